"""Distance between the vectors of whole texts (`vocabdistil.pooled_loss`), padded on the right."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from ._losses import loss_problem, randn
from .harness import Case, Problem

OPERATION = "pooled_loss"


def build(device: torch.device, batch: int, length: int, hidden: int, divergence: str) -> Problem:
    shape = batch, length, hidden
    tensors = randn(*shape, seed=1, device=device), randn(*shape, seed=2, device=device)
    lengths = torch.linspace(length // 2, length, batch, device=device).long()
    mask = torch.arange(length, device=device) < lengths[:, None]
    read = int(lengths.sum()) * hidden
    # Both sides are read where they are attended; the gradient is written everywhere.
    size = 4 * (2 * read + batch * length * hidden)
    return loss_problem(OPERATION, tensors, 1, [mask, mask], {"divergence": divergence}, size)


def cases(device: torch.device) -> Iterator[Case]:
    for divergence in ("cosine", "mse"):
        call = functools.partial(build, batch=32, length=128, hidden=384, divergence=divergence)
        yield Case(f"b32-l128-d384-{divergence}", call, modes=("fwd+bwd",))
