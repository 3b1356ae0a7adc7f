from __future__ import annotations

import pytest
import torch

from tests.reference_cases import F64, rows
from tests.tolerances import VALUE, assert_close
from vocabdistil.reference import average_losses, ensemble_distribution, layer_map, layer_mean


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("last", 3, 12), [((3,), (12,))]),
        (("skip", 3, 12), [((1,), (4,)), ((2,), (8,)), ((3,), (12,))]),
        (("skip", 2, 12, 2), [((1,), (2,)), ((2,), (4,))]),
        (("average", 2, 12), [((1,), (1, 2, 3, 4, 5, 6)), ((2,), (7, 8, 9, 10, 11, 12))]),
        (("average", 3, 7, 2), [((1,), (1, 2)), ((2,), (3, 4)), ((3,), (5, 6))]),
        (("average_all", 2, 3), [((1, 2), (1, 2, 3))]),
        (("weighted", 2, 3), [((1, 2), (1, 2, 3))]),
        (([(0, 0), ((1, 2), [5, 6])], 2, 6), [((0,), (0,)), ((1, 2), (5, 6))]),
    ],
)
def test_layer_maps(arguments, expected):
    assert layer_map(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("first", 3, 12), ValueError, "kind: expected one of 'last'"),
        (("skip", 5, 12), ValueError, "k: expected a step, as 12 teacher layers do not divide by 5"),
        (("average", 3, 12, 5), ValueError, "k: expected a step from 1 to 4"),
        (("last", 3, 12, 2), ValueError, "k: expected None with kind 'last'"),
        (("last", 0, 12), ValueError, "student_layers: expected at least 1"),
        (("last", 3, 1.5), TypeError, "teacher_layers: expected an integer"),
        (([(4, 1)], 3, 12), ValueError, r"kind\[0\]: expected student layers from 0 to 3, got 4"),
        (([(1, ())], 3, 12), ValueError, r"kind\[0\]: expected at least one teacher layer"),
        (([1], 3, 12), TypeError, r"kind\[0\]: expected \(student layers, teacher layers\)"),
        (([], 3, 12), ValueError, "kind: expected at least one assignment"),
    ],
)
def test_layer_map_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        layer_map(*arguments)


def test_layer_mean():
    layers = [rows(6, 4, seed=s).view(2, 3, 4) for s in range(3)]
    stacked = torch.stack(layers)
    assert_close(layer_mean(layers), stacked.mean(0), VALUE, F64)
    weights = torch.tensor([1.0, 0.0, 3.0], dtype=F64)
    expected = (stacked * weights[:, None, None, None]).sum(0) / 4
    assert_close(layer_mean(layers, weights), expected, VALUE, F64)
    assert_close(layer_mean(layers, [1, 0, 3]), expected, VALUE, F64)
    assert torch.equal(layer_mean(layers[:1]), layers[0])
    half = layer_mean([x.bfloat16() for x in layers])
    assert half.dtype == torch.bfloat16 and half.shape == (2, 3, 4)


def test_layer_mean_gradcheck():
    layers = [rows(2, 3, seed=s, grad=True) for s in range(2)]
    weights = torch.tensor([0.4, 1.1], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b, w: layer_mean([a, b], w), (*layers, weights))


def test_average_losses():
    losses = [torch.tensor(v, dtype=F64, requires_grad=True) for v in (1.0, 4.0)]
    assert average_losses(losses).item() == 2.5
    weighted = average_losses(losses, [3, 1])
    weighted.backward()
    assert weighted.item() == 1.75 and [x.grad.item() for x in losses] == [0.75, 0.25]


def test_ensemble_distribution():
    logits = [
        torch.tensor([[0.75, 0.25]], dtype=F64).log(),
        torch.tensor([[0.25, 0.75]], dtype=F64).log() + 9,
    ]
    half = torch.full((1, 2), 0.5, dtype=F64)
    assert_close(ensemble_distribution(logits), half, VALUE, F64)
    first = ensemble_distribution(logits, weights=[1, 0])
    assert_close(first, torch.tensor([[0.75, 0.25]], dtype=F64), VALUE, F64)
    assert_close(
        ensemble_distribution(logits, [1, 0], temperature=1e6), half.expand(1, 2), {F64: (1e-5, 1e-5)}, F64
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: average_losses([]), ValueError, "losses: expected at least one teacher"),
        (lambda: average_losses(torch.ones(2)), TypeError, "losses: expected a list of tensors"),
        (lambda: average_losses([torch.ones(1)], [1, 2]), ValueError, "weights: expected one per teacher"),
        (lambda: average_losses([torch.ones(1)], [0]), ValueError, "weights: expected finite numbers >= 0"),
        (
            lambda: ensemble_distribution([rows(2, 3), rows(2, 4)]),
            ValueError,
            r"logits\[1\]: expected shape \(2, 3\)",
        ),
        (lambda: layer_mean([]), ValueError, "layers: expected at least one layer"),
        (lambda: layer_mean([rows(2, 3)] * 2, [1]), ValueError, "weights: expected one weight per layer"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
