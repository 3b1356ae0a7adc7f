"""The log-probability of one token per row in Triton: one program per row, which is read a block of columns at a time,
once forward and once backward. Rows whose token nobody asks for are not read. Loads are widened before arithmetic,
addresses are int64, and nothing is atomic. Formula: vocabdistil/reference/span_likelihood.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .matched_kl import accumulator
from .rows import on_device
from .softmax import exp_less_one, log_one_plus, online, shift_of

TURN = 4096  # columns read at a time


@triton.jit
def _logits(z, bias, d, columns, ACC: tl.constexpr):
    """A row's logits at columns d, -inf outside."""
    inside = d < columns
    x = tl.load(z + d, mask=inside, other=float("-inf")).to(ACC)
    if bias is not None:
        x += tl.load(bias + d, mask=inside, other=0.0).to(ACC)
    return x


@triton.jit
def odds_kernel(
    logits, bias, ids, needed, log_prob, shift, share, stride, columns, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # logits: [N, columns], rows stride apart; bias: [columns] or None; ids: int64 [N]; needed: uint8 [N]; log_prob,
    # shift, share: [N].
    n = tl.program_id(0).to(tl.int64)
    asked = tl.load(needed + n) != 0
    left = tl.where(asked, columns, 0)
    token = tl.load(ids + n)
    known = asked & (token >= 0) & (token < columns)
    z = logits + n * stride
    own = tl.load(z + token, mask=known, other=float("nan")).to(ACC)
    if bias is not None:
        own += tl.load(bias + token, mask=known, other=0.0).to(ACC)
    top = tl.full([BLOCK], float("-inf"), dtype=ACC)
    total = tl.zeros([BLOCK], dtype=ACC)
    one = tl.full([], 1.0, dtype=ACC)
    for block in range(0, left, BLOCK):
        d = block + tl.arange(0, BLOCK)
        x = _logits(z, bias, d, columns, ACC)
        top, total = online(top, total, tl.where(d == token, float("-inf"), x), one)
    highest = tl.max(top)
    base = shift_of(highest)
    others = tl.sum(total * tl.exp(top - base))
    none = others == 0
    # From the token's logit to the log of all others' exponentials: no sum of both is rounded.
    log_others = tl.log(tl.where(none, 1.0, others))
    odds = tl.where(none, float("-inf"), (base - own) + log_others)
    less = log_one_plus(tl.exp(-tl.abs(odds)))
    above = odds > 0
    empty = none & (own == float("-inf"))
    value = tl.where(above, -(odds + less), -less)
    peak = tl.where(own > highest, own, highest)
    log_share = tl.where(above, (peak - base) - log_others, 0.0) - less
    log_share = tl.where(above | (own > highest), log_share, (peak - own) - less)
    tl.store(log_prob + n, tl.where(asked, tl.where(empty, float("-inf"), value), 0.0))
    tl.store(shift + n, tl.where(asked & ~empty, peak, 0.0))
    tl.store(share + n, tl.where(asked & ~empty, tl.exp(log_share), 0.0))


@triton.jit
def slope_kernel(
    logits, bias, ids, needed, log_prob, shift, share, upstream, grad, stride, g_stride, columns, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # As odds_kernel; upstream: [N]; grad: [N, columns], rows g_stride apart.
    n = tl.program_id(0).to(tl.int64)
    times, part = tl.load(upstream + n), tl.load(share + n)
    asked = (tl.load(needed + n) != 0) & (times != 0) & (part != 0)
    token = tl.load(ids + n)
    own = -times * exp_less_one(tl.load(log_prob + n))
    base = tl.load(shift + n)
    z, out = logits + n * stride, grad + n * g_stride
    for block in range(0, columns, BLOCK):
        d = block + tl.arange(0, BLOCK)
        slope = tl.zeros([BLOCK], dtype=ACC)
        if asked:
            x = _logits(z, bias, d, columns, ACC)
            slope = tl.where(d == token, own, -times * part * tl.exp(x - base))
        tl.store(out + d, slope.to(grad.dtype.element_ty), mask=d < columns)


def tile(columns: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """8 columns per thread, of float64 4."""
    block = min(triton.next_power_of_2(columns), TURN // (2 if dtype == torch.float64 else 1))
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16), "enable_fp_fusion": True}


def log_prob_fwd(
    logits: Tensor, bias: Tensor | None, ids: Tensor, needed: Tensor, out: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Logits ``[N, V]`` (unit column stride), to which a bias ``[V]`` may still have to be added, int64 ids and bool
    needed ``[N]`` -> log_prob, shift and share ``[N]`` in the accumulation dtype. The log-probability of an id that is
    none of the columns is NaN."""
    (rows, columns), dtype = logits.shape, out[0].dtype
    if rows:
        with on_device(logits):
            odds_kernel[(rows,)](
                logits, bias, ids, needed.view(torch.uint8), *out, logits.stride(0), columns, ACC=accumulator(dtype),
                **tile(columns, dtype),
            )  # fmt: skip


def log_prob_bwd(
    logits: Tensor, bias: Tensor | None, ids: Tensor, needed: Tensor, of: tuple[Tensor, Tensor, Tensor],
    grad: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """The same, and the gradient ``[N]`` -> that of the logits, to ``out [N, V]``."""
    (rows, columns), dtype = logits.shape, of[0].dtype
    if rows:
        with on_device(logits):
            slope_kernel[(rows,)](
                logits, bias, ids, needed.view(torch.uint8), *of, grad, out, logits.stride(0), out.stride(0), columns,
                ACC=accumulator(dtype), **tile(columns, dtype),
            )  # fmt: skip
