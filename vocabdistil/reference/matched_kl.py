"""KL between two output distributions over the vocabulary that both sides share, from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from vocabdistil.alignment.spans import SpanPairs, chosen_pairs
from vocabdistil.core import checks
from vocabdistil.core.checks import Matched
from vocabdistil.reference._common import (
    excess_rows,
    kl_rows,
    log_mass,
    log_softmax,
    pool_pairs,
    reduce_pairs,
    upcast,
)


def matched_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    matched: Matched,
    *,
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
    """KL of the student from the teacher over the matched vocabulary.

    ``z_s``, ``z_t`` are row p of the two logits; with ``pairs``, the mean (or sum, by ``pooling``) of the
    rows of span pair p. Over the matched tokens i, with S and U the columns of a side that are matched and
    unmatched::

        renormalize  q_i = exp(z_t[i] / T) / sum_{j in S_t} exp(z_t[j] / T),  r likewise
                     l_p = T^2 sum_i q_i log(q_i / r_i)
        rest         q_i = exp(z_t[i] / T) / sum_j exp(z_t[j] / T) over all columns, and one class more,
                     q_U = sum_{j in U_t} q_j;  r likewise
                     l_p = T^2 (sum_i q_i log(q_i / r_i) + q_U log(q_U / r_U))
        drop         q and r over all columns as in ``rest``
                     l_p = T^2 sum_i q_i log(q_i / r_i)

    ``drop`` is no divergence: without the class of the rest it can be negative, and it is not least at r = q.
    A term with q = 0 is 0, so a logit of -inf is allowed wherever the teacher's is -inf too, and on the
    teacher's side always. When the teacher has no unmatched column, q_U is 0. ``batchmean`` divides by the
    number of rows, or of pairs with both spans non-empty; no rows give 0. No gradient reaches the teacher.

    Source: Kolesnikova et al., arXiv 2205.02340 (KL over the matched vocabulary: ``renormalize``);
    ``rest`` and ``drop`` are this package's.

    Args:
        student_logits: ``[..., V_s]``, flattened to rows.
        teacher_logits: ``[..., V_t]``; as many rows as the student without ``pairs``; on the student's
            device.
        matched: ``.student_ids`` and ``.teacher_ids``, int64 or int32 ``[V_m]``, distinct on each side.
        pairs: span pairs over the flattened rows, or None for row i with row i.
        mask: bool or integers ``[...]``, beside no pairs: rows where it is 0 count for nothing.
        pair_weights: ``[P]`` or None for 1.
        temperature: T > 0, finite.
        unmatched: ``"renormalize"``, ``"rest"`` or ``"drop"``.
        pooling: ``"mean"`` or ``"sum"``, used with ``pairs`` only.
        student_shift, teacher_shift: as in :func:`vocabdistil.matched_kl`.
        reduction: ``"batchmean"``, ``"sum"`` or ``"none"``.
        backend: None or ``"reference"``.

    Returns:
        A scalar, or one loss per pair for ``"none"``; float64 for float64 inputs, else float32.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: wrong shapes, names, devices, temperature; ids outside the columns (looked at only in host
            memory); ``"rest"`` where the teacher has unmatched columns and the student has none (the loss
            would be infinite).
    """
    checks.check_reference_backend(backend)
    checks.check_columns(student_logits, "student_logits")
    checks.check_columns(teacher_logits, "teacher_logits")
    checks.check_sides(student_logits, "student_logits", teacher_logits, "teacher_logits")
    student = upcast(student_logits.flatten(0, -2))
    teacher = upcast(teacher_logits.detach().flatten(0, -2))
    shifts = student_shift, teacher_shift
    pairs = chosen_pairs(pairs, mask, pair_weights, student_logits, teacher_logits, "logits", shifts)
    check_matched_arguments(
        matched, student.shape[1], teacher.shape[1], temperature, unmatched, pooling, reduction
    )

    student_ids, teacher_ids = matched_ids(matched, student.device)
    if unmatched == "renormalize":
        student, teacher = student[:, student_ids], teacher[:, teacher_ids]
    valid = None
    count: int | Tensor = student.shape[0]
    if pairs is not None:
        student, teacher, valid = pool_pairs(student, teacher, pairs, pooling)
        count = pairs.num_nonempty
    loss = matched_rows(student, teacher, student_ids, teacher_ids, temperature, unmatched)
    return reduce_pairs(loss, valid, count, reduction, pair_weights)


def check_matched_arguments(
    matched: Matched,
    student_columns: int,
    teacher_columns: int,
    temperature: float,
    unmatched: str,
    pooling: str,
    reduction: str,
) -> None:
    checks.check_matched(matched, student_columns, teacher_columns)
    checks.check_temperature(temperature)
    checks.check_choice(unmatched, "unmatched", checks.UNMATCHED)
    checks.check_choice(pooling, "pooling", checks.POOLINGS)
    checks.check_choice(reduction, "reduction", checks.REDUCTIONS)
    num_matched = matched.student_ids.numel()
    if unmatched == "rest" and student_columns <= num_matched and teacher_columns > num_matched:
        raise ValueError(
            f"unmatched: expected 'renormalize' or 'drop' as all {student_columns} student columns are "
            f"matched, got 'rest'"
        )


def matched_ids(matched: Matched, device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        matched.student_ids.to(device, torch.int64, non_blocking=True),
        matched.teacher_ids.to(device, torch.int64, non_blocking=True),
    )


def matched_rows(
    student: Tensor,
    teacher: Tensor,
    student_ids: Tensor,
    teacher_ids: Tensor,
    temperature: float,
    unmatched: str,
) -> Tensor:
    """``[P, .]`` logits -> ``[P]`` losses; for ``"renormalize"`` the columns are the matched ones already."""
    log_r, log_q = log_softmax(student, temperature), log_softmax(teacher, temperature)
    if unmatched == "rest":
        log_r = _with_rest(log_r, student_ids)
        log_q = _with_rest(log_q, teacher_ids)
    elif unmatched == "drop":
        return temperature**2 * excess_rows(log_q[:, teacher_ids], log_r[:, student_ids])
    return temperature**2 * kl_rows(log_q, log_r)


def _with_rest(log_p: Tensor, ids: Tensor) -> Tensor:
    """``[P, V]`` log-probabilities -> ``[P, V_m + 1]``: the matched columns and the mass of all others."""
    is_matched = torch.zeros(log_p.shape[1], dtype=torch.bool, device=log_p.device).index_fill(0, ids, True)
    return torch.cat([log_p[:, ids], log_mass(log_p.masked_fill(is_matched, float("-inf")))], dim=-1)
