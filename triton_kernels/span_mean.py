"""Span averaging in Triton: a program takes the tile of a few pairs, looping over blocks of the hidden dimension."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import (
    add_rest,
    address_table,
    aligned,
    first_row,
    on_device,
    one_stride,
    span,
    span_share,
    store_rows,
    tile,
    written_rows,
)  # fmt: skip


@triton.jit(do_not_specialize=["pairs", "rows"])  # they differ from batch to batch
def fwd_kernel(
    x, x_table, coef, start, end, out, pairs, rows, row_stride, dim,
    LAYERS: tl.constexpr, ALIGNED: tl.constexpr, MEAN: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # x: one layer [rows, dim], columns adjacent; x_table: int64 [LAYERS], the addresses of all, None for one. coef:
    # [LAYERS] or None (1 / LAYERS); start, end: int32 [pairs]; out: [pairs, dim], contiguous.
    p = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first, last = span(start, end, p, pairs, rows)
    share = span_share(first, last, MEAN, ACC)
    for block in range(0, dim, BLOCK):
        d = block + tl.arange(0, BLOCK)
        inside = d < dim
        total = first_row(x, x_table, coef, row_stride, first, last, d, inside, share, LAYERS, ALIGNED, ACC)
        total = add_rest(total, x, x_table, coef, row_stride, first, last, d, inside, share, LAYERS, ALIGNED, ACC)
        mask = (p < pairs)[:, None] & inside[None, :]
        tl.store(out + p[:, None] * dim + d[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pairs", "rows"])
def bwd_kernel(
    grad, start, end, out, out_table, coef, pairs, rows, grad_stride, dim,
    LAYERS: tl.constexpr, ALIGNED: tl.constexpr, MEAN: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # grad: [pairs, dim], columns adjacent; start, end: int32 [pairs]; coef: [LAYERS] or None (1 / LAYERS). out:
    # one layer [rows, dim], contiguous; out_table: int64 [LAYERS], the addresses of all, None for one.
    p = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first, last = span(start, end, p, pairs, rows)
    begin, stop = written_rows(end, p, pairs, first, last, rows)
    share = span_share(first, last, MEAN, ACC)
    for block in range(0, dim, BLOCK):
        d = block + tl.arange(0, BLOCK)
        inside = d < dim
        mask = (p < pairs)[:, None] & inside[None, :]
        value = tl.load(grad + p[:, None] * grad_stride + d[None, :], mask=mask, other=0.0).to(ACC) * share[:, None]
        store_rows(value, out, out_table, coef, begin, first, last, stop, dim, d, inside, LAYERS, ALIGNED, ACC)


def _options(x: Tensor) -> dict[str, object]:
    return {"ACC": tl.float64 if x.dtype == torch.float64 else tl.float32, **tile(x.shape[1], 4096)}


def span_mean_fwd(
    x: Sequence[Tensor], start: Tensor, end: Tensor, coef: Tensor | None, mean: bool, out: Tensor
) -> None:
    """x: layers ``[N, D]`` (unit column stride); int32 spans ``[P]``; coef ``[n]`` or None (1/n); out: ``[P, D]``."""
    if not out.numel():
        return
    x, options = one_stride(x), _options(x[0])
    with on_device(out):
        fwd_kernel[(triton.cdiv(out.shape[0], options["ROWS"]),)](
            x[0], address_table(x), coef, start, end, out, out.shape[0], x[0].shape[0], x[0].stride(0), x[0].shape[1],
            LAYERS=len(x), ALIGNED=aligned(*x), MEAN=mean, **options,
        )  # fmt: skip


def span_mean_bwd(
    grad: Tensor, start: Tensor, end: Tensor, coef: Tensor | None, mean: bool, out: Sequence[Tensor]
) -> None:
    """grad ``[P, D]`` (unit column stride) -> out, the gradients of the layers ``[N, D]``, every row written."""
    pairs, dim = grad.shape
    if not pairs:
        for x in out:
            x.zero_()
    elif out[0].numel():
        options = _options(grad)
        with on_device(grad):
            bwd_kernel[(triton.cdiv(pairs, options["ROWS"]),)](
                grad, start, end, out[0], address_table(out), coef, pairs, out[0].shape[0], grad.stride(0), dim,
                LAYERS=len(out), ALIGNED=aligned(*out), MEAN=mean, **options,
            )  # fmt: skip
