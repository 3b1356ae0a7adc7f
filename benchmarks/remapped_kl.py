"""KL through the remap table (`vocabdistil.remapped_kl`), on a made-up table of one to five pieces a row."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

import vocabdistil as vd

from ._losses import loss_problem, randn
from .harness import Case, Problem

OPERATION = "remapped_kl"


def make_table(teacher: int, student: int) -> vd.RemapTable:
    g = torch.Generator().manual_seed(0)
    indptr = torch.zeros(teacher + 1, dtype=torch.int64)
    torch.cumsum(torch.randint(1, 6, (teacher,), generator=g), 0, out=indptr[1:])
    ids = torch.randint(0, student, (int(indptr[-1]),), generator=g)
    return vd.RemapTable(indptr, ids, student_vocab_size=student, unk_id=1, pad_id=0)


def build(device: torch.device, rows: int, v_t: int, v_s: int, combine: str) -> Problem:
    table = make_table(v_t, v_s)
    tensors = randn(rows, v_s, seed=1, device=device), randn(rows, v_t, seed=2, device=device)
    size = 4 * (rows * (2 * v_s + v_t) + table.ids.numel() + table.indptr.numel())
    return loss_problem(OPERATION, tensors, 1, [table], {"combine": combine}, size)


def cases(device: torch.device) -> Iterator[Case]:
    rows, v_t, v_s = (64, 30522, 5000) if device.type == "cpu" else (4096, 119547, 5031)
    for combine in ("sum", "logsumexp"):
        make = functools.partial(build, rows=rows, v_t=v_t, v_s=v_s, combine=combine)
        yield Case(f"{rows}-{v_t}-{v_s}-{combine}", make, modes=("fwd+bwd",))
