"""What several reference losses share: precision, span pooling, rows of pairs, divergences, reductions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vocabdistil.alignment.spans import SpanPairs, at_least_one
from vocabdistil.core.checks import LayerWeights, compute_dtype, kind_of

COSINE_EPS = 1e-8


def upcast(x: Tensor) -> Tensor:
    """Half types to float32; float32 and float64 stay."""
    return x.to(compute_dtype(x.dtype))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` in the dtype of ``x``, under autocast too: the ground truth is not rounded."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def projected(rows: Tensor, weight: Tensor | nn.Module, bias: Tensor | None, width: int) -> Tensor:
    """``[P, width]`` in the dtype of the rows ``[P, D_s]``: :func:`linear`, or what a module makes of them, run in the
    dtype of its parameters and without autocast.

    Raises:
        ValueError: the module does not map ``[P, D_s]`` to ``[P, width]``.
    """
    if isinstance(weight, Tensor):
        return linear(rows, weight, bias)
    wanted = f"weight: expected a projection from width {rows.shape[1]} to width {width}"
    dtype = next((p.dtype for p in weight.parameters() if p.is_floating_point()), rows.dtype)
    with torch.autocast(rows.device.type, enabled=False):
        if torch.compiler.is_compiling():
            out = weight(rows.to(dtype))
        else:
            try:
                out = weight(rows.to(dtype))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise ValueError(f"{wanted}, got {type(weight).__name__}: {str(error).splitlines()[0]}") from error
    if not isinstance(out, Tensor):
        raise TypeError(f"{wanted}, got {kind_of(out)} of {type(weight).__name__}")
    if out.shape != (rows.shape[0], width):
        raise ValueError(f"{wanted}, got shape {tuple(out.shape)} of rows {tuple(rows.shape)}")
    return out.to(rows.dtype)


def weighted_mean(layers: Sequence[Tensor], weights: LayerWeights | None) -> Tensor:
    """``sum_l w_l h_l / sum_l w_l``, uniform without weights; layers are added one by one, never stacked."""
    if len(layers) == 1:
        return upcast(layers[0])
    if weights is None:
        total = upcast(layers[0])
        for layer in layers[1:]:
            total = total + upcast(layer)
        return total / len(layers)
    own: Sequence[Tensor | float] = list(upcast(weights)) if isinstance(weights, Tensor) else weights
    total = upcast(layers[0]) * own[0]
    norm = own[0]
    for layer, weight in zip(layers[1:], own[1:], strict=True):
        total = total + upcast(layer) * weight
        norm = norm + weight
    return total / norm


def span_of_token(start: Tensor, end: Tensor, num_tokens: int) -> Tensor:
    """``[N]`` int64: the span that holds each token, ``P`` for a token in no span.

    The spans ascend and are disjoint, so the only candidate is the first span that ends after the token. The
    shapes do not depend on the values: no host synchronisation, no graph break.
    """
    position = torch.arange(num_tokens, dtype=end.dtype, device=end.device)
    span = torch.searchsorted(end, position, right=True)
    first = torch.cat([start, start.new_full((1,), num_tokens)])
    return torch.where(first[span] <= position, span, end.numel())


def span_pool(x: Tensor, start: Tensor, end: Tensor, pooling: str) -> Tensor:
    """``x [N, D]`` -> ``[P, D]``: the sum or mean of each span's rows, 0 for an empty span."""
    num_spans, width = end.numel(), x.shape[1]
    index = span_of_token(start, end, x.shape[0])[:, None].expand(-1, width)
    # One row more than there are spans takes the tokens that lie in none.
    total = x.new_zeros(num_spans + 1, width).scatter_add(0, index, x)[:num_spans]
    if pooling == "sum":
        return total
    return total / (end - start).clamp(min=1)[:, None]


def valid_pairs(pairs: SpanPairs) -> Tensor | None:
    """``[P]`` bool: both spans non-empty; None when all are (known without looking at the spans). Not so in compiled
    code, which would be made once for either."""
    count = pairs.num_nonempty
    if not (torch.compiler.is_compiling() or isinstance(count, Tensor)) and count == len(pairs):
        return None
    return (pairs.student_end > pairs.student_start) & (pairs.teacher_end > pairs.teacher_start)


def pool_pairs(
    student: Tensor, teacher: Tensor, pairs: SpanPairs, pooling: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows ``[N_s, .]``, ``[N_t, .]`` -> pooled ``[P, .]`` of both sides and the mask of valid pairs.

    Both rows of a pair with an empty span are set to 0, so that what stands on its other side (NaN even)
    reaches neither the loss nor a gradient.
    """
    student = span_pool(student, pairs.student_start, pairs.student_end, pooling)
    teacher = span_pool(teacher, pairs.teacher_start, pairs.teacher_end, pooling)
    valid = valid_pairs(pairs)
    if valid is not None:
        student = torch.where(valid[:, None], student, 0.0)
        teacher = torch.where(valid[:, None], teacher, 0.0)
    return student, teacher, valid


def log_softmax(x: Tensor, temperature: float) -> Tensor:
    """``log softmax(x / T)`` over the last dimension; a row of -inf alone has no mass anywhere, and no gradient."""
    x = x if temperature == 1 else x / temperature
    empty = (x == float("-inf")).all(-1, keepdim=True)
    return torch.where(empty, float("-inf"), F.log_softmax(torch.where(empty, 0.0, x), dim=-1))


def safe_log(x: Tensor) -> Tensor:
    """``log x``, and -inf with gradient 0 (not NaN) where x = 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).log(), float("-inf"))


def log_mass(log_p: Tensor) -> Tensor:
    """``[P, M]`` -> ``[P, 1]``: logsumexp by hand, as torch's has a NaN gradient where all terms are -inf, and what is
    left of a distribution may well have no mass."""
    if not log_p.shape[1]:
        return log_p.new_full((len(log_p), 1), float("-inf"))
    top = log_p.detach().amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    return top + safe_log((log_p - top).exp().sum(-1, keepdim=True))


def log_mixture(log_q: Tensor, log_r: Tensor, beta: float) -> Tensor:
    """``log(beta q + (1 - beta) r)``, -inf with gradient 0 where both are."""
    empty = (log_q == float("-inf")) & (log_r == float("-inf"))
    log_q, log_r = (torch.where(empty, 0.0, x) for x in (log_q, log_r))
    return torch.where(empty, float("-inf"), torch.logaddexp(log_q + math.log(beta), log_r + math.log1p(-beta)))


def excess_rows(log_q: Tensor, log_r: Tensor) -> Tensor:
    """``sum_v q (log q - log r)`` over the last dimension, of any parts of two distributions; a term with q = 0 is 0,
    and so is its gradient."""
    q = log_q.exp()
    return (q * torch.where(q > 0, log_q - log_r, 0.0)).sum(-1)


def _exp_rest(x: Tensor) -> Tensor:
    """``exp(x) - 1 - x`` for ``|x| < 1``, as exact as x is."""
    series = torch.ones_like(x)
    for k in range(11, 2, -1):
        series = 1 + x / k * series
    return torch.where(x.abs() < 0.1, x * x / 2 * series, torch.expm1(x) - x)


def kl_rows(log_q: Tensor, log_r: Tensor) -> Tensor:
    """:func:`excess_rows` of two whole distributions: the sum of ``q log(q / r) - q + r``, of which no term is
    negative, so that it is exact where both are close."""
    q, r = log_q.exp(), log_r.exp()
    some = ~(q == 0)  # NaN too
    u = torch.where(some, log_r - log_q, 0.0)
    small = u.abs() < 1
    v = torch.where(small, u, 0.0)
    terms = torch.where(small, q * _exp_rest(v), (r - q) - q * torch.where(small, 0.0, u))
    empty = (log_q == float("-inf")).all(-1)  # a row without mass asks for nothing
    return torch.where(empty, 0.0, torch.where(some, terms, r).sum(-1))


def unit_rows(x: Tensor) -> Tensor:
    """``x / max(|x|, eps)`` over the last dimension; rows that are too large to be squared are brought to the size of 1
    before, by a power of 2."""
    if not x.shape[-1]:
        return x
    top = x.detach().abs().amax(-1, keepdim=True)
    limit = torch.finfo(x.dtype).max ** 0.5 / (x.shape[-1] + 1)
    size = torch.where((top > limit) & (top < float("inf")), 2.0 ** top.log2().floor(), 1.0)
    x = x / size
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=COSINE_EPS)


def cosine_rows(a: Tensor, b: Tensor) -> Tensor:
    """``a . b / (max(|a|, eps) max(|b|, eps))`` over the last dimension."""
    return (unit_rows(a) * unit_rows(b)).sum(-1)


def divergence_rows(
    student: Tensor, teacher: Tensor, divergence: str, temperature: float, beta: float
) -> Tensor:
    """``[P, D]``, ``[P, D]`` -> ``[P]``: the divergence of each pair (see `span_loss`)."""
    if divergence == "mse":
        return (student - teacher).square().sum(-1)
    if divergence == "cosine":
        return 1 - cosine_rows(student, teacher)
    log_r, log_q = log_softmax(student, temperature), log_softmax(teacher, temperature)
    if divergence == "kl":
        loss = kl_rows(log_q, log_r)
    elif divergence == "reverse_kl":
        loss = kl_rows(log_r, log_q)
    else:
        log_m = log_mixture(log_q, log_r, beta)
        loss = beta * kl_rows(log_q, log_m) + (1 - beta) * kl_rows(log_r, log_m)
    return temperature**2 * loss


def reduce_pairs(
    loss: Tensor, valid: Tensor | None, count: int | Tensor, reduction: str, pair_weights: Tensor | None = None
) -> Tensor:
    """``[P]`` losses -> the reduced loss: ``sum_p w_p l_p / count``, ``sum_p w_p l_p``, or ``w_p l_p``."""
    if valid is not None:
        loss = torch.where(valid, loss, 0.0)
    if pair_weights is not None:
        loss = loss * pair_weights.to(loss.dtype)
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / at_least_one(count)
