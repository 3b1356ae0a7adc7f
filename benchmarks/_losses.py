"""Forward and backward of a loss, by provider: what the benchmarks of the losses over a vocabulary share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def forward_backward(
    case: str, providers: Mapping[str, Callable[[], Tensor]], leaves: Sequence[Tensor], tokens: int, size: int,
    repeats: int = 9,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row per provider: seconds of loss and gradient, with the least bytes that must be read and written."""
    for provider, loss in providers.items():
        times = []
        for _ in range(repeats + 1):
            for leaf in leaves:
                leaf.grad = None
            start = time.perf_counter()
            loss().backward()
            times.append(time.perf_counter() - start)
        cuts = statistics.quantiles(times[1:], n=10)
        p50 = statistics.median(times[1:])
        yield {
            "provider": provider, "case": case, "p20": cuts[1], "p50": p50, "p80": cuts[7],
            "tokens_per_s": tokens / p50, "bytes": size,
        }  # fmt: skip


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32, learned: bool = False) -> Tensor:
    """Normal values of the size of hidden states and logits (deviation 1)."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_(learned)
