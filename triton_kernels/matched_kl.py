"""KL over the matched vocabulary in Triton: one program per pair.

A row of up to `RESIDENT` columns is read once and stays in registers, the teacher's matched columns beside the
student's, until the gradient is written: what must be read is read once. Longer rows are read twice: a first pass
keeps the largest logit and the sum of every lane, a second one, from the end that the cache still holds, forms the
divergence and the gradient. As in span_mean every load is widened before arithmetic, addresses are int64, spans and
ids are kept within the rows and columns, and nothing is atomic. Formulas: vocabdistil/reference/matched_kl.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from vocabdistil.core.values import Seen

from .rows import clamp, on_device
from .span_loss import total_kernel

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
def shift_of(top):
    """A class of -inf logits only is shifted by nothing, so that its terms are exp(-inf) = 0 and not NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def online(top, total, x, inverse):
    """Of every lane the largest so far and the sum of exp((. - largest) / T), with x added to both."""
    above = x > top
    high = tl.where(above, x, top)
    less = tl.exp((tl.where(above, top, x) - shift_of(high)) * inverse)
    return high, tl.where(above, total * less + 1, total + less)


@triton.jit
def _whole(top, total, inverse):
    """The shift and the sum of all lanes."""
    shift = shift_of(tl.max(top))
    return shift, tl.sum(total * tl.exp((top - shift) * inverse))


@triton.jit
def _sum_exp(x, inverse):
    shift = shift_of(tl.max(x))
    return shift, tl.sum(tl.exp((x - shift) * inverse))


@triton.jit
def _log_add(a, b):
    high = tl.maximum(a, b)
    return high + tl.log(tl.exp(a - high) + tl.exp(b - high))


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
def _slope(
    s, q, both, shift_s, shift_t, shift_u, inverse, ratio, by_s, by_u, add_s, add_t, UNMATCHED: tl.constexpr
):  # fmt: skip
    """The terms q (log q - log r) and d loss / d logit, each up to a factor of the row.

    Where both sides are equal the gradient is exactly 0: ``ratio`` and ``by_s`` are then 1, and a product with 1 is
    exact whether it is contracted or not. The term is one product, not a difference of two.
    """
    low_s, low_t = (s - tl.where(both, shift_s, shift_u)) * inverse, (q - shift_t) * inverse
    mass = tl.exp(low_t)
    term = tl.where(both & (mass != 0), mass * ((q - shift_t) - (s - shift_s)) * inverse, 0.0)
    if UNMATCHED == 0:
        return term, tl.where(both, tl.exp(low_s) - mass * ratio, 0.0)
    else:
        by, add = tl.where(both, by_s, by_u), tl.where(both, add_s, 0.0)
        return term, by * tl.exp(low_s + add) - tl.where(both, tl.exp(low_t + add_t), 0.0)


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
    PADDED: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    first, last = _span(student_start, student_end, p, s_rows, SPANS)
    t_first, t_last = _span(teacher_start, teacher_end, p, t_rows, SPANS)
    if ACC == tl.float64:
        t = tl.load(temperature)
    else:
        t = temperature
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
            log_v = tl.load(teacher_rest + p)
        else:
            top_v = tl.full([STREAM], float("-inf"), dtype=ACC)
            sum_v = tl.zeros([STREAM], dtype=ACC)
            for block in range(0, v_t, STREAM):
                d = block + tl.arange(0, STREAM)
                others = tl.load(teacher_matched + d, mask=d < v_t, other=1) == 0
                v = _pooled(teacher, t_first, t_last, t_stride, d, others, t_share, SPANS, PADDED, ACC)
                top_v, sum_v = online(top_v, sum_v, v, inverse)
            shift_v, z_v = _whole(top_v, sum_v, inverse)
            log_v = shift_v * inverse + tl.log(z_v)

    blocks = tl.cdiv(v_s, BLOCK)
    lanes = tl.arange(0, BLOCK)
    if WHOLE:
        s, q, both = _block(
            student, teacher, teacher_of, s_bias, t_bias, lanes, first, last, t_first, t_last, s_stride, t_stride,
            v_s, v_t, share, t_share, s_times, t_times, SPANS, PADDED, ACC,
        )  # fmt: skip
        shift_s, z_s = _sum_exp(tl.where(both, s, float("-inf")), inverse)
        shift_t, z_t = _sum_exp(q, inverse)
        if UNMATCHED != 0:
            shift_u, z_u = _sum_exp(tl.where(both, float("-inf"), s), inverse)
    else:
        lowest = tl.full([BLOCK], float("-inf"), dtype=ACC)
        zeros = tl.zeros([BLOCK], dtype=ACC)
        top_s, top_t, top_u, sum_s, sum_t, sum_u = lowest, lowest, lowest, zeros, zeros, zeros
        for block in range(0, blocks):
            s, q, both = _block(
                student, teacher, teacher_of, s_bias, t_bias, block * BLOCK + lanes, first, last, t_first, t_last,
                s_stride, t_stride, v_s, v_t, share, t_share, s_times, t_times, SPANS, PADDED, ACC,
            )  # fmt: skip
            top_s, sum_s = online(top_s, sum_s, tl.where(both, s, float("-inf")), inverse)
            top_t, sum_t = online(top_t, sum_t, q, inverse)
            if UNMATCHED != 0:
                top_u, sum_u = online(top_u, sum_u, tl.where(both, float("-inf"), s), inverse)
        shift_s, z_s = _whole(top_s, sum_s, inverse)
        shift_t, z_t = _whole(top_t, sum_t, inverse)
        if UNMATCHED != 0:
            shift_u, z_u = _whole(top_u, sum_u, inverse)

    if ACC == tl.float64:
        ratio = z_s / z_t
    else:
        ratio = tl.div_rn(z_s, z_t)
    by_s, by_u, add_s, add_t = z_s * 0 + 1, z_s * 0, z_s * 0, z_s * 0
    rest, rest_q, rest_r, mass = z_s * 0, z_s * 0, z_s * 0, z_s * 0 + 1
    if UNMATCHED == 0:
        shift_u = shift_s
        # A teacher without any mass asks for nothing; a student without any is infinitely far from what has some.
        nothing = (z_t == 0) | (z_s == 0)
        outside, excess = tl.log(ratio), tl.where(nothing, 0.0, 1 / z_s)
        ratio = tl.where(nothing, 0.0, ratio)
    else:
        # Each class has its own shift, so that neither log q_U nor log r_U underflows.
        a = shift_t * inverse + tl.log(z_t)
        all_t = _log_add(a, log_v)
        log_q, rest_q = a - all_t, log_v - all_t
        a, b = shift_s * inverse + tl.log(z_s), shift_u * inverse + tl.log(z_u)
        all_s = _log_add(a, b)
        log_r, rest_r = a - all_s, b - all_s
        mass, rest = tl.exp(log_q), tl.exp(rest_q)
        outside, excess = (log_q - tl.log(z_t)) - (log_r - tl.log(z_s)), 1.0
        if UNMATCHED == 1:
            by_u = tl.exp(rest_r) - rest
        else:
            by_s, by_u = mass, mass * tl.exp(rest_r)
        add_s = tl.where(z_s == 0, float("-inf"), log_r - tl.log(z_s))
        add_t = tl.where(z_t == 0, float("-inf"), log_q - tl.log(z_t))
        by_u = tl.where(z_u == 0, 0.0, by_u / z_u)

    begin, stop = first, last
    factor = excess
    if grad is not None:
        if SPANS:
            begin = tl.load(student_end + p - 1, mask=p > 0, other=0).to(tl.int64)
            begin = tl.minimum(tl.maximum(begin, 0), s_rows)
            if p + 1 == pairs:
                stop = stop * 0 + s_rows
        factor = excess * t * tl.load(scale + p) * share * by
    if WHOLE:
        terms, slope = _slope(
            s, q, both, shift_s, shift_t, shift_u, inverse, ratio, by_s, by_u, add_s, add_t, UNMATCHED
        )  # fmt: skip
        if grad is not None:
            _store(grad, factor * slope, lanes, v_s, g_stride, first, last, begin, stop, filled, SPANS, PADDED)
    else:
        terms = tl.zeros([BLOCK], dtype=ACC)
        for i in range(0, blocks):
            d = (blocks - 1 - i) * BLOCK + lanes
            s, q, both = _block(
                student, teacher, teacher_of, s_bias, t_bias, d, first, last, t_first, t_last, s_stride, t_stride,
                v_s, v_t, share, t_share, s_times, t_times, SPANS, PADDED, ACC,
            )  # fmt: skip
            more, slope = _slope(
                s, q, both, shift_s, shift_t, shift_u, inverse, ratio, by_s, by_u, add_s, add_t, UNMATCHED
            )  # fmt: skip
            terms += more
            if grad is not None:
                _store(grad, factor * slope, d, v_s, g_stride, first, last, begin, stop, filled, SPANS, PADDED)
    if loss is not None:
        value = tl.sum(terms) / z_t + outside
        if UNMATCHED == 0:
            value = tl.where(value < 0, 0.0, value)  # what rounding leaves of rows that are close
            value = tl.where(z_t == 0, 0.0, tl.where(z_s == 0, float("inf"), value))
        if UNMATCHED != 0:
            value = tl.where(mass == 0, 0.0, mass * value)
        if UNMATCHED == 1:
            value += tl.where(rest == 0, 0.0, rest * (rest_q - rest_r))
        if PADDED:  # pairs with an empty side are here rows that count for nothing, and may be infinite
            filled = tl.load(scale + p) != 0
        tl.store(loss + p, tl.where(filled, value * t * t, 0.0))


@triton.jit(do_not_specialize=["pairs", "s_rows", "t_rows"])  # they differ from batch to batch
def kernel(
    student, teacher, student_start, student_end, teacher_start, teacher_end, teacher_of, teacher_matched,
    teacher_rest, s_bias, t_bias, s_lengths, t_lengths, temperature, scale, loss, grad, upstream, pairs, s_rows,
    t_rows, s_stride, t_stride, g_stride, v_s, v_t, SPANS: tl.constexpr, MEAN: tl.constexpr, UNMATCHED: tl.constexpr,
    PADDED: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """UNMATCHED: 0 renormalize, 1 rest, 2 drop. PADDED: rows reach to their stride, a multiple of 16, so
    that 16 bytes are read and written at a time. WHOLE: BLOCK holds a row. What may be None: the spans (row p with row
    p), ``teacher_of``, ``teacher_matched`` or ``teacher_rest``, biases, lengths, ``loss``, ``grad``, and ``upstream``,
    with which the gradient is multiplied; nothing is done where it is 1.

    The program of pair p also clears the rows between the span before and its own, the last one the tail."""
    if upstream is None:
        _row(
            student, teacher, student_start, student_end, teacher_start, teacher_end, teacher_of, teacher_matched,
            teacher_rest, s_bias, t_bias, s_lengths, t_lengths, temperature, scale, loss, grad, 1.0, pairs, s_rows,
            t_rows, s_stride, t_stride, g_stride, v_s, v_t, SPANS, MEAN, UNMATCHED, PADDED, ACC, BLOCK, WHOLE, STREAM,
        )  # fmt: skip
    else:
        by = tl.load(upstream)
        if by != 1:
            _row(
                student, teacher, student_start, student_end, teacher_start, teacher_end, teacher_of, teacher_matched,
                teacher_rest, s_bias, t_bias, s_lengths, t_lengths, temperature, scale, loss, grad, by, pairs, s_rows,
                t_rows, s_stride, t_stride, g_stride, v_s, v_t, SPANS, MEAN, UNMATCHED, PADDED, ACC, BLOCK, WHOLE,
                STREAM,
            )  # fmt: skip


@triton.jit
def rest_kernel(
    z, total, left_out, bias, lengths, temperature, columns, stride, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Adds the columns of z that are not left out to the log sum exp of each row."""
    p = tl.program_id(0).to(tl.int64)
    if ACC == tl.float64:
        inverse = 1.0 / tl.load(temperature)
    else:
        inverse = 1.0 / temperature
    top = tl.full([BLOCK], float("-inf"), dtype=ACC)
    sums = tl.zeros([BLOCK], dtype=ACC)
    for block in range(0, columns, BLOCK):
        d = block + tl.arange(0, BLOCK)
        x = tl.load(z + p * stride + d, mask=d < stride, other=0.0)
        if bias is not None:
            part = tl.load(bias + d, mask=d < columns, other=0.0).to(ACC)
            if lengths is not None:
                part *= tl.load(lengths + p).to(ACC)
            x += part
        kept = tl.load(left_out + d, mask=d < columns, other=1) == 0
        top, sums = online(top, sums, tl.where(kept, x, float("-inf")), inverse)
    shift, summed = _whole(top, sums, inverse)
    before, value = tl.load(total + p), shift * inverse + tl.log(summed)
    high = shift_of(tl.maximum(before, value))
    tl.store(total + p, high + tl.log(tl.exp(before - high) + tl.exp(value - high)))


@triton.jit(do_not_specialize=["count"])
def tables_kernel(student_ids, teacher_ids, teacher_of, teacher_matched, count, v_s, v_t, BLOCK: tl.constexpr):
    """``teacher_of[student id] = teacher id`` and, unless None, ``teacher_matched[teacher id] = 1``."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(student_ids + i, mask=i < count, other=-1)
    t = tl.load(teacher_ids + i, mask=i < count, other=-1)
    tl.store(teacher_of + s, t.to(tl.int32), mask=(s >= 0) & (s < v_s))
    if teacher_matched is not None:
        tl.store(teacher_matched + t, (t * 0 + 1).to(tl.int8), mask=(t >= 0) & (t < v_t))


class _Tables:
    """``teacher_of [V_s]`` int32 and, if wanted, ``teacher_matched [V_t]`` int8 of the ids last used, kept as long as
    the ids live and are not written to.

    Nothing is kept from or used in the capture of a CUDA graph: what it builds is filled when it is replayed, and what
    it uses has to outlive it. Kept tables are used in the stream alone that they were made in.
    """

    def __init__(self) -> None:
        self._of: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def get(
        self, student_ids: Tensor, teacher_ids: Tensor, v_s: int, v_t: int, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        stream = None
        if student_ids.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return self._make(student_ids, teacher_ids, v_s, v_t, wanted)
            stream = torch.cuda.current_stream(student_ids.device).cuda_stream
        known = self._of.get(student_ids)
        if known is None or not known[0].are(student_ids, teacher_ids):
            known = self._of[student_ids] = Seen(student_ids, teacher_ids), {}
        tables, key = known[1], (v_s, v_t, wanted, stream)
        if key not in tables:
            tables[key] = self._make(student_ids, teacher_ids, v_s, v_t, wanted)
        return tables[key]

    @staticmethod
    def _make(
        student_ids: Tensor, teacher_ids: Tensor, v_s: int, v_t: int, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        teacher_of = torch.full((v_s,), -1, dtype=torch.int32, device=student_ids.device)
        teacher_matched = torch.zeros(v_t, dtype=torch.int8, device=student_ids.device) if wanted else None
        count = student_ids.numel()
        tables_kernel[(triton.cdiv(count, 1024),)](
            student_ids, teacher_ids, teacher_of, teacher_matched, count, v_s, v_t, BLOCK=1024
        )
        return teacher_of, teacher_matched


_tables = _Tables()


def tile(columns: int, dtype: torch.dtype) -> dict[str, int | bool | None]:
    """Columns per turn and warps.

    Up to 16384 columns a row stays in registers: 16 columns of both sides per thread, 64 registers, so that 32 warps
    share a multiprocessor: of two rows of 8192 columns one is read while the other is computed. Beyond, and where
    float64 takes twice the registers, a row is read in turns of 8 columns per thread. Spills and 16-byte accesses were
    looked at in the code for sm_90.
    """
    block, wide = triton.next_power_of_2(columns), dtype == torch.float64
    whole = block <= (RESIDENT // 4 if wide else RESIDENT)
    block = block if whole else TURN
    warps = min(max(block // (512 if whole else 256), 1), 32)
    turns = {"BLOCK": block, "WHOLE": whole, "STREAM": min(256 * warps, 4096)}
    return turns | {"num_warps": warps, "maxnreg": None if wide else 64, "enable_fp_fusion": True}


def temperature_argument(temperature: float, like: Tensor) -> float | Tensor:
    """A scalar argument is float32: of float64 a tensor, filled on the device."""
    return like.new_full((), temperature) if like.dtype == torch.float64 else temperature


def resident(columns: int, dtype: torch.dtype) -> bool:
    """Whether a row of the accumulation dtype stays in registers."""
    return bool(tile(columns, dtype)["WHOLE"])


def accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def weighted_total(loss: Tensor, scale: Tensor) -> Tensor:
    """``sum_p loss[p] scale[p]``, the same bits on every run."""
    if loss.dtype == torch.float64:
        return (loss * scale).sum()
    total = loss.new_empty(())
    total_kernel[(1,)](loss, scale, total, loss.shape[0], 1.0, BLOCK=2048, num_warps=8)
    return total


def matched_kl(
    student: Tensor, teacher: Tensor, spans: Sequence[Tensor], student_ids: Tensor, teacher_ids: Tensor,
    scale: Tensor, unmatched: int, mean: bool, temperature: float, keep: bool, loss: Tensor | None,
    grad: Tensor | None, upstream: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Logits ``[N, V]`` (unit column stride), no or four int32 spans ``[P]``, ids ``[V_m]``, scale ``[P]`` -> the
    scaled total. Writes what is not None: the losses ``[P]`` and the gradient of the total for the student's logits.

    keep: whether tables of the ids may be kept for the next call.
    With ``upstream []`` the gradient, already there for an upstream gradient of 1, is written again with it folded in,
    unless it is 1: decided on the device."""
    pairs = scale.shape[0]
    if not pairs:
        if grad is not None:
            grad.zero_()
        return scale.new_zeros(())
    v_s, v_t = student.shape[1], teacher.shape[1]
    with on_device(student):
        tables = _tables.get if keep else _tables._make
        teacher_of, teacher_matched = tables(student_ids, teacher_ids, v_s, v_t, bool(unmatched))
        kernel[(pairs,)](
            student, teacher, *(spans or (None,) * 4), teacher_of, teacher_matched, None, None, None, None, None,
            temperature_argument(temperature, scale), scale, loss, grad, upstream, pairs, student.shape[0],
            teacher.shape[0], student.stride(0), teacher.stride(0), v_s, v_s, v_t, SPANS=bool(spans),
            MEAN=mean and bool(spans), UNMATCHED=unmatched, PADDED=False, ACC=accumulator(scale.dtype),
            **tile(v_s, scale.dtype),
        )  # fmt: skip
        return None if loss is None else weighted_total(loss, scale)


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

    teacher_rest: ``[R]``, log sum exp(. / T) of the teacher's other columns; None for "renormalize"."""
    (rows, v_s), v_m = student.shape, teacher.shape[1]
    with on_device(student):
        kernel[(rows,)](
            student, teacher, None, None, None, None, None, None, teacher_rest, student_bias, teacher_bias,
            student_lengths, teacher_lengths, temperature_argument(temperature, scale), scale, loss, grad, None, rows,
            rows, rows, student.stride(0), teacher.stride(0), 0 if grad is None else grad.stride(0), v_s, v_m,
            SPANS=False, MEAN=False, UNMATCHED=unmatched, PADDED=True, ACC=accumulator(scale.dtype),
            **tile(v_s, scale.dtype),
        )  # fmt: skip


def add_rest(
    z: Tensor, bias: Tensor | None, lengths: Tensor | None, left_out: Tensor, temperature: float, total: Tensor
) -> None:
    """``total [R]`` = log(exp total + sum exp(. / T)) over the columns of ``z [R, V]`` (row stride as for
    :func:`dense_rows`), plus the bias ``[V]`` as often as the lengths ``[R]`` say, that ``left_out [V]`` (uint8) does
    not mark."""
    rows, columns = z.shape
    with on_device(z):
        rest_kernel[(rows,)](
            z, total, left_out, bias, lengths, temperature_argument(temperature, z), columns, z.stride(0),
            ACC=accumulator(z.dtype), BLOCK=2048, num_warps=8,
        )  # fmt: skip
