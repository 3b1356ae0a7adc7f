"""The Triton span_mean kernels in the interpreter against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from vocabdistil.triton_kernels import span_mean as kernels

import vocabdistil as vd
from tests.spans import make_pairs
from tests.tolerances import assert_norm_close


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


def test_no_row_is_left_unwritten_and_none_outside_is_touched():
    start, end = torch.tensor([1, 4], dtype=torch.int32), torch.tensor([2, 900], dtype=torch.int32)  # past the end
    x = torch.randn(6, 3)
    out = kernels.span_mean_fwd(x, start, end, True)
    torch.testing.assert_close(out, torch.stack([x[1], x[4:].mean(0)]))
    grad = kernels.span_mean_bwd(torch.ones(2, 3), start, end, 6, False)
    assert grad[:, 0].tolist() == [0, 1, 0, 0, 1, 1]


def test_strides_and_zero_pairs():
    x = torch.randn(5, 8)[:, :3]
    start = torch.tensor([0], dtype=torch.int32)
    torch.testing.assert_close(kernels.span_mean_fwd(x, start, start + 2, True)[0], x[:2].mean(0))
    assert kernels.span_mean_bwd(torch.ones(0, 3), start[:0], start[:0], 5, True).abs().sum() == 0
