"""Gradients that the forward pass of a scalar loss has already formed, and how backward hands them out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For a ``backward`` without a derivative of its own: whoever differentiates what it returned is told so.

    torch's decorator of this name tells only where the upstream gradient needs a gradient itself; of a loss that was
    the last step, whose upstream gradient is 1, it lets a penalty on the gradient be dropped in silence.
    """

    @functools.wraps(backward)
    def first_only(ctx: Any, *upstream: Tensor) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # enabled by create_graph=True alone
            return backward(ctx, *upstream)
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        found = [g.detach().requires_grad_() for g in gradients if g is not None]
        try:
            saved = ctx.saved_tensors
        except RuntimeError:  # a checkpoint gives them once
            saved = ()
        told = iter(_Last.apply(len(found), *found, *upstream, *(x for x in saved if x is not None)))
        return tuple(None if g is None else next(told) for g in gradients)

    return first_only


class _Last(torch.autograd.Function):
    """Gradients, and what they depend on: who goes back from them to any of it is told that there is no way."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(g.view_as(g) for g in tensors[:count])

    @staticmethod
    def backward(ctx, *upstream):
        raise RuntimeError(
            "vocabdistil: the gradient of this loss has no gradient of its own (a gradient penalty, a second "
            "derivative); backend='reference' has one"
        )


def formed_early(reduce: bool, *inputs: Tensor) -> bool:
    """Whether forward forms the gradient: for a scalar loss, and of half inputs only where backward can see, without
    waiting for a device, whether it has to be scaled: it would be scaled after it was rounded."""
    unseen = torch.compiler.is_compiling() or inputs[0].device.type != "cpu"
    return reduce and not (unseen and any(x.dtype in HALF for x in inputs))


def hand_out(ready: Sequence[Tensor], grad: Tensor, recompute: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """``ready`` times the upstream gradient: as it is where that is 1 (the usual ``loss.backward()``, seen in host
    memory only), in place for full precision, and computed anew for half types, so that it is rounded once, after
    scaling, and a loss scaler can do its work. The caller gives up ``ready``."""
    if grad.device.type == "cpu" and bool(grad == 1):
        return ready
    if any(g.dtype in HALF for g in ready):
        return recompute()
    return [g.mul_(grad) for g in ready]


# What the backward passes of an operation met last, on each device and in each dtype: ``[]``, read and written by the
# device alone.
_met: dict[tuple[Hashable, torch.device, torch.dtype], Tensor] = {}


def next_upstream(operation: Hashable, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The upstream gradient that forward forms a gradient with, ``[]``: the last one that the operation's backward met
    where ``like`` is, 1 at first. A copy, as another loss may meet another before this one's backward compares it.

    A wrong guess costs time alone. Its memory lives as long as the process, so that a captured CUDA graph may read and
    write it; the capture itself makes none, as whatever it makes is filled anew whenever the graph is replayed.
    """
    key = operation, like.device, dtype
    if key not in _met:
        one = like.new_ones((), dtype=dtype)
        if type(one) is not Tensor or (one.is_cuda and torch.cuda.is_current_stream_capturing()):
            return one
        _met[key] = one
    return _met[key].clone()


def note_upstream(operation: Hashable, grad: Tensor) -> None:
    known = _met.get((operation, grad.device, grad.dtype))
    if known is not None:
        known.copy_(grad)


class RowLoss(torch.autograd.Function):
    """A loss of which one pass of a private op gives each row's value and, for a scalar reduction, the gradient for
    the student's logits, the only array of its size.

    ``op(student, teacher, spans, *index, scale, *options, wanted) -> (total, loss, grad)`` with the index a, b and the
    first ``further`` of ``rest``, vectors or None; the others are the spans.
    ``again``, where a backend has it, takes the same up to the options and ``grad, upstream, formed``: it writes the
    gradient with the upstream gradient folded in, unless ``formed``, one that it is already there with, is the same,
    which the device sees without the host waiting for it. Such an op takes one more argument: the upstream gradient to
    form the gradient with.
    """

    @staticmethod
    def forward(ctx, op, again, student, teacher, a, b, scale, options, reduce, needed, further, *rest):
        # Dynamo takes a forward with two arguments in `rest` for one without a context: it counts them.
        index, spans = (a, b, *rest[:further]), rest[further:]
        compiling = torch.compiler.is_compiling()
        early = formed_early(reduce, student) or (reduce and again is not None and not compiling)
        guess = ()
        if again is not None and early and needed and not compiling:
            guess = (next_upstream(op, scale, scale.dtype),)
        total, loss, grad = op(student, teacher, spans, *index, scale, *options, early and needed, *guess)
        ctx.static = (op, again, options, early, further)
        ctx.save_for_backward(student, teacher, a, b, scale, *((grad,) if compiling else ()), *rest)
        if not compiling:  # not among the saved tensors: whoever takes it must be its only owner
            ctx.ready = (grad, *guess) if early else None
        return total if reduce else loss * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        op, again, options, early, further = ctx.static
        student, teacher, a, b, scale, *rest = ctx.saved_tensors
        compiling = torch.compiler.is_compiling()
        if compiling:
            ready, *rest = rest
        else:
            held, ctx.ready = ctx.ready, None
        index, spans = (a, b, *rest[:further]), rest[further:]

        def compute() -> list[Tensor]:
            scaled = (scale * grad).expand_as(scale).contiguous()
            return [op(student, teacher, spans, *index, scaled, *options, True)[2]]

        if compiling and early:
            result = ready * grad.to(ready.dtype)
        elif early and again is not None:
            result, formed = held or (student.new_empty(student.shape), None)
            again(student, teacher, spans, *index, scale, *options, result, grad, formed)
            note_upstream(op, grad)
        elif early and held is not None:
            (result,) = hand_out(held, grad, compute)
        else:
            (result,) = compute()
        return None, None, result, *(None,) * (8 + len(rest))


class LinearLoss(torch.autograd.Function):
    """A loss of logits ``h weight^T + bias`` that are never all there at once. The gradients of a scalar loss are
    formed in the forward sweep, in the accumulation dtype: scaling by the upstream gradient and rounding to the
    inputs' dtype happen once, in backward.

    ``op(student, weight, bias, *rest, scale, *options, *wanted) -> (total, loss, grad, grad, grad)``, which gradients
    are wanted as three bools.
    """

    @staticmethod
    def forward(ctx, op, student, weight, bias, options, reduce, needed, scale, *rest):
        ctx.static = (op, options, reduce, needed, len(rest))
        wanted = needed if reduce else (False,) * 3
        total, loss, *grads = op(student, weight, bias, *rest, scale, *options, *wanted)
        compiling = torch.compiler.is_compiling()
        ctx.save_for_backward(student, weight, bias, scale, *rest, *(grads if compiling else ()))
        if not compiling:  # not among the saved tensors: whoever takes them must be their only owner
            ctx.ready = grads if reduce else None
        return total if reduce else loss * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        op, options, reduce, needed, count = ctx.static
        student, weight, bias, scale, *rest = ctx.saved_tensors

        def compute() -> list[Tensor]:
            scaled = (scale * grad).expand_as(scale).contiguous()
            return op(student, weight, bias, *rest[:count], scaled, *options, *needed)[2:]

        if torch.compiler.is_compiling():
            grads = [g * grad for g in rest[count:]] if reduce else compute()
        else:
            ready, ctx.ready = ctx.ready, None
            grads = compute() if ready is None else hand_out(ready, grad, compute)
        grads = [
            g.to(x.dtype) if wanted else None
            for g, x, wanted in zip(grads, (student, weight, bias), needed, strict=True)
        ]
        return None, *grads, *(None,) * (4 + count)
