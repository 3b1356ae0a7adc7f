"""pooled_loss: a span loss whose spans are whole texts. Formulas: ``reference/pooled_loss.py``."""

from __future__ import annotations

from torch import Tensor, nn

from ..core.checks import Scale
from ..reference.pooled_loss import check_pooled
from ._scale import scalable
from .span_loss import span_loss


@scalable
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
    scale: Scale = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Distance between what two embedding models make of each text; formulas in
    :func:`vocabdistil.reference.pooled_loss`.

    Args:
        student_hidden: ``[B, L_s, D_s]``; float32, float64, bfloat16 or float16.
        teacher_hidden: ``[B, L_t, D_t]``, the same. It gets no gradient.
        student_mask, teacher_mask: bool or integers ``[B, L_s]``, ``[B, L_t]``, 0 for padding on either side of a text.
        divergence: ``"cosine"`` or ``"mse"`` (summed over features).
        pooling: ``"mean"``, ``"cls"`` (the first attended token) or ``"lasttoken"``.
        weight, bias: ``[D_t, D_s]``, ``[D_t]``: projection of the student, applied to one row per text; or a
            module as ``weight``, as in :func:`span_loss`.
        scale, backend: as in :func:`span_loss`.

    Returns:
        The mean over the texts with tokens on both sides, ``[]``, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, value or device, named in the text; a mask
            with gaps, if it lies in host memory.
    """
    pairs = check_pooled(student_hidden, teacher_hidden, student_mask, teacher_mask, divergence, pooling)
    return span_loss(
        student_hidden, teacher_hidden, pairs, divergence=divergence, weight=weight, bias=bias,
        scale=scale, backend=backend,
    )  # fmt: skip
