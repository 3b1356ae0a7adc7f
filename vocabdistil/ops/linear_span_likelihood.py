"""linear_span_likelihood: public function. Formula: ``reference/linear_span_likelihood.py``."""

from __future__ import annotations

from torch import Tensor, nn

from ..alignment.spans import SpanPairs
from ..reference.linear_span_likelihood import linear_span_likelihood as reference_linear_span_likelihood


def linear_span_likelihood(
    student_hidden: Tensor,
    student_weight: Tensor | nn.Linear,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | nn.Linear,
    student_ids: Tensor,
    teacher_ids: Tensor,
    pairs: SpanPairs,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 100.0,
    divergence: str = "kl",
    pair_weights: Tensor | None = None,
    student_shift: int = 1,
    teacher_shift: int = 1,
    reduction: str = "batchmean",
    backend: str | None = None,
) -> Tensor:
    """:func:`span_likelihood` of the logits ``h weight^T + bias`` of both sides; formulas in
    :func:`vocabdistil.reference.span_likelihood`.

    Args:
        student_hidden: ``[B, L_s, D_s]``: last hidden states of a causal model; float32, float64, bfloat16 or float16.
            ``[..., D_s]`` without a shift.
        student_weight, student_bias: ``[V_s, D_s]``, ``[V_s]`` or None: the student's output layer, which may be
            its embedding; the dtype of the hidden states, or float32 with half-precision hidden states; or a
            :class:`torch.nn.Linear` as ``student_weight``.
        teacher_hidden: ``[B, L_t, D_t]``. Neither it nor the teacher's weights get a gradient.
        teacher_weight, teacher_bias: ``[V_t, D_t]``, ``[V_t]`` or None.
        student_ids, teacher_ids, pairs, temperature, divergence, pair_weights, student_shift, teacher_shift,
            reduction, backend: as in :func:`span_likelihood`.

    Returns:
        The loss, float32 (float64 if the hidden states are float64): ``[]``, or ``[P]`` for ``reduction="none"``.

    Raises:
        TypeError, ValueError: as :func:`span_likelihood`; weights that do not fit the hidden states.
    """
    return reference_linear_span_likelihood(
        student_hidden, student_weight, teacher_hidden, teacher_weight, student_ids, teacher_ids, pairs,
        student_bias=student_bias, teacher_bias=teacher_bias, temperature=temperature, divergence=divergence,
        pair_weights=pair_weights, student_shift=student_shift, teacher_shift=teacher_shift, reduction=reduction,
        backend=backend,
    )  # fmt: skip
