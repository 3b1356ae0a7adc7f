"""The Triton relation_loss kernels in the interpreter against the float64 reference."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd
from tests.compiling import assert_compiles
from tests.relation_loss_backend import *  # noqa: F403
from tests.relation_loss_backend import make_texts, run, states

# -inf less -inf, and more, in lanes that are masked afterwards: numpy, which plays the GPU here, tells of it.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")


def test_nothing_is_read_that_was_not_written(fresh_memory_holds_nan):
    pairs, shape_s, shape_t = make_texts([70, 9, 20], seed=3, empty=True)
    loss, grad = run(vd, states(shape_s, 12, 1), states(shape_t, 20, 2), pairs, heads=2, backend="triton")
    assert loss.isfinite() and grad.isfinite().all()


def test_labels_that_point_nowhere():
    """Columns beyond the rows are not read, and none is of the text of another label."""
    op = torch.ops.vocabdistil.relation_loss.default
    first = torch.tensor([-90, -90, 1, 1, 2**31 - 2], dtype=torch.int32)
    last = torch.tensor([900, 900, 2**31 - 1, 2, 2**31 - 1], dtype=torch.int32)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    total, loss, grad = op(x, x.flip(0), first, last, torch.ones(5), 2, "triton", True)
    assert total.isfinite() and loss.isfinite().all() and grad.isfinite().all()


def test_compiles_as_one_graph():
    pairs, shape_s, shape_t = make_texts([9, 6], seed=4, empty=True)
    teacher = states(shape_t, 12, 2, torch.bfloat16)

    def loss(s):
        return vd.relation_loss(s * 2, teacher, pairs, heads=2, backend="triton") * 3

    assert_compiles(loss, states(shape_s, 8, 1, torch.bfloat16))


def test_float64_is_refused():
    pairs, shape_s, shape_t = make_texts([3])
    with pytest.raises(ValueError, match="^backend: 'triton' cannot take .*float64 goes through the reference"):
        vd.relation_loss(
            states(shape_s, 4, 1, torch.float64), states(shape_t, 4, 2, torch.float64), pairs, heads=2,
            backend="triton",
        )  # fmt: skip
