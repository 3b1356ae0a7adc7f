"""Gradients that the forward pass of a scalar loss has already formed, and how backward hands them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def formed_early(reduce: bool, *inputs: Tensor) -> bool:
    """Whether forward forms the gradient: for a scalar loss, and not of half inputs in a compiled graph, where it
    could only be scaled after it was rounded."""
    return reduce and not (torch.compiler.is_compiling() and any(x.dtype in HALF for x in inputs))


def hand_out(ready: Sequence[Tensor], grad: Tensor, recompute: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """``ready`` times the upstream gradient: as it is where that is 1 (the usual ``loss.backward()``, seen in host
    memory only), in place for full precision, and computed anew for half types, so that it is rounded once, after
    scaling, and a loss scaler can do its work. The caller gives up ``ready``."""
    if grad.device.type == "cpu" and bool(grad == 1):
        return ready
    if any(g.dtype in HALF for g in ready):
        return recompute()
    return [g.mul_(grad) for g in ready]
