"""The upstream gradient that forward forms a gradient with (vocabdistil/ops/_gradient.py)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def assert_guesses_the_upstream_gradient(loss: Callable[[Tensor], Tensor], student: Tensor) -> None:
    """``loss(leaf)`` forms its gradient with the upstream gradient that the last backward pass met; that is as it ought
    to be to the last bit, whether the guess was right or not, and as of two losses in one step neither's was."""

    def start() -> tuple[Tensor, Tensor]:
        leaf = student.clone().requires_grad_()
        return leaf, loss(leaf)

    def gradient(upstream: float) -> tuple[Tensor, Tensor]:
        """What forward has formed, and what came out of backward."""
        leaf, value = start()
        formed = value.grad_fn.ready[0].clone()
        value.backward(torch.full_like(value, upstream))
        return formed, leaf.grad

    gradient(1.0)
    first, want = gradient(0.3)
    assert not torch.equal(first, want)
    for _ in range(2):
        formed, grad = gradient(0.3)
        assert torch.equal(formed, want) and torch.equal(grad, want)
    _, other = gradient(-4.0)
    assert torch.equal(gradient(0.3)[1], want)
    (leaf, value), (second, second_value) = start(), start()
    second_value.backward(torch.full_like(value, -4.0))
    value.backward(torch.full_like(value, 0.3))
    assert torch.equal(leaf.grad, want) and torch.equal(second.grad, other)
    leaf, value = start()  # once more, of a graph that was kept
    for _ in range(2):
        (again,) = torch.autograd.grad(value, leaf, torch.full_like(value, 0.3), retain_graph=True)
        assert torch.equal(again, want)
