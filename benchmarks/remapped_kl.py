"""KL through the remap table (`vocabdistil.remapped_kl`), on a made-up table of one to five pieces a row: each piece as
often as any other, or (``uneven``) as often as words are, so that some stand in thousands of rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

import vocabdistil as vd

from ._losses import loss_problem, randn
from .harness import Case, Problem

OPERATION = "remapped_kl"


def make_table(teacher: int, student: int, uneven: bool = False) -> vd.RemapTable:
    g = torch.Generator().manual_seed(0)
    indptr = torch.zeros(teacher + 1, dtype=torch.int64)
    torch.cumsum(torch.randint(1, 6, (teacher,), generator=g), 0, out=indptr[1:])
    count = int(indptr[-1])
    if uneven:
        ids = (1 / torch.arange(1.0, student + 1)).multinomial(count, replacement=True, generator=g)
    else:
        ids = torch.randint(0, student, (count,), generator=g)
    return vd.RemapTable(indptr, ids, student_vocab_size=student, unk_id=1, pad_id=0)


def build(
    device: torch.device, rows: int, v_t: int, v_s: int, combine: str, dtype: torch.dtype, uneven: bool
) -> Problem:
    table = make_table(v_t, v_s, uneven)
    tensors = randn(rows, v_s, seed=1, device=device, dtype=dtype), randn(rows, v_t, seed=2, device=device, dtype=dtype)
    size = dtype.itemsize * rows * (2 * v_s + v_t) + 4 * (table.ids.numel() + table.indptr.numel())
    return loss_problem(OPERATION, tensors, 1, [table], {"combine": combine}, size, rowwise=(0, 1))


def cases(device: torch.device) -> Iterator[Case]:
    single, half = torch.float32, torch.bfloat16
    rows, v_t, v_s, kinds = 64, 30522, 5000, [(single, False)]
    if device.type == "cuda":
        rows, v_t, v_s, kinds = 4096, 119547, 5031, [(single, False), (half, False), (half, True)]
    for dtype, uneven in kinds:
        for combine in ("sum", "logsumexp"):
            name = f"{rows}-{v_t}-{v_s}-{combine}{'-bf16' if dtype == half else ''}{'-uneven' if uneven else ''}"
            make = functools.partial(build, rows=rows, v_t=v_t, v_s=v_s, combine=combine, dtype=dtype, uneven=uneven)
            yield Case(name, make, dtype, modes=("fwd+bwd",))
