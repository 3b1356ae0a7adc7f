"""Divergence over averaged hidden states in plain PyTorch: the ground truth for every kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spans import SpanPairs
from .span_mean import pooled

__all__ = ["span_kl", "span_loss"]


def layer_mean(layers: Tensor | Sequence[Tensor], weights: Tensor | Sequence[float] | None) -> Tensor:
    """sum_l w_l h_l / sum_l w_l over a list of layers (uniform without weights), half types in float32."""
    if isinstance(layers, Tensor):
        layers = [layers]
    layers = [x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in layers]
    if weights is None:
        return sum(layers[1:], start=layers[0]) / len(layers)
    w = torch.as_tensor(weights, device=layers[0].device).to(layers[0].dtype)
    w = w / w.sum()
    return sum((w[i] * x for i, x in enumerate(layers[1:], 1)), start=w[0] * layers[0])


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p (log p - log q) over the last dimension, where 0 log 0 = 0."""
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)


def divergences(mean_s: Tensor, mean_t: Tensor, divergence: str, temperature: float, beta: float) -> Tensor:
    """[P, D], [P, D] -> [P]."""
    if divergence == "mse":
        return (mean_s - mean_t).square().sum(-1)
    if divergence == "cosine":
        return 1 - F.cosine_similarity(mean_s, mean_t, dim=-1, eps=1e-8)
    log_q, log_r = F.log_softmax(mean_t / temperature, -1), F.log_softmax(mean_s / temperature, -1)
    q, r = log_q.exp(), log_r.exp()
    if divergence == "kl":
        loss = _kl(q, log_q, log_r)
    elif divergence == "reverse_kl":
        loss = _kl(r, log_r, log_q)
    elif divergence == "jsd":
        m = beta * q + (1 - beta) * r
        log_m = torch.where(m > 0, m, 1).log()
        loss = beta * _kl(q, log_q, log_m) + (1 - beta) * _kl(r, log_r, log_m)
    else:
        raise ValueError(f"divergence: expected one of kl, reverse_kl, jsd, mse, cosine, got {divergence!r}")
    return temperature**2 * loss


def span_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    pairs: SpanPairs,
    *,
    divergence: str = "kl",
    temperature: float = 1.0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    pair_weights: Tensor | None = None,
    beta: float = 0.5,
    pooling: str = "mean",
    reduction: str = "batchmean",
    student_layer_weights: Tensor | Sequence[float] | None = None,
    teacher_layer_weights: Tensor | Sequence[float] | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Divergence between the averaged hidden states of aligned spans.

    With ``mean_s``, ``mean_t`` the averaged rows of a pair (``mean_s`` after the projection), over the hidden
    dimension ``q = softmax(mean_t / T)`` and ``r = softmax(mean_s / T)``:

    =============  ==============================================================================================
    ``kl``         ``T^2 KL(q || r)``: model card of distilrubert-tiny-cased-conversational-5k; the factor T^2 as
                   in Hinton et al., arXiv 1503.02531, section 2
    ``reverse_kl`` ``T^2 KL(r || q)``
    ``jsd``        ``T^2 [beta KL(q || m) + (1 - beta) KL(r || m)]``, ``m = beta q + (1 - beta) r``: Agarwal et
                   al., arXiv 2306.13649, eq. 1, the teacher as P
    ``mse``        ``sum_d (mean_s - mean_t)^2``: Kolesnikova et al., arXiv 2205.02340
    ``cosine``     ``1 - cos(mean_s, mean_t)``, norms clamped at 1e-8: Sanh et al., arXiv 1910.01108
    =============  ==============================================================================================

    A pair with an empty span on either side counts 0 and has no gradient. Arguments and errors as
    :func:`vocabdistil.span_loss`; half types are computed in float32, and the loss is float32 then.
    """
    s, t = layer_mean(student, student_layer_weights), _frozen_layer_mean(teacher, teacher_layer_weights)
    mean_s = pooled(s.reshape(-1, s.shape[-1]), pairs.student_start, pairs.student_end, pooling)
    mean_t = pooled(t.reshape(-1, t.shape[-1]), pairs.teacher_start, pairs.teacher_end, pooling)
    if weight is not None:
        mean_s = F.linear(mean_s, weight.to(mean_s.dtype), None if bias is None else bias.to(mean_s.dtype))
    loss = divergences(mean_s, mean_t.to(mean_s.dtype), divergence, temperature, beta)
    both = (pairs.student_end > pairs.student_start) & (pairs.teacher_end > pairs.teacher_start)
    loss = torch.where(both, loss, 0)
    if pair_weights is not None:
        loss = loss * pair_weights.to(loss.dtype)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "batchmean":
        return loss.sum() / max(pairs.num_nonempty, 1)
    raise ValueError(f"reduction: expected one of batchmean, sum, none, got {reduction!r}")


def _frozen_layer_mean(teacher: Tensor | Sequence[Tensor], weights: Tensor | Sequence[float] | None) -> Tensor:
    layers = [teacher] if isinstance(teacher, Tensor) else teacher
    return layer_mean([x.detach() for x in layers], weights)


def span_kl(
    student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor], pairs: SpanPairs, **options
) -> Tensor:
    """:func:`span_loss` with ``divergence="kl"``."""
    return span_loss(student, teacher, pairs, divergence="kl", **options)
