"""InfoNCE over span pairs (`vocabdistil.contrastive`) with all negatives; the reference holds all scores at once."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

import vocabdistil as vd

from ._losses import loss_problem, randn
from .harness import Case, Problem

OPERATION = "contrastive"


def build(device: torch.device, count: int, hidden: int, dtype: torch.dtype = torch.float32) -> Problem:
    tensors = [randn(n, hidden, seed=n, device=device, dtype=dtype) for n in (2 * count, count)]
    at = torch.arange(count + 1, device=device)
    pairs = vd.SpanPairs(2 * at[:-1], 2 * at[1:], at[:-1], at[1:])
    return loss_problem(OPERATION, tensors, 1, [pairs], {}, 5 * count * hidden * dtype.itemsize)


def cases(device: torch.device) -> Iterator[Case]:
    for count, hidden in ((1024, 264), (2048, 768)):
        yield Case(f"{count}-{hidden}", functools.partial(build, count=count, hidden=hidden), modes=("fwd+bwd",))
    if device.type == "cuda":  # as many pairs as a batch of 64 texts has, and an odd number
        for count in (3001, 8192):
            make = functools.partial(build, count=count, hidden=768, dtype=torch.bfloat16)
            yield Case(f"{count}-768-bf16", make, torch.bfloat16, modes=("fwd+bwd",))
