"""KL over the matched vocabulary in Triton: one program per pair, in passes over the student's columns.

The student's rows are read in order, the teacher's matched columns through ``teacher_of``; the passes find the largest
logits, the sums and the gradient, and only the gradient is written. As in span_mean every load is widened before
arithmetic, addresses are int64, spans and ids are kept within the rows and columns, and nothing is atomic.
Formulas: vocabdistil/reference/matched_kl.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _span(start, end, p, rows, SPANS: tl.constexpr):
    first, last = p, p + 1
    if SPANS:
        first = tl.minimum(tl.maximum(tl.load(start + p).to(tl.int64), 0), rows)
        last = tl.minimum(tl.maximum(tl.load(end + p).to(tl.int64), 0), rows)
    return first, last


@triton.jit
def _pooled(x, first, last, stride, columns, inside, share, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """The pooled logits of a block of columns, -inf outside."""
    total = tl.zeros([BLOCK], dtype=ACC)
    for i in range(first, last):
        total += tl.load(x + i * stride + columns, mask=inside, other=0.0).to(ACC)
    return tl.where(inside, total * share, float("-inf"))


@triton.jit
def _teacher_columns(teacher_of, columns, inside, v_t):
    ids = tl.load(teacher_of + columns, mask=inside, other=-1).to(tl.int64)
    return ids, (ids >= 0) & (ids < v_t)


@triton.jit
def _shift(top):
    """A class of -inf logits only is shifted by nothing, so that its terms are exp(-inf) = 0 and not NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def kernel(
    student, teacher, student_start, student_end, teacher_start, teacher_end, teacher_of, teacher_matched, temperature,
    scale, loss, grad, pairs, s_rows, t_rows, s_stride, t_stride, v_s, v_t, SPANS: tl.constexpr, MEAN: tl.constexpr,
    UNMATCHED: tl.constexpr, GRAD: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """UNMATCHED: 0 renormalize, 1 rest, 2 drop. The program of pair p also clears the rows between the span before and
    its own, the last one the tail."""
    p = tl.program_id(0).to(tl.int64)
    first, last = _span(student_start, student_end, p, s_rows, SPANS)
    t_first, t_last = _span(teacher_start, teacher_end, p, t_rows, SPANS)
    t = tl.load(temperature).to(ACC)
    inverse = 1.0 / t
    share = tl.full([], 1.0, dtype=ACC)
    t_share = tl.full([], 1.0, dtype=ACC)
    if MEAN:
        share = 1.0 / tl.maximum(last - first, 1).to(ACC)
        t_share = 1.0 / tl.maximum(t_last - t_first, 1).to(ACC)
    filled = (last > first) & (t_last > t_first)
    lowest = tl.full([BLOCK], float("-inf"), dtype=ACC)
    zeros = tl.zeros([BLOCK], dtype=ACC)

    top_s, top_t, top_u, top_v = lowest, lowest, lowest, lowest
    for block in range(0, v_s, BLOCK):
        d = block + tl.arange(0, BLOCK)
        inside = d < v_s
        ids, both = _teacher_columns(teacher_of, d, inside, v_t)
        s = _pooled(student, first, last, s_stride, d, inside, share, ACC, BLOCK)
        q = _pooled(teacher, t_first, t_last, t_stride, ids, both, t_share, ACC, BLOCK)
        top_s = tl.maximum(top_s, tl.where(both, s, lowest))
        top_t = tl.maximum(top_t, q)
        top_u = tl.maximum(top_u, tl.where(both, lowest, s))
    if UNMATCHED != 0:
        for block in range(0, v_t, BLOCK):
            d = block + tl.arange(0, BLOCK)
            rest = tl.load(teacher_matched + d, mask=d < v_t, other=1) == 0
            top_v = tl.maximum(top_v, _pooled(teacher, t_first, t_last, t_stride, d, rest, t_share, ACC, BLOCK))
    shift_s, shift_t = _shift(tl.max(top_s)), _shift(tl.max(top_t))
    shift_u, shift_v = _shift(tl.max(top_u)), _shift(tl.max(top_v))

    sum_s, sum_t, dot, sum_u, sum_v = zeros, zeros, zeros, zeros, zeros
    for block in range(0, v_s, BLOCK):
        d = block + tl.arange(0, BLOCK)
        inside = d < v_s
        ids, both = _teacher_columns(teacher_of, d, inside, v_t)
        s = _pooled(student, first, last, s_stride, d, inside, share, ACC, BLOCK)
        q = _pooled(teacher, t_first, t_last, t_stride, ids, both, t_share, ACC, BLOCK)
        mass = tl.exp((q - shift_t) * inverse)
        sum_s += tl.where(both, tl.exp((s - shift_s) * inverse), 0.0)
        sum_t += mass
        # One product, not a difference of two: that would be contracted, and no longer be 0 where both are equal.
        dot += tl.where(both & (mass != 0), mass * (((q - shift_t) - (s - shift_s)) * inverse), 0.0)
        if UNMATCHED != 0:
            sum_u += tl.where(inside & (ids < 0), tl.exp((s - shift_u) * inverse), 0.0)
    if UNMATCHED != 0:
        for block in range(0, v_t, BLOCK):
            d = block + tl.arange(0, BLOCK)
            rest = tl.load(teacher_matched + d, mask=d < v_t, other=1) == 0
            v = _pooled(teacher, t_first, t_last, t_stride, d, rest, t_share, ACC, BLOCK)
            sum_v += tl.exp((v - shift_v) * inverse)
    z_s, z_t, total = tl.sum(sum_s), tl.sum(sum_t), tl.sum(dot)

    # d loss / d logit: matched: by_s exp(s + add_s) - exp(t + add_t); unmatched: by_u exp u. by_s is 1 wherever equal
    # sides must give exactly 0.
    by_s, by_u, add_s, add_t = 1.0, z_s * 0, -tl.log(z_s), -tl.log(z_t)
    value = total / z_t + tl.log(z_s / z_t)
    if UNMATCHED != 0:
        z_u, z_v = tl.sum(sum_u), tl.sum(sum_v)
        # Each class has its own shift, so that neither log q_U nor log r_U underflows.
        a, b = shift_s * inverse + tl.log(z_s), shift_u * inverse + tl.log(z_u)
        high = tl.maximum(a, b)
        all_s = high + tl.log(tl.exp(a - high) + tl.exp(b - high))
        log_r, rest_r = a - all_s, b - all_s
        a, b = shift_t * inverse + tl.log(z_t), shift_v * inverse + tl.log(z_v)
        high = tl.maximum(a, b)
        all_t = high + tl.log(tl.exp(a - high) + tl.exp(b - high))
        log_q, rest_q = a - all_t, b - all_t
        mass, rest = tl.exp(log_q), tl.exp(rest_q)
        value = tl.where(mass == 0, 0.0, mass * (total / z_t + (log_q - tl.log(z_t)) - (log_r - tl.log(z_s))))
        if UNMATCHED == 1:
            value += tl.where(rest == 0, 0.0, rest * (rest_q - rest_r))
            by_u = tl.exp(rest_r) - rest
        else:
            by_s, by_u = mass, mass * tl.exp(rest_r)
        add_s = tl.where(z_s == 0, float("-inf"), log_r + add_s)
        add_t = tl.where(z_t == 0, float("-inf"), log_q + add_t)
        by_u = tl.where(z_u == 0, 0.0, by_u / z_u)
    tl.store(loss + p, tl.where(filled, value * t * t, 0.0))

    if GRAD:
        begin, stop = first, last
        if SPANS:
            begin = tl.load(student_end + p - 1, mask=p > 0, other=0).to(tl.int64)
            begin = tl.minimum(tl.maximum(begin, 0), s_rows)
            if p + 1 == pairs:
                stop = stop * 0 + s_rows
        factor = t * tl.load(scale + p) * share
        for block in range(0, v_s, BLOCK):
            d = block + tl.arange(0, BLOCK)
            inside = d < v_s
            ids, both = _teacher_columns(teacher_of, d, inside, v_t)
            s = _pooled(student, first, last, s_stride, d, inside, share, ACC, BLOCK)
            q = _pooled(teacher, t_first, t_last, t_stride, ids, both, t_share, ACC, BLOCK)
            slope = by_s * tl.exp((s - shift_s) * inverse + add_s) - tl.exp((q - shift_t) * inverse + add_t)
            outer = zeros
            if UNMATCHED != 0:
                outer = by_u * tl.exp((s - shift_u) * inverse)
            slope = factor * tl.where(both, slope, outer)
            for i in range(begin, stop):
                kept = tl.where(filled & (i >= first) & (i < last), slope, 0.0)
                tl.store(grad + i * v_s + d, kept.to(grad.dtype.element_ty), mask=inside)


def matched_kl(
    student: Tensor, teacher: Tensor, spans: Sequence[Tensor], student_ids: Tensor, teacher_ids: Tensor,
    scale: Tensor, unmatched: int, mean: bool, temperature: float, wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Logits ``[N, V]`` (unit column stride), no or four int32 spans ``[P]``, ids ``[V_m]``, scale ``[P]`` -> the
    scaled total, the losses ``[P]`` and, if ``wanted``, the gradient of the total for the student's logits."""
    loss = torch.empty_like(scale)
    grad = student.new_empty(student.shape if wanted else 0)
    pairs = scale.shape[0]
    if not pairs:
        return scale.new_zeros(()), loss, grad.zero_()
    v_s, v_t = student.shape[1], teacher.shape[1]
    student_ids, teacher_ids = student_ids.long(), teacher_ids.long()
    teacher_of = student_ids.new_full((v_s,), -1, dtype=torch.int32)
    teacher_of.index_copy_(0, student_ids, teacher_ids.to(torch.int32))
    teacher_matched = torch.zeros(v_t if unmatched else 1, dtype=torch.int8, device=student.device)
    if unmatched:
        teacher_matched.index_fill_(0, teacher_ids, 1)
    vectors = spans or [teacher_of] * 4  # not read
    kernel[(pairs,)](
        student, teacher, *vectors, teacher_of, teacher_matched, scale.new_full((1,), temperature), scale, loss, grad,
        pairs, student.shape[0], teacher.shape[0], student.stride(0), teacher.stride(0), v_s, v_t, SPANS=bool(spans),
        MEAN=mean, UNMATCHED=unmatched, GRAD=wanted, ACC=tl.float64 if scale.dtype == torch.float64 else tl.float32,
        BLOCK=min(triton.next_power_of_2(v_s), 1024),
    )  # fmt: skip
    return (loss * scale).sum(dtype=torch.float64).to(scale.dtype), loss, grad
