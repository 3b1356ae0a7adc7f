"""KL over the teacher's vocabulary, onto which the student's logits are mapped, from hidden states."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vocabdistil.alignment.spans import SpanPairs, chosen_pairs
from vocabdistil.core import checks
from vocabdistil.core.checks import RemapLike
from vocabdistil.reference._common import linear, pool_pairs, reduce_pairs, upcast
from vocabdistil.reference.linear_matched_kl import output_layers
from vocabdistil.reference.remapped_kl import check_remapped_arguments, remapped_rows


def linear_remapped_kl(
    student_hidden: Tensor,
    student_weight: Tensor | nn.Linear,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | nn.Linear,
    table: RemapLike,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    pairs: SpanPairs | None = None,
    mask: Tensor | None = None,
    pair_weights: Tensor | None = None,
    entry_weights: Tensor | None = None,
    combine: str = "sum",
    top_k: int | None = None,
    remainder: str = "rest",
    temperature: float = 1.0,
    student_shift: int = 0,
    teacher_shift: int = 0,
    reduction: str = "batchmean",
    backend: str | None = None,
) -> Tensor:
    """`remapped_kl` of the logits ``z = h weight^T + bias`` of both sides.

    ``linear_remapped_kl(h_s, W_s, h_t, W_t, ...) = remapped_kl(h_s W_s^T + b_s, h_t W_t^T + b_t, ...)``, up to
    rounding: the mean over a span commutes with the linear map, so that hidden states are averaged first.

    Source: as `remapped_kl`.

    Args:
        student_hidden: ``[..., D_s]``, flattened to rows.
        student_weight, student_bias: ``[V_s, D_s]``, ``[V_s]`` or None; the dtype of the hidden states, or
            float32 with half-precision hidden states.
        teacher_hidden: ``[..., D_t]``, on the student's device.
        teacher_weight, teacher_bias: ``[V_t, D_t]``, ``[V_t]`` or None.
        table, pairs, mask, pair_weights, entry_weights, combine, top_k, remainder, temperature, student_shift,
            teacher_shift, reduction, backend: as in `remapped_kl`.

    Returns:
        As `remapped_kl`. Gradients reach ``student_hidden``, ``student_weight`` and ``student_bias``.

    Raises:
        TypeError, ValueError: as `remapped_kl`; weights that do not fit the hidden states.
    """
    checks.check_reference_backend(backend)
    student_weight, student_bias, teacher_weight, teacher_bias = output_layers(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias
    )
    student = upcast(student_hidden.flatten(0, -2))
    teacher = upcast(teacher_hidden.detach().flatten(0, -2))
    shifts = student_shift, teacher_shift
    pairs = chosen_pairs(pairs, mask, pair_weights, student_hidden, teacher_hidden, "hidden", shifts)
    columns = student_weight.shape[0], teacher_weight.shape[0]
    check_remapped_arguments(
        table, *columns, entry_weights, combine, top_k, remainder, temperature, reduction, student.dtype,
        "teacher_weight",
    )  # fmt: skip
    valid = None
    count: int | Tensor = student.shape[0]
    if pairs is not None:
        student, teacher, valid = pool_pairs(student, teacher, pairs, "mean")
        count = pairs.num_nonempty
    student = linear(student, student_weight, student_bias)
    with torch.no_grad():
        teacher = linear(teacher, teacher_weight, teacher_bias)
    loss = remapped_rows(student, teacher, table, entry_weights, combine, temperature, top_k, remainder)
    return reduce_pairs(loss, valid, count, reduction, pair_weights)
