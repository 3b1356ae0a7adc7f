"""span_mean: schema, implementations, autograd, public function. Formula: ``reference/span_mean.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..alignment.spans import check_span_vectors
from ..core import checks, native
from ..core.dispatch import implementation, resolve
from ..reference._common import span_pool
from ..reference.span_mean import span_mean as reference_span_mean
from ._gradient import once_differentiable
from ._library import define


def _impl(
    x: Sequence[Tensor], start: Tensor, end: Tensor, coef: Tensor | None, mean: bool, accumulate: bool, backend: str
) -> Tensor:
    out = _fake(x, start, end, coef, mean, accumulate, backend)
    implementation("span_mean", backend, "span_mean_fwd")(x, start, end, coef, mean, out)
    return out


def _fake(x, start, end, coef, mean, accumulate, backend):
    dtype = native.accumulation_dtype(x[0].dtype) if accumulate else x[0].dtype
    return x[0].new_empty(start.shape[0], x[0].shape[1], dtype=dtype)


def _backward_impl(
    grad: Tensor, start: Tensor, end: Tensor, coef: Tensor | None, mean: bool, layers: int, rows: int,
    dtype: torch.dtype, backend: str,
) -> list[Tensor]:  # fmt: skip
    if grad.stride(1) != 1:
        grad = grad.contiguous()
    out = _backward_fake(grad, start, end, coef, mean, layers, rows, dtype, backend)
    implementation("span_mean", backend, "span_mean_bwd")(grad, start, end, coef, mean, out)
    return out


def _backward_fake(grad, start, end, coef, mean, layers, rows, dtype, backend):
    return [grad.new_empty(rows, grad.shape[1], dtype=dtype) for _ in range(layers)]


_forward_op = define(
    "span_mean(Tensor[] x, Tensor start, Tensor end, Tensor? coef, bool mean, bool accumulate, str backend) -> Tensor",
    _impl,
    _fake,
)
_backward_op = define(
    "span_mean_backward(Tensor grad, Tensor start, Tensor end, Tensor? coef, bool mean, int layers, SymInt rows, "
    "ScalarType dtype, str backend) -> Tensor[]",
    _backward_impl,
    _backward_fake,
)


class _SpanMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, coef, mean, accumulate, backend, *tensors):
        start, end, *x = tensors  # not parameters of their own: see span_loss
        ctx.save_for_backward(start, end, coef, *x)
        ctx.options = (mean, backend)
        return _forward_op(x, start, end, coef, mean, accumulate, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        start, end, coef, *x = ctx.saved_tensors
        mean, backend = ctx.options
        grad_coef = None
        if ctx.needs_input_grad[0]:
            # d out / d coef_l is the span mean of layer l alone.
            grad_coef = torch.stack(
                [(_forward_op([layer], start, end, None, mean, True, backend) * grad).sum() for layer in x]
            ).to(coef.dtype)
        grads = (None,) * len(x)
        if any(ctx.needs_input_grad[6:]):
            grads = _backward_op(grad, start, end, coef, mean, len(x), x[0].shape[0], x[0].dtype, backend)
        return grad_coef, None, None, None, None, None, *grads


def pooled_rows(
    x: Sequence[Tensor], start: Tensor, end: Tensor, coef: Tensor | None, mean: bool, accumulate: bool, backend: str
) -> Tensor:
    """Layers [N, D] -> [P, D], differentiable in the layers and in ``coef`` [n] (None: 1/n each)."""
    return _SpanMean.apply(coef, mean, accumulate, backend, start, end, *x)


def pool_rows(x: Tensor, start: Tensor, end: Tensor, pooling: str, valid: Tensor | None) -> Tensor:
    """[P, D] in the accumulation dtype; 0 for a pair with an empty side, whatever stands on its other one."""
    choice = resolve("span_mean", x.device, None)
    if choice == "reference":
        rows = span_pool(x.to(native.accumulation_dtype(x.dtype)), start, end, pooling)
    else:
        rows = pooled_rows([native_rows(x)], start, end, None, pooling == "mean", True, choice)
    return rows if valid is None else torch.where(valid[:, None], rows, 0.0)


def native_rows(rows: Tensor) -> Tensor:
    """[N, D] with unit column stride, as the kernels read it: a copy only where it has another."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def span_mean(
    x: Tensor, start: Tensor, end: Tensor, pooling: str = "mean", *, backend: str | None = None
) -> Tensor:
    """Mean (or sum) of the rows of ``x`` over each span; see :func:`vocabdistil.reference.span_mean`.

    Args:
        x: ``[N, D]`` or ``[B, L, D]`` (flattened to ``N = B * L``), float32, float64, bfloat16 or float16; any
            strides (a copy is made where the last dimension is not contiguous).
        start, end: int32 ``[P]``, half-open spans, ascending and disjoint.
        pooling: ``"mean"`` or ``"sum"``.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None chooses by device.

    Returns:
        ``[P, D]`` in the dtype of ``x``, accumulated in float32 (float64 for float64); 0 for an empty span. The
        gradient is deterministic: a token lies in at most one span, so it is a gather.

    Raises:
        TypeError, ValueError: an argument of a wrong dtype, shape or device, or spans that overlap, descend or run
            past the end of ``x``.
    """
    checks.check_float(x, "x", dims=(2, 3))
    checks.check_choice(pooling, "pooling", checks.POOLINGS)
    rows = native_rows(x.flatten(0, -2))
    check_span_vectors(start, end, rows.shape[0], rows.device)
    choice = resolve("span_mean", x.device, backend)
    if choice == "reference":
        return reference_span_mean(rows, start, end, pooling=pooling)
    start, end = start.to(torch.int32).contiguous(), end.to(torch.int32).contiguous()
    return pooled_rows([rows], start, end, None, pooling == "mean", False, choice)
