"""log_prob and linear_log_prob, of which span_likelihood and linear_span_likelihood are made: the log-probability of
one token per row, from logits or from hidden states and an output layer. Formula: ``reference/span_likelihood.py``.

The forward pass leaves three numbers per row: the log-probability, and what gives a logit's probability again. From
hidden states the backward pass forms the logits once more: neither pass holds those of all rows and tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..core import native
from ..core.dispatch import implementation
from ._dense_log_prob import dense_backward, dense_forward
from ._gradient import once_differentiable
from ._library import define, without_autocast
from .span_mean import native_rows

# Bytes that the logits of all rows may take on a CPU, at as many columns at a time.
BUDGET = 8 << 20


@contextlib.contextmanager
def _of(side: str) -> Iterator[None]:
    """Says whose ids the kernel does not take."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{side}_{error}") from error


def _outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = native.accumulation_dtype(x.dtype)
    log_prob, shift, share = (x.new_empty(x.shape[0], dtype=dtype) for _ in range(3))
    return log_prob, shift, share


def _forward(logits: Tensor, ids: Tensor, needed: Tensor, side: str, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    out = _outputs(logits)
    if backend != "cpu":
        implementation("log_prob", backend, "log_prob_fwd")(logits, None, ids, needed, out)
        return out
    with _of(side):
        native.log_prob_fwd(logits, ids, needed, out)
    return out


def _forward_fake(logits, ids, needed, side, backend):
    return _outputs(logits)


def _backward(
    grad: Tensor, logits: Tensor, ids: Tensor, needed: Tensor, log_prob: Tensor, shift: Tensor, share: Tensor,
    side: str, backend: str,
) -> Tensor:  # fmt: skip
    out, odds = native.empty(logits, *logits.shape), (log_prob, shift, share)
    if backend != "cpu":
        implementation("log_prob", backend, "log_prob_bwd")(logits, None, ids, needed, odds, grad.contiguous(), out)
        return out
    with _of(side):
        native.log_prob_bwd(logits, ids, needed, odds, grad.contiguous(), out)
    return out


def _backward_fake(grad, logits, ids, needed, log_prob, shift, share, side, backend):
    return logits.new_empty(logits.shape)


def _linear_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, needed: Tensor, side: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    out = _outputs(hidden)
    bias = None if bias is None else bias.to(out[0].dtype).contiguous()
    if backend != "cpu":
        dense_forward(hidden, weight, bias, ids, needed, out, backend)
        return out
    with _of(side):
        native.linear_log_prob_fwd(native_rows(hidden), native_rows(weight), bias, ids, needed, out)
    return out


def _linear_forward_fake(hidden, weight, bias, ids, needed, side, backend):
    return _outputs(hidden)


def _linear_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, needed: Tensor, log_prob: Tensor,
    shift: Tensor, share: Tensor, side: str, backend: str, hidden_grad: bool, weight_grad: bool, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = log_prob.dtype
    bias = None if bias is None else bias.to(dtype).contiguous()
    grads = [
        native.empty(log_prob, *x.shape) if wanted and x is not None else None
        for x, wanted in ((hidden, hidden_grad), (weight, weight_grad), (bias, bias_grad))
    ]
    odds = log_prob, shift, share
    if backend != "cpu":
        dense_backward(grad.contiguous(), hidden, weight, bias, ids, needed, odds, grads, backend)
    else:
        with _of(side):
            native.linear_log_prob_bwd(
                native_rows(hidden), native_rows(weight), bias, ids, needed, odds, grad.contiguous(), BUDGET, grads
            )
    grad_hidden, grad_weight, grad_bias = (log_prob.new_empty(0) if g is None else g for g in grads)
    return grad_hidden, grad_weight, grad_bias


def _linear_backward_fake(
    grad, hidden, weight, bias, ids, needed, log_prob, shift, share, side, backend, hidden_grad, weight_grad, bias_grad
):  # fmt: skip
    return (
        log_prob.new_empty(hidden.shape if hidden_grad else 0), log_prob.new_empty(weight.shape if weight_grad else 0),
        log_prob.new_empty(weight.shape[0] if bias_grad else 0),
    )  # fmt: skip


_TOKENS = "Tensor ids, Tensor needed"
_ODDS = "Tensor log_prob, Tensor shift, Tensor share"
_forward_op = define(
    f"log_prob(Tensor logits, {_TOKENS}, str side, str backend) -> (Tensor, Tensor, Tensor)", _forward, _forward_fake
)
_backward_op = define(
    f"log_prob_backward(Tensor grad, Tensor logits, {_TOKENS}, {_ODDS}, str side, str backend) -> Tensor",
    _backward,
    _backward_fake,
)
_linear_forward_op = define(
    f"linear_log_prob(Tensor hidden, Tensor weight, Tensor? bias, {_TOKENS}, str side, str backend) -> "
    "(Tensor, Tensor, Tensor)",
    without_autocast(_linear_forward),
    _linear_forward_fake,
)
_linear_backward_op = define(
    f"linear_log_prob_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, {_TOKENS}, {_ODDS}, str side, "
    "str backend, bool hidden_grad, bool weight_grad, bool bias_grad) -> (Tensor, Tensor, Tensor)",
    without_autocast(_linear_backward),
    _linear_backward_fake,
)


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ids, needed, side, backend):
        log_prob, shift, share = _forward_op(logits, ids, needed, side, backend)
        ctx.save_for_backward(logits, ids, needed, log_prob, shift, share)
        ctx.options = side, backend
        return log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _backward_op(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, needed, side, backend):
        log_prob, shift, share = _linear_forward_op(hidden, weight, bias, ids, needed, side, backend)
        ctx.save_for_backward(hidden, weight, bias, ids, needed, log_prob, shift, share)
        ctx.options = side, backend
        return log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        wanted = ctx.needs_input_grad[:3]
        grads = _linear_backward_op(grad, *ctx.saved_tensors, *ctx.options, *wanted)
        given = zip(grads, ctx.saved_tensors[:3], wanted, strict=True)
        return *(g.to(x.dtype) if asked else None for g, x, asked in given), None, None, None, None


def log_prob(logits: Tensor, ids: Tensor, needed: Tensor, side: str, backend: str) -> Tensor:
    """``log softmax(z)[id]`` of the rows that are needed, 0 of the others, which are not read.

    Args:
        logits: ``[N, V]``.
        ids: int64 or int32 ``[N]``; anything where the row is not needed.
        needed: bool ``[N]``.
        side: what stands before ``_ids`` in the error for an id that is none of the columns.
        backend: ``"cpu"``, or ``"triton"``, with which the log-probability of such an id is NaN.

    Returns:
        ``[N]``, float32, or float64 for float64.
    """
    return _LogProb.apply(native_rows(logits), ids.to(torch.int64).contiguous(), needed, side, backend)


def linear_log_prob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, needed: Tensor, side: str, backend: str
) -> Tensor:
    """The same of the logits ``hidden weight^T + bias``: ``[N, D]``, ``[V, D]``, ``[V]`` or None."""
    return _LinearLogProb.apply(hidden, weight, bias, ids.to(torch.int64).contiguous(), needed, side, backend)
