"""matched_kl: schema, implementation, autograd, public function. Formula: ``reference/matched_kl.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..alignment.spans import SpanPairs, at_least_one, chosen_pairs
from ..core import checks, native
from ..core.checks import Matched, Scale
from ..core.dispatch import implementation, resolve
from ..reference._common import reduce_pairs
from ..reference.matched_kl import check_matched_arguments
from ..reference.matched_kl import matched_kl as reference_matched_kl
from ._gradient import RowLoss
from ._library import define
from ._scale import scalable, scaled
from .span_mean import native_rows


def _impl(
    student: Tensor, teacher: Tensor, spans: Sequence[Tensor], student_ids: Tensor, teacher_ids: Tensor,
    scale: Tensor, unmatched: int, mean: bool, temperature: float, backend: str, keep: bool, wanted: bool,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``keep``: tables of the ids may be kept for the next call. Not in compiled code, which may run in the memory pool
    of a CUDA graph."""
    total, loss, grad = _fake(
        student, teacher, spans, student_ids, teacher_ids, scale, unmatched, mean, temperature, backend, keep, wanted
    )
    given = grad if wanted else None
    if backend == "cpu":
        native.matched_kl(
            student, teacher, spans, student_ids, teacher_ids, unmatched, mean, temperature, scale, loss, total,
            given,
        )  # fmt: skip
    else:
        implementation("matched_kl", backend, "matched_kl")(
            student, teacher, spans, student_ids, teacher_ids, scale, unmatched, mean, temperature, keep, loss, total,
            given, upstream,
        )  # fmt: skip
    return total, loss, grad


def _again(
    student, teacher, spans, student_ids, teacher_ids, scale, unmatched, mean, temperature, backend, keep, grad,
    upstream, formed,
):  # fmt: skip
    implementation("matched_kl", backend, "matched_kl")(
        student, teacher, spans, student_ids, teacher_ids, scale, unmatched, mean, temperature, keep, None, None,
        grad, upstream, formed,
    )  # fmt: skip


def _fake(
    student, teacher, spans, student_ids, teacher_ids, scale, unmatched, mean, temperature, backend, keep, wanted,
    upstream=None,
):  # fmt: skip
    grad = student.new_empty(student.shape if wanted else 0)
    return scale.new_empty(()), torch.empty_like(scale), grad


_op = define(
    "matched_kl(Tensor student, Tensor teacher, Tensor[] spans, Tensor student_ids, Tensor teacher_ids, "
    "Tensor scale, int unmatched, bool mean, float temperature, str backend, bool keep, bool wanted, "
    "Tensor? upstream=None) -> (Tensor, Tensor, Tensor)",
    _impl,
    _fake,
)


def _limits(student: Tensor, teacher: Tensor) -> tuple[tuple[str, str], ...]:
    """What the CUDA kernel cannot take: pairs of a backend and the reason."""
    wide = torch.float64 in (student.dtype, teacher.dtype)
    return (("cuda", "float64 goes through Triton or the reference"),) if wide else ()


@scalable
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
    scale: Scale = 1.0,
    backend: str | None = None,
) -> Tensor:
    """KL of the student from the teacher over the matched vocabulary; formulas in
    :func:`vocabdistil.reference.matched_kl`.

    The matched columns are read through the index inside the kernel; only the student's gradient is written.

    Args:
        student_logits: ``[..., V_s]``, flattened to rows; float32, float64, bfloat16 or float16; any strides (one copy
            where the last dimension is not contiguous or the rows are not evenly spaced).
        teacher_logits: ``[..., V_t]``; as many rows as the student without ``pairs``. It gets no gradient.
        matched: ``.student_ids`` and ``.teacher_ids``, int64 or int32 ``[V_m]``, distinct on each side.
        pairs: span pairs over the flattened rows, whose logits are pooled; None for row i with row i.
        mask: bool or integers ``[...]``, one per row, beside no pairs: rows where it is 0 count for nothing.
        pair_weights: ``[P]``, what each pair (or row) counts; may require gradients.
        temperature: ``T > 0``.
        unmatched: ``"renormalize"`` (softmax over the matched columns), ``"rest"`` (one class more for all unmatched
            mass) or ``"drop"`` (softmax over all columns, terms of the matched ones).
        pooling: ``"mean"`` or ``"sum"`` over the rows of a span; used with ``pairs`` only.
        student_shift, teacher_shift: 0 where row i of ``[B, L, .]`` is about token i, as in a masked model; 1 where it
            predicts token i + 1, as in a causal one: the pairs (or, without them, the tokens and their mask) then read
            the row before. What begins a text counts for nothing, as nothing predicts it: texts have to be padded
            behind, as in front of them a row of padding would be read.
        reduction: ``"batchmean"`` (divided by the number of rows, or of pairs with both spans non-empty), ``"sum"``
            or ``"none"`` (``[P]``).
        scale: as in :func:`span_loss`.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None chooses by device.

    Returns:
        The loss, float32 (float64 if an input is float64): ``[]``, or ``[P]`` for ``reduction="none"``.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, value or device, named in the text; ids out
            of range or, with the kernel, repeated; ``"rest"`` where the teacher alone has unmatched columns.
    """
    checks.check_columns(student_logits, "student_logits")
    checks.check_columns(teacher_logits, "teacher_logits")
    checks.check_sides(student_logits, "student_logits", teacher_logits, "teacher_logits")
    student, teacher = student_logits.flatten(0, -2), teacher_logits.detach().flatten(0, -2)
    shifts = student_shift, teacher_shift
    pairs = chosen_pairs(pairs, mask, pair_weights, student_logits, teacher_logits, "logits", shifts)
    check_matched_arguments(
        matched, student.shape[1], teacher.shape[1], temperature, unmatched, pooling, reduction
    )
    if pair_weights is not None and pair_weights.requires_grad:
        each = matched_kl(
            student_logits, teacher_logits, matched, pairs=pairs, temperature=temperature, unmatched=unmatched,
            pooling=pooling, reduction="none", backend=backend,
        )  # fmt: skip
        return scaled(reduce_pairs(each, None, pair_count(pairs, student), reduction, pair_weights), scale)
    choice = resolve("matched_kl", student.device, backend, _limits(student, teacher))
    if choice == "reference":
        loss = reference_matched_kl(
            student_logits, teacher_logits, matched, pairs=pairs, pair_weights=pair_weights, temperature=temperature,
            unmatched=unmatched, pooling=pooling, reduction=reduction,
        )  # fmt: skip
        return scaled(loss, scale)
    dtype = native.accumulation_dtype(student.dtype, teacher.dtype)
    spans, each = span_vectors(pairs), row_scale(pairs, student, reduction, dtype, scale, pair_weights)
    compiling = torch.compiler.is_compiling()
    options = (native.UNMATCHED_CODES[unmatched], pooling == "mean", float(temperature), choice, not compiling)
    # Two names, not a loop: torch.compile of torch 2.6 takes tensors made under one name for one tensor in backward.
    ids_dtype = torch.int32 if choice == "cpu" else None  # the GPU kernels take both: one launch less per side
    student_ids = matched.student_ids.to(student.device, ids_dtype).contiguous()
    teacher_ids = matched.teacher_ids.to(student.device, ids_dtype).contiguous()
    return RowLoss.apply(
        _op, None if choice == "cpu" else _again, native_rows(student), native_rows(teacher), student_ids, teacher_ids,
        each, options, reduction != "none", torch.is_grad_enabled() and student.requires_grad, 0, *spans,
    )  # fmt: skip


def span_vectors(pairs: SpanPairs | None) -> tuple[Tensor, ...]:
    """The four int32 vectors of the pairs; none for row p with row p."""
    if pairs is None:
        return ()
    return pairs.student_start, pairs.student_end, pairs.teacher_start, pairs.teacher_end


def pair_count(pairs: SpanPairs | None, student: Tensor) -> int | Tensor:
    """What ``batchmean`` divides by: the pairs with both spans non-empty, or the rows."""
    return at_least_one(student.shape[0] if pairs is None else pairs.num_nonempty)


def row_scale(
    pairs: SpanPairs | None, student: Tensor, reduction: str, dtype: torch.dtype, scale: Scale,
    pair_weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``[P]``: what each pair's loss counts in a total of the given reduction."""
    rows = student.shape[0] if pairs is None else len(pairs)
    each = torch.ones(rows, dtype=dtype, device=student.device) if pair_weights is None else pair_weights.to(dtype)
    if reduction == "batchmean":
        each = each / pair_count(pairs, student)
    return scaled(each, scale).contiguous()
