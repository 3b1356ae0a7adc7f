"""KL over the teacher's vocabulary, onto which the student's logits are mapped."""

from __future__ import annotations

import torch
from torch import Tensor

from vocabdistil.alignment.spans import SpanPairs, chosen_pairs
from vocabdistil.core import checks
from vocabdistil.core.checks import RemapLike
from vocabdistil.reference._common import (
    excess_rows,
    kl_rows,
    log_mass,
    log_softmax,
    pool_pairs,
    reduce_pairs,
    safe_log,
    upcast,
)


def remapped_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    table: RemapLike,
    *,
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
    """KL of the student from the teacher over all teacher tokens that the table maps ("reduce-map").

    For a teacher token v with a non-empty row of the table (every other v is left out, on both sides)::

        sum        z'(v) = sum_{j in row(v)} w(v, j) z_s(j)
        logsumexp  z'(v) = log sum_{j in row(v)} w(v, j) exp(z_s(j))

        q = softmax(z_t / T),  r = softmax(z' / T)  over the mapped v
        l_p = T^2 sum_v q(v) log(q(v) / r(v))

    w is 1 without ``entry_weights``; an entry of weight 0 is none. A student id that stands twice in a row counts
    twice. With ``top_k``, K are the k mapped v with the largest z_t (and all others that are as large as the k-th),
    and::

        renormalize  q, r over K alone, l_p the sum over K
        rest         one class more, q(U) = sum_{v not in K} q(v), r likewise
                     l_p = T^2 (sum_{v in K} q(v) log(q(v) / r(v)) + q(U) log(q(U) / r(U)))
        drop         l_p = T^2 sum_{v in K} q(v) log(q(v) / r(v)), which can be negative

    With ``pairs``, ``z_s`` and ``z_t`` are means over the spans. A term with q = 0 is 0. No gradient reaches the
    teacher or the weights. ``batchmean`` divides by the number of rows, or of pairs with both spans non-empty; no rows
    give 0.

    Source: Kolesnikova et al., arXiv 2205.02340 (reduce-map). A projection of probabilities by a sparse matrix, as the
    projected KL of X-Token (arXiv 2605.21699), is ``logsumexp`` with the matrix as table and weights: ``exp z'`` is
    proportional to ``W softmax(z_s)``. Where a temperature is to divide the logits before they are projected, both
    sides are given divided, ``T ** 2 * remapped_kl(z_s / T, z_t / T, ...)``.

    Args:
        student_logits: ``[..., V_s]``, flattened to rows.
        teacher_logits: ``[..., V_t]``, at least as many columns as the table has rows; on the student's
            device.
        table: ``.indptr [rows + 1]`` and ``.ids [nnz]``, int32 or int64.
        pairs: span pairs over the flattened rows, or None for row i with row i.
        mask: bool or integers ``[...]``, beside no pairs: rows where it is 0 count for nothing.
        pair_weights: ``[P]`` or None for 1.
        entry_weights: ``[nnz]``, finite, any float dtype, one per entry of ``table.ids``, or None for 1; none
            negative with ``"logsumexp"``.
        combine: ``"sum"`` or ``"logsumexp"``.
        top_k: k >= 1, or None for all mapped columns.
        remainder: ``"rest"``, ``"drop"`` or ``"renormalize"``: the mapped columns outside the ``top_k``.
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
    columns = student.shape[1], teacher.shape[1]
    check_remapped_arguments(
        table, *columns, entry_weights, combine, top_k, remainder, temperature, reduction, student.dtype
    )

    valid = None
    count: int | Tensor = student.shape[0]
    if pairs is not None:
        student, teacher, valid = pool_pairs(student, teacher, pairs, "mean")
        count = pairs.num_nonempty
    loss = remapped_rows(student, teacher, table, entry_weights, combine, temperature, top_k, remainder)
    return reduce_pairs(loss, valid, count, reduction, pair_weights)


def check_remapped_arguments(
    table: RemapLike,
    student_columns: int,
    teacher_columns: int,
    entry_weights: Tensor | None,
    combine: str,
    top_k: int | None,
    remainder: str,
    temperature: float,
    reduction: str,
    dtype: torch.dtype,
    columns_of: str = "teacher_logits",
) -> None:
    """dtype: what is accumulated in."""
    checks.check_remap(table, student_columns, teacher_columns, columns_of)
    checks.check_choice(combine, "combine", checks.COMBINES)
    checks.check_entry_weights(entry_weights, table, combine, dtype)
    checks.check_top_k(top_k, remainder)
    checks.check_temperature(temperature)
    checks.check_choice(reduction, "reduction", checks.REDUCTIONS)


def remapped_rows(
    student: Tensor,
    teacher: Tensor,
    table: RemapLike,
    weights: Tensor | None,
    combine: str,
    temperature: float,
    top_k: int | None,
    remainder: str,
) -> Tensor:
    """``[P, V_s]``, ``[P, V_t]`` logits -> ``[P]`` losses."""
    indptr, ids, weights = _entries(table, weights, combine, student)
    lengths = indptr.diff()
    mapped = lengths.nonzero()[:, 0]
    combined = _combine(student, ids, lengths[mapped], combine, weights)
    teacher = teacher[:, mapped]
    chosen = None if top_k is None else _largest(teacher, top_k)
    if chosen is not None and remainder == "renormalize":
        combined, teacher = (x.masked_fill(~chosen, float("-inf")) for x in (combined, teacher))
    log_r, log_q = log_softmax(combined, temperature), log_softmax(teacher, temperature)
    if chosen is None or remainder == "renormalize":
        return temperature**2 * kl_rows(log_q, log_r)
    inside = [x.masked_fill(~chosen, float("-inf")) for x in (log_q, log_r)]
    if remainder == "drop":
        return temperature**2 * excess_rows(*inside)
    outside = (log_mass(x.masked_fill(chosen, float("-inf"))) for x in (log_q, log_r))
    return temperature**2 * kl_rows(*(torch.cat(parts, 1) for parts in zip(inside, outside, strict=True)))


def _entries(
    table: RemapLike, weights: Tensor | None, combine: str, like: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The table where ``like`` is, without entries of weight 0; of the weights their logs with ``"logsumexp"``."""
    indptr, ids = (x.to(like.device, torch.int64) for x in (table.indptr, table.ids))
    if weights is None:
        return indptr, ids, None
    weights = weights.detach().to(like.device, torch.float64 if combine == "logsumexp" else like.dtype)
    there = weights != 0
    before = torch.cat([indptr.new_zeros(1), there.cumsum(0)])
    kept = weights[there]
    return before[indptr], ids[there], kept.log().to(like) if combine == "logsumexp" else kept


def _largest(teacher: Tensor, top_k: int) -> Tensor:
    """``[P, M]`` bool: the ``top_k`` largest of each row, and what is as large as the last of them."""
    k = min(top_k, teacher.shape[1])
    return ~(teacher < teacher.topk(k).values[:, -1:])


def _combine(logits: Tensor, ids: Tensor, lengths: Tensor, combine: str, weights: Tensor | None) -> Tensor:
    """``[P, V_s]`` -> ``[P, M]``: the student's logits of the M non-empty rows, of these ``lengths``; weights: or
    their logs."""
    pieces = logits[:, ids]
    if weights is not None:
        pieces = pieces * weights if combine == "sum" else pieces + weights
    row = torch.repeat_interleave(torch.arange(lengths.numel(), device=logits.device), lengths)
    index = row.expand(logits.shape[0], -1)
    zeros = logits.new_zeros(logits.shape[0], lengths.numel())
    if combine == "sum":
        return zeros.scatter_add(1, index, pieces)
    top = torch.full_like(zeros, float("-inf")).scatter_reduce(1, index, pieces.detach(), "amax")
    top = top.nan_to_num(neginf=0.0)
    return top + safe_log(zeros.scatter_add(1, index, (pieces - top.gather(1, index)).exp()))
