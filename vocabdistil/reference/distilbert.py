"""The triple loss of DistilBERT, for a student with the teacher's vocabulary."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vocabdistil.core import checks
from vocabdistil.reference._common import cosine_rows, kl_rows, log_softmax, upcast
from vocabdistil.reference.mlm import mlm_loss


class DistilBertLoss(NamedTuple):
    """The weighted sum and its three terms, unweighted (``ce`` with its T^2)."""

    loss: Tensor
    ce: Tensor
    mlm: Tensor
    cos: Tensor


def distilbert(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    labels: Tensor,
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 2.0,
    alpha_ce: float = 5.0,
    alpha_mlm: float = 2.0,
    alpha_cos: float = 1.0,
    backend: str | None = None,
) -> DistilBertLoss:
    """``alpha_ce T^2 mean KL(q || r) + alpha_mlm MLM + alpha_cos mean(1 - cos(h_s, h_t))``.

    ``q = softmax(z_t / T)``, ``r = softmax(z_s / T)``; KL and cosine are means over the attended positions,
    MLM is the mean cross-entropy over the positions with a label. No gradient reaches the teacher. Without a
    position to average over, a term is 0.

    Source: Sanh et al., arXiv 1910.01108, section 2 (the triple loss); T = 2 and the weights 5 : 2 : 1 are
    those of the authors' BERT recipe.

    Args:
        student_logits, teacher_logits: ``[..., V]``.
        student_hidden, teacher_hidden: ``[..., D]``, the last hidden states, of the same positions.
        labels: integer ``[...]``, -100 where nothing is to be predicted.
        attention_mask: ``[...]``, 0 for padding.
        temperature: T > 0, finite.
        alpha_ce, alpha_mlm, alpha_cos: the weights.
        backend: None or ``"reference"``.

    Returns:
        `DistilBertLoss`; float64 for float64 inputs, else float32.

    Raises:
        TypeError, ValueError: wrong dtypes, devices, or shapes that do not agree.
    """
    checks.check_reference_backend(backend)
    checks.check_temperature(temperature)
    for name, a, b in (
        ("logits", student_logits, teacher_logits),
        ("hidden", student_hidden, teacher_hidden),
    ):
        checks.check_columns(a, f"student_{name}")
        checks.check_columns(b, f"teacher_{name}")
        checks.check_sides(a, f"student_{name}", b, f"teacher_{name}")
        if a.shape != b.shape:
            raise ValueError(
                f"teacher_{name}: expected shape {tuple(a.shape)} as student_{name}, got {tuple(b.shape)}"
            )
    if student_hidden.shape[:-1] != student_logits.shape[:-1]:
        raise ValueError(
            f"student_hidden: expected positions {tuple(student_logits.shape[:-1])} as student_logits, "
            f"got {tuple(student_hidden.shape[:-1])}"
        )
    if attention_mask is not None and attention_mask.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"attention_mask: expected shape {tuple(student_logits.shape[:-1])}, "
            f"got {tuple(attention_mask.shape)}"
        )

    mlm = mlm_loss(student_logits, labels, lambda logits: logits)
    rows = [
        x.flatten(0, -2)
        for x in (student_logits, teacher_logits.detach(), student_hidden, teacher_hidden.detach())
    ]
    if attention_mask is not None:
        attended = attention_mask.flatten() != 0
        rows = [x[attended] for x in rows]
    z_s, z_t, h_s, h_t = (upcast(x) for x in rows)
    count = max(z_s.shape[0], 1)
    log_r, log_q = log_softmax(z_s, temperature), log_softmax(z_t, temperature)
    ce = temperature**2 * kl_rows(log_q, log_r).sum() / count
    cos = (1 - cosine_rows(h_s, h_t)).sum() / count
    return DistilBertLoss(alpha_ce * ce + alpha_mlm * mlm + alpha_cos * cos, ce, mlm, cos)
