"""Span averaging in Triton: one program per pair, looping over blocks of the hidden dimension.

Every load is widened before arithmetic (the interpreter computes bfloat16 wrongly otherwise), addresses are int64,
spans are clamped to the rows, and nothing is atomic: a token lies in at most one span.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _clamp(position, rows):
    return tl.minimum(tl.maximum(position.to(tl.int64), 0), rows)


@triton.jit
def fwd_kernel(
    x, start, end, out, rows, row_stride, dim, MEAN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    first, last = _clamp(tl.load(start + p), rows), _clamp(tl.load(end + p), rows)
    share = 1.0
    if MEAN:
        share = 1.0 / tl.maximum(last - first, 1).to(ACC)
    for block in range(0, dim, BLOCK):
        d = block + tl.arange(0, BLOCK)
        inside = d < dim
        total = tl.zeros([BLOCK], dtype=ACC)
        for i in range(first, last):
            total += tl.load(x + i * row_stride + d, mask=inside, other=0.0).to(ACC)
        tl.store(out + p * dim + d, (total * share).to(out.dtype.element_ty), mask=inside)


@triton.jit
def bwd_kernel(
    grad, start, end, out, pairs, rows, grad_stride, dim, MEAN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The program of pair p also clears the rows between the span before and its own, the last one the tail."""
    p = tl.program_id(0).to(tl.int64)
    first, last = _clamp(tl.load(start + p), rows), _clamp(tl.load(end + p), rows)
    begin = _clamp(tl.load(end + p - 1, mask=p > 0, other=0), rows)
    stop = last
    if p + 1 == pairs:
        stop = stop * 0 + rows
    share = 1.0
    if MEAN:
        share = 1.0 / tl.maximum(last - first, 1).to(ACC)
    for block in range(0, dim, BLOCK):
        d = block + tl.arange(0, BLOCK)
        inside = d < dim
        value = tl.load(grad + p * grad_stride + d, mask=inside, other=0.0).to(ACC) * share
        for i in range(begin, stop):
            kept = tl.where((i >= first) & (i < last), value, 0.0)
            tl.store(out + i * dim + d, kept.to(out.dtype.element_ty), mask=inside)


def _options(dtype: torch.dtype, dim: int) -> dict[str, object]:
    return {
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "BLOCK": min(triton.next_power_of_2(dim), 1024),
    }


def span_mean_fwd(x: Tensor, start: Tensor, end: Tensor, mean: bool) -> Tensor:
    """x ``[N, D]`` (unit column stride), int32 spans ``[P]`` -> ``[P, D]`` in the dtype of x."""
    out = x.new_empty(start.shape[0], x.shape[1])
    if out.numel():
        options = _options(x.dtype, x.shape[1])
        fwd_kernel[(start.shape[0],)](x, start, end, out, x.shape[0], x.stride(0), x.shape[1], MEAN=mean, **options)
    return out


def span_mean_bwd(grad: Tensor, start: Tensor, end: Tensor, rows: int, mean: bool) -> Tensor:
    """grad ``[P, D]`` (unit column stride), int32 spans ``[P]`` -> the gradient ``[rows, D]``, every row written."""
    pairs, dim = grad.shape
    if not pairs:
        return grad.new_zeros(rows, dim)
    out = grad.new_empty(rows, dim)
    if out.numel():
        options = _options(grad.dtype, dim)
        bwd_kernel[(pairs,)](grad, start, end, out, pairs, rows, grad.stride(0), dim, MEAN=mean, **options)
    return out
