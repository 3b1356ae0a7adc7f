"""linear_span_likelihood: public function, made of linear_log_prob; formula in its reference."""

from __future__ import annotations

from torch import Tensor, nn

from ..alignment.spans import SpanPairs
from ..core.dispatch import resolve
from ..reference.linear_matched_kl import output_layers
from ..reference.linear_span_likelihood import linear_span_likelihood as reference_linear_span_likelihood
from ..reference.span_likelihood import likelihood_pairs
from .log_prob import linear_log_prob
from .span_likelihood import loss_of_tokens


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
    """:func:`span_likelihood` of the logits ``h weight^T + bias`` of both sides; formulas in
    :func:`vocabdistil.reference.span_likelihood`.

    The logits are never all there: the forward pass keeps three numbers per row, the backward pass forms them again, on
    a CPU those of all rows at as many tokens as 8 MiB hold (at least a block of 72 to 108). Of rows in no span a CPU
    computes nothing. Gradients are accumulated in float32 (float64 for float64), the same bits for any number of
    threads.

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
    student_weight, student_bias, teacher_weight, teacher_bias = output_layers(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias
    )
    shifts = student_shift, teacher_shift
    shifted = likelihood_pairs(
        student_hidden, teacher_hidden, student_ids, teacher_ids, pairs, pair_weights, "hidden", shifts, temperature,
        divergence, reduction,
    )  # fmt: skip
    choice = resolve("linear_span_likelihood", student_hidden.device, backend)
    if choice == "reference":
        return reference_linear_span_likelihood(
            student_hidden, student_weight, student_ids, teacher_hidden, teacher_weight, teacher_ids, pairs,
            student_bias=student_bias, teacher_bias=teacher_bias, temperature=temperature, divergence=divergence,
            pair_weights=pair_weights, student_shift=student_shift, teacher_shift=teacher_shift, reduction=reduction,
        )  # fmt: skip
    student = student_hidden.flatten(0, -2), student_weight, student_bias
    frozen_bias = None if teacher_bias is None else teacher_bias.detach()
    teacher = teacher_hidden.detach().flatten(0, -2), teacher_weight.detach(), frozen_bias
    return loss_of_tokens(
        lambda ids, needed: linear_log_prob(*student, ids, needed, "student", choice),
        lambda ids, needed: linear_log_prob(*teacher, ids, needed, "teacher", choice),
        student_ids, teacher_ids, shifted, pair_weights, shifts, temperature, divergence, reduction,
    )  # fmt: skip
