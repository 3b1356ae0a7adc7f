"""relation_loss: schema, implementation, autograd, public function. Formula: ``reference/relation_loss.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..alignment.spans import SpanPairs
from ..core import native
from ..core.checks import Scale
from ..core.dispatch import implementation, resolve
from ..reference._common import valid_pairs
from ..reference.relation_loss import Kinds, check_relation_arguments, text_of
from ..reference.relation_loss import relation_loss as reference_relation_loss
from ._gradient import RowLoss
from ._library import define
from ._scale import scalable, scaled
from .matched_kl import row_scale
from .span_mean import pool_rows


def _impl(
    student: Tensor, teacher: Tensor, first: Tensor, last: Tensor, scale: Tensor, heads: int, backend: str, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total, loss, grad = _fake(student, teacher, first, last, scale, heads, backend, wanted)
    given = grad if wanted else None
    student, teacher = student.contiguous(), teacher.contiguous()
    if backend == "triton":
        kernels = implementation("relation_loss", backend, "relation_loss")
        total = kernels(student, teacher, first, last, scale, heads, loss, given)
    else:
        native.relation_loss(student, teacher, first, last, scale, heads, loss, total, given)
    return total, loss, grad


def _fake(student, teacher, first, last, scale, heads, backend, wanted):
    grad = student.new_empty(student.shape if wanted else 0)
    return scale.new_empty(()), torch.empty_like(scale), grad


_op = define(
    "relation_loss(Tensor student, Tensor teacher, Tensor first, Tensor last, Tensor scale, int heads, str backend, "
    "bool wanted) -> (Tensor, Tensor, Tensor)",
    _impl,
    _fake,
)


def _of_rows(
    student: Tensor, teacher: Tensor, spans: Sequence[Tensor], first: Tensor, last: Tensor, *options: object
) -> tuple[Tensor, Tensor, Tensor]:
    """As :class:`RowLoss` calls an op; the spans are averaged before."""
    return _op(student, teacher, first, last, *options)


@scalable
def relation_loss(
    student: Kinds,
    teacher: Kinds,
    pairs: SpanPairs,
    *,
    heads: int,
    reduction: str = "batchmean",
    scale: Scale = 1.0,
    backend: str | None = None,
) -> Tensor:
    """KL between the self-attention relations of teacher and student (MiniLMv2) over aligned spans; formulas in
    :func:`vocabdistil.reference.relation_loss`.

    The averaged rows are written, their scores are not: a text as one head sees it is taken a block of rows at a time,
    forwards for the sums and backwards for the gradient, which is formed with the loss where that is a scalar.

    Args:
        student: ``[B, L_s, D_s]``, the states of one kind (queries, keys or values of a layer) with the heads side by
            side, or a list of such tensors, one per kind, whose widths may differ; float32, float64, bfloat16 or
            float16; any strides.
        teacher: ``[B, L_t, D_t]``, or as many such tensors. It gets no gradient.
        pairs: span pairs over the flattened positions, each within one text, the same on both sides (looked at only in
            host memory).
        heads: how many heads the states are cut into, whatever number the models have; divides every width.
        reduction: ``"batchmean"`` (divided by the number of pairs with both spans non-empty), ``"sum"`` or ``"none"``
            (``[P]``).
        scale: as in :func:`span_loss`.
        backend: ``"cpu"``, ``"triton"`` (float64 goes through the reference there) or ``"reference"``; None chooses by
            device.

    Returns:
        The loss, float32 (float64 if an input is float64): ``[]``, or ``[P]`` for ``reduction="none"``.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, value or device, named in the text.
    """
    students, teachers = check_relation_arguments(student, teacher, pairs, heads, reduction)
    dtype = native.accumulation_dtype(students[0].dtype, teachers[0].dtype)
    limits = (("triton", "float64 goes through the reference"),) if dtype == torch.float64 else ()
    choice = resolve("relation_loss", students[0].device, backend, limits)
    if choice == "reference":
        return scaled(reference_relation_loss(student, teacher, pairs, heads=heads, reduction=reduction), scale)
    first, last = text_of(pairs, students[0].shape[1])
    if (valid := valid_pairs(pairs)) is not None:
        last = torch.where(valid, last, first)
    terms = []
    for s, t in zip(students, teachers, strict=True):
        s = pool_rows(s.flatten(0, 1), pairs.student_start, pairs.student_end, "mean", None).to(dtype)
        t = pool_rows(t.flatten(0, 1), pairs.teacher_start, pairs.teacher_end, "mean", None).to(dtype)
        each = row_scale(pairs, s, reduction, dtype, scale) / len(students)
        term = RowLoss.apply(
            _of_rows, None, s, t, first, last, each, (heads, choice), reduction != "none",
            torch.is_grad_enabled() and s.requires_grad, 0,
        )  # fmt: skip
        terms.append(term)
    return sum(terms[1:], terms[0])
