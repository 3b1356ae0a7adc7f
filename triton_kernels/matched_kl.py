"""KL over the matched vocabulary in Triton: one program per pair.

A row of up to `RESIDENT` columns is read once and stays in registers, the teacher's matched columns beside the
student's, until the gradient is written: what must be read is read once. Longer rows are read twice: a first pass
keeps the largest logit and the sums of every lane, which give the divergence, a second one, from the end that the
cache still holds, forms the gradient. Rows that are close are read twice more in between and, as what they need
does not fit in registers beside a row, in turns for the gradient too. As in span_mean every load is
widened before arithmetic, addresses are int64, spans and ids are kept within the rows and columns, and nothing is
atomic. Formulas: vocabdistil/reference/matched_kl.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vocabdistil.core.values import MadeOf

from .rows import clamp, on_device, to_do
from .softmax import (
    CLOSE,
    close_step,
    exp_less_one,
    log_one_plus,
    online,
    online_two,
    quotient,
    shift_of,
    temperature_of,
)
from .span_loss import write_total

RESIDENT = 16384  # columns of the longest row that stays in registers
TURN = 4096  # columns read at a time of a longer one


@triton.jit
def _span(start, end, p, rows, SPANS: tl.constexpr):
    first, last = p, p + 1
    if SPANS:
        first = clamp(tl.load(start + p), rows)
        last = clamp(tl.load(end + p), rows)
    return first, last


@triton.jit
def _pooled(
    x, first, last, stride, columns, inside, share, SPANS: tl.constexpr, PADDED: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The pooled logits of a block of columns, -inf outside."""
    if SPANS:
        total = tl.zeros(columns.shape, dtype=ACC)
        for i in range(first, last):
            total += tl.load(x + i * stride + columns, mask=inside, other=0.0).to(ACC)
        value = tl.where(inside, total * share, float("-inf"))
    elif PADDED:
        value = tl.load(x + first * stride + columns, mask=columns < stride, other=0.0).to(ACC)
        value = tl.where(inside, value, float("-inf"))
    else:
        value = tl.load(x + first * stride + columns, mask=inside, other=float("-inf")).to(ACC)
    return value


@triton.jit
def _whole(top, total, inverse):
    """The shift of all lanes and what turns each one's sums into sums shifted by it."""
    shift = shift_of(tl.max(top))
    return shift, tl.exp((top - shift) * inverse)


@triton.jit
def _sum_exp(x, inverse):
    shift = shift_of(tl.max(x))
    return shift, tl.sum(tl.exp((x - shift) * inverse))


@triton.jit
def _sum_exp_two(x, y, inverse):
    """The same of two tensors together."""
    shift = shift_of(tl.maximum(tl.max(x), tl.max(y)))
    return shift, tl.sum(tl.exp((x - shift) * inverse)) + tl.sum(tl.exp((y - shift) * inverse))


@triton.jit
def _lacks(x, there, shift, inverse):
    """What the exponentials lack of 1."""
    return tl.sum(tl.where(there, exp_less_one((x - shift) * inverse), 0.0))


@triton.jit
def _near_count(total, count):
    """Is it worth adding up what each of ``count`` exponentials lacks of 1? Their sum has not its digits."""
    return total > 0.5 * count


@triton.jit
def log_ratio(a, less_a, count_a, b, less_b, count_b):
    """``log(a / b)`` of sums of exponentials; ``less = sum - count``."""
    x, y = less_a / count_a, less_b / count_b
    near = log_one_plus((count_a - count_b) / count_b) + log_one_plus((x - y) / (1 + y))
    return tl.where(_near_count(a, count_a) & _near_count(b, count_b), near, tl.log(a / b))


@triton.jit
def with_rest(
    kl, ratio, shift_s, shift_t, shift_u, shift_v, inverse, z_s, z_t, a, b, rest_ratio, DROP: tl.constexpr
):  # fmt: skip
    """The divergence with the unmatched classes, and what its gradient is formed of: ``own`` (see ``with_unmatched`` of
    csrc/cpu/matched.h), and what the teacher's matched and the student's unmatched exponentials count besides.

    kl, ratio: of the matched columns alone, and log of the student's sum over the teacher's. z, a, b: the sums of the
    matched columns, and of the other ones of student (u) and teacher (v); rest_ratio: log(a / b)."""
    teacher_odds = (shift_t - shift_v) * inverse + tl.log(z_t / b)  # log of the matched mass over the other
    student_odds = (shift_s - shift_u) * inverse + tl.log(z_s / a)
    # What these differ by, with the digits that their difference has not where the sides are close.
    apart = ((shift_s - shift_t) - (shift_u - shift_v)) * inverse
    apart += ratio - rest_ratio
    log_mass, log_rest = -_softplus(-teacher_odds), -_softplus(teacher_odds)
    mass, rest = tl.exp(log_mass), tl.exp(log_rest)
    up, down = rest * apart, -mass * apart
    first_mass, rest_mass = close_step(mass, mass, tl.exp(up), up)
    first_rest, rest_rest = close_step(rest, rest, tl.exp(down), down)
    excess = rest_mass + rest_rest
    between = log_one_plus(excess)
    more, own = up - between, mass + (first_mass - excess * mass) / (1 + excess)
    moved = (first_rest - excess * rest) / (1 + excess)
    far = ~(tl.abs(apart) < 30)  # exponentials of the difference might overflow
    far_more = -_softplus(-student_odds) - log_mass
    far_between = tl.where(rest == 0, 0.0, rest * (log_rest + _softplus(student_odds)))
    far_between -= tl.where(mass == 0, 0.0, mass * far_more)
    between = tl.where(far, tl.where(far_between < 0, 0.0, far_between), between)
    more = tl.where(far, far_more, more)
    own = tl.where(far, tl.exp(-_softplus(-student_odds)), own)
    moved = tl.where(far, tl.exp(-_softplus(student_odds)) - rest, moved)
    inside = tl.where(mass == 0, 0.0, mass * kl)
    if DROP:
        loss = inside - tl.where(mass == 0, 0.0, mass * more)
        gives, own = mass * (rest + moved), mass * own
    else:
        loss = inside + between
        gives = moved
    nothing, infinite = (z_t == 0) & (b == 0), (z_s == 0) & (a == 0)
    loss = tl.where(nothing, 0.0, tl.where(infinite, float("inf"), loss))
    own = tl.where(nothing | infinite, 0.0, own)
    gives = tl.where(nothing | infinite, 0.0, gives)
    return loss, own, tl.where(z_t == 0, 0.0, gives / z_t), tl.where(a == 0, 0.0, gives / a)


@triton.jit
def _softplus(x):
    """``log(1 + exp x)``"""
    return tl.where(x > 0, x, 0.0) + log_one_plus(tl.exp(-tl.abs(x)))


@triton.jit
def _block(
    student, teacher, teacher_of, s_bias, t_bias, d, first, last, t_first, t_last, s_stride, t_stride, v_s, v_t,
    share, t_share, s_times, t_times, SPANS: tl.constexpr, PADDED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Student and teacher logits of the student's columns d, and which of them are matched; -inf where there is none.
    Without a table the matched columns are the first ``v_t`` of both."""
    inside = d < v_s
    if teacher_of is None:
        ids = d
        both = inside & (d < v_t)
    else:
        ids = tl.load(teacher_of + d, mask=inside, other=-1)
        both = (ids >= 0) & (ids < v_t)
    s = _pooled(student, first, last, s_stride, d, inside, share, SPANS, PADDED, ACC)
    q = _pooled(teacher, t_first, t_last, t_stride, ids, both, t_share, SPANS, PADDED, ACC)
    if s_bias is not None:
        s += s_times * tl.load(s_bias + d, mask=d < s_stride, other=0.0).to(ACC)
    if t_bias is not None:
        q += t_times * tl.load(t_bias + d, mask=d < t_stride, other=0.0).to(ACC)
    return s, q, both


@triton.jit
def _dot(q, both, shift_t, difference, inverse):
    """The sum of exp(q) difference / T: no mass, no contribution, even where the difference is infinite."""
    mass = tl.exp((q - shift_t) * inverse)
    return tl.sum(tl.where(both & (mass != 0), mass * (difference * inverse), 0.0))


@triton.jit
def _step(s, q, both, shift_s, shift_t, inverse, apart, mean, tilt):
    """``close_step`` of the matched columns of rows that are close."""
    p, r = tl.exp((q - shift_t) * inverse), tl.exp((s - shift_s) * inverse)
    first, rest = close_step(p, r, tilt, ((s - q) + apart) * inverse + mean)
    return tl.where(both, first, 0.0), tl.where(both, rest, 0.0)


@triton.jit
def _slope(s, q, both, matched, shift_t, shift_u, inverse, by_s, by_t, by_u, UNMATCHED: tl.constexpr):
    """d loss / d logit up to a factor of the row; ``matched``: the student's exponentials or ``_step`` there."""
    slope = by_s * matched - by_t * tl.exp((q - shift_t) * inverse)
    if UNMATCHED == 0:
        slope = tl.where(both, slope, 0.0)
    else:
        slope = tl.where(both, slope, by_u * tl.exp((s - shift_u) * inverse))
    return slope


@triton.jit
def _outcome(
    kl, ratio, by_s, by_t, shift_s, shift_t, shift_u, shift_v, inverse, z_s, z_t, z_u, z_v, rest_ratio, factor,
    UNMATCHED: tl.constexpr,
):  # fmt: skip
    """The divergence of a row, and what its gradient is formed of, times ``factor``: what the student's matched, the
    teacher's and the student's unmatched exponentials count."""
    # A teacher without any mass asks for nothing; a student without any is infinitely far from what has some.
    nothing = (z_t == 0) | (z_s == 0)
    kl = tl.where(z_t == 0, 0.0, tl.where(z_s == 0, float("inf"), kl))
    by_s, by_t, by_u = tl.where(nothing, 0.0, by_s), tl.where(nothing, 0.0, by_t), z_s * 0
    value = kl
    if UNMATCHED != 0:
        value, own, add_t, by_u = with_rest(
            kl, ratio, shift_s, shift_t, shift_u, shift_v, inverse, z_s, z_t, z_u, z_v, rest_ratio, UNMATCHED == 2
        )
        by_s = tl.where((z_t == 0) & (z_s != 0), own / z_s, own * by_s)
        by_t = own * by_t + add_t
    return value, factor * by_s, factor * by_t, factor * by_u


@triton.jit
def _store(
    grad, slope, d, v_s, g_stride, first, last, begin, stop, filled, SPANS: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    if SPANS:
        for i in range(begin, stop):
            kept = tl.where(filled & (i >= first) & (i < last), slope, 0.0)
            tl.store(grad + i * g_stride + d, kept.to(grad.dtype.element_ty), mask=d < v_s)
    elif PADDED:
        tl.store(grad + first * g_stride + d, slope.to(grad.dtype.element_ty), mask=d < g_stride)
    else:
        tl.store(grad + first * g_stride + d, slope.to(grad.dtype.element_ty), mask=d < v_s)


@triton.jit
def _row(
    student, teacher, student_start, student_end, teacher_start, teacher_end, teacher_of, teacher_matched,
    teacher_rest, s_bias, t_bias, s_lengths, t_lengths, temperature, scale, loss, grad, by, pairs, s_rows, t_rows,
    s_stride, t_stride, g_stride, v_s, v_t, SPANS: tl.constexpr, MEAN: tl.constexpr, UNMATCHED: tl.constexpr,
    PADDED: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
    WHOLE: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    first, last = _span(student_start, student_end, p, s_rows, SPANS)
    t_first, t_last = _span(teacher_start, teacher_end, p, t_rows, SPANS)
    t = temperature_of(temperature, ACC)
    inverse = 1.0 / t
    share = tl.full([], 1.0, dtype=ACC)
    t_share = tl.full([], 1.0, dtype=ACC)
    s_times = tl.full([], 1.0, dtype=ACC)
    t_times = tl.full([], 1.0, dtype=ACC)
    if s_lengths is not None:
        s_times = tl.load(s_lengths + p).to(ACC)
    if t_lengths is not None:
        t_times = tl.load(t_lengths + p).to(ACC)
    if MEAN:
        share = 1.0 / tl.maximum(last - first, 1).to(ACC)
        t_share = 1.0 / tl.maximum(t_last - t_first, 1).to(ACC)
    filled = (last > first) & (t_last > t_first)

    if UNMATCHED != 0:  # before the rows that stay in registers are read
        if teacher_rest is not None:
            shift_v = shift_of(tl.load(teacher_rest + 4 * p))
            z_v, less_v = tl.load(teacher_rest + 4 * p + 1), tl.load(teacher_rest + 4 * p + 2)
            count_v = tl.load(teacher_rest + 4 * p + 3)
        else:
            top_v = tl.full([STREAM], float("-inf"), dtype=ACC)
            sum_v = tl.zeros([STREAM], dtype=ACC)
            here_v = tl.zeros([STREAM], dtype=ACC)
            for block in range(0, v_t, STREAM):
                d = block + tl.arange(0, STREAM)
                others = tl.load(teacher_matched + d, mask=d < v_t, other=1) == 0
                v = _pooled(teacher, t_first, t_last, t_stride, d, others, t_share, SPANS, PADDED, ACC)
                top_v, sum_v = online(top_v, sum_v, v, inverse)
                here_v += others.to(ACC)
            shift_v, weight = _whole(top_v, sum_v, inverse)
            z_v, count_v = tl.sum(sum_v * weight), tl.sum(here_v)
            less_v = z_v - count_v
            if _near_count(z_v, count_v):
                less_v = z_v * 0
                for block in range(0, v_t, STREAM):
                    d = block + tl.arange(0, STREAM)
                    others = tl.load(teacher_matched + d, mask=d < v_t, other=1) == 0
                    v = _pooled(teacher, t_first, t_last, t_stride, d, others, t_share, SPANS, PADDED, ACC)
                    less_v += _lacks(v, others, shift_v, inverse)

    blocks = tl.cdiv(v_s, STREAM)
    lanes, turn = tl.arange(0, BLOCK), tl.arange(0, STREAM)
    if UNMATCHED == 0:
        shift_u, shift_v, z_u, z_v, rest_ratio = share * 0, share * 0, share * 0, share * 0, share * 0
    if WHOLE:
        s, q, both = _block(
            student, teacher, teacher_of, s_bias, t_bias, lanes, first, last, t_first, t_last, s_stride, t_stride,
            v_s, v_t, share, t_share, s_times, t_times, SPANS, PADDED, ACC,
        )  # fmt: skip
        if TAIL > 0:
            behind = BLOCK + tl.arange(0, TAIL)
            s_tail, q_tail, both_tail = _block(
                student, teacher, teacher_of, s_bias, t_bias, behind, first, last, t_first, t_last, s_stride, t_stride,
                v_s, v_t, share, t_share, s_times, t_times, SPANS, PADDED, ACC,
            )  # fmt: skip
            shift_s, z_s = _sum_exp_two(
                tl.where(both, s, float("-inf")), tl.where(both_tail, s_tail, float("-inf")), inverse
            )
            shift_t, z_t = _sum_exp_two(q, q_tail, inverse)
            dot = _dot(q, both, shift_t, (q - shift_t) - (s - shift_s), inverse)
            dot += _dot(q_tail, both_tail, shift_t, (q_tail - shift_t) - (s_tail - shift_s), inverse)
        else:
            shift_s, z_s = _sum_exp(tl.where(both, s, float("-inf")), inverse)
            shift_t, z_t = _sum_exp(q, inverse)
            dot = _dot(q, both, shift_t, (q - shift_t) - (s - shift_s), inverse)
        moved = z_s * 0
        if UNMATCHED != 0:
            others = (lanes < v_s) & ~both
            count_u = tl.sum(others.to(ACC))
            if TAIL > 0:
                count_u += tl.sum(((behind < v_s) & ~both_tail).to(ACC))
                shift_u, z_u = _sum_exp_two(
                    tl.where(both, float("-inf"), s), tl.where(both_tail, float("-inf"), s_tail), inverse
                )
            else:
                shift_u, z_u = _sum_exp(tl.where(both, float("-inf"), s), inverse)
    else:
        lowest = tl.full([STREAM], float("-inf"), dtype=ACC)
        zeros = tl.zeros([STREAM], dtype=ACC)
        top_s, top_t, top_u, sum_s, sum_t, sum_u = lowest, lowest, lowest, zeros, zeros, zeros
        dots, here_u, from_s, from_t = zeros, zeros, share * 0, share * 0
        for block in range(0, blocks):
            d = block * STREAM + turn
            s, q, both = _block(
                student, teacher, teacher_of, s_bias, t_bias, d, first, last, t_first, t_last, s_stride, t_stride,
                v_s, v_t, share, t_share, s_times, t_times, SPANS, PADDED, ACC,
            )  # fmt: skip
            of_s = tl.where(both, s, float("-inf"))
            if block == 0:  # a constant that all logits of a side have in common is not to take digits
                from_s, from_t = shift_of(tl.max(of_s)), shift_of(tl.max(q))
            top_s, sum_s, top_t, sum_t, dots = online_two(
                top_s, sum_s, top_t, sum_t, dots, of_s, q, (q - from_t) - (of_s - from_s), inverse
            )  # fmt: skip
            if UNMATCHED != 0:
                top_u, sum_u = online(top_u, sum_u, tl.where(both, float("-inf"), s), inverse)
                here_u += ((d < v_s) & ~both).to(ACC)
        shift_s, weight = _whole(top_s, sum_s, inverse)
        z_s = tl.sum(sum_s * weight)
        shift_t, weight = _whole(top_t, sum_t, inverse)
        z_t, dot = tl.sum(sum_t * weight), tl.sum(tl.where(weight == 0, 0.0, dots * weight))
        moved = ((from_t - shift_t) - (from_s - shift_s)) * inverse
        if UNMATCHED != 0:
            shift_u, weight = _whole(top_u, sum_u, inverse)
            z_u, count_u = tl.sum(sum_u * weight), tl.sum(here_u)
    if UNMATCHED != 0:
        less_u = z_u - count_u
        if _near_count(z_u, count_u):
            less_u = z_u * 0
            for block in range(0, blocks):
                d = block * STREAM + turn
                x, y, matched = _block(
                    student, teacher, teacher_of, s_bias, t_bias, d, first, last, t_first, t_last, s_stride, t_stride,
                    v_s, v_t, share, t_share, s_times, t_times, SPANS, PADDED, ACC,
                )  # fmt: skip
                less_u += _lacks(x, (d < v_s) & ~matched, shift_u, inverse)

        rest_ratio = log_ratio(z_u, less_u, count_u, z_v, less_v, count_v)
    begin, stop, factor = first, last, share
    if grad is not None:
        if SPANS:
            begin = tl.load(student_end + p - 1, mask=p > 0, other=0).to(tl.int64)
            begin = tl.minimum(tl.maximum(begin, 0), s_rows)
            if p + 1 == pairs:
                stop = stop * 0 + s_rows
        factor = t * tl.load(scale + p) * share * by

    mean = dot / z_t + moved
    ratio = tl.log(quotient(z_s, z_t))
    if (mean + ratio < CLOSE) & (z_t != 0):
        # Anew, of differences that are taken before either side is shifted: of rows that are close these are exact.
        apart = shift_t - shift_s
        dot = z_s * 0
        for block in range(0, blocks):
            x, y, matched = _block(
                student, teacher, teacher_of, s_bias, t_bias, block * STREAM + turn, first, last, t_first, t_last,
                s_stride, t_stride, v_s, v_t, share, t_share, s_times, t_times, SPANS, PADDED, ACC,
            )  # fmt: skip
            dot += _dot(y, matched, shift_t, (y - x) - apart, inverse)
        mean = dot / z_t
        tilt = tl.exp(mean)
        rest = z_s * 0
        for block in range(0, blocks):
            x, y, matched = _block(
                student, teacher, teacher_of, s_bias, t_bias, block * STREAM + turn, first, last, t_first, t_last,
                s_stride, t_stride, v_s, v_t, share, t_share, s_times, t_times, SPANS, PADDED, ACC,
            )  # fmt: skip
            step, terms = _step(x, y, matched, shift_s, shift_t, inverse, apart, mean, tilt)
            rest += tl.sum(terms)
        excess = rest / z_t
        kl = log_one_plus(excess)
        by_s = 1 / ((1 + excess) * z_t)
        value, by_s, by_t, by_u = _outcome(
            kl, kl - mean, by_s, excess * by_s, shift_s, shift_t, shift_u, shift_v, inverse, z_s, z_t, z_u, z_v,
            rest_ratio, factor, UNMATCHED,
        )  # fmt: skip
        if grad is not None:
            for block in range(0, blocks):
                # Upwards: a gradient in the memory of the logits, of half their size perhaps, stays behind what is
                # still to be read.
                d = block * STREAM + turn
                x, y, matched = _block(
                    student, teacher, teacher_of, s_bias, t_bias, d, first, last, t_first, t_last, s_stride, t_stride,
                    v_s, v_t, share, t_share, s_times, t_times, SPANS, PADDED, ACC,
                )  # fmt: skip
                tl.debug_barrier()
                step, terms = _step(x, y, matched, shift_s, shift_t, inverse, apart, mean, tilt)
                slope = _slope(x, y, matched, step, shift_t, shift_u, inverse, by_s, by_t, by_u, UNMATCHED)
                _store(grad, slope, d, v_s, g_stride, first, last, begin, stop, filled, SPANS, PADDED)
    else:
        value, by_s, by_t, by_u = _outcome(
            mean + ratio, ratio, 1 / z_s, 1 / z_t, shift_s, shift_t, shift_u, shift_v, inverse, z_s, z_t, z_u, z_v,
            rest_ratio, factor, UNMATCHED,
        )  # fmt: skip
        if grad is not None:
            if WHOLE:
                own = tl.exp((s - shift_s) * inverse)
                slope = _slope(s, q, both, own, shift_t, shift_u, inverse, by_s, by_t, by_u, UNMATCHED)
                _store(grad, slope, lanes, v_s, g_stride, first, last, begin, stop, filled, SPANS, PADDED)
                if TAIL > 0:
                    own = tl.exp((s_tail - shift_s) * inverse)
                    slope = _slope(
                        s_tail, q_tail, both_tail, own, shift_t, shift_u, inverse, by_s, by_t, by_u, UNMATCHED
                    )
                    _store(grad, slope, behind, v_s, g_stride, first, last, begin, stop, filled, SPANS, PADDED)
            else:
                for i in range(0, blocks):
                    d = (blocks - 1 - i) * STREAM + turn
                    s, q, both = _block(
                        student, teacher, teacher_of, s_bias, t_bias, d, first, last, t_first, t_last, s_stride,
                        t_stride, v_s, v_t, share, t_share, s_times, t_times, SPANS, PADDED, ACC,
                    )  # fmt: skip
                    own = tl.exp((s - shift_s) * inverse)
                    slope = _slope(s, q, both, own, shift_t, shift_u, inverse, by_s, by_t, by_u, UNMATCHED)
                    _store(grad, slope, d, v_s, g_stride, first, last, begin, stop, filled, SPANS, PADDED)
    if loss is not None:
        if PADDED:  # pairs with an empty side are here rows that count for nothing, and may be infinite
            filled = tl.load(scale + p) != 0
        tl.store(loss + p, tl.where(filled, value * t * t, 0.0))


@triton.jit(do_not_specialize=["pairs", "s_rows", "t_rows"])  # they differ from batch to batch
def kernel(
    student, teacher, student_start, student_end, teacher_start, teacher_end, teacher_of, teacher_matched,
    teacher_rest, s_bias, t_bias, s_lengths, t_lengths, temperature, scale, loss, grad, upstream, formed, pairs,
    s_rows, t_rows, s_stride, t_stride, g_stride, v_s, v_t, SPANS: tl.constexpr, MEAN: tl.constexpr,
    UNMATCHED: tl.constexpr, PADDED: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
    WHOLE: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """UNMATCHED: 0 renormalize, 1 rest, 2 drop. PADDED: rows reach to their stride, a multiple of 16, so
    that 16 bytes are read and written at a time. WHOLE: BLOCK and TAIL (0: none) hold a row. What may be None: spans
    (row p with row p), ``teacher_of``, ``teacher_matched`` or ``teacher_rest``, biases, lengths, ``loss``, ``grad``,
    ``upstream``, with which the gradient is multiplied, and ``formed``: nothing is done where both are equal.

    The program of pair p also clears the rows between the span before and its own, the last one the tail."""
    # student, teacher: [s_rows, v_s], [t_rows, v_t], columns adjacent; *_start, *_end: int32 [pairs]. teacher_of: int32
    # [v_s], -1 where there is none; teacher_matched: int8 [v_t]; teacher_rest: [pairs, 4]. s_bias, t_bias: [v_s],
    # [v_t]; s_lengths, t_lengths: [pairs]; temperature: a number, or float64 []. scale, loss: [pairs]; grad: as the
    # student, rows g_stride apart; upstream, formed: [].
    if upstream is None:
        _row(
            student, teacher, student_start, student_end, teacher_start, teacher_end, teacher_of, teacher_matched,
            teacher_rest, s_bias, t_bias, s_lengths, t_lengths, temperature, scale, loss, grad, 1.0, pairs, s_rows,
            t_rows, s_stride, t_stride, g_stride, v_s, v_t, SPANS, MEAN, UNMATCHED, PADDED, ACC, BLOCK, TAIL, WHOLE,
            STREAM,
        )  # fmt: skip
    else:
        by = tl.load(upstream)
        if to_do(pairs, upstream, formed) != 0:
            _row(
                student, teacher, student_start, student_end, teacher_start, teacher_end, teacher_of, teacher_matched,
                teacher_rest, s_bias, t_bias, s_lengths, t_lengths, temperature, scale, loss, grad, by, pairs, s_rows,
                t_rows, s_stride, t_stride, g_stride, v_s, v_t, SPANS, MEAN, UNMATCHED, PADDED, ACC, BLOCK, TAIL,
                WHOLE, STREAM,
            )  # fmt: skip


@triton.jit
def _rest(z, bias, lengths, left_out, p, d, columns, stride, ACC: tl.constexpr):
    """Logits of the columns d, -inf where they are left out, and where they are not."""
    x = tl.load(z + p * stride + d, mask=d < stride, other=0.0)
    if bias is not None:
        part = tl.load(bias + d, mask=d < columns, other=0.0).to(ACC)
        if lengths is not None:
            part *= tl.load(lengths + p).to(ACC)
        x += part
    kept = tl.load(left_out + d, mask=d < columns, other=1) == 0
    return tl.where(kept, x, float("-inf")), kept


@triton.jit
def rest_kernel(
    z, rest, left_out, bias, lengths, temperature, columns, stride, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Adds the columns of z that are not left out to ``rest [R, 4]``: of each row the largest, the sum of
    exp((. - largest) / T), that sum less the number of its terms, and this number."""
    # z: [R, columns], rows stride apart; left_out: uint8 [columns]; bias: [columns] or None; lengths: [R] or None;
    # temperature: a number, or float64 [].
    p = tl.program_id(0).to(tl.int64)
    inverse = 1.0 / temperature_of(temperature, ACC)
    tops = tl.full([BLOCK], float("-inf"), dtype=ACC)
    sums = tl.zeros([BLOCK], dtype=ACC)
    here = tl.zeros([BLOCK], dtype=ACC)
    for block in range(0, columns, BLOCK):
        x, kept = _rest(z, bias, lengths, left_out, p, block + tl.arange(0, BLOCK), columns, stride, ACC)
        tops, sums = online(tops, sums, x, inverse)
        here += kept.to(ACC)
    top = tl.max(tops)
    shift, weight = _whole(tops, sums, inverse)
    total, count = tl.sum(sums * weight), tl.sum(here)
    less = total - count
    if _near_count(total, count):
        less = total * 0
        for block in range(0, columns, BLOCK):
            x, kept = _rest(z, bias, lengths, left_out, p, block + tl.arange(0, BLOCK), columns, stride, ACC)
            less += _lacks(x, kept, shift, inverse)
    rest += 4 * p
    before, before_count = tl.load(rest), tl.load(rest + 3)
    high = tl.maximum(top, before)
    total, less = shifted(top, total, less, count, high, inverse)
    old_total, old_less = shifted(before, tl.load(rest + 1), tl.load(rest + 2), before_count, high, inverse)
    tl.store(rest, high)
    tl.store(rest + 1, total + old_total)
    tl.store(rest + 2, less + old_less)
    tl.store(rest + 3, count + before_count)


@triton.jit
def shifted(top, total, less, count, high, inverse):
    """The sums of exponentials shifted by a larger value than the largest."""
    low = (top - shift_of(high)) * inverse
    weight = tl.exp(low)
    return weight * total, weight * less + count * exp_less_one(low)


@triton.jit(do_not_specialize=["count"])
def tables_kernel(student_ids, teacher_ids, teacher_of, teacher_matched, count, v_s, v_t, BLOCK: tl.constexpr):
    """``teacher_of[student id] = teacher id`` and, unless None, ``teacher_matched[teacher id] = 1``."""
    # student_ids, teacher_ids: int32 or int64 [count]; teacher_of: int32 [v_s]; teacher_matched: int8 [v_t] or None.
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(student_ids + i, mask=i < count, other=-1)
    t = tl.load(teacher_ids + i, mask=i < count, other=-1)
    tl.store(teacher_of + s, t.to(tl.int32), mask=(s >= 0) & (s < v_s))
    if teacher_matched is not None:
        tl.store(teacher_matched + t, (t * 0 + 1).to(tl.int8), mask=(t >= 0) & (t < v_t))


def _make_tables(
    student_ids: Tensor, teacher_ids: Tensor, v_s: int, v_t: int, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """``teacher_of [V_s]`` int32 and, if wanted, ``teacher_matched [V_t]`` int8."""
    teacher_of = torch.full((v_s,), -1, dtype=torch.int32, device=student_ids.device)
    teacher_matched = torch.zeros(v_t, dtype=torch.int8, device=student_ids.device) if wanted else None
    count = student_ids.numel()
    tables_kernel[(triton.cdiv(count, 1024),)](
        student_ids, teacher_ids, teacher_of, teacher_matched, count, v_s, v_t, BLOCK=1024, enable_fp_fusion=True
    )  # fmt: skip
    return teacher_of, teacher_matched


_tables = MadeOf(_make_tables)


def tile(columns: int, dtype: torch.dtype) -> dict[str, int | bool | None]:
    """Columns per turn and warps.

    Up to 16384 columns a row stays in registers: 16 columns of both sides per thread, 64 registers, so that 32 warps
    share a multiprocessor: of two rows of 8192 columns one is read while the other is computed. A row that 5/8 or 6/8
    of a power of two hold takes half of it and a tail, 10 or 12 columns per thread. Beyond, and where float64 takes
    twice the registers, a row is read in turns of 8 columns per thread. Spills and 16-byte accesses were looked at in
    the code for sm_90.
    """
    block, tail, wide = triton.next_power_of_2(columns), 0, dtype == torch.float64
    whole = block <= (RESIDENT // 4 if wide else RESIDENT)
    block = block if whole else TURN
    warps = min(max(block // (512 if whole else 256), 1), 32)
    turn = min(256 * warps, block, TURN)
    if whole and block >= 1024:
        fitting = [part for part in (block // 8, block // 4) if block // 2 + part >= columns]
        if fitting:
            block, tail = block // 2, fitting[0]
    return {"BLOCK": block, "TAIL": tail, "WHOLE": whole, "STREAM": turn} | {
        "num_warps": warps, "maxnreg": None if wide else 64, "enable_fp_fusion": True,
    }  # fmt: skip


def temperature_argument(temperature: float, like: Tensor) -> float | Tensor:
    """A scalar argument is float32: of float64 a tensor, filled on the device."""
    return like.new_full((), temperature) if like.dtype == torch.float64 else temperature


def resident(columns: int, dtype: torch.dtype) -> bool:
    """Whether a row of the accumulation dtype stays in registers."""
    return bool(tile(columns, dtype)["WHOLE"])


def accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def weighted_total(loss: Tensor, scale: Tensor, total: Tensor | None = None) -> Tensor:
    """``sum_p loss[p] scale[p]``, the same bits on every run, written to ``total []`` if that is given."""
    total = loss.new_empty(()) if total is None else total
    if loss.dtype == torch.float64:
        return torch.sum(loss * scale, dim=0, out=total)
    with on_device(loss):
        write_total(loss, scale, total, 1.0)
    return total


def matched_kl(
    student: Tensor, teacher: Tensor, spans: Sequence[Tensor], student_ids: Tensor, teacher_ids: Tensor,
    scale: Tensor, unmatched: int, mean: bool, temperature: float, keep: bool, loss: Tensor | None,
    total: Tensor | None, grad: Tensor | None, upstream: Tensor | None = None, formed: Tensor | None = None,
) -> None:  # fmt: skip
    """Logits ``[N, V]`` (unit column stride), no or four int32 spans ``[P]``, ids ``[V_m]``, scale ``[P]``. Writes what
    is not None: the losses ``[P]``, their scaled total ``[]`` and its gradient for the student's logits.

    keep: whether tables of the ids may be kept for the next call.
    ``upstream []`` is another factor, of the gradient alone; ``formed []`` is one that it is already there with: where
    it is the same it is left as it is, decided on the device."""
    pairs = scale.shape[0]
    if not pairs:
        if grad is not None:
            grad.zero_()
        if total is not None:
            total.zero_()
        return
    v_s, v_t = student.shape[1], teacher.shape[1]
    with on_device(student):
        tables = _tables.get if keep else _tables.make
        teacher_of, teacher_matched = tables(student_ids, teacher_ids, v_s, v_t, bool(unmatched))
        kernel[(pairs,)](
            student, teacher, *(spans or (None,) * 4), teacher_of, teacher_matched, None, None, None, None, None,
            temperature_argument(temperature, scale), scale, loss, grad, upstream, formed, pairs,
            student.shape[0], teacher.shape[0], student.stride(0), teacher.stride(0), v_s, v_s, v_t, SPANS=bool(spans),
            MEAN=mean and bool(spans), UNMATCHED=unmatched, PADDED=False, ACC=accumulator(scale.dtype),
            **tile(v_s, scale.dtype),
        )  # fmt: skip
        if loss is not None and total is not None:
            weighted_total(loss, scale, total)


def dense_rows(
    student: Tensor, teacher: Tensor, student_bias: Tensor | None, teacher_bias: Tensor | None,
    student_lengths: Tensor | None, teacher_lengths: Tensor | None, teacher_rest: Tensor | None, scale: Tensor,
    unmatched: int, temperature: float, loss: Tensor, grad: Tensor | None,
) -> None:  # fmt: skip
    """Logits ``[R, V]`` and ``[R, V_m]`` in the accumulation dtype, to which the biases, as often as the lengths
    ``[R]`` say, are still to be added; the first ``V_m`` columns of the student are the matched ones, in the teacher's
    order; the row strides are multiples of 16 and belong to the row, the biases are as long ->
    ``loss [R]``, 0 where ``scale`` is, and ``grad [R, V]`` (any float dtype) = ``scale`` d loss / d logit unless it is
    None. Up to `RESIDENT` columns its rows may lie in those of the student: a row is read before it is written.

    teacher_rest: of the teacher's other columns, from :func:`add_rest`; None for "renormalize"."""
    (rows, v_s), v_m = student.shape, teacher.shape[1]
    with on_device(student):
        kernel[(rows,)](
            student, teacher, None, None, None, None, None, None, teacher_rest, student_bias, teacher_bias,
            student_lengths, teacher_lengths, temperature_argument(temperature, scale), scale, loss, grad, None, None,
            rows, rows, rows, student.stride(0), teacher.stride(0), 0 if grad is None else grad.stride(0), v_s, v_m,
            SPANS=False, MEAN=False, UNMATCHED=unmatched, PADDED=True, ACC=accumulator(scale.dtype),
            **tile(v_s, scale.dtype),
        )  # fmt: skip


def add_rest(
    z: Tensor, bias: Tensor | None, lengths: Tensor | None, left_out: Tensor, temperature: float, rest: Tensor | None
) -> Tensor:
    """Adds to ``rest`` (None at first), what :func:`dense_rows` reads of the teacher's other columns, those columns of
    ``z [R, V]`` (row stride as there), plus the bias ``[V]`` as often as the lengths ``[R]`` say, that
    ``left_out [V]`` (uint8) does not mark."""
    rows, columns = z.shape
    if rest is None:
        rest = z.new_zeros(rows, 4)
        rest[:, 0] = float("-inf")
    with on_device(z):
        rest_kernel[(rows,)](
            z, rest, left_out, bias, lengths, temperature_argument(temperature, z), columns, z.stride(0),
            ACC=accumulator(z.dtype), BLOCK=2048, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return rest
