"""Divergence between averaged rows in Triton, with its gradient, in one pass: the averaged rows stay in registers,
and only the loss of each pair and the rows of the gradient are written. Formulas: ``reference/span_loss.py``.

Only the student has a gradient: the teacher's is that of the mirrored divergence with the sides exchanged. Where both
means are equal the gradient is exactly 0: each is written such that a fused multiply-add cannot break that.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    to_do,
    written_rows,
)  # fmt: skip
from .softmax import CLOSE, close_step, exp_series, less_its_log, log_one_plus

KL, REVERSE_KL, JSD, MSE, COSINE = (tl.constexpr(code) for code in range(5))


@triton.jit
def _exponentials(x, inside, inverse):
    """``exp((x - max x) / T)``, the largest, and the sum, of each row."""
    top = tl.max(tl.where(inside[None, :], x, float("-inf")), 1)
    exp = tl.where(inside[None, :], tl.exp((x - top[:, None]) * inverse), 0.0)
    return exp, top, tl.sum(exp, 1)


@triton.jit
def softmax_divergence(s, t, counts, inside, temperature, beta, DIVERGENCE: tl.constexpr):
    """``s, t [ROWS, BLOCK]`` -> the divergences ``[ROWS]`` and their gradients in s, of rows that count."""
    inverse = 1.0 / temperature
    exp_s, top_s, sum_s = _exponentials(s, inside, inverse)
    exp_t, top_t, sum_t = _exponentials(t, inside, inverse)
    # Of logarithms, up to a constant: taken before either row is shifted, so that rows that are close lose nothing.
    difference = ((t - s) - (top_t - top_s)[:, None]) * inverse
    if DIVERGENCE == KL:
        # A term without mass is 0, even where the difference is infinite.
        mean = tl.sum(tl.where(exp_t == 0, 0.0, exp_t * difference), 1) / sum_t
        ratio = tl.div_rn(sum_s, sum_t)
        loss = mean + tl.log(ratio)
        grad = (exp_s - exp_t * ratio[:, None]) * (temperature / sum_s)[:, None]
        if tl.min(tl.where(counts, loss, CLOSE), 0) < CLOSE:
            first, rest = close_step(exp_t, exp_s, (tl.exp(loss) / ratio)[:, None], mean[:, None] - difference)
            excess = tl.sum(rest, 1) / sum_t
            near = (first - exp_t * excess[:, None]) * (temperature / (sum_t * (1 + excess)))[:, None]
            grad = tl.where((loss < CLOSE)[:, None], near, grad)
            loss = tl.where(loss < CLOSE, log_one_plus(excess), loss)
    elif DIVERGENCE == REVERSE_KL:
        mean = -tl.sum(tl.where(exp_s == 0, 0.0, exp_s * difference), 1) / sum_s
        ratio = tl.div_rn(sum_t, sum_s)
        loss = mean + tl.log(ratio)
        away = -difference - mean[:, None]
        grad = tl.where(exp_s == 0, 0.0, exp_s * away) * (temperature / sum_s)[:, None]
        if tl.min(tl.where(counts, loss, CLOSE), 0) < CLOSE:
            first, rest = close_step(exp_s, exp_t, (tl.exp(loss) / ratio)[:, None], -away)
            loss = tl.where(loss < CLOSE, log_one_plus(tl.sum(rest, 1) / sum_s), loss)
    else:
        r, q = exp_s / sum_s[:, None], exp_t / sum_t[:, None]
        above = beta * (q - r)  # of the mixture above r: exactly 0 where q = r
        mixture = tl.where(r + above == 0, 1.0, r + above)
        log_r = tl.where(r == 0, 0.0, tl.log(tl.div_rn(r, mixture)))
        log_q = tl.where(q == 0, 0.0, tl.log(tl.div_rn(q, mixture)))
        terms_r, terms_q = r * log_r, q * log_q
        mean = tl.sum(tl.where(exp_s == 0, 0.0, exp_s * difference), 1) / sum_s
        reverse_kl = tl.log(tl.div_rn(sum_t, sum_s)) - mean
        if tl.min(tl.where(counts, reverse_kl, CLOSE), 0) < CLOSE:
            close = (reverse_kl < CLOSE)[:, None]
            away = difference - mean[:, None]
            first, rest = close_step(exp_s, exp_t, tl.exp(-mean)[:, None], away)
            u = away - log_one_plus(tl.sum(rest, 1) / sum_s)[:, None]  # log q - log r
            small = (u < 0.125) & (u > -0.125)
            u = tl.where(small, u, 0.0)
            # What the mixture is above r and q, as shares of these. Its sum is 0, so that no term need be negative.
            more = u + u * u * exp_series(u) * 0.5
            y, x = beta * more, (beta - 1) * more / (1 + more)
            near_r, near_q = less_its_log(y), less_its_log(x)
            terms_r = tl.where(close, tl.where(small, r * near_r, terms_r + above), terms_r)
            terms_q = tl.where(close, tl.where(small, q * near_q, terms_q + (beta - 1) * (q - r)), terms_q)
            log_r = tl.where(close & small, near_r - y, log_r)
        kl_r = tl.sum(terms_r, 1)
        loss = beta * tl.sum(terms_q, 1) + (1 - beta) * kl_r
        grad = (1 - beta) * temperature * r * (log_r - kl_r[:, None])
    return loss * temperature * temperature, grad


@triton.jit
def _unit_size(x):
    """Rows that are too large to be squared, brought to the size of 1, and what each was divided by."""
    top = tl.max(tl.abs(x), 1)
    size = tl.where((top > 1e15) & (top < float("inf")), top, 1.0)
    return x / size[:, None], size


@triton.jit
def cosine(s, t):
    s, size_s = _unit_size(s)
    t, size_t = _unit_size(t)
    ss, tt, st = tl.sum(s * s, 1), tl.sum(t * t, 1), tl.sum(s * t, 1)
    # Of a squared norm, as torch.nn.functional.cosine_similarity; a clamped norm is a constant.
    floor_s, floor_t = tl.where(size_s == 1, 1e-16, 0.0), tl.where(size_t == 1, 1e-16, 0.0)
    root_s, root_t = tl.sqrt(tl.maximum(ss, floor_s)), tl.sqrt(tl.maximum(tt, floor_t))
    norms = tl.where((ss == tt) & (ss > floor_s) & (size_s == size_t), ss, root_s * root_t)  # exactly 1 - 1 where s = t
    loss = 1 - tl.div_rn(st, norms)
    along = tl.where(ss > floor_s, tl.div_rn(st, tl.maximum(ss, 1e-16)), 0.0)
    grad = (s * along[:, None] - t) / (norms * size_s)[:, None]
    return tl.where((ss != ss) | (tt != tt), ss + tt, loss), grad  # maximum() drops a NaN


@triton.jit
def divergence(s, t, counts, inside, temperature, beta, DIVERGENCE: tl.constexpr):
    if DIVERGENCE == MSE:
        difference = s - t
        return tl.sum(difference * difference, 1), 2 * difference
    elif DIVERGENCE == COSINE:
        return cosine(s, t)
    else:
        return softmax_divergence(s, t, counts, inside, temperature, beta, DIVERGENCE)


@triton.jit(do_not_specialize=["pairs", "student_rows", "teacher_rows"])  # they differ from batch to batch
def loss_kernel(
    student, student_table, student_coef, student_rows, student_stride, student_start, student_end,
    teacher, teacher_table, teacher_coef, teacher_rows, teacher_stride, teacher_start, teacher_end,
    grad, grad_table, loss, weights, upstream, formed, pairs, dim, base, temperature, beta,
    DIVERGENCE: tl.constexpr, MEAN: tl.constexpr, STUDENT_LAYERS: tl.constexpr, TEACHER_LAYERS: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``grad``, ``loss``, ``weights``, ``upstream`` and ``formed`` may be None; nothing is done where the last two are
    equal."""
    # student, teacher: one layer [student_rows, dim], [teacher_rows, dim], columns adjacent; *_table: int64 [*_LAYERS],
    # the addresses of all, None for one; *_coef: [*_LAYERS] or None; *_start, *_end: int32 [pairs]. grad: one
    # layer [student_rows, dim], contiguous; grad_table: int64 [STUDENT_LAYERS] or None. loss, weights: float32 [pairs];
    # upstream, formed: float32 [].
    ACC: tl.constexpr = tl.float32
    if upstream is not None:
        pairs = to_do(pairs, upstream, formed)  # no pairs: every mask is empty, every loop ends at once
        base = base * tl.load(upstream)
    p = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_s, last_s = span(student_start, student_end, p, pairs, student_rows)
    first_t, last_t = span(teacher_start, teacher_end, p, pairs, teacher_rows)
    share_s, share_t = span_share(first_s, last_s, MEAN, ACC), span_share(first_t, last_t, MEAN, ACC)
    d = tl.arange(0, BLOCK)
    inside = d < dim
    s = first_row(
        student, student_table, student_coef, student_stride, first_s, last_s, d, inside, share_s,
        STUDENT_LAYERS, ALIGNED, ACC,
    )  # fmt: skip
    t = first_row(
        teacher, teacher_table, teacher_coef, teacher_stride, first_t, last_t, d, inside, share_t,
        TEACHER_LAYERS, ALIGNED, ACC,
    )  # fmt: skip
    s = add_rest(
        s, student, student_table, student_coef, student_stride, first_s, last_s, d, inside, share_s,
        STUDENT_LAYERS, ALIGNED, ACC,
    )  # fmt: skip
    t = add_rest(
        t, teacher, teacher_table, teacher_coef, teacher_stride, first_t, last_t, d, inside, share_t,
        TEACHER_LAYERS, ALIGNED, ACC,
    )  # fmt: skip
    both = (last_s > first_s) & (last_t > first_t)
    value, gradient = divergence(s, t, both, inside, temperature, beta, DIVERGENCE)
    if loss is not None:
        tl.store(loss + p, tl.where(both, value, 0.0), mask=p < pairs)
    if grad is not None:
        scale = share_s * base
        if weights is not None:
            scale *= tl.load(weights + p, mask=p < pairs, other=0.0)
        begin, stop = written_rows(student_end, p, pairs, first_s, last_s, student_rows)
        gradient = tl.where(both[:, None], gradient * scale[:, None], 0.0)
        store_rows(
            gradient, grad, grad_table, student_coef, begin, first_s, last_s, stop, dim, d, inside,
            STUDENT_LAYERS, ALIGNED, ACC,
        )  # fmt: skip


@triton.jit(do_not_specialize=["pairs", "per"])
def total_kernel(loss, weights, total, pairs, per, base, BLOCK: tl.constexpr):
    """``total = base * sum_p weights[p] * loss[p]`` of ``per`` pairs, by one program: a fixed order, so the same sum
    every time."""
    # loss, weights: float32 [pairs], weights may be None; total: float32 [programs].
    part = tl.program_id(0)
    begin = part.to(tl.int64) * per
    stop = tl.minimum(begin + per, pairs)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for block in range(begin, stop, BLOCK):
        p = block + tl.arange(0, BLOCK)
        value = tl.load(loss + p, mask=p < stop, other=0.0)
        if weights is not None:
            value *= tl.load(weights + p, mask=p < stop, other=0.0)
        sums += value
    tl.store(total + part, tl.sum(sums, 0) * base)


TOTAL_PAIRS = 8192  # of more a total is added up in two stages


def write_total(loss: Tensor, weights: Tensor | None, total: Tensor, base: float) -> None:
    """``total [] = base * sum_p weights[p] * loss[p]``, float32, the same bits on every run; weights may be None."""
    options = {"BLOCK": 2048, "num_warps": 8, "enable_fp_fusion": True}
    pairs = loss.shape[0]
    if pairs > TOTAL_PAIRS:
        count = triton.cdiv(pairs, TOTAL_PAIRS)
        parts = loss.new_empty(count)
        total_kernel[(count,)](loss, weights, parts, pairs, TOTAL_PAIRS, 1.0, **options)
        loss, weights, pairs = parts, None, count
    total_kernel[(1,)](loss, weights, total, pairs, pairs, base, **options)


def span_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], spans: Sequence[Tensor], weights: Tensor | None, base: float,
    student_coef: Tensor | None, teacher_coef: Tensor | None, divergence: int, mean: bool, temperature: float,
    beta: float, loss: Tensor | None, total: Tensor | None, grads: Sequence[Tensor], upstream: Tensor | None,
    formed: Tensor | None,
) -> None:  # fmt: skip
    """Writes what is not None or empty: ``loss [P]``, ``total []`` (float32), ``grads``, one ``[N_s, D]`` per layer.

    student, teacher: layers ``[N, D]`` with unit column stride, float32, bfloat16 or float16; spans: the four int32
    ``[P]`` of SpanPairs; weights: float32 ``[P]`` or None; coefs: ``[n]`` or None (1/n). ``base * weights[p]`` is what
    pair p counts. ``upstream []`` is another factor, of the gradients alone; ``formed []`` is one that they are already
    there with: where it is the same they are left as they are, decided on the device.
    """
    student, teacher = one_stride(student), one_stride(teacher)
    pairs, (rows, dim) = spans[0].shape[0], student[0].shape
    if not pairs:
        for x in [*grads, *([] if total is None else [total])]:
            x.zero_()
        return
    options = tile(dim, 16384, heavy=divergence == JSD.value)
    with on_device(student[0]):
        loss_kernel[(triton.cdiv(pairs, options["ROWS"]),)](
            student[0], address_table(student), student_coef, rows, student[0].stride(0), spans[0], spans[1],
            teacher[0], address_table(teacher), teacher_coef, teacher[0].shape[0], teacher[0].stride(0), *spans[2:],
            grads[0] if grads else None, address_table(grads) if grads else None, loss, weights, upstream,
            formed, pairs, dim, base, temperature, beta,
            DIVERGENCE=divergence, MEAN=mean, STUDENT_LAYERS=len(student), TEACHER_LAYERS=len(teacher),
            ALIGNED=aligned(*student, *teacher, *grads), **options,
        )  # fmt: skip
        if total is not None:
            write_total(loss, weights, total, base)
