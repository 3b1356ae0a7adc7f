"""KL through the remap table in Triton, in one launch.

A program takes four pairs at a time, side by side: their means, combined logits and gradients are laid out
``[column, pair]`` in memory of its own, so that an id of the table fetches 16 bytes, the widest access of a thread, and
the means of a small vocabulary stay in L1, which serves what shared memory would: Triton can gather from the one and
not from the other. Each step of a program reads what all its threads have written before, behind a barrier. Both ways
through the table are products of a sparse matrix: its rows, and the lists of the transposed one, stand in slices of 256
of nearly one length, interleaved: no lane waits for another's long row. A list of a frequent piece is cut into segments
that are added up in a fixed order, so nothing is atomic. There are as many programs as multiprocessors hold, and as
their memory allows, so that it does not grow with the pairs. By reasoning, not measured.
Formulas: vocabdistil/reference/remapped_kl.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .matched_kl import accumulator, temperature_argument, weighted_total, with_rest
from .rows import clamp, on_device, span_share, to_do
from .softmax import CLOSE, close_step, log_one_plus, online, online_two, quotient, shift_of, temperature_of

BUDGET = 256 << 20  # bytes for the memory of all programs
PAIRS = 4  # side by side: 16 bytes of float32
FEW = 2  # where there are not enough for all programs
RESIDENT = 2  # programs of a multiprocessor, of 8 warps each
REGISTERS = 128  # of a thread, so that as many find room; what of the pairs' numbers spills is read outside the loops
SLICE = 256  # rows of the table, or segments, side by side: four numbers of a tile per thread
WINDOW = 2048  # rows of the table that are sorted by length: the teacher's columns that they read are still in L1
SEGMENT = 64  # pieces of a segment at least
SEARCH = 64  # rows of the table whose teacher's logits are compared at a time with 16 numbers each


class GatherPlan(NamedTuple):
    """A table as the kernel reads it; int32, but for the weights.

    Row o, in the order of the slices, is the teacher's column ``rows[o]`` (-1: none); its k-th piece stands at
    ``pieces_at[o // SLICE] + SLICE k + o % SLICE`` of ``pieces`` (-1: none). Segment o lists, laid out alike in
    ``uses_at`` and ``uses``, rows that hold the piece ``owners[o]``; the segments of piece j are
    ``segments[of[j]:of[j + 1]]``. What entries count, or the logs: ``weights``, as ``pieces``, and ``use_weights``, as
    ``uses``; or None. ``mapped``: how many rows are not empty.
    """

    mapped: int
    rows: Tensor
    pieces_at: Tensor
    pieces: Tensor
    uses_at: Tensor
    uses: Tensor
    owners: Tensor
    of: Tensor
    segments: Tensor
    weights: Tensor | None
    use_weights: Tensor | None


def _starts(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _lists(begin: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each element of the lists: which list, which element of it, and its index ``begin[list] + element``."""
    owner = torch.repeat_interleave(torch.arange(lengths.numel()), lengths)
    element = torch.arange(owner.numel()) - _starts(lengths)[owner]
    return owner, element, begin[owner] + element


def _sliced(
    begin: Tensor, lengths: Tensor, values: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The lists ``values[begin[o]:][:lengths[o]]`` in interleaved slices: where each slice starts, the slices, and the
    weights likewise."""
    count = -(-lengths.numel() // SLICE)
    longest = torch.nn.functional.pad(lengths, (0, count * SLICE - lengths.numel())).view(count, SLICE).amax(1)
    at = _starts(SLICE * longest)
    owner, element, source = _lists(begin, lengths)
    where = at[owner // SLICE] + SLICE * element + owner % SLICE
    out = torch.full((int(at[-1]),), -1).index_copy_(0, where, values[source])
    if weights is None:
        return at, out, None
    return at, out, weights.new_zeros(int(at[-1])).index_copy_(0, where, weights[source])


def make_gather_plan(indptr: Tensor, ids: Tensor, weights: Tensor | None, student_columns: int) -> GatherPlan:
    """From a checked table on the CPU, in int64."""
    lengths = indptr.diff()
    mapped = lengths.nonzero()[:, 0]
    window = torch.arange(mapped.numel()) // WINDOW
    order = mapped[(window * (ids.numel() + 1) + lengths[mapped]).argsort(stable=True)]
    rows = torch.full((-(-order.numel() // SLICE) * SLICE,), -1)
    rows[: order.numel()] = order
    pieces_at, pieces, piece_weights = _sliced(indptr[order], lengths[order], ids, weights)

    row, _, source = _lists(indptr[order], lengths[order])
    by_piece = ids[source].argsort(stable=True)
    counts = ids.bincount(minlength=student_columns)
    longest = max(SEGMENT, math.isqrt(int(counts.max())))
    parts = -(-counts // longest)
    owner, part, _ = _lists(torch.zeros_like(parts), parts)
    sizes = (counts[owner] - part * longest).clamp(max=longest)
    by_size = sizes.argsort(descending=True, stable=True)
    begin = _starts(counts)[owner] + part * longest
    of_uses = None if weights is None else weights[source][by_piece]
    uses_at, uses, use_weights = _sliced(begin[by_size], sizes[by_size], row[by_piece], of_uses)
    owners = torch.full((-(-owner.numel() // SLICE) * SLICE,), -1)
    owners[: owner.numel()] = owner[by_size]
    plan = rows, pieces_at, pieces, uses_at, uses, owners, _starts(parts), by_size.argsort()
    return GatherPlan(mapped.numel(), *(x.to(torch.int32) for x in plan), piece_weights, use_weights)


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
def _mean(x, first, last, longest, stride, columns, inside, ACC: tl.constexpr, SPANS: tl.constexpr):
    """The mean over each pair's rows, read along the columns; the pairs stand in another dimension than these."""
    total = tl.load(x + first * stride + columns, mask=inside & (first < last), other=0.0).to(ACC)
    if SPANS:
        for i in range(1, longest):
            mask = inside & (first + i < last)
            total += tl.load(x + (first + i) * stride + columns, mask=mask, other=0.0).to(ACC)
        total *= span_share(first, last, True, ACC)
    return total


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
def _merged(top, total, inverse):
    """The shift of each pair and the sum of its exponentials."""
    high, weight = _weights(top, inverse)
    return shift_of(high), _weighed(total, weight)


@triton.jit
def _key(x):
    """Integers in the order of the numbers, a NaN above them all."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        key = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
        key = tl.where(x == x, key, 0x7FFFFFFFFFFFFFFF)
    else:
        bits = x.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        key = tl.where(x == x, key, 0x7FFFFFFF)
    return key


@triton.jit
def _least(
    teacher, first, last, longest, stride, row_ids, rows, top_k, ACC: tl.constexpr, SPANS: tl.constexpr,
    PAIRS: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """Of each pair the ``top_k``-th largest of the teacher's logits in the table's rows: four bits of its key at a
    time, the highest first, by how many have no less."""
    INT: tl.constexpr = tl.int64 if ACC == tl.float64 else tl.int32
    BITS: tl.constexpr = 64 if ACC == tl.float64 else 32
    i = tl.arange(0, SEARCH)[:, None, None]
    digits = tl.arange(0, 16)[None, :, None].to(INT)
    first, last = first[None, None, :], last[None, None, :]
    one = tl.full([], 1, INT)
    sign = one << (BITS - 1)  # keys are counted from the lowest on
    low = tl.zeros([PAIRS], INT)
    for turn in range(0, BITS // 4):
        shift = one * (BITS - 4 - 4 * turn)
        asked = (low[None, None, :] | (digits << shift)) ^ sign
        count = tl.zeros([SEARCH, 16, PAIRS], tl.int32)
        for b in range(0, rows, SEARCH):
            v = tl.load(row_ids + b + i)
            key = _key(_mean(teacher, first, last, longest, stride, v, v >= 0, ACC, SPANS))
            count += ((v >= 0) & (key >= asked)).to(tl.int32)
        found = tl.sum((tl.sum(count, 0) >= top_k).to(tl.int32), 0) - 1
        low = low | (found.to(INT) << shift)
    key = low ^ sign
    if ACC == tl.float64:
        value = (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    else:
        value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return value


@triton.jit
def _combined(pooled, pieces_at, pieces, weights, b, columns, i, r, LOGSUMEXP: tl.constexpr, ACC: tl.constexpr,
              PAIRS: tl.constexpr, SLICE: tl.constexpr):  # fmt: skip
    """``[SLICE, PAIRS]``: the student's combined logits of a slice of rows."""
    at = tl.load(pieces_at + b)
    length = (tl.load(pieces_at + b + 1) - at) // SLICE
    high, total = tl.full([SLICE, PAIRS], float("-inf"), ACC), tl.zeros([SLICE, PAIRS], ACC)
    for k in range(0, length):
        j = tl.load(pieces + at + k * SLICE + i)
        there = ((j >= 0) & (j < columns))[:, None]
        source = pooled + j[:, None] * PAIRS + r[None, :]
        if LOGSUMEXP:
            x = tl.load(source, mask=there, other=float("-inf"))
            if weights is not None:
                x += tl.load(weights + at + k * SLICE + i)[:, None]
            high, total = online(high, total, x, 1.0)
        else:
            x = tl.load(source, mask=there, other=0.0)
            if weights is not None:
                x *= tl.load(weights + at + k * SLICE + i)[:, None]
            total += x
    if LOGSUMEXP:
        total = tl.where(high == float("-inf"), float("-inf"), high + tl.log(total))
    return total


@triton.jit
def _segment_sums(
    slope, z, pooled, uses_at, uses, use_weights, owners, b, rows, i, r, LOGSUMEXP: tl.constexpr, ACC: tl.constexpr,
    PAIRS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """``[SLICE, PAIRS]``: the sums of a slice of segments; ``rows``: how many slope has."""
    if LOGSUMEXP:
        j = tl.load(owners + b * SLICE + i)
        own = tl.load(pooled + j[:, None] * PAIRS + r[None, :], mask=(j >= 0)[:, None], other=float("-inf"))
    at = tl.load(uses_at + b)
    length = (tl.load(uses_at + b + 1) - at) // SLICE
    total = tl.zeros([SLICE, PAIRS], ACC)
    for k in range(0, length):
        o = tl.load(uses + at + k * SLICE + i)
        there = ((o >= 0) & (o < rows))[:, None]
        source = o[:, None] * PAIRS + r[None, :]
        value = tl.load(slope + source, mask=there, other=0.0)
        if LOGSUMEXP:  # d z / d s is the share of s in the sum
            s = own
            if use_weights is not None:
                s += tl.load(use_weights + at + k * SLICE + i)[:, None]
            share = tl.exp(s - tl.load(z + source, mask=there, other=0.0))
            value = tl.where(there & (s != float("-inf")), value * share, 0.0)
        elif use_weights is not None:
            value *= tl.load(use_weights + at + k * SLICE + i)[:, None]
        total += value
    return total


@triton.jit
def _step(s, q, p, r, shift_s, shift_t, mean, inverse):
    """``close_step`` of logits s, q with exponentials r, p."""
    d = ((s - q) + (shift_t - shift_s)[None, :]) * inverse + mean[None, :]
    return close_step(p, r, tl.exp(mean)[None, :], d)


@triton.jit
def _write(
    grad, sums, of, segments, begin, first, last, stop, filled, present, d, inside, columns, ACC: tl.constexpr,
    SPANS: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, r,
):  # fmt: skip
    """The segments of each piece, added up, into every row of its pairs' spans; zeros into the rows between them."""
    at = tl.load(of + d, mask=inside, other=0)
    length = tl.load(of + d + 1, mask=inside, other=0) - at
    total = tl.zeros([BLOCK, PAIRS], ACC)
    for k in range(0, tl.max(length, 0)):
        there = k < length
        o = tl.load(segments + at + k, mask=there, other=0)
        total += tl.load(sums + o[:, None] * PAIRS + r[None, :], mask=there[:, None], other=0.0)
    if SPANS:
        total *= span_share(first, last, True, ACC)[None, :]
        row = begin
        for _ in range(0, tl.max(stop - begin, 0)):
            kept = tl.where((filled & (row >= first) & (row < last))[None, :], total, 0.0)
            mask = inside[:, None] & (row < stop)[None, :]
            tl.store(grad + row[None, :] * columns + d[:, None], kept.to(grad.dtype.element_ty), mask=mask)
            row += 1
    else:
        value = tl.where(filled[None, :], total, 0.0).to(grad.dtype.element_ty)
        tl.store(grad + first[None, :] * columns + d[:, None], value, mask=inside[:, None] & present[None, :])


@triton.jit(do_not_specialize=["pairs", "s_rows", "t_rows", "top_k"])
def kernel(
    student, teacher, s_start, s_end, t_start, t_end, row_ids, pieces_at, pieces, weights, uses_at, uses, use_weights,
    owners, of, segments, scratch, scale, loss, grad, upstream, formed, temperature, pairs, s_rows, t_rows, s_stride,
    t_stride, columns, slices, segment_slices, top_k, LOGSUMEXP: tl.constexpr, REMAINDER: tl.constexpr,
    ACC: tl.constexpr, PAIRS: tl.constexpr, SLICE: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """Losses, and the gradient of the total for the student's logits, of groups of PAIRS pairs."""
    # student, teacher: [rows, columns], columns adjacent; s_start, s_end, t_start, t_end: int32 [pairs] or None (row p
    # with row p); row_ids, pieces_at, pieces, weights, uses_at, uses, use_weights, owners, of, segments: of the plan;
    # scratch: [programs, columns + 2 or 3 heights, PAIRS]; scale: [pairs]; loss: [pairs] or None; grad: [s_rows,
    # columns], contiguous, or None; upstream, formed: [] or None; temperature: a number, or float64 []; REMAINDER: None
    # without top_k, else a code of `native.UNMATCHED_CODES`.
    TOP: tl.constexpr = REMAINDER is not None
    WHOLE: tl.constexpr = REMAINDER is not None and REMAINDER != 0
    SPANS: tl.constexpr = s_start is not None
    APART: tl.constexpr = LOGSUMEXP and grad is not None  # the gradient has memory beside the combined logits
    r, i = tl.arange(0, PAIRS), tl.arange(0, SLICE)
    t = temperature_of(temperature, ACC)
    inverse = 1.0 / t
    height = slices * SLICE
    size = columns + height
    if APART:
        size += height
    if grad is not None:
        size += segment_slices * SLICE
    pooled = scratch + tl.program_id(0).to(tl.int64) * size * PAIRS
    z = pooled + columns * PAIRS
    slope = z
    if APART:
        slope = z + height * PAIRS
    sums = slope + height * PAIRS
    for group in range(tl.program_id(0), to_do(tl.cdiv(pairs, PAIRS), upstream, formed), tl.num_programs(0)):
        p = group * PAIRS + r.to(tl.int64)
        first, last = _pairs_of(s_start, s_end, p, pairs, s_rows)
        t_first, t_last = _pairs_of(t_start, t_end, p, pairs, t_rows)
        filled = (first < last) & (t_first < t_last)
        longest, t_longest = tl.max(last - first, 0), tl.max(t_last - t_first, 0)

        for b in range(0, columns, SLICE):
            d = b + i
            value = _mean(
                student, first[None, :], last[None, :], longest, s_stride, d[:, None], (d < columns)[:, None], ACC,
                SPANS,
            )  # fmt: skip
            tl.store(pooled + d[:, None] * PAIRS + r[None, :], value, mask=(d < columns)[:, None])
        if TOP:
            least = _least(
                teacher, t_first, t_last, t_longest, t_stride, row_ids, height, top_k, ACC, SPANS, PAIRS, SEARCH
            )
        tl.debug_barrier()

        lowest, zeros = tl.full([SLICE, PAIRS], float("-inf"), ACC), tl.zeros([SLICE, PAIRS], ACC)
        top_s, sum_s, top_t, sum_t, dots = lowest, zeros, lowest, zeros, zeros
        if WHOLE:
            top_u, sum_u, top_v, sum_v = lowest, zeros, lowest, zeros
        apart = tl.zeros([PAIRS], ACC)
        for b in range(0, slices):
            s = _combined(
                pooled, pieces_at, pieces, weights, b, columns, i, r, LOGSUMEXP, ACC, PAIRS, SLICE
            )
            v = tl.load(row_ids + b * SLICE + i)
            mapped = (v >= 0)[:, None]
            q = _mean(
                teacher, t_first[None, :], t_last[None, :], t_longest, t_stride, v[:, None], mapped, ACC, SPANS
            )
            s, q = tl.where(mapped, s, float("-inf")), tl.where(mapped, q, float("-inf"))
            tl.store(z + (b * SLICE + i[:, None]) * PAIRS + r[None, :], s)
            if b == 0:  # pairs that are close are so up to a constant, which is not to take digits
                apart = shift_of(tl.max(q, 0)) - shift_of(tl.max(s, 0))
            difference = (q - s) - apart[None, :]
            if TOP:
                outside = q < least[None, :]
                if WHOLE:
                    top_u, sum_u = online(top_u, sum_u, tl.where(outside, s, float("-inf")), inverse)
                    top_v, sum_v = online(top_v, sum_v, tl.where(outside, q, float("-inf")), inverse)
                s, q = tl.where(outside, float("-inf"), s), tl.where(outside, float("-inf"), q)
            top_s, sum_s, top_t, sum_t, dots = online_two(
                top_s, sum_s, top_t, sum_t, dots, s, q, difference, inverse
            )

        shift_s, z_s = _merged(top_s, sum_s, inverse)
        high_t, weight = _weights(top_t, inverse)
        shift_t, z_t = shift_of(high_t), _weighed(sum_t, weight)
        mean = tl.sum(tl.where(weight == 0, 0.0, dots * weight), 0) / z_t + (apart - (shift_t - shift_s)) * inverse
        ratio = tl.log(quotient(z_s, z_t))
        kl = mean + ratio
        close = (kl < CLOSE) & (z_t != 0)
        any_close = tl.max(close.to(tl.int32), 0) != 0
        by_s, by_t = 1 / z_s, 1 / z_t
        if WHOLE:
            shift_u, z_u = _merged(top_u, sum_u, inverse)
            shift_v, z_v = _merged(top_v, sum_v, inverse)
            rest_ratio = tl.log(quotient(z_u, z_v))
        tl.debug_barrier()
        if any_close:
            total, moved_rest = tl.zeros([SLICE, PAIRS], ACC), tl.zeros([SLICE, PAIRS], ACC)
            for b in range(0, slices):
                v = tl.load(row_ids + b * SLICE + i)
                mapped = (v >= 0)[:, None]
                s = tl.load(z + (b * SLICE + i[:, None]) * PAIRS + r[None, :])
                q = _mean(
                    teacher, t_first[None, :], t_last[None, :], t_longest, t_stride, v[:, None], mapped, ACC, SPANS
                )
                e_t, e_s = tl.exp((q - shift_t[None, :]) * inverse), tl.exp((s - shift_s[None, :]) * inverse)
                moved, rest = _step(s, q, e_t, e_s, shift_s, shift_t, mean, inverse)
                if TOP:
                    outside = q < least[None, :]
                    rest = tl.where(outside, 0.0, rest)
                    if WHOLE:
                        e_v = tl.exp((q - shift_v[None, :]) * inverse)
                        e_u = tl.exp((s - shift_u[None, :]) * inverse)
                        apart_u = ((s - q) + (shift_v - shift_u)[None, :]) * inverse
                        moved, _ = close_step(e_v, e_u, 1.0, apart_u)
                        moved_rest += tl.where(mapped & outside, moved, 0.0)
                total += tl.where(mapped, rest, 0.0)
            excess = tl.sum(total, 0) / z_t
            kl = tl.where(close, log_one_plus(excess), kl)
            ratio = tl.where(close, kl - mean, ratio)
            by_s = tl.where(close, by_t / (1 + excess), by_s)
            by_t = tl.where(close, excess * by_s, by_t)
            if WHOLE:  # with the digits that the quotient of two sums has not
                rest_ratio = tl.where(close, log_one_plus(tl.sum(moved_rest, 0) / z_v), rest_ratio)

        # A teacher without any mass asks for nothing; a student without any is infinitely far from what has some.
        nothing = (z_t == 0) | (z_s == 0)
        value = tl.where(z_t == 0, 0.0, tl.where(z_s == 0, float("inf"), kl))
        by_s, by_t = tl.where(nothing, 0.0, by_s), tl.where(nothing, 0.0, by_t)
        if WHOLE:
            value, own, add_t, by_u = with_rest(
                value, ratio, shift_s, shift_t, shift_u, shift_v, inverse, z_s, z_t, z_u, z_v, rest_ratio,
                REMAINDER == 2,
            )  # fmt: skip
            by_s = tl.where((z_t == 0) & (z_s != 0), own / z_s, own * by_s)
            by_t = own * by_t + add_t
        if loss is not None:
            tl.store(loss + p, tl.where(filled, value * t * t, 0.0), mask=p < pairs)
        if grad is not None:
            factor = t * tl.load(scale + p, mask=p < pairs, other=0.0)
            if upstream is not None:
                factor *= tl.load(upstream)
            by_s, by_t = by_s * factor, by_t * factor
            if WHOLE:
                by_u *= factor
            for b in range(0, slices):
                v = tl.load(row_ids + b * SLICE + i)
                mapped = (v >= 0)[:, None]
                at = (b * SLICE + i[:, None]) * PAIRS + r[None, :]
                s = tl.load(z + at)
                q = _mean(
                    teacher, t_first[None, :], t_last[None, :], t_longest, t_stride, v[:, None], mapped, ACC, SPANS
                )
                e_t, e_s = tl.exp((q - shift_t[None, :]) * inverse), tl.exp((s - shift_s[None, :]) * inverse)
                if any_close:
                    moved, rest = _step(s, q, e_t, e_s, shift_s, shift_t, mean, inverse)
                    e_s = tl.where(close[None, :], moved, e_s)
                d = e_s * by_s[None, :] - e_t * by_t[None, :]
                if TOP:
                    outside = q < least[None, :]
                    if WHOLE:
                        other = by_u[None, :] * tl.exp((s - shift_u[None, :]) * inverse)
                        d = tl.where(outside, other, d)
                    else:  # those outside have no part in anything, whatever they are
                        d = tl.where(outside, 0.0, d)
                tl.store(slope + at, tl.where(mapped & filled[None, :], d, 0.0))
            tl.debug_barrier()

            for b in range(0, segment_slices):
                total = _segment_sums(
                    slope, z, pooled, uses_at, uses, use_weights, owners, b, height, i, r, LOGSUMEXP, ACC, PAIRS, SLICE
                )
                tl.store(sums + (b * SLICE + i[:, None]) * PAIRS + r[None, :], total)
            tl.debug_barrier()

            begin, stop = first, last
            if SPANS:
                begin = clamp(tl.load(s_end + p - 1, mask=(p > 0) & (p < pairs), other=0), s_rows)
                stop = tl.where(p + 1 == pairs, s_rows, last)
            for b in range(0, columns, SLICE):
                d = b + i
                _write(
                    grad, sums, of, segments, begin, first, last, stop, filled, p < pairs, d, d < columns, columns,
                    ACC, SPANS, PAIRS, SLICE, r,
                )  # fmt: skip
        tl.debug_barrier()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def remapped_kl(
    student: Tensor, teacher: Tensor, spans: Sequence[Tensor], plan: GatherPlan, scale: Tensor, logsumexp: bool,
    top_k: int, remainder: int, temperature: float, loss: Tensor | None, grad: Tensor | None,
    upstream: Tensor | None = None, formed: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Logits ``[N, V]`` (unit column stride), no or four int32 spans ``[P]``, scale ``[P]`` -> the scaled total. Writes
    what is not None: the losses ``[P]`` and the gradient of the total for the student's logits.

    top_k: 0 for all; upstream, formed: as for ``matched_kl``."""
    pairs, (rows, columns), t_rows = scale.shape[0], student.shape, teacher.shape[0]
    slices, segments = plan.pieces_at.numel() - 1, plan.uses_at.numel() - 1
    if not pairs or not slices:
        for x in (loss, grad):
            if x is not None:
                x.zero_()
        return scale.new_zeros(())
    height, gradient = SLICE * slices, grad is not None
    size = columns + height * (1 + (logsumexp and gradient)) + SLICE * segments * gradient
    most = RESIDENT * _multiprocessors(student.device)
    side = PAIRS if pairs >= PAIRS * most and size * scale.element_size() * PAIRS * most <= BUDGET else FEW
    programs = min(triton.cdiv(pairs, side), most, max(1, BUDGET // (size * scale.element_size() * side)))
    scratch = scale.new_empty(programs, size, side)
    with on_device(student):
        kernel[(programs,)](
            student, teacher, *(spans or (None,) * 4), plan.rows, plan.pieces_at, plan.pieces, plan.weights,
            plan.uses_at, plan.uses, plan.use_weights, plan.owners, plan.of, plan.segments, scratch, scale, loss, grad,
            upstream, formed, temperature_argument(temperature, scale), pairs, rows, t_rows, student.stride(0),
            teacher.stride(0), columns, slices, segments, min(top_k, plan.mapped), LOGSUMEXP=logsumexp,
            REMAINDER=remainder if top_k else None, ACC=accumulator(scale.dtype), PAIRS=side, SLICE=SLICE,
            SEARCH=min(SEARCH, SLICE), num_warps=8, maxnreg=REGISTERS, enable_fp_fusion=True,
        )  # fmt: skip
        return None if loss is None else weighted_total(loss, scale)
