"""InfoNCE over span pairs (`vocabdistil.contrastive`) with all negatives; the reference holds all scores at once."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

import vocabdistil as vd

from ._losses import loss_problem, randn
from .harness import Case, Problem

OPERATION = "contrastive"


def build(device: torch.device, count: int, hidden: int) -> Problem:
    tensors = randn(2 * count, hidden, seed=1, device=device), randn(count, hidden, seed=2, device=device)
    at = torch.arange(count + 1, device=device)
    pairs = vd.SpanPairs(2 * at[:-1], 2 * at[1:], at[:-1], at[1:])
    return loss_problem(OPERATION, tensors, 1, [pairs], {}, 4 * 5 * count * hidden)


def cases(device: torch.device) -> Iterator[Case]:
    for count, hidden in ((1024, 264), (2048, 768)):
        yield Case(f"{count}-{hidden}", functools.partial(build, count=count, hidden=hidden), modes=("fwd+bwd",))
