"""Reading averaged rows and writing rows of a gradient in Triton: shared by span_mean and span_loss.

A program holds a tile ``[ROWS, BLOCK]``: ROWS pairs, BLOCK columns. Every load is widened before arithmetic (the
interpreter computes bfloat16 wrongly otherwise), addresses are int64, spans are clamped to the rows, and nothing is
atomic: a token lies in at most one span.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def clamp(position, rows):
    return tl.minimum(tl.maximum(position.to(tl.int64), 0), rows)


@triton.jit
def span(start, end, p, pairs, rows):
    """First and last position of the spans ``p [ROWS]``, empty for a pair past the end."""
    first = clamp(tl.load(start + p, mask=p < pairs, other=0), rows)
    return first, clamp(tl.load(end + p, mask=p < pairs, other=0), rows)


@triton.jit
def written_rows(end, p, pairs, first, last, rows):
    """Rows ``[begin, stop)`` of a gradient that pair p writes: the gap before its span, the span, and for the last
    pair the tail. So every row is written once, and none twice."""
    begin = clamp(tl.load(end + p - 1, mask=(p > 0) & (p < pairs), other=0), rows)
    return begin, tl.where(p + 1 == pairs, rows, last)


@triton.jit
def layer(x, table, l, ALIGNED: tl.constexpr):
    """Address of layer l: x itself where there is one layer, else an entry of the table of addresses."""
    if table is not None:
        x = tl.load(table + l).to(x.dtype)
        if ALIGNED:
            x = tl.multiple_of(x, 16)
    return x


@triton.jit
def layer_coef(coef, l, LAYERS: tl.constexpr, ACC: tl.constexpr):
    if coef is None:
        weight = tl.full([], 1.0 / LAYERS, ACC)
    else:
        weight = tl.load(coef + l).to(ACC)
    return weight


@triton.jit
def load_rows(x, row, last, stride, columns, inside, ACC: tl.constexpr):
    mask = (row < last)[:, None] & inside[None, :]
    return tl.load(x + row[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def first_row(
    x, table, coef, stride, first, last, columns, inside, share,
    LAYERS: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The first token of layer 0, weighted. Apart from the rest, so that both sides' first loads, for most spans the
    only ones, are in flight together."""
    rows = load_rows(layer(x, table, 0, ALIGNED), first, last, stride, columns, inside, ACC)
    return rows * (share * layer_coef(coef, 0, LAYERS, ACC))[:, None]


@triton.jit
def add_rest(
    total, x, table, coef, stride, first, last, columns, inside, share,
    LAYERS: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    longest = tl.max(last - first, 0)
    for l in range(LAYERS):
        source = layer(x, table, l, ALIGNED)
        weight = (share * layer_coef(coef, l, LAYERS, ACC))[:, None]
        begin = 0
        if l == 0:
            begin = 1
        for i in range(begin, longest):
            total += load_rows(source, first + i, last, stride, columns, inside, ACC) * weight
    return total


@triton.jit
def store_rows(
    value, out, table, coef, begin, first, last, stop, dim, columns, inside,
    LAYERS: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Writes ``coef[l] * value`` to the rows of each span and 0 to the others of ``[begin, stop)``, in every layer."""
    longest = tl.max(stop - begin, 0)
    for l in range(LAYERS):
        target = layer(out, table, l, ALIGNED)
        scaled = value * layer_coef(coef, l, LAYERS, ACC)
        for i in range(0, longest):
            row = begin + i
            kept = tl.where(((row >= first) & (row < last))[:, None], scaled, 0.0)
            mask = (row < stop)[:, None] & inside[None, :]
            tl.store(target + row[:, None] * dim + columns[None, :], kept.to(out.dtype.element_ty), mask=mask)


@triton.jit
def to_do(count, upstream, formed):
    """``count``, or 0 where the gradient is there already, formed with this upstream gradient."""
    if formed is not None:
        count = tl.where(tl.load(upstream) == tl.load(formed), 0, count)
    return count


@triton.jit
def span_share(first, last, MEAN: tl.constexpr, ACC: tl.constexpr):
    length = tl.maximum(last - first, 1)
    if not MEAN:
        length = tl.minimum(length, 1)
    return 1.0 / length.to(ACC)


@triton.jit(do_not_specialize=["a0", "a1", "a2", "a3", "a4", "a5", "a6", "a7"])
def table_kernel(out, a0, a1, a2, a3, a4, a5, a6, a7):
    # out: int64 [8]; the others are the addresses themselves.
    tl.store(out, a0)
    tl.store(out + 1, a1)
    tl.store(out + 2, a2)
    tl.store(out + 3, a3)
    tl.store(out + 4, a4)
    tl.store(out + 5, a5)
    tl.store(out + 6, a6)
    tl.store(out + 7, a7)


def address_table(layers: Sequence[Tensor]) -> Tensor | None:
    """int64 addresses of the layers on their device, None for one layer. They travel as kernel arguments: a copy from
    the host would wait for the device, and could not be captured in a CUDA graph."""
    if len(layers) == 1:
        return None
    addresses = [x.data_ptr() for x in layers]
    padded = addresses + addresses[:1] * (-len(addresses) % 8)
    table = torch.empty(len(padded), dtype=torch.int64, device=layers[0].device)
    for i in range(0, len(padded), 8):
        table_kernel[(1,)](table[i:], *padded[i : i + 8], num_warps=1, enable_fp_fusion=True)
    return table


def aligned(*layers: Tensor) -> bool:
    return all(x.data_ptr() % 16 == 0 for x in layers)


def one_stride(layers: Sequence[Tensor]) -> list[Tensor]:
    """The layers with one row stride: a copy of each only where theirs differ."""
    if len({x.stride(0) for x in layers}) == 1:
        return list(layers)
    return [x.contiguous() for x in layers]


def tile(dim: int, widest: int, heavy: bool = False) -> dict[str, int | bool]:
    """Pairs and columns per program, and warps.

    Up to 1024 columns a program is one warp with at most 1024 elements per side, 32 per thread: two sides and a
    temporary stay in registers, reductions are shuffles without a barrier, and 16 to 20 such warps per multiprocessor
    keep about 64 KB of loads in flight, more than the 25 KB that latency times bandwidth asks for. Narrow rows share
    the warp. Wider rows take 16 elements per thread, so that 4096 columns are 8 warps. What is ``heavy``, as it keeps
    more of every element, takes half as many per thread (``python -m benchmarks static --triton`` tells of spills). By
    reasoning, not measured.
    """
    block, share = min(triton.next_power_of_2(dim), widest), 2 if heavy else 1
    warp = 1024 // share
    return {
        "ROWS": max(1, warp // block),
        "BLOCK": block,
        "num_warps": max(1, block // warp) if block <= 1024 else min(block // 512, 16) * share,
        "enable_fp_fusion": True,
    }


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the current device: that of x, unless the interpreter runs them on the host."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
