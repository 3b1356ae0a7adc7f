"""The sweep of `linear_matched_kl` for half-precision hidden states in Triton: logits stay in registers, and the
gradient is formed as its products load it (triton_kernels/linear_matched_kl.py). Rows are taken in a few large chunks,
as what is kept between forming and using the gradient takes 4 bytes per row and column.

The student's rows that are needed are gathered once, the matched ones first and then the others, both padded to whole
tiles. The teacher's are read where they lie, unless they have to be rounded to the dtype of its hidden states, as
autocast would do, or their columns are not adjacent.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

from ..core import native
from ..core.dispatch import implementation
from ._dense_sweep import rows_per_chunk, unit_of, unmatched_last
from .span_mean import native_rows


def _chosen(bias: Tensor | None, ids: Tensor) -> Tensor | None:
    return None if bias is None else bias[ids].float()


def _scattered(of_tiles: Tensor, ids: Tensor, others: Tensor, at: int, count: int) -> Tensor:
    """``[count, ...]`` of ``[parts, width, ...]``: the parts' sums, the first columns at the ids and those from ``at``
    at the others."""
    rows = of_tiles[0] if len(of_tiles) == 1 else of_tiles.sum(0)
    out = rows.new_zeros(count, *rows.shape[1:]).index_copy_(0, ids, rows[: ids.numel()])
    return out.index_copy_(0, others, rows[at : at + others.numel()]) if others.numel() else out


def fused_sweep(
    student: Tensor, student_weight: Tensor, student_bias: Tensor | None, student_lengths: Tensor | None,
    teacher: Tensor, teacher_weight: Tensor, teacher_bias: Tensor | None, teacher_lengths: Tensor | None,
    student_ids: Tensor, teacher_ids: Tensor, scale: Tensor, unmatched: int, temperature: float, hidden_grad: bool,
    weight_grad: bool, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As ``dense_sweep``."""
    # The sizes of tiles are those of the current device.
    with torch.cuda.device(student.device) if student.is_cuda else contextlib.nullcontext():
        of_weight, of_bias, loss, grad_hidden, others, unit, at = _sweep(
            student, student_weight, student_bias, student_lengths, teacher, teacher_weight, teacher_bias,
            teacher_lengths, student_ids, teacher_ids, scale, unmatched, temperature, hidden_grad, weight_grad,
            bias_grad,
        )  # fmt: skip
    grad_weight, grad_bias = (
        scale.new_empty(0) if x is None else _scattered(x, student_ids, others, at, student_weight.shape[0])
        for x in (of_weight, of_bias)
    )
    if unit is not None:
        for x in (grad_hidden, grad_weight, grad_bias):
            x.mul_(unit)
    total = implementation("matched_kl", "triton", "weighted_total")(loss, scale)
    return total, loss, grad_hidden, grad_weight, grad_bias


def _sweep(
    student: Tensor, student_weight: Tensor, student_bias: Tensor | None, student_lengths: Tensor | None,
    teacher: Tensor, teacher_weight: Tensor, teacher_bias: Tensor | None, teacher_lengths: Tensor | None,
    student_ids: Tensor, teacher_ids: Tensor, scale: Tensor, unmatched: int, temperature: float, hidden_grad: bool,
    weight_grad: bool, bias_grad: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor, Tensor | None, int]:  # fmt: skip
    """The gradients of the gathered rows of the weight ``[parts, width, D]`` and of their biases, to be added up, if
    they are wanted; the losses; the gradient of the hidden states; the student's other columns; the unit of the
    gradients, if they have one; and where the other columns begin. Whatever else it holds is given back."""
    kernels = functools.partial(implementation, "linear_matched_kl", "triton")
    (count, dim), narrow, v_m = student.shape, student.dtype, student_ids.numel()
    whole, wanted = unmatched != native.UNMATCHED_CODES["renormalize"], hidden_grad or weight_grad or bias_grad
    student, teacher = native_rows(student), native_rows(teacher)
    others, t_others = student_ids[:0], teacher_ids[:0]
    if whole:
        others = unmatched_last(student_ids, student_weight.shape[0])[v_m:]
        t_others = unmatched_last(teacher_ids, teacher_weight.shape[0])[v_m:]
        teacher_weight = native_rows(teacher_weight)
    at, width = kernels("layout")(v_m, others.numel())
    w_s = student.new_zeros(width, dim)
    w_s[:v_m] = student_weight[student_ids]
    w_s[at : at + others.numel()] = student_weight[others]
    w_t = teacher_weight
    t_ids: Tensor | None = teacher_ids
    if w_t.dtype != teacher.dtype or w_t.stride(-1) != 1:
        w_t, t_ids = w_t[teacher_ids].to(teacher.dtype), None
    b_s, b_t = _chosen(student_bias, student_ids), _chosen(teacher_bias, teacher_ids)
    u_s, u_t = _chosen(student_bias, others), _chosen(teacher_bias, t_others)

    loss = torch.empty_like(scale)
    grad_hidden = scale.new_empty(student.shape if hidden_grad else 0)
    unit = unit_of(scale, temperature) if narrow == torch.float16 and wanted else None
    row_scale = scale if unit is None else scale / unit
    parts = kernels("parts_of_weight")(count, width, dim)
    of_weight = scale.new_zeros(parts, width, dim) if weight_grad else None
    of_bias = scale.new_zeros(parts, width) if bias_grad else None

    traffic = w_s.nbytes + v_m * teacher.shape[1] * teacher.element_size() + width * dim * 4 * weight_grad
    fixed = w_s.nbytes + grad_hidden.nbytes + (0 if of_weight is None else of_weight.nbytes)
    fixed += 0 if t_ids is not None else w_t.nbytes
    per_row = kernels("bytes_per_row")(at, width, t_others.numel(), dim, wanted, hidden_grad)
    step = min(rows_per_chunk(count, fixed, traffic, per_row), count) if count else 0
    g, h = (torch.empty(step, n, dtype=torch.float16, device=scale.device) if wanted else None for n in (at, width))

    def turn(part: slice) -> None:
        x, y, n = student[part], teacher[part], part.stop - part.start
        out = None if g is None or h is None else (g[:n], h[:n])
        x_lengths, y_lengths = (None if k is None else k[part] for k in (student_lengths, teacher_lengths))
        stats = kernels("tiles")(
            x, w_s, b_s, x_lengths, y, w_t, t_ids, b_t, y_lengths, v_m, temperature, out
        )  # fmt: skip
        s_rest = t_rest = None
        if whole:
            of_others = None if out is None else out[1][:, at:]
            s_rest = kernels("masses")(x, w_s[at:], None, u_s, x_lengths, others.numel(), temperature, of_others)
            t_rest = kernels("masses")(
                y, teacher_weight, t_others, u_t, y_lengths, t_others.numel(), temperature, None
            )  # fmt: skip
        factors = kernels("combine")(
            stats, s_rest, t_rest, row_scale[part], unmatched, temperature, loss[part], wanted
        )  # fmt: skip
        if out is not None and hidden_grad:
            kernels("grad_hidden")(*out, factors, w_s, grad_hidden[part])
        if out is not None and (weight_grad or bias_grad):
            kernels("grad_weight")(*out, factors, x, x_lengths, (of_weight, of_bias), part.start > 0)

    for begin in range(0, count, max(step, 1)):
        turn(slice(begin, min(count, begin + step)))
    return of_weight, of_bias, loss, grad_hidden, others, unit, at
