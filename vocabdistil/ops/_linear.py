"""What the divergences from hidden states and output layers have in common: their rows and their results."""

from __future__ import annotations

import torch
from torch import Tensor

from ..alignment.spans import SpanPairs
from ..core import native
from ..reference._common import valid_pairs
from .span_mean import pool_rows


def empty_grads(scale: Tensor, *sides: tuple[Tensor | None, bool]) -> list[Tensor | None]:
    """Of each tensor memory for its gradient in the accumulation dtype, where it is wanted."""
    return [native.empty(scale, *x.shape) if wanted and x is not None else None for x, wanted in sides]


def results(
    total: Tensor, loss: Tensor, grads: list[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As an operation returns them: an empty tensor for a gradient that was not wanted."""
    grad_hidden, grad_weight, grad_bias = (total.new_empty(0) if g is None else g for g in grads)
    return total, loss, grad_hidden, grad_weight, grad_bias


def fake_results(
    scale: Tensor, student: Tensor, student_weight: Tensor, hidden_grad: bool, weight_grad: bool, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of the shapes of :func:`results`."""
    return (
        scale.new_empty(()), torch.empty_like(scale), scale.new_empty(student.shape if hidden_grad else 0),
        scale.new_empty(student_weight.shape if weight_grad else 0),
        scale.new_empty(student_weight.shape[0] if bias_grad else 0),
    )  # fmt: skip


def wanted_grads(*tensors: Tensor | None) -> tuple[bool, ...]:
    return tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors)


def pool_sides(
    student: Tensor, teacher: Tensor, pairs: SpanPairs | None, pooling: str, scale: Tensor, choice: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of both sides, and what each counts: ``scale``, but 0 for pairs with an empty side."""
    if pairs is None:
        return student, teacher, scale
    dtypes, valid = (student.dtype, teacher.dtype), valid_pairs(pairs)
    student = pool_rows(student, pairs.student_start, pairs.student_end, pooling, valid)
    teacher = pool_rows(teacher, pairs.teacher_start, pairs.teacher_end, pooling, valid)
    if choice != "cpu":  # products run in the dtype of the hidden states there
        student, teacher = student.to(dtypes[0]), teacher.to(dtypes[1])
    if valid is not None:  # such a pair is left with the bias of each side, and counts for nothing
        scale = torch.where(valid, scale, 0.0)
    return student, teacher, scale
