"""The sweep of `linear_remapped_kl` on a GPU: chunks of rows, whose float32 logits two products form, the kernels of
remapped_kl turn into the losses and the gradient of the student's logits, and two more products carry back. Chunks and
precision are those of ``_dense_sweep.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from ._dense_sweep import row_buffer, rows_per_chunk, unit_of
from ._products import product
from .remapped_kl import remapped_op

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def dense_remapped(
    student: Tensor, student_weight: Tensor, student_bias: Tensor | None, teacher: Tensor, teacher_weight: Tensor,
    teacher_bias: Tensor | None, indptr: Tensor, ids: Tensor, weights: Tensor | None, scale: Tensor, logsumexp: bool,
    top_k: int, remainder: int, temperature: float, backend: str, hidden_grad: bool, weight_grad: bool,
    bias_grad: bool,
) -> Gradients:  # fmt: skip
    """As the private op ``linear_remapped_kl``: the total, the losses and the gradients in the accumulation dtype."""
    dtype, narrow, (count, _), columns = scale.dtype, student.dtype, student.shape, student_weight.shape[0]
    mapped = indptr.numel() - 1  # columns of the teacher that the table has rows for
    wanted = hidden_grad or weight_grad or bias_grad
    w_s, w_t = student_weight.to(narrow), teacher_weight[:mapped].to(teacher.dtype)
    b_s, b_t = (None if b is None else b.to(dtype) for b in (student_bias, teacher_bias))
    loss = torch.empty_like(scale)
    grad_hidden = scale.new_empty(student.shape if hidden_grad else 0)
    grad_weight = scale.new_zeros(student_weight.shape if weight_grad else 0)
    grad_bias = scale.new_zeros(columns if bias_grad else 0)
    unit = None
    if narrow == torch.float16:
        largest = 1.0 if weights is None or not weights.numel() else weights.abs().amax().clamp(min=1).to(scale)
        unit = unit_of(4 * largest * scale, temperature)  # a piece may stand in a row more than once
    row_scale = scale if unit is None else scale / unit

    traffic = w_s.nbytes + w_t.nbytes + grad_weight.nbytes
    per_row = dtype.itemsize * ((1 + wanted) * columns + mapped) + narrow.itemsize * columns * (narrow != dtype)
    step = min(rows_per_chunk(count, traffic + grad_hidden.nbytes, traffic, per_row), count) if count else 0
    s_buffer, t_buffer = (row_buffer(scale, step, n, dtype) for n in (columns, mapped))
    for begin in range(0, count, max(step, 1)):
        part = slice(begin, min(count, begin + step))
        s, t = (buffer[: part.stop - begin] for buffer in (s_buffer, t_buffer))
        for z, x, weight, bias in ((s, student, w_s, b_s), (t, teacher, w_t, b_t)):
            product(x[part], weight.t(), z)
            if bias is not None:
                z.add_(bias[: z.shape[1]])
        _, loss[part], d = remapped_op(
            s, t, (), indptr, ids, weights, row_scale[part], logsumexp, top_k, remainder, temperature, backend, wanted
        )
        if not wanted:
            continue
        if bias_grad:
            grad_bias.add_(d.sum(0))
        d = d.to(narrow)
        if hidden_grad:
            product(d, w_s, grad_hidden[part])
        if weight_grad:
            product(d.t(), student[part], grad_weight, add=True)
    if unit is not None:
        for g in (grad_hidden, grad_weight, grad_bias):
            g.mul_(unit)
    loss = torch.where(scale == 0, 0.0, loss)
    total = (loss.double() * scale.double()).sum().to(dtype)
    return total, loss, grad_hidden, grad_weight, grad_bias
