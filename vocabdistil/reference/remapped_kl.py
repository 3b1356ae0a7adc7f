"""KL over the teacher's vocabulary, onto which the student's logits are mapped."""

from __future__ import annotations

import torch
from torch import Tensor

from vocabdistil.alignment.spans import SpanPairs, chosen_pairs
from vocabdistil.core import checks
from vocabdistil.core.checks import RemapLike
from vocabdistil.reference._common import kl_rows, log_softmax, pool_pairs, reduce_pairs, safe_log, upcast

COMBINES = ("sum", "logsumexp")


def remapped_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    table: RemapLike,
    *,
    pairs: SpanPairs | None = None,
    mask: Tensor | None = None,
    pair_weights: Tensor | None = None,
    combine: str = "sum",
    temperature: float = 1.0,
    student_shift: int = 0,
    teacher_shift: int = 0,
    reduction: str = "batchmean",
    backend: str | None = None,
) -> Tensor:
    """KL of the student from the teacher over all teacher tokens that the table maps ("reduce-map").

    For a teacher token v with a non-empty row of the table (every other v is left out, on both sides)::

        sum        z'(v) = sum_{j in row(v)} z_s(j)
        logsumexp  z'(v) = log sum_{j in row(v)} exp(z_s(j))

        q = softmax(z_t / T),  r = softmax(z' / T)  over the mapped v
        l_p = T^2 sum_v q(v) log(q(v) / r(v))

    A student id that stands twice in a row counts twice. With ``pairs``, ``z_s`` and ``z_t`` are means over
    the spans. A term with q = 0 is 0. No gradient reaches the teacher. ``batchmean`` divides by the number of
    rows, or of pairs with both spans non-empty; no rows give 0.

    Source: Kolesnikova et al., arXiv 2205.02340 (reduce-map); ``logsumexp`` is this package's.

    Args:
        student_logits: ``[..., V_s]``, flattened to rows.
        teacher_logits: ``[..., V_t]``, at least as many columns as the table has rows; on the student's
            device.
        table: ``.indptr [rows + 1]`` and ``.ids [nnz]``, int32 or int64.
        pairs: span pairs over the flattened rows, or None for row i with row i.
        mask: bool or integers ``[...]``, beside no pairs: rows where it is 0 count for nothing.
        pair_weights: ``[P]`` or None for 1.
        combine: ``"sum"`` or ``"logsumexp"``.
        temperature: T > 0, finite; divides the combined logits.
        student_shift, teacher_shift: as in :func:`vocabdistil.matched_kl`.
        reduction: ``"batchmean"``, ``"sum"`` or ``"none"``.
        backend: None or ``"reference"``.

    Returns:
        A scalar, or one loss per pair for ``"none"``; float64 for float64 inputs, else float32.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: wrong shapes, names, devices, temperature; ids outside the student's columns (looked at
            only in host memory).
    """
    checks.check_reference_backend(backend)
    checks.check_columns(student_logits, "student_logits")
    checks.check_columns(teacher_logits, "teacher_logits")
    checks.check_sides(student_logits, "student_logits", teacher_logits, "teacher_logits")
    student = upcast(student_logits.flatten(0, -2))
    teacher = upcast(teacher_logits.detach().flatten(0, -2))
    shifts = student_shift, teacher_shift
    pairs = chosen_pairs(pairs, mask, pair_weights, student_logits, teacher_logits, "logits", shifts)
    checks.check_remap(table, student.shape[1], teacher.shape[1])
    checks.check_choice(combine, "combine", COMBINES)
    checks.check_temperature(temperature)
    checks.check_choice(reduction, "reduction", checks.REDUCTIONS)

    valid = None
    count: int | Tensor = student.shape[0]
    if pairs is not None:
        student, teacher, valid = pool_pairs(student, teacher, pairs, "mean")
        count = pairs.num_nonempty
    lengths = table.indptr.to(student.device, torch.int64).diff()
    mapped = lengths.nonzero()[:, 0]
    log_r = log_softmax(_combine(student, table, lengths[mapped], combine), temperature)
    log_q = log_softmax(teacher[:, mapped], temperature)
    return reduce_pairs(temperature**2 * kl_rows(log_q, log_r), valid, count, reduction, pair_weights)


def _combine(logits: Tensor, table: RemapLike, lengths: Tensor, combine: str) -> Tensor:
    """``[P, V_s]`` -> ``[P, M]``: the student's logits of the M non-empty rows, of these ``lengths``."""
    pieces = logits[:, table.ids.to(logits.device, torch.int64)]
    row = torch.repeat_interleave(torch.arange(lengths.numel(), device=logits.device), lengths)
    index = row.expand(logits.shape[0], -1)
    zeros = logits.new_zeros(logits.shape[0], lengths.numel())
    if combine == "sum":
        return zeros.scatter_add(1, index, pieces)
    top = torch.full_like(zeros, float("-inf")).scatter_reduce(1, index, pieces.detach(), "amax")
    top = top.nan_to_num(neginf=0.0)
    return top + safe_log(zeros.scatter_add(1, index, (pieces - top.gather(1, index)).exp()))
