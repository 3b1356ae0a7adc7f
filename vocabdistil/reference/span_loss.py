"""Divergences between the averaged hidden states of aligned spans."""

from __future__ import annotations

from torch import Tensor, nn

from vocabdistil.alignment.spans import SpanPairs, check_pair_weights, check_pairs
from vocabdistil.core import checks
from vocabdistil.core.checks import (
    DIVERGENCES,
    POOLINGS,
    REDUCTIONS,
    Layers,
    LayerWeights,
    check_beta,
    check_choice,
    check_keepable,
    check_layer_weights,
    check_layers,
    check_projection,
    check_sides,
    check_temperature,
)
from vocabdistil.reference._common import divergence_rows, pool_pairs, projected, reduce_pairs, weighted_mean


def span_loss(
    student: Layers,
    teacher: Layers,
    pairs: SpanPairs,
    *,
    divergence: str = "kl",
    temperature: float = 1.0,
    weight: Tensor | nn.Module | None = None,
    bias: Tensor | None = None,
    pair_weights: Tensor | None = None,
    beta: float = 0.5,
    pooling: str = "mean",
    reduction: str = "batchmean",
    student_layer_weights: LayerWeights | None = None,
    teacher_layer_weights: LayerWeights | None = None,
    backend: str | None = None,
) -> Tensor:
    """Divergence between the pooled hidden states of aligned spans.

    With ``h = sum_l w_l h_l / sum_l w_l`` over the layers of a side (uniform weights by default), ``t_p`` and
    ``m_p`` the mean (or sum, by ``pooling``) of h over the teacher's and the student's tokens of pair p, and
    ``s_p = weight m_p + bias`` (``s_p = m_p`` without a weight; the bias enters once, whatever the pooling)::

        q = softmax(t_p / T),  r = softmax(s_p / T),  m = beta q + (1 - beta) r

        kl          l_p = T^2 sum_d q log(q / r)
        reverse_kl  l_p = T^2 sum_d r log(r / q)
        jsd         l_p = T^2 (beta KL(q || m) + (1 - beta) KL(r || m))
        mse         l_p = sum_d (s_p - t_p)^2
        cosine      l_p = 1 - s_p . t_p / (max(|s_p|, 1e-8) max(|t_p|, 1e-8))

    A term whose first factor (q or r) is 0 is 0. A pair with an empty span on either side has ``l_p = 0`` and
    gives no gradient. ``batchmean``: ``sum_p w_p l_p / P``, P the number of pairs with both spans non-empty
    (0 if there are none); ``sum``: ``sum_p w_p l_p``; ``none``: the vector ``w_p l_p``.

    Gradients reach the student, ``weight``, ``bias``, ``pair_weights`` and both layer weights, never the
    teacher.

    Sources: KL between averaged hidden states: model card of ``distilrubert-tiny-cased-conversational-5k``;
    MSE on aligned tokens: Kolesnikova et al., arXiv 2205.02340; cosine: Sanh et al., arXiv
    1910.01108, section 2; T^2: Hinton et al., arXiv 1503.02531, section 2; generalised JSD: Agarwal et al.,
    arXiv 2306.13649, equation 1 with the teacher as P.

    Args:
        student: ``[N_s, D_s]`` or ``[B, L_s, D_s]``, or a list of such layers.
        teacher: ``[N_t, D_t]`` or ``[B, L_t, D_t]``, or a list, on the device of the student.
        pairs: P span pairs over the flattened positions.
        divergence: ``"kl"``, ``"reverse_kl"``, ``"jsd"``, ``"mse"`` or ``"cosine"``.
        temperature: T > 0, finite; no effect on ``mse`` and ``cosine``.
        weight, bias: ``[D_t, D_s]`` and ``[D_t]``, applied to the pooled student rows; or as ``weight`` a module that
            maps these rows ``[P, D_s]`` to ``[P, D_t]``, in the place of ``weight m_p + bias``; required when D_s
            differs from D_t. Their dtype is the student's, or float32 for a half-precision student.
        pair_weights: ``[P]`` or None for 1.
        beta: the weight of the teacher in ``jsd``, ``0 < beta < 1``.
        pooling: ``"mean"`` or ``"sum"``, for the student's spans and the teacher's.
        reduction: ``"batchmean"``, ``"sum"`` or ``"none"``.
        student_layer_weights, teacher_layer_weights: one weight per layer, a tensor ``[n]`` or a list of
            numbers.
        backend: None or ``"reference"``.

    Returns:
        A scalar, or ``[P]`` for ``"none"``; float64 for float64 inputs, else float32.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: wrong shapes, names, devices, temperature, beta, or pairs past the end of a side.
    """
    checks.check_reference_backend(backend)
    weight, bias = checks.as_projection(weight, bias)
    students, teachers = check_span_loss(
        student, teacher, pairs, divergence=divergence, temperature=temperature, weight=weight, bias=bias,
        pair_weights=pair_weights, beta=beta, pooling=pooling, reduction=reduction,
        student_layer_weights=student_layer_weights, teacher_layer_weights=teacher_layer_weights,
    )  # fmt: skip
    student_rows = weighted_mean(students, student_layer_weights)
    teacher_rows = weighted_mean([layer.detach() for layer in teachers], teacher_layer_weights)
    student_rows, teacher_rows, valid = pool_pairs(student_rows, teacher_rows, pairs, pooling)
    if weight is not None:
        student_rows = projected(student_rows, weight, bias, teacher_rows.shape[1])
    loss = divergence_rows(student_rows, teacher_rows, divergence, temperature, beta)
    return reduce_pairs(loss, valid, pairs.num_nonempty, reduction, pair_weights)


def span_kl(
    student: Layers,
    teacher: Layers,
    pairs: SpanPairs,
    *,
    temperature: float = 1.0,
    weight: Tensor | nn.Module | None = None,
    bias: Tensor | None = None,
    pair_weights: Tensor | None = None,
    pooling: str = "mean",
    reduction: str = "batchmean",
    student_layer_weights: LayerWeights | None = None,
    teacher_layer_weights: LayerWeights | None = None,
    backend: str | None = None,
) -> Tensor:
    """`span_loss` with ``divergence="kl"``: ``T^2 sum_p w_p KL(q_p || r_p) / P``."""
    return span_loss(
        student,
        teacher,
        pairs,
        divergence="kl",
        temperature=temperature,
        weight=weight,
        bias=bias,
        pair_weights=pair_weights,
        pooling=pooling,
        reduction=reduction,
        student_layer_weights=student_layer_weights,
        teacher_layer_weights=teacher_layer_weights,
        backend=backend,
    )


def check_span_loss(
    student: Layers,
    teacher: Layers,
    pairs: SpanPairs,
    *,
    divergence: str,
    temperature: float,
    weight: Tensor | nn.Module | None,
    bias: Tensor | None,
    pair_weights: Tensor | None,
    beta: float,
    pooling: str,
    reduction: str,
    student_layer_weights: LayerWeights | None,
    teacher_layer_weights: LayerWeights | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """All that span_loss checks, for every implementation; returns both sides as layers ``[N, D]``."""
    students, teachers = check_layers(student, "student"), check_layers(teacher, "teacher")
    check_sides(students[0], "student", teachers[0], "teacher")
    for layer in teachers:
        check_keepable(layer, "teacher", *students, weight, pair_weights, student_layer_weights, teacher_layer_weights)
    check_layer_weights(student_layer_weights, students, "student_layer_weights")
    check_layer_weights(teacher_layer_weights, teachers, "teacher_layer_weights")
    check_pairs(pairs, students[0], teachers[0])
    check_projection(weight, bias, students[0], teachers[0])
    check_pair_weights(pair_weights, len(pairs), students[0])
    check_choice(divergence, "divergence", DIVERGENCES)
    check_choice(pooling, "pooling", POOLINGS)
    check_choice(reduction, "reduction", REDUCTIONS)
    check_temperature(temperature)
    check_beta(beta)
    return students, teachers
