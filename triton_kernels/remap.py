"""The remap table in Triton: a program takes a chunk of one sequence, scans its row lengths and writes its pieces.

Bytes, per teacher token: 8 (id, int64) + 8 (mask, if there is one) + 16 (pair), and 16 (id and mask) per student token
of the padded result; the table, 8 to 12 bytes of it per token, stays in the L2 cache. Launches: one for sequences of
up to LONGEST tokens and a given width, another that measures the chunks for longer ones or where the width is asked
for, and a small sum. Adjacent lanes take adjacent tokens (``length`` is not specialised, which would give a lane
several), so that the stores of their pieces meet in the same sectors.

Nothing is atomic, and no id outside the table is ever used as an index: it is the unknown token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vocabdistil.core.native import remap_results, remap_totals

from .rows import on_device

LONGEST = 2048  # tokens of a chunk at most


@triton.jit
def look_up(ids, mask, indptr, b, at, length, ids_stride, mask_stride, rows):
    """Of the tokens ``at [BLOCK]`` of sequence b: whether each is kept and in the table, where its row begins, and how
    long that is (1 for an id outside the table, 0 for a token left out)."""
    keep = at < length
    token = tl.load(ids + b * ids_stride + at, mask=keep, other=0).to(tl.int64)
    if mask is not None:
        keep = keep & (tl.load(mask + b * mask_stride + at, mask=keep, other=0) != 0)
    known = (token >= 0) & (token < rows)
    row = tl.where(known, token, 0)
    first = tl.load(indptr + row, mask=keep & known, other=0)
    last = tl.load(indptr + row + 1, mask=keep & known, other=0)
    count = tl.where(known, last - first, 1)
    return keep, known, first, tl.where(keep, count, 0)


@triton.jit(do_not_specialize=["length", "chunks", "rows", "size"])
def measure_kernel(
    ids, mask, indptr, out, length, ids_stride, mask_stride, chunks, rows, size, BLOCK: tl.constexpr
):
    # ids: int32 or int64 [batch, length], mask: any integers of that shape or None, columns adjacent; indptr: int32
    # [rows + 1]. out: int32 [4, batch, chunks]: pieces, tokens that are kept, those with pieces, those of no row.
    pid = tl.program_id(0).to(tl.int64)
    at = (pid % chunks) * BLOCK + tl.arange(0, BLOCK)
    keep, known, _, count = look_up(ids, mask, indptr, pid // chunks, at, length, ids_stride, mask_stride, rows)
    row = pid * 0 + size  # int64, as addresses are
    tl.store(out + pid, tl.sum(count, 0))
    tl.store(out + row + pid, tl.sum(keep.to(tl.int32), 0))
    tl.store(out + 2 * row + pid, tl.sum((count > 0).to(tl.int32), 0))
    tl.store(out + 3 * row + pid, tl.sum((keep & (known == 0)).to(tl.int32), 0))


@triton.jit
def fill(out, start, stop, value, BLOCK: tl.constexpr):
    for block in range(start, stop, BLOCK):
        at = block + tl.arange(0, BLOCK)
        tl.store(out + at, tl.full([BLOCK], 1, tl.int64) * value, mask=at < stop)


@triton.jit(do_not_specialize=["length", "chunks", "rows", "width", "pairs", "unk_id", "pad_id"])
def write_kernel(
    ids, mask, indptr, pieces, measured, first_pair, input_ids, attention, spans, nonempty, length, ids_stride,
    mask_stride, chunks, rows, width, pairs, unk_id, pad_id, BLOCK: tl.constexpr,
):  # fmt: skip
    # ids, mask, indptr: as in measure_kernel, measured its out or None; pieces: int32 [nnz]; first_pair: int64 [batch *
    # chunks] or None. input_ids, attention: int64 [batch, width]; spans: int32 [4, pairs]; nonempty: int32 [batch *
    # chunks].
    pid = tl.program_id(0).to(tl.int64)
    b, chunk = pid // chunks, pid % chunks
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    keep, known, first, count = look_up(ids, mask, indptr, b, at, length, ids_stride, mask_stride, rows)
    within = tl.cumsum(count, 0).to(tl.int64)
    own = tl.sum(count, 0).to(tl.int64)
    before, total = own * 0, own
    if measured is not None:
        total = own * 0
        for block in range(0, chunks, BLOCK):
            other = block + tl.arange(0, BLOCK)
            tokens = tl.load(measured + b * chunks + other, mask=other < chunks, other=0).to(tl.int64)
            total += tl.sum(tokens, 0)
            before += tl.sum(tl.where(other < chunk, tokens, 0), 0)
    end = before + within
    start = tl.minimum(end - count, width)
    # Ends ascend, so whatever follows a token that does not fit does not fit either.
    keep = keep & (end <= width)
    count = tl.where(keep, count, 0)
    tl.store(nonempty + pid, tl.sum((count > 0).to(tl.int32), 0))

    if first_pair is not None:
        kept = keep.to(tl.int32)
        pair, there = tl.load(first_pair + pid) + tl.cumsum(kept, 0) - kept, keep
    else:
        pair, there = b * length + at, at < length
    student, teacher, row = b * width + start, b * length + at, pid * 0 + pairs
    tl.store(spans + pair, student.to(tl.int32), mask=there)
    tl.store(spans + row + pair, (student + count).to(tl.int32), mask=there)
    tl.store(spans + 2 * row + pair, teacher.to(tl.int32), mask=there)
    tl.store(spans + 3 * row + pair, (teacher + keep.to(tl.int32)).to(tl.int32), mask=there)

    out, seen = input_ids + b * width, attention + b * width
    for k in range(0, tl.max(count, 0)):
        piece = tl.load(pieces + first + k, mask=(k < count) & known, other=0)
        piece = tl.where(known, piece, unk_id)
        tl.store(out + start + k, piece.to(tl.int64), mask=k < count)
    here = tl.minimum(before, width)
    stop = here + tl.sum(count, 0)
    fill(seen, here, stop, 1, BLOCK)
    # What is left of the row: a share for each chunk, or what the first chunk that does not fit leaves.
    share = tl.cdiv(tl.maximum(width - total, 0), chunks)
    pad, pad_stop = tl.minimum(total + chunk * share, width), tl.minimum(total + (chunk + 1) * share, width)
    cut = (before <= width) & (before + own > width)
    pad, pad_stop = tl.where(cut, stop, pad), tl.where(cut, width, pad_stop)
    fill(out, pad, pad_stop, pad_id, BLOCK)
    fill(seen, pad, pad_stop, 0, BLOCK)


def _chunks(ids: Tensor) -> tuple[int, dict[str, int]]:
    """Chunks of a sequence, and how a kernel takes them."""
    block = min(max(triton.next_power_of_2(ids.shape[1]), 128), LONGEST)
    return max(triton.cdiv(ids.shape[1], block), 1), {
        "BLOCK": block,
        "num_warps": block // 128,
        "enable_fp_fusion": True,
    }


def _inputs(ids: Tensor, mask: Tensor | None, indptr: Tensor) -> tuple:
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    return ids, mask, indptr


def _strides(ids: Tensor, mask: Tensor | None) -> tuple[int, int]:
    return ids.stride(0), 0 if mask is None else mask.stride(0)


def measure(ids: Tensor, mask: Tensor | None, indptr: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`vocabdistil.reference.remap.measure`, on columns that are adjacent."""
    chunks, options = _chunks(ids)
    batch = ids.shape[0]
    found = torch.empty(4, batch, chunks, dtype=torch.int32, device=ids.device)
    if batch:
        with on_device(ids):
            measure_kernel[(batch * chunks,)](
                *_inputs(ids, mask, indptr), found, ids.shape[1], *_strides(ids, mask), chunks, indptr.numel() - 1,
                batch * chunks, **options,
            )  # fmt: skip
    return remap_totals(found), found


def remap(
    ids: Tensor, mask: Tensor | None, indptr: Tensor, pieces: Tensor, unk_id: int, pad_id: int, width: int,
    measured: Tensor | None = None, pairs: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As :func:`vocabdistil.reference.remap.remap`, on columns that are adjacent."""
    (batch, length), (chunks, options) = ids.shape, _chunks(ids)
    first_pair = None
    if pairs is not None:
        kept = measured[1].flatten()
        first_pair = kept.cumsum(0) - kept
    elif chunks > 1:
        measured = measure(ids, mask, indptr)[1]
    count = batch * length if pairs is None else pairs
    out = remap_results(ids, width, count, chunks)
    if batch:
        with on_device(ids):
            write_kernel[(batch * chunks,)](
                *_inputs(ids, mask, indptr), pieces, measured, first_pair, *out, length, *_strides(ids, mask), chunks,
                indptr.numel() - 1, width, count, unk_id, pad_id, **options,
            )  # fmt: skip
    return *out[:3], out[3].sum()
