"""Whether a loss compiles as one graph that computes the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def assert_compiles(loss: Callable[..., Tensor], *inputs: Tensor, backend: str = "aot_eager") -> None:
    """``loss(*inputs)`` and its gradients, eager and compiled with ``fullgraph=True``, are close."""
    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = f(*leaves)
        value.backward()
        results.append((value.detach(), *(leaf.grad for leaf in leaves)))
    torch.testing.assert_close(results[0], results[1])
