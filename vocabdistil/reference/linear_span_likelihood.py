"""How likely both sides find the text of a span, from hidden states and the two output layers."""

from __future__ import annotations

from torch import Tensor, nn

from vocabdistil.alignment.spans import SpanPairs
from vocabdistil.core import checks
from vocabdistil.reference._common import linear, upcast
from vocabdistil.reference.linear_matched_kl import output_layers
from vocabdistil.reference.span_likelihood import likelihood_loss, likelihood_pairs


def linear_span_likelihood(
    student_hidden: Tensor,
    student_weight: Tensor | nn.Linear,
    student_ids: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | nn.Linear,
    teacher_ids: Tensor,
    pairs: SpanPairs,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    divergence: str = "kl",
    pair_weights: Tensor | None = None,
    student_shift: int = 1,
    teacher_shift: int = 1,
    reduction: str = "batchmean",
    backend: str | None = None,
) -> Tensor:
    """`span_likelihood` of the logits ``z = h weight^T + bias`` of both sides.

    Source: as `span_likelihood`.

    Args:
        student_hidden: ``[B, L_s, D_s]``; ``[..., D_s]`` without a shift.
        student_weight, student_bias: ``[V_s, D_s]``, ``[V_s]`` or None; the dtype of the hidden states, or
            float32 with half-precision hidden states.
        teacher_hidden: ``[B, L_t, D_t]``, on the student's device.
        teacher_weight, teacher_bias: ``[V_t, D_t]``, ``[V_t]`` or None.
        student_ids, teacher_ids, pairs, temperature, divergence, pair_weights, student_shift, teacher_shift,
            reduction, backend: as in `span_likelihood`.

    Returns:
        As `span_likelihood`. Gradients reach ``student_hidden``, ``student_weight`` and ``student_bias``.

    Raises:
        TypeError, ValueError: as `span_likelihood`; weights that do not fit the hidden states.
    """
    checks.check_reference_backend(backend)
    student_weight, student_bias, teacher_weight, teacher_bias = output_layers(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias
    )
    shifts = student_shift, teacher_shift
    pairs = likelihood_pairs(
        student_hidden, teacher_hidden, student_ids, teacher_ids, pairs, pair_weights, "hidden", shifts, temperature,
        divergence, reduction,
    )  # fmt: skip
    return likelihood_loss(
        linear(upcast(student_hidden.flatten(0, -2)), student_weight, student_bias),
        linear(upcast(teacher_hidden.flatten(0, -2)), teacher_weight, teacher_bias).detach(),
        student_ids, teacher_ids, pairs, pair_weights, shifts, temperature, divergence, reduction,
    )  # fmt: skip
