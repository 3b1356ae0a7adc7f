"""Relations between the rows of a text in Triton: a program holds a tile of scores of some rows with as many others of
their texts, in one head. Scores are formed twice, for the sums of each row and for the gradient, and never written.
Formulas: ``reference/relation_loss.py``.

Where both sides are equal the gradient is exactly 0: a product with a ratio of 1 is exact whether it is contracted or
not. Products take three passes in TF32, which together keep nearly all of float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import clamp, on_device

LOWEST = tl.constexpr(-1e30)  # below any score, and finite: nothing less nothing is no NaN


@triton.jit
def _labels(first, last, p, pairs):
    """Where the text of each pair begins, and whether the pair counts."""
    begin = tl.load(first + p, mask=p < pairs, other=0)
    return begin, tl.load(last + p, mask=p < pairs, other=0) > begin


@triton.jit
def _reach(last, p, begin, counts, pairs):
    """The pairs that the texts of these rows span; none, if no row counts."""
    end = tl.load(last + p, mask=counts, other=0)
    return clamp(tl.min(tl.where(counts, begin, pairs)), pairs), clamp(tl.max(end), pairs)


@triton.jit
def _scores(
    x, p, q, p_counts, q_counts, width, at, dim, inv_root,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``[ROWS, ROWS]``: products of rows p and q in the head that begins at column ``at``."""
    total = tl.zeros([ROWS, ROWS], dtype=tl.float32)
    for begin in range(0, dim, BLOCK):
        d = begin + tl.arange(0, BLOCK)
        inside = d < dim
        a = tl.load(x + p[:, None] * width + (at + d)[None, :], mask=p_counts[:, None] & inside[None, :], other=0.0)
        b = tl.load(x + q[None, :] * width + (at + d)[:, None], mask=q_counts[None, :] & inside[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="tf32x3")
    return total * inv_root


@triton.jit(do_not_specialize=["pairs"])
def sums_kernel(
    student, teacher, first, last, scale, losses, tops, factors, pairs, s_width, t_width, s_dim, t_dim, s_root, t_root,
    weight, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``losses [heads, P]``; ``tops [2, heads, P]``: the largest scores of the student and of the teacher; ``factors
    [2, heads, P]``: what the student's exponentials count in the gradient, and the teacher's in units of that."""
    # student, teacher: float32 [pairs, s_width], [pairs, t_width], contiguous; first, last: int32 [pairs]; scale:
    # [pairs].
    p, head = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    begin, counts = _labels(first, last, p, pairs)
    low, high = _reach(last, p, begin, counts, pairs)
    top_s, top_t = tl.full([ROWS], LOWEST, tl.float32), tl.full([ROWS], LOWEST, tl.float32)
    sum_s, sum_t = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    dot = tl.zeros([ROWS], tl.float32)
    for block in range(low, high, ROWS):
        q = block + tl.arange(0, ROWS).to(tl.int64)
        q_begin, q_counts = _labels(first, last, q, pairs)
        same = counts[:, None] & q_counts[None, :] & (begin[:, None] == q_begin[None, :])
        s = _scores(student, p, q, counts, q_counts, s_width, head * s_dim, s_dim, s_root, ROWS, BLOCK)
        t = _scores(teacher, p, q, counts, q_counts, t_width, head * t_dim, t_dim, t_root, ROWS, BLOCK)
        above = t - s
        s, t = tl.where(same, s, float("-inf")), tl.where(same, t, float("-inf"))
        higher_s, higher_t = tl.maximum(top_s, tl.max(s, 1)), tl.maximum(top_t, tl.max(t, 1))
        kept_t = tl.exp(top_t - higher_t)
        exp_t = tl.exp(t - higher_t[:, None])
        sum_s = sum_s * tl.exp(top_s - higher_s) + tl.sum(tl.exp(s - higher_s[:, None]), 1)
        sum_t = sum_t * kept_t + tl.sum(exp_t, 1)
        dot = dot * kept_t + tl.sum(tl.where(exp_t == 0, 0.0, exp_t * above), 1)
        top_s, top_t = higher_s, higher_t
    sum_s, sum_t = tl.where(counts, sum_s, 1.0), tl.where(counts, sum_t, 1.0)
    ratio = tl.div_rn(sum_s, sum_t)
    loss = (tl.div_rn(dot, sum_t) - (top_t - top_s)) + tl.log(ratio)
    at, inside = head.to(tl.int64) * pairs + p, p < pairs
    second = tl.num_programs(1).to(tl.int64) * pairs + at
    tl.store(losses + at, tl.where(counts, loss, 0.0), mask=inside)
    tl.store(tops + at, top_s, mask=inside)
    tl.store(tops + second, top_t, mask=inside)
    tl.store(factors + at, tl.load(scale + p, mask=inside, other=0.0) * weight / sum_s, mask=inside)
    tl.store(factors + second, ratio, mask=inside)


@triton.jit(do_not_specialize=["pairs"])
def grad_kernel(
    student, teacher, first, last, tops, factors, grad, pairs, s_width, t_width, s_dim, t_dim, s_root, t_root,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Columns ``OUT`` of one head of the rows of ``grad [P, s_width]``."""
    # student, teacher: float32 [pairs, s_width], [pairs, t_width], contiguous; first, last: int32 [pairs]; tops,
    # factors: [2, heads, pairs], from sums_kernel.
    p, head = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    d = tl.program_id(2) * OUT + tl.arange(0, OUT)
    begin, counts = _labels(first, last, p, pairs)
    low, high = _reach(last, p, begin, counts, pairs)
    one = head.to(tl.int64) * pairs
    two = tl.num_programs(1).to(tl.int64) * pairs + one
    top_s, top_t = tl.load(tops + one + p, mask=counts, other=0.0), tl.load(tops + two + p, mask=counts, other=0.0)
    factor = tl.load(factors + one + p, mask=counts, other=0.0)
    ratio = tl.load(factors + two + p, mask=counts, other=0.0)
    total = tl.zeros([ROWS, OUT], dtype=tl.float32)
    for block in range(low, high, ROWS):
        q = block + tl.arange(0, ROWS).to(tl.int64)
        q_begin, q_counts = _labels(first, last, q, pairs)
        same = counts[:, None] & q_counts[None, :] & (begin[:, None] == q_begin[None, :])
        s = _scores(student, p, q, counts, q_counts, s_width, head * s_dim, s_dim, s_root, ROWS, BLOCK)
        t = _scores(teacher, p, q, counts, q_counts, t_width, head * t_dim, t_dim, t_root, ROWS, BLOCK)
        q_top_s = tl.load(tops + one + q, mask=q_counts, other=0.0)
        q_top_t = tl.load(tops + two + q, mask=q_counts, other=0.0)
        q_factor = tl.load(factors + one + q, mask=q_counts, other=0.0)
        q_ratio = tl.load(factors + two + q, mask=q_counts, other=0.0)
        own = tl.exp(s - top_s[:, None]) - tl.exp(t - top_t[:, None]) * ratio[:, None]
        theirs = tl.exp(s - q_top_s[None, :]) - tl.exp(t - q_top_t[None, :]) * q_ratio[None, :]
        slope = tl.where(same, own * factor[:, None] + theirs * q_factor[None, :], 0.0)
        mask = q_counts[:, None] & (d < s_dim)[None, :]
        rows = tl.load(student + q[:, None] * s_width + (head * s_dim + d)[None, :], mask=mask, other=0.0)
        total = tl.dot(slope, rows, total, input_precision="tf32x3")
    mask = (p < pairs)[:, None] & (d < s_dim)[None, :]
    tl.store(grad + p[:, None] * s_width + (head * s_dim + d)[None, :], total * s_root, mask=mask)


def tile(dim: int) -> dict[str, int]:
    """Rows of a tile, columns that a product reads at a time, columns of a gradient that a program writes, warps.

    The scores of either side, the parts that they are split into and the gradient's rows then stay in the registers of
    sm_90, by the compiler's report: more columns at a time, fewer warps or a deeper pipeline spill. Not measured. Heads
    are rarely wider than 128; of those that are, the scores are formed again for each 128 columns.
    """
    width = max(16, triton.next_power_of_2(dim))
    return {
        "ROWS": 64, "BLOCK": min(width, 32), "OUT": min(width, 128), "num_warps": 8, "num_stages": 1,
        "enable_fp_fusion": True,
    }  # fmt: skip


def relation_loss(
    student: Tensor, teacher: Tensor, first: Tensor, last: Tensor, scale: Tensor, heads: int, loss: Tensor,
    grad: Tensor | None,
) -> Tensor:  # fmt: skip
    """Rows ``[P, D_s]``, ``[P, D_t]``, float32, contiguous; first, last: int32 ``[P]``, the pairs of each pair's text,
    none for a pair that is left out; scale ``[P]``. Writes ``loss [P]`` and ``grad [P, D_s]``; returns the total."""
    (pairs, s_width), t_width = student.shape, teacher.shape[1]
    if not pairs:
        return scale.sum()
    s_dim, t_dim = s_width // heads, t_width // heads
    options = tile(s_dim)
    out = options.pop("OUT")
    losses, tops, factors = (scale.new_empty(*shape, heads, pairs) for shape in ((), (2,), (2,)))
    sizes = (pairs, s_width, t_width, s_dim, t_dim, s_dim**-0.5, t_dim**-0.5)
    grid = (triton.cdiv(pairs, options["ROWS"]), heads)
    with on_device(student):
        sums_kernel[grid](
            student, teacher, first, last, scale, losses, tops, factors, *sizes, 1 / heads, **options
        )
        if grad is not None:
            grad_kernel[(*grid, triton.cdiv(s_dim, out))](
                student, teacher, first, last, tops, factors, grad, *sizes, **options, OUT=out
            )
    torch.mean(losses, 0, out=loss)
    return (loss * scale).sum()
