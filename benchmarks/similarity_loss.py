"""Cosines among the vectors of a batch (`vocabdistil.similarity_loss`)."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from ._losses import loss_problem, randn
from .harness import Case, Problem

OPERATION = "similarity_loss"


def build(device: torch.device, batch: int, student: int, teacher: int) -> Problem:
    tensors = randn(batch, student, seed=1, device=device), randn(batch, teacher, seed=2, device=device)
    return loss_problem(OPERATION, tensors, 1, [], {}, 4 * batch * (2 * student + teacher))


def cases(device: torch.device) -> Iterator[Case]:
    for batch, student, teacher in ((64, 264, 768), (2048, 264, 768)):
        yield Case(
            f"b{batch}-{student}-{teacher}",
            functools.partial(build, batch=batch, student=student, teacher=teacher),
            modes=("fwd+bwd",),
        )
