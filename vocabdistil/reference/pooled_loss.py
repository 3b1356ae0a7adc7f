"""Distance between the vectors of whole texts."""

from __future__ import annotations

from torch import Tensor, nn

from vocabdistil.alignment.spans import SpanPairs, text_pairs
from vocabdistil.core import checks
from vocabdistil.reference.span_loss import span_loss

POOLED_DIVERGENCES = ("cosine", "mse")


def pooled_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_mask: Tensor,
    teacher_mask: Tensor,
    *,
    divergence: str = "cosine",
    pooling: str = "mean",
    weight: Tensor | nn.Module | None = None,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Distance between what two embedding models make of each text, averaged over the texts.

    With ``s_b`` and ``t_b`` the vectors of text b, the mean over its attended tokens or one of them, and
    ``W s_b + bias`` in the place of ``s_b`` if there is a ``weight``::

        cosine  L = sum_b (1 - cos(s_b, t_b)) / B        each norm at least 1e-8
        mse     L = sum_b |s_b - t_b|^2 / B

    B counts the texts with tokens on both sides; the others count for nothing. No gradient reaches the teacher.

    Sources: mean-pooled, compared by cosine: Reimers & Gurevych, arXiv 1908.10084, section 3; squared distance to the
    teacher's vectors: Reimers & Gurevych, arXiv 2004.09813, section 2.

    Args:
        student_hidden: ``[B, L_s, D_s]``.
        teacher_hidden: ``[B, L_t, D_t]``, on the device of the student.
        student_mask, teacher_mask: bool or integers ``[B, L_s]``, ``[B, L_t]``, 0 for padding on either side of a text.
        divergence: ``"cosine"`` or ``"mse"``.
        pooling: ``"mean"``, ``"cls"`` (the first attended token) or ``"lasttoken"``.
        weight, bias: ``[D_t, D_s]``, ``[D_t]``, the student's projection, or a module as ``weight``; required when the
            widths differ.
        backend: None or ``"reference"``.

    Returns:
        A scalar, 0 without texts; float64 for float64 inputs, else float32.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: wrong shapes, names or devices, a mask with gaps (looked at in host memory).
    """
    checks.check_reference_backend(backend)
    pairs = check_pooled(student_hidden, teacher_hidden, student_mask, teacher_mask, divergence, pooling)
    return span_loss(student_hidden, teacher_hidden, pairs, divergence=divergence, weight=weight, bias=bias)


def check_pooled(
    student: Tensor, teacher: Tensor, student_mask: Tensor, teacher_mask: Tensor, divergence: str, pooling: str
) -> SpanPairs:
    """The texts as pairs; :func:`span_loss` checks the rest."""
    checks.check_choice(divergence, "divergence", POOLED_DIVERGENCES)
    pairs = text_pairs(student_mask, teacher_mask, pooling)
    for name, hidden, mask in (("student", student, student_mask), ("teacher", teacher, teacher_mask)):
        checks.check_float(hidden, f"{name}_hidden", dims=(3,))
        if mask.shape != hidden.shape[:2]:
            raise ValueError(f"{name}_mask: expected shape {tuple(hidden.shape[:2])}, got {tuple(mask.shape)}")
    return pairs
