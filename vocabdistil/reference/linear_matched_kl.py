"""KL over the matched vocabulary, from hidden states and the two output layers."""

from __future__ import annotations

from torch import Tensor, nn

from vocabdistil.alignment.spans import SpanPairs, chosen_pairs
from vocabdistil.core import checks
from vocabdistil.core.checks import Matched
from vocabdistil.reference._common import linear, pool_pairs, reduce_pairs, upcast
from vocabdistil.reference.matched_kl import check_matched_arguments, matched_ids, matched_rows


def linear_matched_kl(
    student_hidden: Tensor,
    student_weight: Tensor | nn.Linear,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | nn.Linear,
    matched: Matched,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    pairs: SpanPairs | None = None,
    mask: Tensor | None = None,
    pair_weights: Tensor | None = None,
    temperature: float = 1.0,
    unmatched: str = "renormalize",
    pooling: str = "mean",
    student_shift: int = 0,
    teacher_shift: int = 0,
    reduction: str = "batchmean",
    backend: str | None = None,
) -> Tensor:
    """`matched_kl` of the logits ``z = h weight^T + bias`` of both sides, without writing all of them.

    ``linear_matched_kl(h_s, W_s, h_t, W_t, ...) = matched_kl(h_s W_s^T + b_s, h_t W_t^T + b_t, ...)``, up to
    rounding. Two things save the work: pooling commutes with the linear map, so hidden states are pooled
    first (a sum over n tokens adds the bias n times); and ``"renormalize"`` reads the matched rows of the
    weights only.

    Source: as `matched_kl`.

    Args:
        student_hidden: ``[..., D_s]``, flattened to rows.
        student_weight, student_bias: ``[V_s, D_s]``, ``[V_s]`` or None; the dtype of the hidden states, or
            float32 with half-precision hidden states.
        teacher_hidden: ``[..., D_t]``, on the student's device.
        teacher_weight, teacher_bias: ``[V_t, D_t]``, ``[V_t]`` or None.
        matched, pairs, mask, pair_weights, temperature, unmatched, pooling, student_shift, teacher_shift,
            reduction, backend: as in `matched_kl`.

    Returns:
        As `matched_kl`. Gradients reach ``student_hidden``, ``student_weight`` and ``student_bias``.

    Raises:
        TypeError, ValueError: as `matched_kl`; weights that do not fit the hidden states.
    """
    checks.check_reference_backend(backend)
    student_weight, student_bias, teacher_weight, teacher_bias = output_layers(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias
    )
    student = upcast(student_hidden.flatten(0, -2))
    teacher = upcast(teacher_hidden.detach().flatten(0, -2))
    shifts = student_shift, teacher_shift
    pairs = chosen_pairs(pairs, mask, pair_weights, student_hidden, teacher_hidden, "hidden", shifts)
    check_matched_arguments(
        matched, student_weight.shape[0], teacher_weight.shape[0], temperature, unmatched, pooling, reduction
    )

    student_ids, teacher_ids = matched_ids(matched, student.device)
    teacher_weight = teacher_weight.detach()
    teacher_bias = None if teacher_bias is None else teacher_bias.detach()
    if unmatched == "renormalize":
        student_weight, teacher_weight = student_weight[student_ids], teacher_weight[teacher_ids]
        student_bias = None if student_bias is None else student_bias[student_ids]
        teacher_bias = None if teacher_bias is None else teacher_bias[teacher_ids]

    valid = student_lengths = teacher_lengths = None
    count: int | Tensor = student.shape[0]
    if pairs is not None:
        student, teacher, valid = pool_pairs(student, teacher, pairs, pooling)
        count = pairs.num_nonempty
        if pooling == "sum":
            # A pair with an empty side counts for nothing: 0 times a bias of -inf would be a NaN in its gradient.
            student_lengths = (pairs.student_end - pairs.student_start).clamp(min=1)
            teacher_lengths = (pairs.teacher_end - pairs.teacher_start).clamp(min=1)
    student = _logits(student, student_weight, student_bias, student_lengths)
    teacher = _logits(teacher, teacher_weight, teacher_bias, teacher_lengths)
    loss = matched_rows(student, teacher, student_ids, teacher_ids, temperature, unmatched)
    return reduce_pairs(loss, valid, count, reduction, pair_weights)


def output_layers(
    student_hidden: Tensor,
    student_weight: Tensor | nn.Linear,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | nn.Linear,
    teacher_bias: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Weight and bias of the student's output layer and of the teacher's, checked with the hidden states."""
    student_weight, student_bias = checks.as_output_layer(student_weight, student_bias, "student")
    teacher_weight, teacher_bias = checks.as_output_layer(teacher_weight, teacher_bias, "teacher")
    checks.check_columns(student_hidden, "student_hidden")
    checks.check_columns(teacher_hidden, "teacher_hidden")
    checks.check_sides(student_hidden, "student_hidden", teacher_hidden, "teacher_hidden")
    _check_output_layer(student_hidden, student_weight, student_bias, "student")
    _check_output_layer(teacher_hidden, teacher_weight, teacher_bias, "teacher")
    for name, x in (("hidden", teacher_hidden), ("weight", teacher_weight)):
        checks.check_keepable(x, f"teacher_{name}", student_hidden, student_weight, student_bias)
    return student_weight, student_bias, teacher_weight, teacher_bias


def _check_output_layer(hidden: Tensor, weight: Tensor, bias: Tensor | None, side: str) -> None:
    name = f"{side}_weight"
    checks.check_float(weight, name, dims=(2,))
    checks.check_weight_dtype(weight, name, hidden)
    checks.check_keepable(hidden, f"{side}_hidden", weight, bias)
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"{name}: expected shape (V, {hidden.shape[-1]}), got {tuple(weight.shape)}")
    if bias is not None:
        name = f"{side}_bias"
        checks.check_float(bias, name)
        checks.check_weight_dtype(bias, name, hidden)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, lengths: Tensor | None) -> Tensor:
    if bias is None or lengths is None:
        return linear(hidden, weight, bias)
    return linear(hidden, weight) + lengths[:, None] * bias.to(hidden.dtype)
