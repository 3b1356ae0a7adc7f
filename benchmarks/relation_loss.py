"""MiniLMv2 relations over span pairs (`vocabdistil.relation_loss`) of one kind; the reference holds all scores of all
texts and heads at once."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from ._losses import loss_problem, randn
from .harness import Case, Problem, random_pairs

OPERATION = "relation_loss"


def build(device: torch.device, shape: tuple[int, int], d_t: int, d_s: int, heads: int, dtype: torch.dtype) -> Problem:
    """``shape``: batch and length of the teacher."""
    pairs, student_shape = random_pairs(*shape, device)
    student = randn(*student_shape, d_s, seed=1, device=device, dtype=dtype)
    teacher = randn(*shape, d_t, seed=2, device=device, dtype=dtype)
    tokens = int((pairs.student_end - pairs.student_start).sum())
    size = dtype.itemsize * (tokens * d_s + teacher.numel() + student.numel())
    return loss_problem(OPERATION, (student, teacher), 1, [pairs], {"heads": heads}, size)


def cases(device: torch.device) -> Iterator[Case]:
    single, half = torch.float32, torch.bfloat16
    kinds = [((8, 128), 384, 384, 12, single), ((8, 256), 768, 264, 12, single), ((2, 512), 768, 384, 48, single)]
    if device.type == "cuda":
        kinds = [((32, 256), 768, 264, 12, single), ((32, 256), 768, 264, 12, half), ((64, 512), 1024, 1024, 16, half)]
    for shape, d_t, d_s, heads, dtype in kinds:
        name = f"b{shape[0]}-l{shape[1]}-d{d_t}-from{d_s}-h{heads}{'-bf16' if dtype == half else ''}"
        make = functools.partial(build, shape=shape, d_t=d_t, d_s=d_s, heads=heads, dtype=dtype)
        yield Case(name, make, dtype, modes=("fwd+bwd",))
