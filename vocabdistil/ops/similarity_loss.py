"""similarity_loss: implementation, autograd, public function. Formula: ``reference/similarity_loss.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import native
from ..core.dispatch import transformed
from ..reference._common import unit_rows
from ..reference.similarity_loss import check_similarity
from ..reference.similarity_loss import similarity_loss as reference_similarity_loss
from ._gradient import once_differentiable


class _Similarity(torch.autograd.Function):
    """One matrix of differences gives the loss and, as it is symmetric, the gradient; only the latter is kept."""

    @staticmethod
    def forward(ctx, student, teacher):
        each = 1 / max(len(student) ** 2, 1)
        with torch.autocast(student.device.type, enabled=False):
            difference = (student @ student.t()).addmm_(teacher, teacher.t(), alpha=-1)
            if ctx.needs_input_grad[0]:
                ctx.save_for_backward(student, (difference @ student).mul_(4 * each))
        return torch.linalg.vector_norm(difference, dim=1).square().sum() * each

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        _, slope = ctx.saved_tensors
        return slope * grad, None


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the cosines among the vectors of a batch; formula and sources in
    :func:`vocabdistil.reference.similarity_loss`.

    Args:
        student: ``[B, D_s]``; float32, float64, bfloat16 or float16.
        teacher: ``[B, D_t]``, the same. It gets no gradient.

    Returns:
        The loss, ``[]``, float32 (float64 for float64). Half types are computed in float32.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape or device, named in the text.
    """
    check_similarity(student, teacher)
    if transformed():
        return reference_similarity_loss(student, teacher)
    dtype = native.accumulation_dtype(student.dtype, teacher.dtype)
    return _Similarity.apply(unit_rows(student.to(dtype)), unit_rows(teacher.detach().to(dtype)))
