"""What the benchmarks of the losses over a vocabulary share: one function of tensors, by every provider."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import vocabdistil as vd

from .harness import Problem, Provider, compiled, own_providers


def randn(*shape: int, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values of the size of hidden states and logits (deviation 1)."""
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def loss_problem(
    operation: str,
    tensors: Sequence[Tensor],
    learned: int,
    arguments: Sequence[Any],
    options: dict[str, Any],
    size: int,
) -> Problem:
    """``vd.OPERATION(*tensors, *arguments, **options)`` against the reference and that compiled.

    Args:
        learned: how many of the tensors, from the first on, get a gradient.
        size: bytes that have to be read and written, gradients included.
    """
    ours, reference = getattr(vd, operation), getattr(vd.reference, operation)
    tensors = [x.requires_grad_(i < learned) for i, x in enumerate(tensors)]

    def truth() -> list[Tensor]:
        wide = [x.detach().double().requires_grad_(i < learned) for i, x in enumerate(tensors)]
        loss = reference(*wide, *arguments, **options)
        loss.backward()
        return [loss.detach(), *(x.grad for x in wide[:learned])]

    compiled_reference = compiled(reference)
    providers = {
        "reference": Provider(lambda: reference(*tensors, *arguments, **options)),
        "compile": Provider(lambda: compiled_reference(*tensors, *arguments, **options)),
    }
    here, missing = own_providers(operation, tensors[0].device)
    for name, backend in here.items():
        backends = {} if backend is None else {"backend": backend}
        providers[name] = Provider(lambda b=backends: ours(*tensors, *arguments, **options, **b))
    return Problem(providers, truth, {"fwd+bwd": size}, tensors[:learned], None, missing)
