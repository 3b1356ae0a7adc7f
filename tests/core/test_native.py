"""What the compiled module makes of its arguments (csrc/functions.h)."""

from __future__ import annotations

import pytest
import torch

from vocabdistil.core import native


class Meddler:
    """A number that does something to the list it stands in as soon as it is asked for its value."""

    def __init__(self, value, meddle):
        self.value, self.meddle = value, meddle

    def __float__(self):
        self.meddle()
        return self.value


def mean_of(layers, coef):
    start, end, out = torch.tensor([0]).int(), torch.tensor([2]).int(), torch.empty(1, 3)
    native.module().span_mean_fwd(
        native.DTYPE_CODES[torch.float32], [x.data_ptr() for x in layers], [3] * len(layers), coef, 2,
        start.data_ptr(), end.data_ptr(), 1, 3, True, native.DTYPE_CODES[torch.float32], out.data_ptr(), 1,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("change", ["replace", "shorten"])
def test_a_list_that_changes_while_it_is_read_is_read_as_it_was(change):
    coef = [0.5, 0.25, 0.125]
    layers = [torch.full((2, 3), x) for x in (1.0, 2.0, 4.0)]
    meddles = {"replace": lambda: coef.__setitem__(slice(1, None), [9.0, 9.0]), "shorten": coef.clear}
    coef[0] = Meddler(0.5, meddles[change])
    assert mean_of(layers, coef).tolist() == [[1.5] * 3]


def test_what_is_no_list_is_told():
    layers = [torch.ones(2, 3)]
    with pytest.raises(TypeError, match="not iterable"):
        mean_of(layers, 1.0)
