"""KL over the matched vocabulary from half-precision hidden states and two output layers, in Triton: logits live in
registers alone.

A program forms a tile of the logits of both sides on the tensor cores and leaves of it two 16-bit numbers per element,
and seven per row: sums of exponentials, and the divergence *within* the tile. By the chain rule

    KL(p || q) = KL(P || Q) + sum_k P_k KL(p_k || q_k),

with P, Q the masses of the tiles and p_k, q_k the distributions within tile k, ``combine_kernel`` makes the losses of
the statistics. The gradient is formed as the operands of its two products are loaded: with g = q_k - p_k and h the
flatter of p_k and q_k, both of which are written, it is for every column, but for a factor of the row,

    Q_k q_k - P_k p_k = P_k g + (Q_k - P_k) h,  or, with h = p_k,  Q_k g + (Q_k - P_k) h.

Differences are formed before anything is rounded, so that rows that are close keep their digits, and where both sides
are equal all is exactly 0 (but for rounding in the masses of the columns without a partner, which each side adds up in
an order of its own). Of q_k and p_k the flatter one: what a difference that is small beside it would lose. The numbers
are float16 in units of the largest of a row of a tile, from which 11 bits remain of all that is at least 2^-29 of that:
the gradient is then rounded once, as an operand.

Memory, by counting, not measured: 4 bytes per element written once and read by both products, 12 in all, and 7
statistics and 2 factors per row of a tile, another 1.25 (float32 logits of both sides, and their gradient in half
precision, take 22 to 30). Of hidden sizes over 272 (144 before sm_90) a product reads once more for each so many
columns, most of it from the cache. Formulas: vocabdistil/reference/linear_matched_kl.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from .matched_kl import log_ratio, shifted, with_rest
from .rows import on_device
from .softmax import CLOSE, close_step, exp_less_one, log_one_plus, quotient, shift_of

TILE = 64  # columns that have statistics of their own
MATCHED = 2 * TILE  # the matched columns are padded to a multiple of this
TURNS = 8  # tiles of the teacher's other columns that a program takes, two of these wide
STEP = 32  # columns or rows that a product of the gradient takes at a time
PROGRAMS = 132  # one for each multiprocessor of an H200: products with fewer are cut into parts,
MOST_PARTS = 6  # not into more than these, as each takes memory
_STATISTICS = tl.constexpr(7)  # per row of a tile
_MASSES = tl.constexpr(4)  # per row of a part of the columns without a partner
_LARGEST = tl.constexpr(32768.0)  # of the float16 numbers
_TINY = tl.constexpr(1e-30)


@triton.jit
def _operand(x, dtype: tl.constexpr, WIDE: tl.constexpr):
    """Of a product on tensor cores. WIDE: float32, as the interpreter multiplies no bfloat16."""
    x = x.to(dtype)
    if WIDE:
        x = x.to(tl.float32)
    return x


@triton.jit
def _halves(values, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The first and the last columns of ``[ROWS, WIDTH]``."""
    return tl.split(tl.permute(tl.reshape(values, (ROWS, 2, WIDTH // 2)), (0, 2, 1)))


@triton.jit
def _logits(
    x, r, x_stride, weight, ids, bias, lengths, c, w_stride, rows, columns, dim, UNIT: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_R, BLOCK_V]`` in float32, -inf beyond the columns. A row or column beyond is read as the last one."""
    row = tl.minimum(r, rows - 1).to(tl.int64)
    column = tl.minimum(c, columns - 1)
    if ids is not None:
        at = tl.load(ids + column).to(tl.int64)
    else:
        at = column.to(tl.int64)
    left = x + row[:, None] * (x_stride * UNIT)
    right = weight + at[None, :] * (w_stride * UNIT)
    size = dim * UNIT
    total = tl.zeros([BLOCK_R, BLOCK_V], dtype=tl.float32)
    for begin in range(0, size, BLOCK_K):
        d = begin + tl.arange(0, BLOCK_K)
        a = tl.load(left + d[None, :], mask=(d < size)[None, :], other=0.0)
        b = tl.load(right + d[:, None], mask=(d < size)[:, None], other=0.0)
        dtype: tl.constexpr = x.dtype.element_ty
        total = tl.dot(_operand(a, dtype, WIDE), _operand(b, dtype, WIDE), total)
    if bias is not None:
        part = tl.load(bias + column)[None, :]
        if lengths is not None:
            part = tl.load(lengths + row).to(tl.float32)[:, None] * part
        total += part
    return tl.where((c < columns)[None, :], total, float("-inf"))


@triton.jit
def _write_tile(
    s, t, inverse, stats, g, h, r, c, k, rows, g_stride, h_stride, WRITE: tl.constexpr,
):  # fmt: skip
    """Statistics and numbers of the logits s and t ``[BLOCK_R, TILE]``, columns c, tile k."""
    top_s, top_t = tl.max(s, 1), tl.max(t, 1)
    shift_s, shift_t = shift_of(top_s), shift_of(top_t)
    exp_s, exp_t = tl.exp((s - shift_s[:, None]) * inverse), tl.exp((t - shift_t[:, None]) * inverse)
    sum_s, sum_t = tl.sum(exp_s, 1), tl.sum(exp_t, 1)
    # Differences before either side is shifted: of rows that are close these are exact.
    apart = ((s - t) - (shift_s - shift_t)[:, None]) * inverse
    mean = tl.sum(tl.where(exp_t == 0, 0.0, exp_t * apart), 1) / -sum_t
    ratio = tl.log(quotient(sum_s, sum_t))
    kl = mean + ratio
    close = (kl < CLOSE) & (sum_t != 0)
    first, rest = close_step(exp_t, exp_s, tl.exp(mean)[:, None], apart + mean[:, None])
    excess = tl.sum(rest, 1) / sum_t
    kl = tl.where(close, log_one_plus(excess), kl)
    ratio = tl.where(close, kl - mean, ratio)
    place, inside = stats + k.to(tl.int64) * _STATISTICS * rows + r, r < rows
    if WRITE:
        step = 1 / ((1 + excess) * sum_t)
        by_s = tl.where(close, step, tl.where(sum_s == 0, 0.0, 1 / sum_s))
        by_t = tl.where(close, excess * step, tl.where(sum_t == 0, 0.0, 1 / sum_t))
        slope = tl.where(close[:, None], first, exp_s) * by_s[:, None] - exp_t * by_t[:, None]
        largest = tl.max(tl.abs(slope), 1)
        unit = tl.where(largest < _TINY, 0.0, _LARGEST / largest)
        flatter = tl.where((sum_s >= sum_t)[:, None], exp_s, exp_t) * _LARGEST
        at = r.to(tl.int64)[:, None]
        tl.store(g + at * g_stride + c[None, :], (slope * unit[:, None]).to(tl.float16), mask=inside[:, None])
        tl.store(h + at * h_stride + c[None, :], flatter.to(tl.float16), mask=inside[:, None])
        tl.store(place + 6 * rows, tl.where(largest < _TINY, 0.0, largest), mask=inside)
    tl.store(place, top_s, mask=inside)
    tl.store(place + rows, sum_s, mask=inside)
    tl.store(place + 2 * rows, top_t, mask=inside)
    tl.store(place + 3 * rows, sum_t, mask=inside)
    tl.store(place + 4 * rows, kl, mask=inside)
    tl.store(place + 5 * rows, ratio, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def tiles_kernel(
    student, s_weight, s_bias, s_lengths, teacher, t_weight, t_ids, t_bias, t_lengths, temperature, stats, g, h, rows,
    columns, s_stride, sw_stride, s_dim, t_stride, tw_stride, t_dim, g_stride, h_stride, S_UNIT: tl.constexpr,
    T_UNIT: tl.constexpr, WRITE: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    begin = tl.program_id(1) * BLOCK_V
    c = begin + tl.arange(0, BLOCK_V)
    inverse = 1.0 / temperature
    s = _logits(
        student, r, s_stride, s_weight, None, s_bias, s_lengths, c, sw_stride, rows, columns, s_dim, S_UNIT, WIDE,
        BLOCK_R, BLOCK_V, BLOCK_K,
    )  # fmt: skip
    t = _logits(
        teacher, r, t_stride, t_weight, t_ids, t_bias, t_lengths, c, tw_stride, rows, columns, t_dim, T_UNIT, WIDE,
        BLOCK_R, BLOCK_V, BLOCK_K,
    )  # fmt: skip
    k = tl.program_id(1) * (BLOCK_V // TILE)
    if TILE == BLOCK_V:
        _write_tile(s, t, inverse, stats, g, h, r, c, k, rows, g_stride, h_stride, WRITE)
    else:
        d = begin + tl.arange(0, TILE)
        s0, s1 = _halves(s, BLOCK_R, BLOCK_V)
        t0, t1 = _halves(t, BLOCK_R, BLOCK_V)
        _write_tile(s0, t0, inverse, stats, g, h, r, d, k, rows, g_stride, h_stride, WRITE)
        _write_tile(s1, t1, inverse, stats, g, h, r, d + TILE, k + 1, rows, g_stride, h_stride, WRITE)


@triton.jit(do_not_specialize=["rows"])
def masses_kernel(
    x, weight, ids, bias, lengths, temperature, stats, h, rows, columns, x_stride, w_stride, dim, h_stride,
    UNIT: tl.constexpr, WRITE: tl.constexpr, TURNS: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of columns that have no partner: ``stats [parts, 4, rows]`` of ``TURNS`` tiles each, as ``rest_kernel`` of
    matched_kl gives them, and their exponentials."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inverse = 1.0 / temperature
    inside = r < rows
    top = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    total, less = tl.zeros([BLOCK_R], dtype=tl.float32), tl.zeros([BLOCK_R], dtype=tl.float32)
    count = 0.0
    for turn in range(0, TURNS):
        begin = (tl.program_id(1) * TURNS + turn) * BLOCK_V
        if begin < columns:
            c = begin + tl.arange(0, BLOCK_V)
            z = _logits(
                x, r, x_stride, weight, ids, bias, lengths, c, w_stride, rows, columns, dim, UNIT, WIDE, BLOCK_R,
                BLOCK_V, BLOCK_K,
            )  # fmt: skip
            high = tl.max(z, 1)
            low = (z - shift_of(high)[:, None]) * inverse
            values = tl.exp(low)
            terms = tl.minimum(columns - begin, BLOCK_V).to(tl.float32)
            added = tl.sum(values, 1)
            lacks = added - terms
            if tl.max((added > 0.5 * terms).to(tl.int32), 0) > 0:  # their sum has not the digits
                lacks = tl.sum(tl.where((c < columns)[None, :], exp_less_one(low), 0.0), 1)
            if WRITE:
                at = h + r.to(tl.int64)[:, None] * h_stride + c[None, :]
                tl.store(at, (values * _LARGEST).to(tl.float16), mask=inside[:, None])
            higher = tl.maximum(top, high)
            added, lacks = shifted(high, added, lacks, terms, higher, inverse)
            total, less = shifted(top, total, less, count, higher, inverse)
            top, total, less, count = higher, total + added, less + lacks, count + terms
    place = stats + tl.program_id(1).to(tl.int64) * _MASSES * rows + r
    tl.store(place, top, mask=inside)
    tl.store(place + rows, total, mask=inside)
    tl.store(place + 2 * rows, less, mask=inside)
    tl.store(place + 3 * rows, tl.zeros([BLOCK_R], dtype=tl.float32) + count, mask=inside)


@triton.jit
def _all_masses(stats, r, parts, rows, inverse, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """Top, shift, sum, what it lacks of the number of its terms, and this number, of the rows r."""
    tops = tl.full([PARTS, ROWS], float("-inf"), dtype=tl.float32)
    for begin in range(0, parts, PARTS):
        tops = tl.maximum(tops, _statistic(stats, 0, r, begin, parts, rows, _MASSES, float("-inf"), PARTS))
    top = tl.max(tops, 0)
    totals = tl.zeros([PARTS, ROWS], dtype=tl.float32)
    lacks, counts = totals, totals
    for begin in range(0, parts, PARTS):
        high = _statistic(stats, 0, r, begin, parts, rows, _MASSES, float("-inf"), PARTS)
        total = _statistic(stats, 1, r, begin, parts, rows, _MASSES, 0.0, PARTS)
        less = _statistic(stats, 2, r, begin, parts, rows, _MASSES, 0.0, PARTS)
        count = _statistic(stats, 3, r, begin, parts, rows, _MASSES, 0.0, PARTS)
        total, less = shifted(high, total, less, count, top[None, :], inverse)
        totals, lacks, counts = totals + total, lacks + less, counts + count
    return shift_of(top), tl.sum(totals, 0), tl.sum(lacks, 0), tl.sum(counts, 0)


@triton.jit
def _statistic(stats, i, r, begin, parts, rows, EACH: tl.constexpr, other, PARTS: tl.constexpr):
    """Number i of EACH of some parts ``[PARTS, ROWS]``."""
    k = begin + tl.arange(0, PARTS)
    place = stats + ((k * EACH + i).to(tl.int64) * rows)[:, None] + r[None, :]
    return tl.load(place, mask=(k < parts)[:, None] & (r < rows)[None, :], other=other)


@triton.jit
def _masses_of_tiles(stats, r, begin, tiles, rows, shift_s, shift_t, inverse, PARTS: tl.constexpr):
    """Of some tiles: both masses in units of the largest exponential of all, and the log of their ratio."""
    top_s = _statistic(stats, 0, r, begin, tiles, rows, _STATISTICS, float("-inf"), PARTS)
    sum_s = _statistic(stats, 1, r, begin, tiles, rows, _STATISTICS, 0.0, PARTS)
    top_t = _statistic(stats, 2, r, begin, tiles, rows, _STATISTICS, float("-inf"), PARTS)
    sum_t = _statistic(stats, 3, r, begin, tiles, rows, _STATISTICS, 0.0, PARTS)
    ratio = _statistic(stats, 5, r, begin, tiles, rows, _STATISTICS, 0.0, PARTS)
    own_s, own_t = tl.exp((top_s - shift_s[None, :]) * inverse), tl.exp((top_t - shift_t[None, :]) * inverse)
    apart = ((shift_of(top_s) - shift_of(top_t)) - (shift_s - shift_t)[None, :]) * inverse + ratio
    return own_s * sum_s, own_t * sum_t, apart, own_s, own_t, sum_s, sum_t


@triton.jit(do_not_specialize=["rows"])
def combine_kernel(
    stats, s_rest, t_rest, scale, temperature, loss, factors, rows, tiles, s_parts, t_parts, UNMATCHED: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The losses of what the tiles were reduced to and, unless None, ``factors [tiles + s_parts, 2, rows]``: what g
    and h count in the gradient. UNMATCHED: 0 renormalize, 1 rest, 2 drop."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = r < rows
    inverse = 1.0 / temperature
    lowest = tl.full([PARTS, ROWS], float("-inf"), dtype=tl.float32)
    zeros = tl.zeros([PARTS, ROWS], dtype=tl.float32)
    tops_s, tops_t = lowest, lowest
    for begin in range(0, tiles, PARTS):
        tops_s = tl.maximum(tops_s, _statistic(stats, 0, r, begin, tiles, rows, _STATISTICS, float("-inf"), PARTS))
        tops_t = tl.maximum(tops_t, _statistic(stats, 2, r, begin, tiles, rows, _STATISTICS, float("-inf"), PARTS))
    shift_s, shift_t = shift_of(tl.max(tops_s, 0)), shift_of(tl.max(tops_t, 0))
    sums_s, sums_t, dots, insides = zeros, zeros, zeros, zeros
    for begin in range(0, tiles, PARTS):
        q, p, apart, _, _, own, _ = _masses_of_tiles(stats, r, begin, tiles, rows, shift_s, shift_t, inverse, PARTS)
        kl = _statistic(stats, 4, r, begin, tiles, rows, _STATISTICS, 0.0, PARTS)
        sums_s, sums_t = sums_s + q, sums_t + p
        # No mass, no contribution, even where the student has none either.
        dots += tl.where(p == 0, 0.0, p * apart)
        insides += tl.where(p == 0, 0.0, tl.where(own == 0, float("inf"), p * kl))
    z_s, z_t = tl.sum(sums_s, 0), tl.sum(sums_t, 0)
    mean = tl.sum(dots, 0) / -z_t
    ratio = tl.log(quotient(z_s, z_t))
    between = mean + ratio
    close = (between < CLOSE) & (z_t != 0)
    tilt = tl.exp(mean)
    rests = zeros
    for begin in range(0, tiles, PARTS):
        q, p, apart, _, _, _, _ = _masses_of_tiles(stats, r, begin, tiles, rows, shift_s, shift_t, inverse, PARTS)
        _, rest = close_step(p, q, tilt[None, :], apart + mean[None, :])
        rests += rest
    excess = tl.sum(rests, 0) / z_t
    between = tl.where(close, log_one_plus(excess), between)
    ratio = tl.where(close, between - mean, ratio)
    kl = between + tl.sum(insides, 0) / z_t
    # A teacher without any mass asks for nothing; a student without any is infinitely far from what has some.
    kl = tl.where(z_t == 0, 0.0, tl.where(z_s == 0, float("inf"), kl))
    if UNMATCHED == 0:
        value = kl
        own = tl.where((z_t == 0) | (z_s == 0), 0.0, 1.0)
        more_t, by_u, shift_u = z_s * 0, z_s * 0, z_s * 0
    else:
        shift_u, z_u, less_u, count_u = _all_masses(s_rest, r, s_parts, rows, inverse, ROWS, PARTS)
        shift_v, z_v, less_v, count_v = _all_masses(t_rest, r, t_parts, rows, inverse, ROWS, PARTS)
        rest_ratio = log_ratio(z_u, less_u, count_u, z_v, less_v, count_v)
        value, own, more_t, by_u = with_rest(
            kl, ratio, shift_s, shift_t, shift_u, shift_v, inverse, z_s, z_t, z_u, z_v, rest_ratio, UNMATCHED == 2
        )
    counts = tl.load(scale + r, mask=inside, other=0.0)
    # Rows that count for nothing may be infinite.
    tl.store(loss + r, tl.where(counts == 0, 0.0, value * temperature * temperature), mask=inside)
    if factors is not None:
        factor = temperature * counts
        step = 1 / ((1 + excess) * z_t)
        share_s, share_t = tl.where(z_s == 0, 0.0, 1 / z_s), tl.where(z_t == 0, 0.0, 1 / z_t)
        for begin in range(0, tiles, PARTS):
            q, p, apart, own_s, own_t, sum_s, sum_t = _masses_of_tiles(
                stats, r, begin, tiles, rows, shift_s, shift_t, inverse, PARTS
            )  # fmt: skip
            unit = _statistic(stats, 6, r, begin, tiles, rows, _STATISTICS, 0.0, PARTS) * (1.0 / _LARGEST)
            first, _ = close_step(p, q, tilt[None, :], apart + mean[None, :])
            far = q * share_s[None, :] - p * share_t[None, :]
            moved = tl.where(close[None, :], (first - excess[None, :] * p) * step[None, :], far)
            student_flatter = sum_s >= sum_t
            by_g = tl.where(
                student_flatter, own[None, :] * p * share_t[None, :] + more_t[None, :] * p,
                own[None, :] * q * share_s[None, :],
            )  # fmt: skip
            by_h = own[None, :] * moved - more_t[None, :] * p
            by_h = tl.where(by_h == 0, 0.0, by_h / (tl.where(student_flatter, sum_s, sum_t) * _LARGEST))
            k = begin + tl.arange(0, PARTS)
            place = factors + ((2 * k).to(tl.int64) * rows)[:, None] + r[None, :]
            mask = (k < tiles)[:, None] & inside[None, :]
            tl.store(place, factor[None, :] * by_g * unit, mask=mask)
            tl.store(place + rows, factor[None, :] * by_h, mask=mask)
        if UNMATCHED != 0:
            for begin in range(0, s_parts, PARTS):
                top = _statistic(s_rest, 0, r, begin, s_parts, rows, _MASSES, float("-inf"), PARTS)
                by_h = factor[None, :] * by_u[None, :] * tl.exp((top - shift_u[None, :]) * inverse) * (1.0 / _LARGEST)
                k = begin + tl.arange(0, PARTS)
                place = factors + ((2 * (tiles + k)).to(tl.int64) * rows)[:, None] + r[None, :]
                mask = (k < s_parts)[:, None] & inside[None, :]
                tl.store(place, zeros, mask=mask)
                tl.store(place + rows, by_h, mask=mask)


@triton.jit
def _slopes(
    g, h, factors, row, column, k, rows, matched, g_stride, h_stride, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """The gradient of the logits of rows and columns from these on, of tile k, in float32."""
    r, c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_V)
    inside = r < rows - row
    place = factors + (tl.cast(2 * k, tl.int64) * rows + row)
    by_g = tl.load(place + r, mask=inside, other=0.0)
    by_h = tl.load(place + rows + r, mask=inside, other=0.0)
    # Addresses of 64 bits for the first element alone.
    at = tl.cast(row, tl.int64)
    first_g, first_h = at * g_stride + column, at * h_stride + column
    partnered = inside[:, None] & (c < matched - column)[None, :]
    of_g = tl.load(g + first_g + (r[:, None] * g_stride + c[None, :]), mask=partnered, other=0.0)
    of_h = tl.load(h + first_h + (r[:, None] * h_stride + c[None, :]), mask=inside[:, None], other=0.0)
    return by_g[:, None] * of_g.to(tl.float32) + by_h[:, None] * of_h.to(tl.float32)


@triton.jit
def _write_part(at, values, begin, size, ADD: tl.constexpr, WIDTH: tl.constexpr):
    d = begin + tl.arange(0, WIDTH)
    if ADD:
        values += tl.load(at + d[None, :], mask=(d < size)[None, :], other=0.0)
    tl.store(at + d[None, :], values, mask=(d < size)[None, :])


@triton.jit
def _write_half(at, values, begin, size, ADD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    if ADD and WIDTH > 64:
        low, high = _halves(values, ROWS, WIDTH)
        _write_part(at, low, begin, size, ADD, WIDTH // 2)
        _write_part(at, high, begin + WIDTH // 2, size, ADD, WIDTH // 2)
    else:
        _write_part(at, values, begin, size, ADD, WIDTH)


@triton.jit
def _write(at, values, begin, size, ADD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Columns ``[begin, begin + WIDTH)`` of the rows at these addresses, 64 or fewer at a time where they are added to,
    as what was there needs registers as well. No kernel may call itself: Triton 3.2 then looks for its end forever."""
    if ADD and WIDTH > 64:
        low, high = _halves(values, ROWS, WIDTH)
        _write_half(at, low, begin, size, ADD, ROWS, WIDTH // 2)
        _write_half(at, high, begin + WIDTH // 2, size, ADD, ROWS, WIDTH // 2)
    else:
        _write_part(at, values, begin, size, ADD, WIDTH)


@triton.jit(do_not_specialize=["rows"])
def hidden_kernel(
    g, h, factors, weight, out, rows, matched, turns, per, g_stride, h_stride, w_stride, dim, UNIT: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, TILE: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """``out [splits, rows, dim]``: the gradient of the logits times the weight, of ``per`` turns of columns each."""
    row = tl.program_id(0) * BLOCK_R
    r = row + tl.arange(0, BLOCK_R)
    inside = r < rows
    dtype: tl.constexpr = weight.dtype.element_ty
    size = dim * UNIT
    d = tl.program_id(1) * (MAIN + TAIL) + tl.arange(0, MAIN)
    total = tl.zeros([BLOCK_R, MAIN], dtype=tl.float32)
    if TAIL:
        e = tl.program_id(1) * (MAIN + TAIL) + MAIN + tl.arange(0, TAIL)
        more = tl.zeros([BLOCK_R, TAIL], dtype=tl.float32)
    first = tl.program_id(2) * per
    for turn in range(first, tl.minimum(first + per, turns)):
        column = turn * BLOCK_V
        slope = _slopes(
            g, h, factors, row, column, column // TILE, rows, matched, g_stride, h_stride, BLOCK_R, BLOCK_V
        )  # fmt: skip
        slope = _operand(slope, dtype, WIDE)
        at = weight + tl.cast(column, tl.int64) * (w_stride * UNIT) + tl.arange(0, BLOCK_V)[:, None] * (w_stride * UNIT)
        w = tl.load(at + d[None, :], mask=(d < size)[None, :], other=0.0)
        total = tl.dot(slope, _operand(w, dtype, WIDE), total)
        if TAIL:
            w = tl.load(at + e[None, :], mask=(e < size)[None, :], other=0.0)
            more = tl.dot(slope, _operand(w, dtype, WIDE), more)
    place = out + (tl.program_id(2).to(tl.int64) * rows + r)[:, None] * size
    tl.store(place + d[None, :], total, mask=inside[:, None] & (d < size)[None, :])
    if TAIL:
        tl.store(place + e[None, :], more, mask=inside[:, None] & (e < size)[None, :])


@triton.jit(do_not_specialize=["rows"])
def weight_kernel(
    g, h, factors, x, lengths, out, bias_out, rows, matched, per, g_stride, h_stride, x_stride, dim,
    UNIT: tl.constexpr, ADD: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, TILE: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """``out [splits, width, dim]``: the gradient of the logits, transposed, times the hidden states, of ``per`` blocks
    of rows each, and ``bias_out [splits, width]``, its sums; ADD: added to what is there."""
    k = tl.program_id(0)
    c = k * TILE + tl.arange(0, TILE)
    dtype: tl.constexpr = x.dtype.element_ty
    size = dim * UNIT
    d = tl.program_id(1) * (MAIN + TAIL) + tl.arange(0, MAIN)
    e = tl.program_id(1) * (MAIN + TAIL) + MAIN + tl.arange(0, TAIL if TAIL else 16)
    width = tl.num_programs(0) * TILE
    place = tl.program_id(2).to(tl.int64) * width + c
    total = tl.zeros([TILE, MAIN], dtype=tl.float32)
    more = tl.zeros([TILE, TAIL if TAIL else 16], dtype=tl.float32)
    sums = tl.zeros([TILE], dtype=tl.float32)
    first = tl.program_id(2) * per
    for turn in range(first, tl.minimum(first + per, tl.cdiv(rows, BLOCK_R))):
        row = turn * BLOCK_R
        r = tl.arange(0, BLOCK_R)
        inside = r < rows - row
        slope = _slopes(g, h, factors, row, k * TILE, k, rows, matched, g_stride, h_stride, BLOCK_R, TILE)
        if bias_out is not None:
            if lengths is not None:
                times = tl.load(lengths + row + r, mask=inside, other=0).to(tl.float32)
                sums += tl.sum(slope * times[:, None], 0)
            else:
                sums += tl.sum(slope, 0)
        if out is not None:
            slope = tl.trans(_operand(slope, dtype, WIDE))
            at = x + tl.cast(row, tl.int64) * (x_stride * UNIT) + r[:, None] * (x_stride * UNIT)
            y = tl.load(at + d[None, :], mask=inside[:, None] & (d < size)[None, :], other=0.0)
            total = tl.dot(slope, _operand(y, dtype, WIDE), total)
            if TAIL:
                y = tl.load(at + e[None, :], mask=inside[:, None] & (e < size)[None, :], other=0.0)
                more = tl.dot(slope, _operand(y, dtype, WIDE), more)
    if out is not None:
        at = out + place[:, None] * size
        _write(at, total, tl.program_id(1) * (MAIN + TAIL), size, ADD, TILE, MAIN)
        if TAIL:
            _write(at, more, tl.program_id(1) * (MAIN + TAIL) + MAIN, size, ADD, TILE, TAIL)
    if bias_out is not None:
        if tl.program_id(1) == 0:
            if ADD:
                sums += tl.load(bias_out + place)
            tl.store(bias_out + place, sums)


def capability() -> int:
    """Of the GPU that kernels are compiled for, as 90; the interpreter has none."""
    if _interpreted():
        return 90
    found = driver.active.get_current_target().arch
    return found if isinstance(found, int) else 80


@functools.cache
def tile(kernel: str, architecture: int) -> dict[str, Any]:
    """Sizes of a program's tile, warps, and turns of its loads that are under way.

    What a multiprocessor of an H200 holds decides: 64 x 128 logits of both sides are 128 registers of the 4 warps that
    multiply them (sm_90), their exponentials and differences, 64 columns at a time, the rest of the 255; two such
    programs share a multiprocessor, so that one multiplies while the other reduces, and 24 KB per turn of 64 columns
    of hidden states, three turns under way, are 147 KB of its 228. What is cut into fewer registers elsewhere, or comes
    out of the tensor memory of sm_100, was chosen by the report of Triton 3.9, in which nothing spills; in that of 3.2
    ``tiles_kernel`` does, by 0.7 to 4.6 KB per thread. Not measured.
    """
    tensor_memory = 100 <= architecture < 120
    options = {"enable_fp_fusion": True, "num_stages": 3, "BLOCK_K": 64}
    if kernel == "tiles":
        rows, columns, warps = (128, 64, 8) if tensor_memory else (64, 128, 4 if architecture == 90 else 8)
        return {**options, "BLOCK_R": rows, "BLOCK_V": columns, "num_warps": warps}
    if kernel == "masses":
        return {**options, "BLOCK_R": 128, "num_warps": 8}
    if kernel == "combine":
        return {"enable_fp_fusion": True, "num_warps": 4, "ROWS": 8, "PARTS": 64 if architecture >= 90 else 32}
    assert kernel == "products", kernel
    wide = architecture == 90 or tensor_memory
    warps = 8 if tensor_memory else 4
    return {"enable_fp_fusion": True, "num_stages": 3, "num_warps": warps, "widest": 272 if wide else 144}


@functools.cache
def widths(dim: int, widest: int) -> tuple[int, int, int]:
    """Programs that share the ``dim`` columns of a product, and the two powers of 2 that each takes of them (the second
    may be 0): as few programs as can be, each of which reads what the gradient is formed of."""
    programs = max(-(-dim // widest), 1)
    need = max(-(-dim // programs), 16)
    sizes = [(main + tail, main, tail) for main in (16, 32, 64, 128, 256) for tail in (0, 16, 32, 64) if tail < main]
    _, main, tail = min(size for size in sizes if need <= size[0] <= max(widest, need))
    return programs, main, tail


def _unit(*sizes: int) -> int:
    """8 where all are multiples of it: what the compiler then knows lets 16 bytes be read at a time."""
    return 1 if any(size % 8 for size in sizes) else 8


def _interpreted() -> bool:
    """What a kernel is where it is not compiled; the releases of Triton tell of it in ways of their own."""
    return not isinstance(tiles_kernel, triton.JITFunction)


def layout(matched: int, others: int) -> tuple[int, int]:
    """Where the other columns begin behind the matched ones, and the width of all, each padded to whole tiles."""
    at = triton.cdiv(matched, MATCHED) * MATCHED
    return at, at + triton.cdiv(others, TILE) * TILE


def _parts(programs: int, turns: int, dim: int) -> int:
    """Into how many parts, which are added in their order, a product of so many blocks of rows is cut, each of which
    takes so many turns."""
    programs *= widths(dim, tile("products", capability())["widest"])[0]
    return max(1, min(triton.cdiv(PROGRAMS, max(programs, 1)), MOST_PARTS, turns // 4))


def parts_of_weight(rows: int, width: int, dim: int) -> int:
    return _parts(width // TILE, triton.cdiv(rows, STEP), dim)


def _parts_of_hidden(rows: int, width: int, dim: int) -> int:
    return _parts(triton.cdiv(rows, TILE), width // STEP, dim)


def bytes_per_row(at: int, width: int, t_others: int, dim: int, wanted: bool, hidden_grad: bool) -> int:
    """Of a chunk, at most: of what :func:`layout` tells and ``t_others`` columns of the teacher."""
    numbers = at // TILE * _STATISTICS.value + (width - at) // TILE * _MASSES.value
    numbers += triton.cdiv(t_others, 2 * TILE * TURNS) * _MASSES.value + hidden_grad * MOST_PARTS * dim
    return 4 * numbers + wanted * (2 * (at + width) + 8 * (width // TILE))


def _float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def tiles(
    student: Tensor, s_weight: Tensor, s_bias: Tensor | None, s_lengths: Tensor | None, teacher: Tensor,
    t_weight: Tensor, t_ids: Tensor | None, t_bias: Tensor | None, t_lengths: Tensor | None, columns: int,
    temperature: float, out: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """Statistics ``[tiles, 7, R]``; writes float16 g and h ``[R, >= the padded columns]`` to ``out`` unless it is None.

    student, teacher: ``[R, D]``; s_weight ``[>= columns, D_s]``, in the student's dtype; t_weight: its rows ``t_ids
    [columns]``, or its first ones; biases: float32 ``[columns]``; lengths ``[R]`` as in
    :func:`vocabdistil.triton_kernels.matched_kl.dense_rows`. Columns of all matrices are adjacent."""
    (rows, s_dim), t_dim = student.shape, teacher.shape[1]
    options = tile("tiles", capability())
    of_s, of_t = (student.stride(0), s_weight.stride(0), s_dim), (teacher.stride(0), t_weight.stride(0), t_dim)
    units, (width, _) = (_unit(*of_s), _unit(*of_t)), layout(columns, 0)
    g, h = (None, None) if out is None else out
    stats = _float32(student, width // TILE, _STATISTICS.value, rows)
    with on_device(student):
        tiles_kernel[triton.cdiv(rows, options["BLOCK_R"]), width // options["BLOCK_V"]](
            student, s_weight, s_bias, s_lengths, teacher, t_weight, t_ids, t_bias, t_lengths, temperature, stats, g, h,
            rows, columns, *(n // units[0] for n in of_s), *(n // units[1] for n in of_t),
            0 if g is None else g.stride(0), 0 if h is None else h.stride(0), S_UNIT=units[0], T_UNIT=units[1],
            WRITE=out is not None, WIDE=_interpreted(), TILE=TILE, **options,
        )  # fmt: skip
    return stats


def masses(
    x: Tensor, weight: Tensor, ids: Tensor | None, bias: Tensor | None, lengths: Tensor | None, columns: int,
    temperature: float, out: Tensor | None,
) -> Tensor:  # fmt: skip
    """Statistics ``[parts, 4, R]`` of the columns that have no partner, the arguments as for :func:`tiles`; a part has
    `TILE` columns where their exponentials are written to float16 ``out [R, >= the padded columns]``."""
    rows, dim = x.shape
    block, turns = (TILE, 1) if out is not None else (2 * TILE, TURNS)
    parts = triton.cdiv(columns, block * turns)
    stats = _float32(x, parts, _MASSES.value, rows)
    sizes, options = (x.stride(0), weight.stride(0), dim), tile("masses", capability())
    unit = _unit(*sizes)
    if parts:
        with on_device(x):
            masses_kernel[triton.cdiv(rows, options["BLOCK_R"]), parts](
                x, weight, ids, bias, lengths, temperature, stats, out, rows, columns, *(n // unit for n in sizes),
                0 if out is None else out.stride(0), UNIT=unit, WRITE=out is not None, TURNS=turns, WIDE=_interpreted(),
                BLOCK_V=block, **options,
            )  # fmt: skip
    return stats


def combine(
    stats: Tensor, s_rest: Tensor | None, t_rest: Tensor | None, scale: Tensor, unmatched: int, temperature: float,
    loss: Tensor, wanted: bool,
) -> Tensor | None:  # fmt: skip
    """Writes ``loss [R]`` of the statistics of :func:`tiles`, and :func:`masses` of both sides' other columns, 0 where
    ``scale [R]`` is; what the products need besides g and h, ``[tiles, 2, R]``, if that is wanted."""
    rows, (s_parts, t_parts) = len(loss), (0 if x is None else len(x) for x in (s_rest, t_rest))
    factors = _float32(stats, len(stats) + s_parts, 2, rows) if wanted else None
    options = tile("combine", capability())
    with on_device(stats):
        combine_kernel[(triton.cdiv(rows, options["ROWS"]),)](
            stats, s_rest, t_rest, scale, temperature, loss, factors, rows, len(stats), s_parts, t_parts,
            UNMATCHED=unmatched, **options,
        )  # fmt: skip
    return factors


def grad_hidden(g: Tensor, h: Tensor, factors: Tensor, weight: Tensor, grad: Tensor) -> None:
    """``grad [R, D]``, float32: the gradient of the logits of all columns times the weight ``[width, D]``."""
    (rows, dim), turns = grad.shape, h.shape[1] // STEP
    parts = _parts_of_hidden(rows, h.shape[1], dim)
    out = _float32(grad, parts, rows, dim) if parts > 1 else grad
    options = tile("products", capability()).copy()
    programs, main, tail = widths(dim, options.pop("widest"))
    unit = _unit(weight.stride(0), dim)
    with on_device(g):
        hidden_kernel[triton.cdiv(rows, TILE), programs, parts](
            g, h, factors, weight, out, rows, g.shape[1], turns, triton.cdiv(turns, parts), g.stride(0), h.stride(0),
            weight.stride(0) // unit, dim // unit, UNIT=unit, WIDE=_interpreted(), BLOCK_R=TILE, BLOCK_V=STEP,
            TILE=TILE, MAIN=main, TAIL=tail, **options,
        )  # fmt: skip
    if parts > 1:
        torch.sum(out, 0, out=grad)


def grad_weight(
    g: Tensor, h: Tensor, factors: Tensor, x: Tensor, lengths: Tensor | None, out: Sequence[Tensor | None], add: bool
) -> None:
    """Writes, or adds to, the two of ``out`` that are not None, ``[parts, width, D]`` and ``[parts, width]``, float32,
    whose sums over the parts are the gradients of weight and bias: that of the logits, transposed, times the rows ``x
    [R, D]``, and its sums over them, each as often as the lengths say."""
    (rows, dim), (weight, bias) = x.shape, out
    parts = next(len(x) for x in out if x is not None)
    options = tile("products", capability()).copy()
    programs, main, tail = widths(1 if weight is None else dim, options.pop("widest"))
    unit, turns = _unit(x.stride(0), dim), triton.cdiv(rows, STEP)
    with on_device(g):
        weight_kernel[h.shape[1] // TILE, programs, parts](
            g, h, factors, x, lengths, weight, bias, rows, g.shape[1], triton.cdiv(turns, parts), g.stride(0),
            h.stride(0), x.stride(0) // unit, dim // unit, UNIT=unit, ADD=add, WIDE=_interpreted(), BLOCK_R=STEP,
            TILE=TILE, MAIN=main, TAIL=tail, **options,
        )  # fmt: skip
