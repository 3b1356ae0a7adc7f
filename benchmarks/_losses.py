"""What the benchmarks of the losses over a vocabulary share: one function of tensors, by every provider."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import vocabdistil as vd

from .harness import Problem, Provider, compiled, own_providers

TRUTH_ROWS = 512


def randn(*shape: int, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values of the size of hidden states and logits (deviation 1)."""
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def as_truth(x: Tensor) -> Tensor:
    """Numbers as float64; ids as they are."""
    return x.double() if x.is_floating_point() else x


def loss_problem(
    operation: str,
    tensors: Sequence[Tensor],
    learned: int,
    arguments: Sequence[Any],
    options: dict[str, Any],
    size: int,
    rowwise: Sequence[int] = (),
    rivals: Callable[[list[Tensor]], tuple[dict[str, Callable[[], Tensor]], dict[str, str]]] | None = None,
) -> Problem:
    """``vd.OPERATION(*tensors, *arguments, **options)`` against the reference, that compiled, and rivals.

    Args:
        learned: how many of the tensors, from the first on, get a gradient.
        size: bytes that have to be read and written, gradients included.
        rowwise: the tensors whose rows belong together: the float64 truth of a mean over rows is then formed a part of
            the rows at a time, as it may take more memory than a GPU has.
        rivals: from the tensors to what else computes the loss, and why others cannot run here.
    """
    ours, reference = getattr(vd, operation), getattr(vd.reference, operation)
    tensors = [x.requires_grad_(i < learned) for i, x in enumerate(tensors)]

    def truth() -> list[Tensor]:
        wide = [as_truth(x.detach()).requires_grad_(i < learned) for i, x in enumerate(tensors)]
        if not rowwise:
            total = reference(*wide, *arguments, **options)
            total.backward()
            return [total.detach(), *(x.grad for x in wide[:learned])]
        rows = tensors[0].shape[0]
        total = wide[0].new_zeros(())
        for begin in range(0, rows, TRUTH_ROWS):
            part = [x[begin : begin + TRUTH_ROWS] if i in rowwise else x for i, x in enumerate(wide)]
            loss = reference(*part, *arguments, **options, reduction="sum") / rows
            loss.backward()
            total += loss.detach()
        return [total, *(x.grad for x in wide[:learned])]

    compiled_reference = compiled(reference)
    providers = {
        "reference": Provider(lambda: reference(*tensors, *arguments, **options)),
        "compile": Provider(lambda: compiled_reference(*tensors, *arguments, **options)),
    }
    here, missing = own_providers(operation, tensors[0].device)
    for name, backend in here.items():
        backends = {} if backend is None else {"backend": backend}
        providers[name] = Provider(lambda b=backends: ours(*tensors, *arguments, **options, **b))
    if rivals is not None:
        others, absent = rivals(tensors)
        providers |= {name: Provider(call) for name, call in others.items()}
        missing |= absent
    return Problem(providers, truth, {"fwd+bwd": size}, tensors[:learned], None, missing)
