"""KL through the remap table in Triton.

Both ways through the table are products of a sparse matrix with dense rows, so 32 pairs are taken side by side: their
logits are laid out ``[column, pair]``, and each id of the table is read once for all of them and fetches 128 bytes.
Rows of the table, and the lists of the transposed one, stand in slices of 32 of nearly one length, interleaved: no lane
waits for another's long row. A list of a frequent piece is cut into segments that are added up in a fixed order, so
nothing is atomic. Only chunks of pairs have their combined logits in memory.
Formulas: vocabdistil/reference/remapped_kl.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .matched_kl import accumulator, temperature_argument, weighted_total
from .rows import clamp, on_device, span_share, to_do
from .softmax import CLOSE, close_step, log_one_plus, online, online_two, quotient, shift_of, temperature_of

BUDGET = 256 << 20  # bytes for the logits of a chunk of pairs, combined and not, and their gradients
PAIRS = 32  # side by side
SLICE = 32  # rows of the table, or segments, side by side
WINDOW = 128  # rows of the table that are sorted by length: the teacher's columns that they read are still in L1
PARTS = 128  # at most as many programs share the columns of 32 pairs
SEGMENT = 64  # pieces of a segment at least


class GatherPlan(NamedTuple):
    """A table as the kernels read it; all int32.

    Row o, in the order of the slices, is the teacher's column ``rows[o]`` (-1: none); its k-th piece stands at
    ``pieces_at[o // 32] + 32 k + o % 32`` of ``pieces`` (-1: none). Segment o lists, laid out alike in ``uses_at`` and
    ``uses``, rows that hold the piece ``owners[o]``; the segments of piece j are ``segments[of[j]:of[j + 1]]``.
    """

    rows: Tensor
    pieces_at: Tensor
    pieces: Tensor
    uses_at: Tensor
    uses: Tensor
    owners: Tensor
    of: Tensor
    segments: Tensor


def _starts(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _lists(begin: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each element of the lists: which list, which element of it, and its index ``begin[list] + element``."""
    owner = torch.repeat_interleave(torch.arange(lengths.numel()), lengths)
    element = torch.arange(owner.numel()) - _starts(lengths)[owner]
    return owner, element, begin[owner] + element


def _sliced(begin: Tensor, lengths: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The lists ``values[begin[o]:][:lengths[o]]`` in interleaved slices: where each slice starts, and the slices."""
    count = -(-lengths.numel() // SLICE)
    longest = torch.nn.functional.pad(lengths, (0, count * SLICE - lengths.numel())).view(count, SLICE).amax(1)
    at = _starts(SLICE * longest)
    owner, element, source = _lists(begin, lengths)
    out = torch.full((int(at[-1]),), -1)
    out[at[owner // SLICE] + SLICE * element + owner % SLICE] = values[source]
    return at, out


def make_gather_plan(indptr: Tensor, ids: Tensor, student_columns: int) -> GatherPlan:
    """From a checked table on the CPU."""
    indptr, ids = indptr.to(torch.int64), ids.to(torch.int64)
    lengths = indptr.diff()
    mapped = lengths.nonzero()[:, 0]
    window = torch.arange(mapped.numel()) // WINDOW
    order = mapped[(window * (ids.numel() + 1) + lengths[mapped]).argsort(stable=True)]
    rows = torch.full((-(-order.numel() // SLICE) * SLICE,), -1)
    rows[: order.numel()] = order
    pieces_at, pieces = _sliced(indptr[order], lengths[order], ids)

    row, _, source = _lists(indptr[order], lengths[order])
    piece = ids[source]
    uses = row[piece.argsort(stable=True)]
    counts = piece.bincount(minlength=student_columns)
    longest = max(SEGMENT, math.isqrt(int(counts.max())))
    parts = -(-counts // longest)
    owner, part, _ = _lists(torch.zeros_like(parts), parts)
    sizes = (counts[owner] - part * longest).clamp(max=longest)
    by_size = sizes.argsort(descending=True, stable=True)
    begin = _starts(counts)[owner] + part * longest
    uses_at, uses = _sliced(begin[by_size], sizes[by_size], uses)
    owners = torch.full((-(-owner.numel() // SLICE) * SLICE,), -1)
    owners[: owner.numel()] = owner[by_size]
    plan = rows, pieces_at, pieces, uses_at, uses, owners, _starts(parts), by_size.argsort()
    return GatherPlan(*(x.to(torch.int32) for x in plan))


@triton.jit
def _pairs_of(start, end, p, pairs, rows):
    """First and last row of the pairs ``p``: empty past the end."""
    if start is None:
        first = tl.minimum(p, pairs)
        last = tl.minimum(p + 1, pairs)
    else:
        first = clamp(tl.load(start + p, mask=p < pairs, other=0), rows)
        last = clamp(tl.load(end + p, mask=p < pairs, other=0), rows)
    return first, last


@triton.jit
def _mean(x, first, last, stride, columns, inside, ACC: tl.constexpr, SPANS: tl.constexpr):
    """``[columns, pairs]``: the mean over each pair's rows, read along the columns."""
    total = tl.load(
        x + first[None, :] * stride + columns[:, None], mask=inside[:, None] & (first < last)[None, :], other=0.0
    ).to(ACC)
    if SPANS:
        for i in range(1, tl.max(last - first, 0)):
            mask = inside[:, None] & (first + i < last)[None, :]
            total += tl.load(x + (first + i)[None, :] * stride + columns[:, None], mask=mask, other=0.0).to(ACC)
        total *= span_share(first, last, True, ACC)[None, :]
    return total


@triton.jit(do_not_specialize=["p0", "pairs", "rows"])
def pool_kernel(
    student, start, end, out, upstream, formed, p0, pairs, rows, stride, columns, ACC: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Means of the student's logits -> ``out [groups, columns, PAIRS]``."""
    # student: [rows, columns], columns adjacent; start, end: int32 [pairs] or None (row p with row p); upstream,
    # formed: [] or None.
    group = tl.program_id(1).to(tl.int64)
    r = tl.arange(0, PAIRS)
    first, last = _pairs_of(start, end, p0 + group * PAIRS + r, pairs, rows)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = d < to_do(columns, upstream, formed)
    value = _mean(student, first, last, stride, d, inside, ACC, start is not None)
    at = (group * columns + d[:, None]) * PAIRS + r[None, :]
    tl.store(out + at, value, mask=inside[:, None])


@triton.jit(do_not_specialize=["p0", "pairs", "rows"])
def combine_kernel(
    pooled, teacher, start, end, row_ids, pieces_at, pieces, z, stats, upstream, formed, temperature, p0, pairs, rows,
    stride, columns, slices, per, parts, LOGSUMEXP: tl.constexpr, ACC: tl.constexpr, PAIRS: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    """Combined logits -> ``z [groups, 32 slices, PAIRS]``; largest and sum of exp of both sides over the columns of a
    program, sum of exp(t) (t - s - apart) / T, and apart -> ``stats [6, groups, parts, PAIRS]``."""
    # pooled: [groups, columns, PAIRS], from pool_kernel; teacher: [rows, V_t], columns adjacent; start, end: int32
    # [pairs] or None; row_ids: int32 [32 slices], pieces_at: int32 [slices + 1], pieces: int32, of the plan; upstream,
    # formed:
    # [] or None; temperature: a number, or float64 [].
    group, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    groups = tl.num_programs(1)
    r, i = tl.arange(0, PAIRS), tl.arange(0, SLICE)
    first, last = _pairs_of(start, end, p0 + group * PAIRS + r, pairs, rows)
    inverse = 1.0 / temperature_of(temperature, ACC)
    lowest, zeros = tl.full([SLICE, PAIRS], float("-inf"), ACC), tl.zeros([SLICE, PAIRS], ACC)
    top_s, sum_s, top_t, sum_t, dots = lowest, zeros, lowest, zeros, zeros
    apart = tl.zeros([PAIRS], ACC)
    pooled += group * columns * PAIRS
    z += group * slices * SLICE * PAIRS
    stop = to_do(tl.minimum((part + 1) * per, slices), upstream, formed)
    for b in range(part * per, stop):
        at = tl.load(pieces_at + b)
        length = (tl.load(pieces_at + b + 1) - at) // SLICE
        high, total = lowest, zeros
        for k in range(0, length):
            j = tl.load(pieces + at + k * SLICE + i)
            there = (j >= 0) & (j < columns)
            source = pooled + j[:, None] * PAIRS + r[None, :]
            if LOGSUMEXP:
                x = tl.load(source, mask=there[:, None], other=float("-inf"))
                high, total = online(high, total, x, 1.0)
            else:
                total += tl.load(source, mask=there[:, None], other=0.0)
        v = tl.load(row_ids + b * SLICE + i)
        mapped = (v >= 0)[:, None]
        if LOGSUMEXP:
            total = high + tl.log(total)
            total = tl.where(high == float("-inf"), float("-inf"), total)
        total = tl.where(mapped, total, float("-inf"))
        t = _mean(teacher, first, last, stride, v, v >= 0, ACC, start is not None)
        t = tl.where(mapped, t, float("-inf"))
        if b == part * per:  # pairs that are close are so up to a constant, which is not to take digits
            apart = shift_of(tl.max(t, 0)) - shift_of(tl.max(total, 0))
        top_s, sum_s, top_t, sum_t, dots = online_two(
            top_s, sum_s, top_t, sum_t, dots, total, t, (t - total) - apart[None, :], inverse
        )  # fmt: skip
        tl.store(z + (b * SLICE + i[:, None]) * PAIRS + r[None, :], total)
    stats += (group * parts + part) * PAIRS + r
    step = groups.to(tl.int64) * parts * PAIRS
    high_s, weight = _weights(top_s, inverse)
    tl.store(stats, high_s)
    tl.store(stats + step, _weighed(sum_s, weight))
    high_t, weight = _weights(top_t, inverse)
    tl.store(stats + 2 * step, high_t)
    tl.store(stats + 3 * step, _weighed(sum_t, weight))
    tl.store(stats + 4 * step, tl.sum(tl.where(weight == 0, 0.0, dots * weight), 0))
    tl.store(stats + 5 * step, apart)


@triton.jit
def _weights(top, inverse):
    """Of lanes ``[n, pairs]`` the largest of each pair, and what turns each lane's sums into sums shifted by it."""
    high = tl.max(top, 0)
    return high, tl.exp((top - shift_of(high)[None, :]) * inverse)


@triton.jit
def _weighed(x, weight):
    """The sum of each pair. A product that is selected is not contracted with the first addition of the sum, which
    would leave one of two terms unrounded: so threads that hold copies of a lane have the same bits."""
    return tl.sum(tl.where(x == 0, 0.0, x * weight), 0)


@triton.jit
def merge_kernel(
    stats, merged, upstream, formed, temperature, parts, ACC: tl.constexpr, PAIRS: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """``stats [6, groups, parts, PAIRS]`` -> ``merged [5, groups, PAIRS]``: shift and sum of exp of both sides, and the
    mean of what their shifted, divided logits differ by."""
    # upstream, formed: [] or None; temperature: a number, or float64 [].
    group, groups = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    r, i = tl.arange(0, PAIRS), tl.arange(0, PARTS)
    inverse = 1.0 / temperature_of(temperature, ACC)
    inside = (i < to_do(parts, upstream, formed))[:, None]
    stats += (group * parts + i[:, None]) * PAIRS + r[None, :]
    step = groups.to(tl.int64) * parts * PAIRS
    high_s, weight = _weights(tl.load(stats, mask=inside, other=float("-inf")), inverse)
    z_s = _weighed(tl.load(stats + step, mask=inside, other=0.0), weight)
    high_t, weight = _weights(tl.load(stats + 2 * step, mask=inside, other=float("-inf")), inverse)
    shift_s, shift_t = shift_of(high_s), shift_of(high_t)
    sums = tl.load(stats + 3 * step, mask=inside, other=0.0)
    moved = (tl.load(stats + 5 * step, mask=inside, other=0.0) - (shift_t - shift_s)[None, :]) * inverse
    dots = tl.load(stats + 4 * step, mask=inside, other=0.0) + sums * moved
    z_t = _weighed(sums, weight)
    merged += group * PAIRS + r
    step = groups * PAIRS
    tl.store(merged, shift_s)
    tl.store(merged + step, z_s)
    tl.store(merged + 2 * step, shift_t)
    tl.store(merged + 3 * step, z_t)
    tl.store(merged + 4 * step, tl.sum(tl.where(weight == 0, 0.0, dots * weight), 0) / z_t)


@triton.jit
def _row_sums(merged, step):
    """The pairs' sums, their divergences, and which of them are close."""
    shift_s, z_s = tl.load(merged), tl.load(merged + step)
    shift_t, z_t = tl.load(merged + 2 * step), tl.load(merged + 3 * step)
    mean = tl.load(merged + 4 * step)
    kl = mean + tl.log(quotient(z_s, z_t))
    return shift_s, z_s, shift_t, z_t, mean, kl, (kl < CLOSE) & (z_t != 0)


@triton.jit
def _step(s, q, p, r, shift_s, shift_t, mean, inverse):
    """``close_step`` of logits s, q with exponentials r, p."""
    d = ((s - q) + (shift_t - shift_s)[None, :]) * inverse + mean[None, :]
    return close_step(p, r, tl.exp(mean)[None, :], d)


@triton.jit(do_not_specialize=["p0", "pairs", "rows"])
def close_kernel(
    z, teacher, start, end, row_ids, merged, sums, temperature, p0, pairs, rows, stride, slices, per, parts,
    ACC: tl.constexpr, PAIRS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Of pairs that are close the sum over the columns of a program of p (exp d - 1 - d) -> ``sums [groups, parts,
    PAIRS]``. Groups without one end at once."""
    # z: [groups, 32 slices, PAIRS]; teacher: [rows, V_t]; start, end: int32 [pairs] or None; row_ids: int32 [32
    # slices]; merged: [5, groups, PAIRS]; temperature: a number, or float64 [].
    group, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    r, i = tl.arange(0, PAIRS), tl.arange(0, SLICE)
    first, last = _pairs_of(start, end, p0 + group * PAIRS + r, pairs, rows)
    inverse = 1.0 / temperature_of(temperature, ACC)
    shift_s, z_s, shift_t, z_t, mean, kl, close = _row_sums(merged + group * PAIRS + r, tl.num_programs(1) * PAIRS)
    total = tl.zeros([SLICE, PAIRS], ACC)
    stop = tl.where(tl.max(close.to(tl.int32), 0) == 0, 0, tl.minimum((part + 1) * per, slices))
    for b in range(part * per, stop):
        v = tl.load(row_ids + b * SLICE + i)
        s = tl.load(z + (group * slices * SLICE + b * SLICE + i[:, None]) * PAIRS + r[None, :])
        q = _mean(teacher, first, last, stride, v, v >= 0, ACC, start is not None)
        p_q, p_s = tl.exp((q - shift_t[None, :]) * inverse), tl.exp((s - shift_s[None, :]) * inverse)
        moved, rest = _step(s, q, p_q, p_s, shift_s, shift_t, mean, inverse)
        total += tl.where((v >= 0)[:, None], rest, 0.0)
    tl.store(sums + (group * parts + part) * PAIRS + r, tl.sum(total, 0))


@triton.jit(do_not_specialize=["p0", "pairs", "rows"])
def slope_kernel(
    z, slope, teacher, student_start, student_end, start, end, row_ids, merged, sums, scale, loss, upstream, formed,
    temperature, p0, pairs, s_rows, rows, stride, slices, per, parts, GRAD: tl.constexpr, ACC: tl.constexpr,
    PAIRS: tl.constexpr, SLICE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The losses, and d loss / d z -> ``slope``, laid out as z, which it may be; ``sums`` from `close_kernel`."""
    # z, slope: [groups, 32 slices, PAIRS]; teacher: [rows, V_t]; student_start, student_end, start, end: int32 [pairs]
    # or None; row_ids: int32 [32 slices]; merged: [5, groups, PAIRS]; sums: [groups, parts, PAIRS]; scale: [pairs];
    # loss: [pairs] or None; upstream, formed: [] or None; temperature: a number, or float64 [].
    group, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    groups = tl.num_programs(1)
    r, i = tl.arange(0, PAIRS), tl.arange(0, SLICE)
    p = p0 + group * PAIRS + r
    first, last = _pairs_of(start, end, p, pairs, rows)
    s_first, s_last = _pairs_of(student_start, student_end, p, pairs, s_rows)
    filled = (first < last) & (s_first < s_last)
    t = temperature_of(temperature, ACC)
    inverse = 1.0 / t
    shift_s, z_s, shift_t, z_t, mean, kl, close = _row_sums(merged + group * PAIRS + r, groups * PAIRS)
    any_close = tl.max(close.to(tl.int32), 0) != 0
    by_s, by_t = 1 / z_s, 1 / z_t
    if any_close:
        k = tl.arange(0, PARTS)[:, None]
        excess = tl.sum(tl.load(sums + (group * parts + k) * PAIRS + r[None, :], mask=k < parts, other=0.0), 0) / z_t
        kl = tl.where(close, log_one_plus(excess), kl)
        by_s = tl.where(close, by_t / (1 + excess), by_s)
        by_t = tl.where(close, excess * by_s, by_t)
    if loss is not None:
        # A teacher without any mass asks for nothing; a student without any is infinitely far from what has some.
        each = tl.where(z_t == 0, 0.0, tl.where(z_s == 0, float("inf"), kl * t * t))
        tl.store(loss + p, tl.where(filled, each, 0.0), mask=p < tl.where(part == 0, pairs, 0))
    if GRAD:
        filled = filled & (z_s != 0) & (z_t != 0)
        factor = t * tl.load(scale + p, mask=p < pairs, other=0.0)
        if upstream is not None:
            factor *= tl.load(upstream)
        by_s, by_t = by_s * factor, by_t * factor
        stop = to_do(tl.minimum((part + 1) * per, slices), upstream, formed)
        for b in range(part * per, stop):
            v = tl.load(row_ids + b * SLICE + i)
            at = (group * slices * SLICE + b * SLICE + i[:, None]) * PAIRS + r[None, :]
            s = tl.load(z + at)
            q = _mean(teacher, first, last, stride, v, v >= 0, ACC, start is not None)
            p_q, own = tl.exp((q - shift_t[None, :]) * inverse), tl.exp((s - shift_s[None, :]) * inverse)
            if any_close:
                moved, rest = _step(s, q, p_q, own, shift_s, shift_t, mean, inverse)
                own = tl.where(close[None, :], moved, own)
            value = tl.where((v >= 0)[:, None] & filled[None, :], own * by_s[None, :] - p_q * by_t[None, :], 0.0)
            tl.store(slope + at, value)


@triton.jit
def gather_kernel(
    slope, z, pooled, uses_at, uses, owners, out, upstream, formed, columns, slices, rows, LOGSUMEXP: tl.constexpr,
    ACC: tl.constexpr, PAIRS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """The sum of each segment -> ``out [groups, 32 slices, PAIRS]``; ``rows``: how many slope has."""
    # slope, z: [groups, rows, PAIRS]; pooled: [groups, columns, PAIRS]; uses_at: int32 [slices + 1], uses: int32,
    # owners: int32 [32 slices], of the plan, whose slices are segments here; upstream, formed: [] or None.
    b, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    r, i = tl.arange(0, PAIRS), tl.arange(0, SLICE)
    slope += group * rows * PAIRS
    if LOGSUMEXP:
        z += group * rows * PAIRS
        j = tl.load(owners + b * SLICE + i)
        s = tl.load(
            pooled + (group * columns + j[:, None]) * PAIRS + r[None, :], mask=(j >= 0)[:, None], other=float("-inf")
        )
    at = tl.load(uses_at + b)
    length = to_do((tl.load(uses_at + b + 1) - at) // SLICE, upstream, formed)
    total = tl.zeros([SLICE, PAIRS], ACC)
    for k in range(0, length):
        o = tl.load(uses + at + k * SLICE + i)
        there = ((o >= 0) & (o < rows))[:, None]
        source = o[:, None] * PAIRS + r[None, :]
        value = tl.load(slope + source, mask=there, other=0.0)
        if LOGSUMEXP:  # d z / d s is the share of s in the sum
            share = tl.exp(s - tl.load(z + source, mask=there, other=0.0))
            value = tl.where(there & (s != float("-inf")), value * share, 0.0)
        total += value
    tl.store(out + ((group * slices + b) * SLICE + i[:, None]) * PAIRS + r[None, :], total)


@triton.jit(do_not_specialize=["p0", "pairs", "rows", "t_rows"])
def write_kernel(
    sums, of, segments, grad, start, end, t_start, t_end, upstream, formed, p0, pairs, rows, t_rows, columns, count,
    ACC: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The segments of each piece, added up, into every row of its pairs' spans; zeros into the rows between them."""
    # sums: [groups, count, PAIRS]; of: int32 [columns + 1], segments: int32 [count], of the plan; grad: [rows,
    # columns], contiguous; start, end, t_start, t_end: int32 [pairs] or None; upstream, formed: [] or None.
    group = tl.program_id(1).to(tl.int64)
    r = tl.arange(0, PAIRS)
    p = p0 + group * PAIRS + r
    first, last = _pairs_of(start, end, p, pairs, rows)
    t_first, t_last = _pairs_of(t_start, t_end, p, pairs, t_rows)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = d < to_do(columns, upstream, formed)
    begin = tl.load(of + d, mask=inside, other=0)
    length = tl.load(of + d + 1, mask=inside, other=0) - begin
    total = tl.zeros([BLOCK, PAIRS], ACC)
    sums += group * count * PAIRS
    for k in range(0, tl.max(length, 0)):
        there = k < length
        o = tl.load(segments + begin + k, mask=there, other=0)
        total += tl.load(sums + o[:, None] * PAIRS + r[None, :], mask=there[:, None], other=0.0)
    filled = (first < last) & (t_first < t_last)
    if start is None:
        value = tl.where(filled[None, :], total, 0.0).to(grad.dtype.element_ty)
        tl.store(grad + first[None, :] * columns + d[:, None], value, mask=inside[:, None] & (p < pairs)[None, :])
    else:
        total *= span_share(first, last, True, ACC)[None, :]
        row = clamp(tl.load(end + p - 1, mask=(p > 0) & (p < pairs), other=0), rows)
        stop = tl.where(p + 1 == pairs, rows, last)
        for _ in range(0, tl.max(stop - row, 0)):
            kept = tl.where((filled & (row >= first) & (row < last))[None, :], total, 0.0)
            mask = inside[:, None] & (row < stop)[None, :]
            tl.store(grad + row[None, :] * columns + d[:, None], kept.to(grad.dtype.element_ty), mask=mask)
            row += 1


def remapped_kl(
    student: Tensor, teacher: Tensor, spans: Sequence[Tensor], plan: GatherPlan, scale: Tensor, logsumexp: bool,
    temperature: float, loss: Tensor | None, grad: Tensor | None, upstream: Tensor | None = None,
    formed: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Logits ``[N, V]`` (unit column stride), no or four int32 spans ``[P]``, scale ``[P]`` -> the scaled total. Writes
    what is not None: the losses ``[P]`` and the gradient of the total for the student's logits.

    upstream, formed: as for ``matched_kl``."""
    pairs, (rows, columns), t_rows = scale.shape[0], student.shape, teacher.shape[0]
    slices, segments = plan.pieces_at.numel() - 1, plan.uses_at.numel() - 1
    if not pairs or not slices:
        for x in (loss, grad):
            if x is not None:
                x.zero_()
        return scale.new_zeros(())
    s_start, s_end, t_start, t_end = spans or (None,) * 4
    height = SLICE * slices
    arrays = 1 + (logsumexp and grad is not None)
    group_bytes = scale.element_size() * PAIRS * (arrays * height + columns + SLICE * segments)
    groups = max(1, min(BUDGET // group_bytes, triton.cdiv(pairs, PAIRS)))
    whole_window = WINDOW // SLICE
    per = triton.cdiv(triton.cdiv(slices, PARTS), whole_window) * whole_window
    parts = triton.cdiv(slices, per)
    all_groups = triton.cdiv(pairs, PAIRS)
    pooled = scale.new_empty(groups, columns, PAIRS)
    z = scale.new_empty(groups, height, PAIRS)
    slope = torch.empty_like(z) if arrays == 2 else z
    stats, merged = scale.new_empty(6, groups, parts, PAIRS), scale.new_empty(5, groups, PAIRS)
    sums = scale.new_empty(groups, SLICE * segments, PAIRS) if grad is not None else None
    t = temperature_argument(temperature, scale)
    wide = {"ACC": accumulator(scale.dtype), "PAIRS": PAIRS, "enable_fp_fusion": True}
    # Four numbers of a tile per thread: 16-byte accesses, and 58 registers (for sm_90) leave room for 32 warps.
    sliced = {**wide, "SLICE": SLICE, "num_warps": 8}
    blocks = triton.cdiv(columns, 32)
    with on_device(student):
        for g in range(0, all_groups, groups):
            n, p0 = min(groups, all_groups - g), g * PAIRS
            pool_kernel[(blocks, n)](
                student, s_start, s_end, pooled, upstream, formed, p0, pairs, rows, student.stride(0), columns, **wide,
                BLOCK=32,
            )  # fmt: skip
            combine_kernel[(parts, n)](
                pooled, teacher, t_start, t_end, plan.rows, plan.pieces_at, plan.pieces, z, stats, upstream, formed, t,
                p0, pairs, t_rows, teacher.stride(0), columns, slices, per, parts, LOGSUMEXP=logsumexp, **sliced,
            )  # fmt: skip
            merge_kernel[(n,)](stats, merged, upstream, formed, t, parts, **wide, PARTS=PARTS)
            close_kernel[(parts, n)](
                z, teacher, t_start, t_end, plan.rows, merged, stats, t, p0, pairs, t_rows, teacher.stride(0), slices,
                per, parts, **sliced,
            )  # fmt: skip
            slope_kernel[(parts, n)](
                z, slope, teacher, s_start, s_end, t_start, t_end, plan.rows, merged, stats, scale, loss, upstream,
                formed, t, p0, pairs, rows, t_rows, teacher.stride(0), slices, per, parts, GRAD=grad is not None,
                **sliced, PARTS=PARTS,
            )  # fmt: skip
            if grad is None:
                continue
            gather_kernel[(segments, n)](
                slope, z, pooled, plan.uses_at, plan.uses, plan.owners, sums, upstream, formed, columns, segments,
                height, LOGSUMEXP=logsumexp, **sliced,
            )  # fmt: skip
            write_kernel[(blocks, n)](
                sums, plan.of, plan.segments, grad, s_start, s_end, t_start, t_end, upstream, formed, p0, pairs, rows,
                t_rows, columns, SLICE * segments, **wide, BLOCK=32,
            )  # fmt: skip
        return None if loss is None else weighted_total(loss, scale)
