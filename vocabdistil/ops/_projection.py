"""The projection of averaged rows: float32 in and out, on a GPU as precise as half-precision hidden states can use.

A product of float32 matrices runs at a tenth of a GPU's speed unless TF32 is allowed, which keeps 11 significant bits
of each factor. Rows averaged from float16 (11 bits) or bfloat16 (8) lose nothing that their gradient could show. So
those products use TF32 whatever the setting of the process; those of float32 hidden states follow that setting.

On a CPU the gradient of the weight is a sum over many rows into a small matrix. Some libraries share such a sum out
among threads, and its bits then depend on their number: it is taken a few hundred rows at a time, too few to share.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reference._common import projected
from ._gradient import once_differentiable
from ._library import define
from ._products import tf32


def _impl(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    with tf32(), torch.autocast(a.device.type, enabled=False):
        return a @ b if bias is None else torch.addmm(bias, a, b)


def _fake(a, b, bias):
    return a.new_empty(a.shape[0], b.shape[1])


_op = define("tf32_product(Tensor a, Tensor b, Tensor? bias) -> Tensor", _impl, _fake)


_ROWS = 512


def _transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """``a^T b`` of ``[P, n]`` and ``[P, m]``: the same bits for any number of threads."""
    with torch.autocast(a.device.type, enabled=False):
        out = a.new_zeros(a.shape[1], b.shape[1])
        for start in range(0, len(a), _ROWS):
            out.addmm_(a[start : start + _ROWS].t(), b[start : start + _ROWS])
        return out


_transposed = define(
    "transposed_product(Tensor a, Tensor b) -> Tensor",
    _transposed_product,
    lambda a, b: a.new_empty(a.shape[1], b.shape[1]),
)


class _CpuLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, bias):
        ctx.save_for_backward(rows, weight)
        return F.linear(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            grad @ weight if needs_rows else None,
            _transposed(grad, rows) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


class _Tf32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, bias):
        ctx.save_for_backward(rows, weight)
        return _op(rows, weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _op(grad, weight, None) if needs_rows else None,
            _op(grad.t(), rows, None) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


def project(rows: Tensor, weight: Tensor | nn.Module, bias: Tensor | None, width: int, half: bool) -> Tensor:
    """``rows [P, D_s] weight^T + bias``, ``[P, D_t]`` in the dtype of the rows, differentiable in all three; or what a
    module makes of the rows.

    Args:
        width: D_t.
        half: the rows are averages of half-precision rows.
    """
    if isinstance(weight, nn.Module):
        return projected(rows, weight, bias, width)
    weight, bias = weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype)
    if half and rows.device.type == "cuda":
        return _Tf32Linear.apply(rows, weight, bias)
    with torch.autocast(rows.device.type, enabled=False):
        return _CpuLinear.apply(rows, weight, bias) if rows.device.type == "cpu" else F.linear(rows, weight, bias)
