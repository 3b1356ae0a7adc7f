"""Between the start and the end of training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vocabdistil.distillation.mixing import SHARES, best_share, kept_share, mix, with_words_left_out


def scalar(value: float) -> nn.Module:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


@pytest.mark.parametrize(("best", "kept"), [(-0.1, 0.0), (0.1, 0.15), (0.3, 0.5), (0.4, 0.7), (0.6, 1.0), (1.0, 1.0)])
def test_the_largest_share_that_is_no_worse_than_the_start(best, kept):
    model = scalar(3.0)
    scored = mix(
        model,
        {"weight": torch.tensor([[1.0]])},
        lambda: -abs(float(model.weight) - (1 + 2 * best)),
        -2 * abs(best),
        kept_share,
    )
    assert tuple(scored) == SHARES and kept_share(scored) == kept
    assert float(model.weight) == pytest.approx(1 + 2 * kept)


@pytest.mark.parametrize("best", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_the_best_share(best):
    model = scalar(3.0)
    start = {"weight": torch.tensor([[1.0]])}
    found = mix(model, start, lambda: -abs(float(model.weight) - (1 + 2 * best)), -2 * best, best_share)
    assert best_share(found) == best and float(model.weight) == pytest.approx(1 + 2 * best)


def test_what_has_no_score_is_not_kept():
    nan = float("nan")
    assert kept_share({0.0: 0.5, 0.5: 0.6, 1.0: nan}) == 0.5
    assert kept_share({0.0: nan, 0.5: 0.6, 1.0: nan}) == 0.5
    assert kept_share({0.0: nan, 0.5: nan, 1.0: nan}) == 0.0


def test_of_equal_ones_the_trained():
    model = scalar(3.0)
    mix(model, {"weight": torch.tensor([[1.0]])}, lambda: 0.5, 0.5, kept_share)
    assert float(model.weight) == 3.0


def test_what_the_start_lacks_stays():
    model = nn.Sequential(scalar(3.0), scalar(5.0))
    mix(model, {"0.weight": torch.tensor([[1.0]])}, lambda: -float(model[0].weight), -1.0, kept_share)
    assert float(model[0].weight) == pytest.approx(1.0) and float(model[1].weight) == 5.0


def test_words_are_left_out_in_order():
    text = "one two three four five six seven eight nine"
    whole, shorter = with_words_left_out([text, "too short"], 0)
    assert whole == [text] * 3
    assert [len(part.split()) for part in shorter] == [8, 7, 6]
    words = text.split()
    for part in shorter:
        rest = iter(words)
        assert all(word in rest for word in part.split())  # a subsequence
    assert with_words_left_out([text], 0) == (whole, shorter) != with_words_left_out([text], 1)
