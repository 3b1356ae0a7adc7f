"""remapped_kl: schema, implementation, autograd, public function. Formula: ``reference/remapped_kl.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..alignment.spans import SpanPairs, chosen_pairs
from ..core import checks, native
from ..core.checks import RemapLike, Scale
from ..core.dispatch import implementation, resolve
from ..reference._common import reduce_pairs
from ..reference.remapped_kl import check_remapped_arguments
from ..reference.remapped_kl import remapped_kl as reference_remapped_kl
from ._gradient import RowLoss
from ._library import define
from ._remap_plans import gather_plans, plans
from ._scale import scalable, scaled
from .matched_kl import pair_count, row_scale, span_vectors
from .span_mean import native_rows


def _impl(
    student: Tensor, teacher: Tensor, spans: Sequence[Tensor], indptr: Tensor, ids: Tensor, weights: Tensor | None,
    scale: Tensor, logsumexp: bool, top_k: int, remainder: int, temperature: float, backend: str, wanted: bool,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``top_k``: 0 for all."""
    options = logsumexp, top_k, remainder, temperature
    total, loss, grad = _fake(student, teacher, spans, indptr, ids, weights, scale, *options, backend, wanted)
    if not 1 <= indptr.numel() <= teacher.shape[1] + 1:
        raise ValueError(f"table: expected at most {teacher.shape[1]} rows, got {indptr.numel() - 1}")
    given = grad if wanted else None
    if backend == "triton":
        total = _triton(student, teacher, spans, indptr, ids, weights, scale, *options, loss, given, upstream)
    else:
        plan = plans.get(indptr, ids, weights, student.shape[1], logsumexp, scale.dtype)
        native.remapped_kl(student, teacher, spans, plan, *options, scale, loss, total, given)
    return total, loss, grad


def _triton(
    student, teacher, spans, indptr, ids, weights, scale, logsumexp, top_k, remainder, temperature, loss, grad,
    upstream, formed=None,
):  # fmt: skip
    table = (indptr.cpu(), ids.cpu(), None if weights is None else weights.cpu())
    plan = gather_plans.get(*table, student.shape[1], logsumexp, scale.dtype, student.device)
    return implementation("remapped_kl", "triton", "remapped_kl")(
        student, teacher, spans, plan, scale, logsumexp, top_k, remainder, temperature, loss, grad, upstream, formed
    )


def _again(
    student, teacher, spans, indptr, ids, weights, scale, logsumexp, top_k, remainder, temperature, backend, grad,
    upstream, formed,
):  # fmt: skip
    _triton(
        student, teacher, spans, indptr, ids, weights, scale, logsumexp, top_k, remainder, temperature, None, grad,
        upstream, formed,
    )  # fmt: skip


def _fake(
    student, teacher, spans, indptr, ids, weights, scale, logsumexp, top_k, remainder, temperature, backend, wanted,
    upstream=None,
):  # fmt: skip
    grad = student.new_empty(student.shape if wanted else 0)
    return scale.new_empty(()), torch.empty_like(scale), grad


remapped_op = define(
    "remapped_kl(Tensor student, Tensor teacher, Tensor[] spans, Tensor indptr, Tensor ids, Tensor? weights, "
    "Tensor scale, bool logsumexp, int top_k, int remainder, float temperature, str backend, bool wanted, "
    "Tensor? upstream=None) -> (Tensor, Tensor, Tensor)",
    _impl,
    _fake,
)


@scalable
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
    scale: Scale = 1.0,
    backend: str | None = None,
) -> Tensor:
    """KL of the student from the teacher over all mapped teacher tokens ("reduce-map"); formulas in
    :func:`vocabdistil.reference.remapped_kl`.

    The student's logits are combined inside the kernel, on a CPU a row at a time, on a GPU four side by side, in
    256 MiB at most (or what two rows take). Only their gradient is written, a gather over the transposed table, which
    is built when a table is first seen and kept for the next calls. A table is best kept in host memory, on a GPU too.

    Args:
        student_logits: ``[..., V_s]``, flattened to rows; float32, float64, bfloat16 or float16; any strides (one copy
            where the last dimension is not contiguous or the rows are not evenly spaced).
        teacher_logits: ``[..., V_t]``, at least as many columns as the table has rows. It gets no gradient.
        table: ``.indptr [rows + 1]`` and ``.ids [nnz]``, int32 or int64: a :class:`RemapTable`.
        pairs: span pairs over the flattened rows, whose logits are averaged; None for row i with row i.
        mask: bool or integers ``[...]``, one per row, beside no pairs: rows where it is 0 count for nothing.
        pair_weights: ``[P]``, what each pair (or row) counts; may require gradients.
        entry_weights: ``[nnz]``, finite, what each entry of ``table.ids`` counts in its row, so that table and weights
            are a sparse projection matrix; none negative with ``"logsumexp"``; an entry of weight 0 is none. Best kept
            in host memory, as the table. It gets no gradient.
        combine: ``"sum"`` or ``"logsumexp"`` of the student's (weighted) logits of a row's pieces.
        top_k: as many of the teacher's most probable mapped columns alone tell the sides apart, with others that are as
            probable as the last of them; None for all.
        remainder: what becomes of the mapped columns outside the ``top_k``: ``"rest"`` (one class more for the mass of
            all of them), ``"drop"`` (their mass counts, the class does not) or ``"renormalize"`` (softmax over the
            ``top_k`` alone).
        temperature: ``T > 0``; divides the combined logits.
        student_shift, teacher_shift: as in :func:`vocabdistil.matched_kl`.
        reduction: ``"batchmean"`` (divided by the number of rows, or of pairs with both spans non-empty), ``"sum"``
            or ``"none"`` (``[P]``).
        scale: as in :func:`span_loss`.
        backend: ``"cpu"``, ``"triton"`` or ``"reference"``; None chooses by device.

    Returns:
        The loss, float32 (float64 if an input is float64): ``[]``, or ``[P]`` for ``reduction="none"``.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, value or device, named in the text; a table
            with ids outside the student's columns.
    """
    checks.check_columns(student_logits, "student_logits")
    checks.check_columns(teacher_logits, "teacher_logits")
    checks.check_sides(student_logits, "student_logits", teacher_logits, "teacher_logits")
    student, teacher = student_logits.flatten(0, -2), teacher_logits.detach().flatten(0, -2)
    shifts = student_shift, teacher_shift
    pairs = chosen_pairs(pairs, mask, pair_weights, student_logits, teacher_logits, "logits", shifts)
    columns = student.shape[1], teacher.shape[1]
    dtype = native.accumulation_dtype(student.dtype, teacher.dtype)
    check_remapped_arguments(table, *columns, entry_weights, combine, top_k, remainder, temperature, reduction, dtype)
    if pair_weights is not None and pair_weights.requires_grad:
        each = remapped_kl(
            student_logits, teacher_logits, table, pairs=pairs, entry_weights=entry_weights, combine=combine,
            top_k=top_k, remainder=remainder, temperature=temperature, reduction="none", backend=backend,
        )  # fmt: skip
        return scaled(reduce_pairs(each, None, pair_count(pairs, student), reduction, pair_weights), scale)
    choice = resolve("remapped_kl", student.device, backend)
    if choice == "reference":
        loss = reference_remapped_kl(
            student_logits, teacher_logits, table, pairs=pairs, pair_weights=pair_weights, entry_weights=entry_weights,
            combine=combine, top_k=top_k, remainder=remainder, temperature=temperature, reduction=reduction,
        )  # fmt: skip
        return scaled(loss, scale)
    each = row_scale(pairs, student, reduction, dtype, scale, pair_weights)
    options = *kernel_options(combine, top_k, remainder, temperature), choice
    return RowLoss.apply(
        remapped_op, _again if choice == "triton" else None, native_rows(student), native_rows(teacher), table.indptr,
        table.ids, each, options, reduction != "none", torch.is_grad_enabled() and student.requires_grad, 1,
        None if entry_weights is None else entry_weights.detach(), *span_vectors(pairs),
    )  # fmt: skip


def kernel_options(combine: str, top_k: int | None, remainder: str, temperature: float) -> tuple[bool, int, int, float]:
    """As the kernels take them."""
    return combine == "logsumexp", int(top_k or 0), native.UNMATCHED_CODES[remainder], float(temperature)
