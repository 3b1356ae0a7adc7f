"""The sweep of `linear_matched_kl` on a GPU, but for hidden states of half precision in Triton (``_fused_sweep.py``),
and in PyTorch on any device: matched columns first, large products, one kernel for the rows.

The rows of both weights that are needed are gathered once, the matched ones first and in one order, so that the row
kernel reads no index. Rows are then taken in a few large chunks: two products give float32 logits; the row kernel turns
them into the loss and the logits' gradient in the dtype of the hidden states, in the memory of the student's logits
where it holds a row in registers; and two more products, accumulated in float32, carry that back. Half inputs go
through the tensor cores; a float32 weight under half hidden states is rounded to their dtype, as autocast would do.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..core import native
from ..core.dispatch import implementation
from ._products import native_products, product
from ._torch_rows import add_rest, dense_rows

# Bytes for all that is held meanwhile, or, where the gathered rows and their gradient are large, this many times them:
# every chunk reads and writes them all.
BUDGET = 64_000_000
_TIMES = 3.25
_REST_COLUMNS = 8192  # of the teacher's logits that enter its unmatched mass, formed at a time
_ALIGNED = 16  # rows of buffers are multiples of this, so that products and kernels read 16 bytes at a time


def _padded(columns: int) -> int:
    return -(-columns // _ALIGNED) * _ALIGNED


def row_buffer(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return like.new_empty(rows, _padded(columns), dtype=dtype)[:, :columns]


def rows_per_chunk(count: int, fixed: int, traffic: int, per_row: int) -> int:
    """fixed: bytes that a chunk's size does not change; traffic: those of them that every chunk reads or writes."""
    left = max(BUDGET, int(_TIMES * traffic)) - fixed
    most = max(left // per_row, 16)
    step = -(-count // -(-count // most))  # as many chunks, of one size
    unit = 128 if most >= 128 else 16  # whole tiles of the products
    return min(-(-step // unit) * unit, most // unit * unit)


def _with_bias(bias: Tensor | None, ids: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The chosen biases, and zeros to the length of a row of the buffers."""
    if bias is None:
        return None
    out = bias.new_zeros(_padded(ids.numel()), dtype=dtype)
    out[: ids.numel()] = bias[ids].to(dtype)
    return out


def unmatched_last(ids: Tensor, columns: int) -> Tensor:
    """All columns, the given ones first; known to be distinct, so that no size has to be asked of the device."""
    matched = torch.zeros(columns, dtype=torch.uint8, device=ids.device)
    matched.index_fill_(0, ids, 1)
    return torch.cat([ids, matched.argsort(stable=True)[: columns - ids.numel()]])


def _teacher_rest(
    x: Tensor, weight: Tensor, bias: Tensor | None, lengths: Tensor | None, left_out: Tensor, temperature: float,
    buffer: Tensor, add_rest: Callable[..., Tensor],
) -> Tensor | None:  # fmt: skip
    """What ``dense_rows`` reads of all columns of the weight but those marked in ``left_out [V]``."""
    rest, step = None, buffer.shape[1]
    for begin in range(0, weight.shape[0], step):
        part = slice(begin, min(weight.shape[0], begin + step))
        z = buffer[: x.shape[0], : part.stop - begin]
        product(x, weight[part].to(x.dtype).t(), z)
        part_bias = None if bias is None else bias[part].to(z.dtype)
        rest = add_rest(z, part_bias, lengths, left_out[part], temperature, rest)
    return rest


def dense_sweep(
    student: Tensor, student_weight: Tensor, student_bias: Tensor | None, student_lengths: Tensor | None,
    teacher: Tensor, teacher_weight: Tensor, teacher_bias: Tensor | None, teacher_lengths: Tensor | None,
    student_ids: Tensor, teacher_ids: Tensor, scale: Tensor, unmatched: int, temperature: float, backend: str,
    hidden_grad: bool, weight_grad: bool, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As the private op ``linear_matched_kl``: the total, the losses and the gradients in the accumulation dtype."""
    renormalized = unmatched == native.UNMATCHED_CODES["renormalize"]
    columns = student_ids if renormalized else unmatched_last(student_ids, student_weight.shape[0])
    total, loss, grad_hidden, d_weight, d_bias = _sweep(
        student, student_weight, student_bias, student_lengths, teacher, teacher_weight, teacher_bias, teacher_lengths,
        columns, teacher_ids, scale, unmatched, temperature, backend, hidden_grad, weight_grad, bias_grad,
    )  # fmt: skip
    grad_weight = _scattered(d_weight, columns, student_weight.shape[0]) if weight_grad else d_weight
    grad_bias = _scattered(d_bias, columns, student_weight.shape[0]) if bias_grad else d_bias
    return total, loss, grad_hidden, grad_weight, grad_bias


def unit_of(scale: Tensor, temperature: float) -> Tensor:
    """Float16 has no room for what one logit of many counts in a mean over many rows: its gradients are formed of a
    size near 1, in units of this, and brought down to their own size in float32."""
    largest = scale.abs().amax().clamp(min=1e-30) if scale.numel() else scale.new_ones(())
    return largest * 2.0 ** -math.floor(math.log2(32768 / temperature))


def _sweep(
    student: Tensor, student_weight: Tensor, student_bias: Tensor | None, student_lengths: Tensor | None,
    teacher: Tensor, teacher_weight: Tensor, teacher_bias: Tensor | None, teacher_lengths: Tensor | None,
    columns: Tensor, teacher_ids: Tensor, scale: Tensor, unmatched: int, temperature: float, backend: str,
    hidden_grad: bool, weight_grad: bool, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The same for these columns of the student, the matched ones first, with the gradients of these rows of its weight
    and bias alone; whatever else it holds is given back when it returns."""
    rows, add, total_of, resident = dense_rows, add_rest, _torch_total, None
    if backend == "triton":
        rows, add, total_of, resident = (
            implementation("matched_kl", backend, name)
            for name in ("dense_rows", "add_rest", "weighted_total", "resident")
        )
    dtype, narrow, count = scale.dtype, student.dtype, scale.numel()
    whole = unmatched != native.UNMATCHED_CODES["renormalize"]
    num_matched, width, wanted = teacher_ids.numel(), columns.numel(), hidden_grad or weight_grad or bias_grad
    w_s = student_weight.index_select(0, columns).to(narrow)
    w_t = teacher_weight.index_select(0, teacher_ids).to(teacher.dtype)
    b_s, b_t = _with_bias(student_bias, columns, dtype), _with_bias(teacher_bias, teacher_ids, dtype)
    left_out = None
    if whole:
        left_out = torch.zeros(teacher_weight.shape[0], dtype=torch.uint8, device=scale.device)
        left_out.index_fill_(0, teacher_ids, 1)

    loss = torch.empty_like(scale)
    grad_hidden = scale.new_empty(student.shape if hidden_grad else 0)
    d_weight = scale.new_empty((width, student.shape[1]) if weight_grad else 0)
    d_bias = scale.new_zeros(width if bias_grad else 0)
    unit = unit_of(scale, temperature) if narrow == torch.float16 else None
    row_scale = scale if unit is None else scale / unit

    size = scale.element_size()
    traffic = w_s.nbytes + w_t.nbytes + size * d_weight.numel()
    in_place = resident is not None and resident(width, dtype)
    per_row = size * (_padded(width) + _padded(num_matched))
    per_row += narrow.itemsize * _padded(width) * (wanted and not in_place)
    per_row += size * _REST_COLUMNS * whole
    fixed = traffic + size * grad_hidden.numel()
    if narrow != dtype and not native_products(student.device)[1]:
        fixed += size * d_weight.numel()  # a product beside it, which is then added
    step = min(rows_per_chunk(count, fixed, traffic, per_row), count) if count else 0
    s_buffer, t_buffer = (row_buffer(scale, step, n, dtype) for n in (width, num_matched))
    d_buffer = None
    if wanted and in_place:  # the gradient of a row takes the front of its logits
        d_buffer = s_buffer.as_strided((step, _padded(width)), s_buffer.stride()).view(narrow)[:, :width]
    elif wanted:
        d_buffer = row_buffer(scale, step, width, narrow)
    rest_buffer = row_buffer(scale, step, _REST_COLUMNS, dtype) if whole else None

    def turn(part: slice) -> None:
        n = part.stop - part.start
        x, y, s, t = student[part], teacher[part], s_buffer[:n], t_buffer[:n]
        d = None if d_buffer is None else d_buffer[:n]
        x_lengths, y_lengths = (None if k is None else k[part] for k in (student_lengths, teacher_lengths))
        product(x, w_s.t(), s)
        product(y, w_t.t(), t)
        rest = None
        if rest_buffer is not None and left_out is not None:
            rest = _teacher_rest(y, teacher_weight, teacher_bias, y_lengths, left_out, temperature, rest_buffer, add)
        rows(s, t, b_s, b_t, x_lengths, y_lengths, rest, row_scale[part], unmatched, temperature, loss[part], d)
        if d is None:
            return
        if hidden_grad:
            product(d, w_s, grad_hidden[part])
        if weight_grad:
            product(d.t(), x, d_weight, add=part.start > 0)
        if bias_grad:
            d_bias.add_((d if x_lengths is None else d * x_lengths[:, None].to(dtype)).sum(0, dtype=dtype))

    for begin in range(0, count, max(step, 1)):
        turn(slice(begin, min(count, begin + step)))
    if not count:
        d_weight.zero_()
    if unit is not None:
        for g in (grad_hidden, d_weight, d_bias):
            g.mul_(unit)
    return total_of(loss, scale), loss, grad_hidden, d_weight, d_bias


def _torch_total(loss: Tensor, scale: Tensor) -> Tensor:
    return (loss * scale).sum(dtype=torch.float64).to(scale.dtype)


def _scattered(rows: Tensor, ids: Tensor, count: int) -> Tensor:
    """``[count, ...]``, the rows at the ids and 0 elsewhere."""
    return rows.new_zeros(count, *rows.shape[1:]).index_copy_(0, ids, rows)
