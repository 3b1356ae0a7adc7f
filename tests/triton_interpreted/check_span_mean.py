"""The Triton span_mean kernels in the interpreter against the float64 reference."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd
from tests.spans import make_pairs
from tests.tolerances import assert_norm_close
from vocabdistil.ops.span_mean import pooled_rows
from vocabdistil.triton_kernels import span_mean as kernels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [1, 7, 264])
@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_against_float64(dim, dtype, pooling):
    pairs, n, _ = make_pairs(9, seed=dim, gaps=True, empty=True)
    start, end = pairs.student_start, pairs.student_end
    generator = torch.Generator().manual_seed(dim)
    x = torch.randn(n, dim, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(9, dim, generator=generator).to(dtype)
    out = vd.span_mean(x, start, end, pooling=pooling, backend="triton")
    out.backward(upstream)
    wide = x.detach().double().requires_grad_()
    want = vd.reference.span_mean(wide, start, end, pooling=pooling)
    want.backward(upstream.double())
    assert out.dtype == dtype
    factor = 2 if dtype == torch.bfloat16 else 1  # the interpreter cuts a float32 to bfloat16 instead of rounding
    assert_norm_close(out.detach(), want.detach(), dtype, "out", factor)
    assert_norm_close(x.grad, wide.grad, dtype, "gradient", factor)


@pytest.mark.parametrize("learned", [False, True])
def test_layers(learned):
    torch.manual_seed(0)
    pairs, n, _ = make_pairs(9, seed=2, gaps=True, empty=True)
    start, end = pairs.student_start, pairs.student_end
    layers = [torch.randn(n, 10).requires_grad_(), *(torch.randn(n, 20)[:, 5:15].requires_grad_() for _ in range(9))]
    coef = torch.rand(10, dtype=torch.float64).requires_grad_() if learned else None
    upstream = torch.randn(9, 10)
    inputs = [*layers, coef] if learned else layers
    results = [
        torch.autograd.grad(pooled_rows(layers, start, end, coef, True, True, backend), inputs, upstream)
        for backend in ("triton", "cpu")
    ]
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        assert_norm_close(got, want, torch.float32, f"gradient {i}")


def test_half_rows_are_not_rounded_where_the_caller_accumulates():
    pairs, n, _ = make_pairs(9, seed=2)
    x = torch.randn(n, 10).to(torch.float16)
    rows = [pooled_rows([x], pairs.student_start, pairs.student_end, None, True, True, b) for b in ("triton", "cpu")]
    assert rows[0].dtype == torch.float32
    torch.testing.assert_close(*rows)


def forward(x, start, end):
    out = torch.full((len(start), x.shape[1]), float("nan"))
    kernels.span_mean_fwd([x], start, end, None, True, out)
    return out


def test_no_row_is_left_unwritten_and_none_outside_is_touched():
    start, end = torch.tensor([1, 4], dtype=torch.int32), torch.tensor([2, 900], dtype=torch.int32)  # past the end
    x = torch.randn(6, 3)
    torch.testing.assert_close(forward(x, start, end), torch.stack([x[1], x[4:].mean(0)]))
    grad = torch.full((8, 3), float("nan"))
    kernels.span_mean_bwd(torch.ones(2, 3), start, end, None, False, [grad[1:7]])
    assert grad[1:7, 0].tolist() == [0, 1, 0, 0, 1, 1] and grad[[0, 7]].isnan().all()


def test_strides_and_zero_pairs():
    x = torch.randn(5, 8)[:, :3]
    start = torch.tensor([0], dtype=torch.int32)
    torch.testing.assert_close(forward(x, start, start + 2)[0], x[:2].mean(0))
    grad = torch.full((5, 3), float("nan"))
    kernels.span_mean_bwd(torch.ones(0, 3), start[:0], start[:0], None, True, [grad])
    assert torch.count_nonzero(grad) == 0
