from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference_cases import F64, mixed_pairs, rows, spans
from tests.tolerances import VALUE, assert_close
from vocabdistil.reference import span_mean


def naive(x, start, end, pooling):
    out = []
    for a, b in spans(start, end):
        total = x[a:b].sum(0)
        out.append(total / (b - a) if pooling == "mean" and b > a else total)
    return torch.stack(out) if out else x.new_zeros(0, x.shape[1])


def test_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, -1.0], [9.0, 9.0]])
    start, end = torch.tensor([0, 2, 2]), torch.tensor([2, 2, 3])
    assert span_mean(x, start, end).tolist() == [[2.0, 4.0], [0.0, 0.0], [5.0, -1.0]]
    assert span_mean(x, start, end, "sum").tolist() == [[4.0, 8.0], [0.0, 0.0], [5.0, -1.0]]
    assert torch.equal(span_mean(x.view(2, 2, 2), start, end), span_mean(x, start, end))


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=12),
    st.integers(0, 3),
    st.integers(0, 5),
)
def test_equals_a_loop(gaps_and_lengths, tail, width):
    start, end, at = [], [], 0
    for gap, length in gaps_and_lengths:
        start.append(at + gap)
        at += gap + length
        end.append(at)
    start, end = (torch.tensor(v, dtype=torch.int32) for v in (start, end))
    x = rows(at + tail, width)
    for pooling in ("mean", "sum"):
        assert_close(span_mean(x, start, end, pooling), naive(x, start, end, pooling), VALUE, F64)


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_gradcheck(pooling):
    pairs = mixed_pairs()
    x = rows(7, 3, grad=True)
    assert torch.autograd.gradcheck(
        lambda v: span_mean(v, pairs.student_start, pairs.student_end, pooling), x
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    start, end = torch.tensor([0, 3]), torch.tensor([3, 400])
    x = rows(400, 5, dtype=dtype)
    out = span_mean(x, start, end)
    assert out.dtype == dtype
    assert_close(out, span_mean(x.double(), start, end), VALUE, dtype)


def test_half_is_accumulated_in_float32():
    # In bfloat16, 256 + 1 = 256: a sum of 512 ones would stop there.
    x = torch.ones(512, 1, dtype=torch.bfloat16)
    assert span_mean(x, torch.tensor([0]), torch.tensor([512]), "sum").item() == 512


def test_nan_outside_the_spans_reaches_nothing():
    x = rows(4, 2)
    x[[0, 3]] = float("nan")
    x.requires_grad_()
    out = span_mean(x, torch.tensor([1, 3]), torch.tensor([3, 3]))
    assert out.isfinite().all()
    out.sum().backward()
    assert x.grad[[0, 3]].eq(0).all() and x.grad[1:3].eq(0.5).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]], [0], [1]), TypeError, "x: expected a tensor"),
        ((torch.ones(3, 2, dtype=torch.int64), [0], [1]), TypeError, "x: expected float32"),
        ((torch.ones(3), [0], [1]), ValueError, "x: expected 2 or 3 dimensions"),
        ((torch.ones(3, 2), [0.0], [1]), TypeError, "start: expected int32 or int64"),
        ((torch.ones(3, 2), [0], [1, 2]), ValueError, "end: expected as many"),
        ((torch.ones(3, 2), [0], [4]), ValueError, "end: expected positions up to 3, got 4"),
        ((torch.ones(3, 2), [0, 1], [2, 3]), ValueError, "do not overlap"),
        ((torch.ones(3, 2), [-1], [2]), ValueError, "start: expected positions >= 0"),
        (
            (torch.ones(3, 2), [0], [1], "max"),
            ValueError,
            "pooling: expected one of 'mean', 'sum', got 'max'",
        ),
    ],
)
def test_errors(arguments, error, message):
    x, start, end, *rest = arguments
    with pytest.raises(error, match=message) as caught:
        span_mean(x, torch.tensor(start), torch.tensor(end), *rest)
    assert "\n" not in str(caught.value)
