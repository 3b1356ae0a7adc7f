"""Between the two products of contrastive in Triton: a program takes the scores of one pair with all others, from one
product, to its loss and to what the next products take. Formulas: ``reference/contrastive.py``.

Why not the products, too, as flash attention does: scores that are never written are formed again for the gradient,
once for each block of columns that a program can hold of it, 256 perhaps. Each score then costs 2 D more operations for
each block, in three passes, where writing and reading it and its gradient costs 20 to 32 bytes, mostly in the L2 cache.
By an H200's peaks, 990 Tflop/s in bfloat16 and 5.5 TB/s of that cache, 3.6 ps a score against 4.7 ps at D = 384 and 14
ps at 768, and the vendor's library comes nearer to its peak; only under some 256 columns would it be the other way
round. Of the dozen passes over the scores that torch's operations make one is left, which reads them once where a row
fits a program's registers, and writes the gradient where they stood or as the parts that the next products take. By
reasoning; not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import on_device

RESIDENT = 8192  # columns of a row that a program holds
TURN = 4096  # columns at a time of a longer one


@triton.jit
def _scores(row, valid, left_out, at, own, columns, stride, inverse):
    """Of columns ``at``, over T; -inf where a pair is none of the negatives, and past the end."""
    x = tl.load(row + at, mask=at < stride, other=0.0) * inverse
    counts = at < columns
    if valid is not None:
        counts = counts & (tl.load(valid + at, mask=counts, other=0) != 0)
    if left_out is not None:
        counts = counts & (tl.load(left_out + at, mask=at < stride, other=0) == 0)
    return tl.where(counts | (at == own), x, float("-inf"))


@triton.jit
def _write(slopes, at, own, stride, x, top, by, factor, SPLIT: tl.constexpr):
    slope = tl.exp(x - top) * by - tl.where(at == own, factor, 0.0)
    inside = at < stride
    if SPLIT:
        part = slopes.dtype.element_ty
        if part == tl.bfloat16:
            high = slope.to(part).to(tl.float32)
        else:  # rounded to a TF32 value
            high = ((slope.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
        tl.store(slopes + at, high.to(part), mask=inside)
        tl.store(slopes + stride + at, (slope - high).to(part), mask=inside)
        tl.store(slopes + 2 * stride + at, high.to(part), mask=inside)
    else:
        tl.store(slopes + at, slope, mask=inside)


@triton.jit(do_not_specialize=["first", "columns"])
def kernel(
    scores, valid, left_out, scale, loss, slopes, first, columns, stride, inverse,
    SPLIT: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # scores: float32 [R, stride], of which `columns` are pairs, the others 0; valid: [columns] or None, left_out: [R,
    # stride] or None, of bytes; scale, loss: [R]; slopes: [R, 3, stride] if SPLIT, else the scores, or None.
    r = tl.program_id(0).to(tl.int64)
    row, own = scores + r * stride, first + tl.program_id(0)
    if left_out is not None:
        left_out += r * stride
    positive = tl.load(row + own) * inverse
    if WHOLE:
        at = tl.arange(0, BLOCK)
        x = _scores(row, valid, left_out, at, own, columns, stride, inverse)
        top = tl.max(x, 0)
        total = tl.sum(tl.exp(x - top), 0)
    else:
        top, total = positive, positive * 0
        for begin in range(0, columns, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            x = _scores(row, valid, left_out, at, own, columns, stride, inverse)
            higher = tl.maximum(top, tl.max(x, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
            top = higher
    tl.store(loss + r, (top - positive) + tl.log(total))
    if slopes is not None:
        factor = tl.load(scale + r) * inverse
        by = tl.div_rn(factor, total)
        slopes += r * stride * (3 if SPLIT else 1)
        if WHOLE:
            _write(slopes, at, own, stride, x, top, by, factor, SPLIT)
        else:
            for begin in range(0, stride, BLOCK):
                at = begin + tl.arange(0, BLOCK)
                x = _scores(row, valid, left_out, at, own, columns, stride, inverse)
                _write(slopes, at, own, stride, x, top, by, factor, SPLIT)


def tile(columns: int) -> dict[str, int | bool]:
    """The columns of a row at a time, so that a thread has 16."""
    whole = columns <= RESIDENT
    block = max(triton.next_power_of_2(columns), 512) if whole else TURN
    return {"WHOLE": whole, "BLOCK": block, "num_warps": max(block // 512, 1), "enable_fp_fusion": True}


def softmax(
    scores: Tensor, first: int, count: int, valid: Tensor | None, left_out: Tensor | None, scale: Tensor,
    temperature: float, loss: Tensor, slopes: Tensor | None,
) -> None:  # fmt: skip
    """Of pairs ``first`` and so on, scores ``[R, n]`` with all ``count`` pairs, n a multiple of 16: writes their
    losses, and ``scale`` times their gradients for the scores.

    Args:
        scores: float32, contiguous.
        valid: bool ``[count]``, or None for all; left_out: bool ``[R, n]``, or None for none. A pair itself always
            counts.
        scale, loss: ``[R]``.
        slopes: ``[R, 1, n]``, the scores themselves; or ``[R, 3, n]``, left parts (``vocabdistil/ops/_products.py``) in
            bfloat16 or, of TF32 values, float32; None: not wanted.
    """
    rows, stride = scores.shape
    split = slopes is not None and slopes.shape[1] == 3
    with on_device(scores):
        kernel[(rows,)](
            scores, *(None if x is None else x.view(torch.uint8) for x in (valid, left_out)), scale, loss, slopes,
            first, count, stride, 1 / temperature, SPLIT=split, **tile(count),
        )  # fmt: skip
