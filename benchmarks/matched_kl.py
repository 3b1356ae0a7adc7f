"""KL over the matched vocabulary from logits (`vocabdistil.matched_kl`)."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

import vocabdistil as vd

from ._losses import loss_problem, randn
from .harness import Case, Problem

OPERATION = "matched_kl"


def make_matched(student: int, teacher: int, count: int) -> vd.MatchedVocab:
    """``count`` random tokens of each side, the teacher's ascending."""
    g = torch.Generator().manual_seed(0)
    teacher_ids = torch.randperm(teacher, generator=g)[:count].sort().values
    return vd.MatchedVocab(teacher_ids, torch.randperm(student, generator=g)[:count])


SECTOR = 32  # bytes: the least that a GPU reads or writes


def sectors(columns: torch.Tensor, itemsize: int) -> int:
    """How many sectors of an aligned row hold these columns."""
    return (columns * itemsize // SECTOR).unique().numel()


def build(device: torch.device, rows: int, v_t: int, v_s: int, v_m: int, unmatched: str, dtype: torch.dtype) -> Problem:
    """Bytes in whole sectors: both sides' columns that count, and the student's gradient."""
    tensors = randn(rows, v_s, seed=1, device=device, dtype=dtype), randn(rows, v_t, seed=2, device=device, dtype=dtype)
    matched = make_matched(v_s, v_t, v_m)
    everything = unmatched != "renormalize"
    sides = ((matched.student_ids, v_s), (matched.teacher_ids, v_t), (torch.arange(v_s), v_s))
    size = SECTOR * rows * sum(sectors(torch.arange(n) if everything else ids, dtype.itemsize) for ids, n in sides)
    matched = matched.to(device)
    return loss_problem(OPERATION, tensors, 1, [matched], {"unmatched": unmatched}, size, rowwise=(0, 1))


def cases(device: torch.device) -> Iterator[Case]:
    half, single = torch.bfloat16, torch.float32
    sizes = [(512, 30522, 5000, 4500, single), (512, 30522, 5000, 4500, half)]
    if device.type == "cuda":
        sizes = [(4096, 119547, 5031, 4700, half), (4096, 119547, 5031, 4700, single)]
    for rows, v_t, v_s, v_m, dtype in sizes:
        for unmatched in ("renormalize", "rest"):
            name = f"{rows}-{v_t}-{v_s}-{v_m}-{unmatched}{'-bf16' if dtype == half else ''}"
            make = functools.partial(build, rows=rows, v_t=v_t, v_s=v_s, v_m=v_m, unmatched=unmatched, dtype=dtype)
            yield Case(name, make, dtype, ("fwd+bwd",))
