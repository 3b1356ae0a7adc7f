"""linear_matched_kl: schema, implementation, autograd, public function. Formula: ``reference/linear_matched_kl.py``.

A GPU takes the sweep in ``_dense_sweep.py``. On a CPU rows are taken in chunks: their logits are products with the
weights, which are gathered some columns at a time, the row kernel of `matched_kl` turns the student's logits into their
gradient in place, and two more products carry that to the hidden states and the weight. Nothing else of the size of the
logits is ever written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import _checks as checks
from .. import _native
from .._checks import Matched
from .._dispatch import resolve
from ..reference._common import span_pool, valid_pairs
from ..reference.linear_matched_kl import check_output_layer
from ..reference.linear_matched_kl import linear_matched_kl as reference_linear_matched_kl
from ..reference.matched_kl import check_matched_arguments
from ..spans import SpanPairs
from ._dense_sweep import dense_sweep
from ._gradient import hand_out
from ._library import define
from ._torch_rows import torch_rows
from .matched_kl import row_scale
from .span_mean import native_rows, pooled_rows

# What a chunk of rows may take for the logits of both sides. Where the weights are large, half of what the matched
# rows of both take, as each chunk has to read them all.
BUDGET = 4 << 20
# Columns whose weights are gathered at a time.
_COLUMNS = 512
# From this share of matched columns on, products with the whole weight of the student are cheaper than to gather it.
_MOSTLY = 0.8


def _dense(device: torch.device, backend: str) -> bool:
    """Whether the products are large and run in the dtype of the hidden states (``_dense_sweep.py``)."""
    return device.type == "cuda" or backend == "triton"


def _column_chunks(weight: Tensor, ids: Tensor | None, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """begin, end and, for one turn, ``weight[ids[begin:end]]`` (``weight[begin:end]`` without ids) in ``dtype``."""
    if ids is None and weight.dtype == dtype:
        yield 0, weight.shape[0], weight
        return
    count = weight.shape[0] if ids is None else ids.numel()
    buffer = None if ids is None else weight.new_empty(min(_COLUMNS, count), weight.shape[1])
    for begin in range(0, count, _COLUMNS):
        end = min(count, begin + _COLUMNS)
        if ids is None:
            rows = weight[begin:end]
        else:
            rows = torch.index_select(weight, 0, ids[begin:end], out=buffer[: end - begin])
        yield begin, end, rows.to(dtype)


def _add_product(out: Tensor, x: Tensor, rows: Tensor, bias: Tensor | None, lengths: Tensor | None) -> None:
    """``out = x rows^T + lengths bias^T``; a length is 1 unless the row is a sum of several."""
    if bias is None:
        torch.mm(x, rows.t(), out=out)
        return
    out.copy_(bias if lengths is None else lengths[:, None] * bias)
    out.addmm_(x, rows.t())


def _project(
    x: Tensor, weight: Tensor, bias: Tensor | None, lengths: Tensor | None, ids: Tensor | None, out: Tensor
) -> None:
    """Logits of the chosen columns (all without ids) of rows x [R, D] -> out [R, columns]."""
    if bias is not None and ids is not None:
        bias = bias[ids]
    for begin, end, rows in _column_chunks(weight, ids, x.dtype):
        _add_product(out[:, begin:end], x, rows, None if bias is None else bias[begin:end], lengths)


def _log_sum_exp(
    x: Tensor, weight: Tensor, bias: Tensor | None, lengths: Tensor | None, left_out: Tensor, temperature: float
) -> Tensor:
    """[R]: log sum exp(z / T) over all columns but those marked in ``left_out`` [V]; z lives a chunk at a time."""
    total = x.new_full((x.shape[0],), float("-inf"))
    for begin in range(0, weight.shape[0], _COLUMNS):
        end = min(weight.shape[0], begin + _COLUMNS)
        rows = weight[begin:end].to(x.dtype)
        z = x.new_empty(x.shape[0], end - begin)
        _add_product(z, x, rows, None if bias is None else bias[begin:end], lengths)
        z.mul_(1 / temperature).masked_fill_(left_out[begin:end], float("-inf"))
        torch.logaddexp(total, z.logsumexp(-1), out=total)
    return total


def _impl(
    student: Tensor, student_weight: Tensor, student_bias: Tensor | None, student_lengths: Tensor | None,
    teacher: Tensor, teacher_weight: Tensor, teacher_bias: Tensor | None, teacher_lengths: Tensor | None,
    student_ids: Tensor, teacher_ids: Tensor, scale: Tensor, unmatched: int, temperature: float, backend: str,
    hidden_grad: bool, weight_grad: bool, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if _dense(student.device, backend):
        return dense_sweep(
            student, student_weight, student_bias, student_lengths, teacher, teacher_weight, teacher_bias,
            teacher_lengths, student_ids, teacher_ids, scale, unmatched, temperature, backend, hidden_grad, weight_grad,
            bias_grad,
        )  # fmt: skip
    dtype, count = scale.dtype, scale.numel()
    whole = unmatched != _native.UNMATCHED_CODES["renormalize"]
    num_matched = student_ids.numel()
    mostly = student_weight.dtype == dtype and num_matched >= _MOSTLY * student_weight.shape[0]
    columns = None if whole or mostly else student_ids  # whose logits are formed
    width = student_weight.shape[0] if columns is None else num_matched
    used = student_ids if columns is None else torch.arange(num_matched, device=scale.device)
    native_ids = [ids.to(torch.int32) for ids in (used, torch.arange(num_matched, device=scale.device))]
    left_out = None
    if whole:
        left_out = torch.zeros(teacher_weight.shape[0], dtype=torch.bool, device=scale.device)
        left_out[teacher_ids] = True
    s_bias, t_bias = (None if b is None else b.to(dtype) for b in (student_bias, teacher_bias))

    loss = torch.empty_like(scale)
    grad_hidden = scale.new_empty(student.shape if hidden_grad else 0)
    grad_weight = scale.new_zeros(student_weight.shape if weight_grad else 0)
    grad_bias = scale.new_zeros(student_weight.shape[0] if bias_grad else 0)

    row_bytes = scale.element_size() * (width + num_matched)
    weight_bytes = scale.element_size() * num_matched * (student.shape[1] + teacher.shape[1])
    step = max(16, max(BUDGET, weight_bytes // 2) // row_bytes)
    buffers = [scale.new_empty(min(step, count), n) for n in (width, num_matched)]
    part_total = scale.new_empty(())
    for begin in range(0, count, step):
        part = slice(begin, min(count, begin + step))
        s_logits, t_logits = (b[: part.stop - begin] for b in buffers)
        x, y = student[part].to(dtype), teacher[part].to(dtype)
        x_lengths, y_lengths = (
            None if n is None else n[part].to(dtype) for n in (student_lengths, teacher_lengths)
        )
        _project(x, student_weight, s_bias, x_lengths, columns, s_logits)
        _project(y, teacher_weight, t_bias, y_lengths, teacher_ids, t_logits)
        rest = None
        if whole:
            rest = _log_sum_exp(y, teacher_weight, t_bias, y_lengths, left_out, temperature)
        if backend == "cpu":
            _native.matched_kl(
                s_logits, t_logits, (), *native_ids, unmatched, False, temperature, rest, scale[part], loss[part],
                part_total, s_logits,
            )  # fmt: skip
        else:
            torch_rows(s_logits, t_logits, used, unmatched, temperature, rest, scale[part], loss[part])
        if hidden_grad or weight_grad:
            for a, b, rows in _column_chunks(student_weight, columns, dtype):
                d = s_logits[:, a:b]
                if hidden_grad and a == 0:
                    torch.mm(d, rows, out=grad_hidden[part])
                elif hidden_grad:
                    grad_hidden[part].addmm_(d, rows)
                if weight_grad and columns is None:
                    grad_weight[a:b].addmm_(d.t(), x)
                elif weight_grad:
                    chosen = columns[a:b]
                    grad_weight.index_copy_(0, chosen, grad_weight.index_select(0, chosen).addmm_(d.t(), x))
        if bias_grad:
            d = s_logits.sum(0) if x_lengths is None else x_lengths @ s_logits
            grad_bias[slice(None) if columns is None else columns] += d
    loss.masked_fill_(scale == 0, 0.0)  # what counts for nothing may be infinite
    total = (loss * scale).sum(dtype=torch.float64).to(dtype)
    return total, loss, grad_hidden, grad_weight, grad_bias


def _fake(
    student, student_weight, student_bias, student_lengths, teacher, teacher_weight, teacher_bias, teacher_lengths,
    student_ids, teacher_ids, scale, unmatched, temperature, backend, hidden_grad, weight_grad, bias_grad,
):  # fmt: skip
    return (
        scale.new_empty(()), torch.empty_like(scale), scale.new_empty(student.shape if hidden_grad else 0),
        scale.new_empty(student_weight.shape if weight_grad else 0),
        scale.new_empty(student_weight.shape[0] if bias_grad else 0),
    )  # fmt: skip


def _without_autocast(*args):
    """The products are to be as precise as the row kernel: autocast would round them to half."""
    with torch.autocast(args[0].device.type, enabled=False):
        return _impl(*args)


_op = define(
    "linear_matched_kl(Tensor student, Tensor student_weight, Tensor? student_bias, Tensor? student_lengths, "
    "Tensor teacher, Tensor teacher_weight, Tensor? teacher_bias, Tensor? teacher_lengths, Tensor student_ids, "
    "Tensor teacher_ids, Tensor scale, int unmatched, float temperature, str backend, bool hidden_grad, "
    "bool weight_grad, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _without_autocast,
    _fake,
)


class _LinearMatchedKL(torch.autograd.Function):
    """The gradients of a scalar loss are formed in the forward sweep, in the accumulation dtype: scaling by the
    upstream gradient and rounding to the inputs' dtype happen once, in backward."""

    @staticmethod
    def forward(ctx, student, weight, bias, options, reduce, needed, scale, *rest):
        ctx.static = (options, reduce, needed)
        wanted = needed if reduce else (False,) * 3
        total, loss, *grads = _op(student, weight, bias, *rest, scale, *options, *wanted)
        compiling = torch.compiler.is_compiling()
        ctx.save_for_backward(student, weight, bias, scale, *rest, *(grads if compiling else ()))
        if not compiling:  # not among the saved tensors: whoever takes them must be their only owner
            ctx.ready = grads if reduce else None
        return total if reduce else loss * scale

    @staticmethod
    def backward(ctx, grad):
        options, reduce, needed = ctx.static
        student, weight, bias, scale, *rest = ctx.saved_tensors

        def compute() -> list[Tensor]:
            scaled = (scale * grad).expand_as(scale).contiguous()
            return _op(student, weight, bias, *rest[:7], scaled, *options, *needed)[2:]

        if torch.compiler.is_compiling():
            grads = [g * grad for g in rest[7:]] if reduce else compute()
        else:
            ready, ctx.ready = ctx.ready, None
            grads = compute() if ready is None else hand_out(ready, grad, compute)
        grads = [
            g.to(x.dtype) if wanted else None
            for g, x, wanted in zip(grads, (student, weight, bias), needed, strict=True)
        ]
        return *grads, *(None,) * 11


def linear_matched_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    matched: Matched,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    pairs: SpanPairs | None = None,
    temperature: float = 1.0,
    unmatched: str = "renormalize",
    pooling: str = "mean",
    reduction: str = "batchmean",
    backend: str | None = None,
) -> Tensor:
    """:func:`matched_kl` of the logits ``h weight^T + bias`` of both sides, which are never all there at once;
    formulas in :func:`vocabdistil.reference.linear_matched_kl`.

    Rows are taken in chunks, so that the memory does not grow with the number of rows: on a CPU chunks whose logits
    take 4 MiB (or half of what the matched rows of both weights take, if that is more), on a GPU 64 MB for all that is
    held meanwhile (or 3.25 times what the gathered rows and their gradient take). There half-precision hidden states
    are multiplied in their dtype on the tensor cores, with float32 accumulation and logits; a float32 weight and the
    means over spans are rounded to that dtype first. ``"renormalize"`` reads only the matched rows of the
    teacher's weight. The gradients to the hidden states, the weight and the bias are formed in the same sweep,
    accumulated in float32 (float64 for float64); weight rows outside the matched vocabulary get exactly 0 under
    ``"renormalize"``.

    Args:
        student_hidden: ``[..., D_s]``, flattened to rows; float32, float64, bfloat16 or float16.
        student_weight, student_bias: ``[V_s, D_s]``, ``[V_s]`` or None: the student's output layer, which may be
            its embedding; the dtype of the hidden states, or float32 with half-precision hidden states.
        teacher_hidden: ``[..., D_t]``. Neither it nor the teacher's weights get a gradient.
        teacher_weight, teacher_bias: ``[V_t, D_t]``, ``[V_t]`` or None.
        matched, pairs, temperature, unmatched, pooling, reduction: as in :func:`matched_kl`; pooling is over hidden
            states, with which the output layer commutes (a sum of n rows adds the bias n times).
        backend: ``"cpu"``, ``"triton"``, ``"torch"`` (any device, without a row kernel) or ``"reference"``; None
            chooses by device.

    Returns:
        The loss, float32 (float64 if the hidden states are float64): ``[]``, or ``[P]`` for ``reduction="none"``.

    Raises:
        TypeError, ValueError: as :func:`matched_kl`; weights that do not fit the hidden states.
    """
    checks.check_columns(student_hidden, "student_hidden")
    checks.check_columns(teacher_hidden, "teacher_hidden")
    checks.check_same_kind(student_hidden, "student_hidden", teacher_hidden, "teacher_hidden")
    check_output_layer(student_hidden, student_weight, student_bias, "student")
    check_output_layer(teacher_hidden, teacher_weight, teacher_bias, "teacher")
    student, teacher = student_hidden.flatten(0, -2), teacher_hidden.detach().flatten(0, -2)
    checks.check_row_pairs(pairs, student, teacher, "student_hidden", "teacher_hidden")
    check_matched_arguments(
        matched, student_weight.shape[0], teacher_weight.shape[0], temperature, unmatched, pooling, reduction
    )
    choice = resolve("linear_matched_kl", student.device, backend)
    if choice == "reference":
        return reference_linear_matched_kl(
            student_hidden, student_weight, teacher_hidden, teacher_weight, matched, student_bias=student_bias,
            teacher_bias=teacher_bias, pairs=pairs, temperature=temperature, unmatched=unmatched, pooling=pooling,
            reduction=reduction,
        )  # fmt: skip
    dtype = _native.accumulation_dtype(student.dtype, teacher.dtype)
    scale = row_scale(pairs, student, reduction, dtype)
    student_lengths = teacher_lengths = None
    if pairs is not None:
        valid = valid_pairs(pairs)
        student = pool_rows(student, pairs.student_start, pairs.student_end, pooling, valid)
        teacher = pool_rows(teacher, pairs.teacher_start, pairs.teacher_end, pooling, valid)
        if _dense(student.device, choice):  # products run in the dtype of the hidden states there
            student, teacher = student.to(student_hidden.dtype), teacher.to(teacher_hidden.dtype)
        if valid is not None:  # such a pair is left with the bias of each side, and counts for nothing
            scale = torch.where(valid, scale, 0.0)
        if pooling == "sum":
            student_lengths = pairs.student_end - pairs.student_start
            teacher_lengths = pairs.teacher_end - pairs.teacher_start
    needed = tuple(
        torch.is_grad_enabled() and x is not None and x.requires_grad
        for x in (student, student_weight, student_bias)
    )
    # Two names, not a loop: see matched_kl.
    student_ids = matched.student_ids.to(student.device, torch.int64)
    teacher_ids = matched.teacher_ids.to(student.device, torch.int64)
    return _LinearMatchedKL.apply(
        student, student_weight, student_bias,
        (_native.UNMATCHED_CODES[unmatched], float(temperature), choice), reduction != "none", needed, scale,
        student_lengths, teacher, teacher_weight.detach(), None if teacher_bias is None else teacher_bias.detach(),
        teacher_lengths, student_ids, teacher_ids,
    )  # fmt: skip


def pool_rows(x: Tensor, start: Tensor, end: Tensor, pooling: str, valid: Tensor | None) -> Tensor:
    """[P, D] in the accumulation dtype; 0 for a pair with an empty side, whatever stands on its other one."""
    choice = resolve("span_mean", x.device, None)
    if choice == "reference":
        rows = span_pool(x.to(_native.accumulation_dtype(x.dtype)), start, end, pooling)
    else:
        rows = pooled_rows([native_rows(x)], start, end, None, pooling == "mean", True, choice)
    return rows if valid is None else torch.where(valid[:, None], rows, 0.0)
