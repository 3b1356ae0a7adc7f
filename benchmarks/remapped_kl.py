"""remapped_kl against the reference, on a made-up table of one to five pieces a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import vocabdistil as vd
from benchmarks._losses import forward_backward, randn

SIZES = ((64, 30522, 5000), (32, 119547, 5031))  # rows, V_t, V_s


def make_table(teacher: int, student: int) -> vd.RemapTable:
    g = torch.Generator().manual_seed(0)
    indptr = torch.zeros(teacher + 1, dtype=torch.int64)
    torch.cumsum(torch.randint(1, 6, (teacher,), generator=g), 0, out=indptr[1:])
    ids = torch.randint(0, student, (int(indptr[-1]),), generator=g)
    return vd.RemapTable(indptr, ids, student_vocab_size=student, unk_id=1, pad_id=0)


def rows() -> Iterator[dict[str, Any]]:
    for n, v_t, v_s in SIZES:
        student, teacher, table = randn(n, v_s, seed=1, learned=True), randn(n, v_t, seed=2), make_table(v_t, v_s)
        for combine in ("sum", "logsumexp"):
            providers = {
                name: lambda m=m, s=student, t=teacher, r=table, c=combine: m.remapped_kl(s, t, r, combine=c)
                for name, m in (("vocabdistil", vd), ("reference", vd.reference))
            }
            size = 4 * (n * (2 * v_s + v_t) + table.ids.numel() + table.indptr.numel())
            case = f"{n} rows, {v_t} -> {v_s}, {combine}"
            yield from forward_backward(case, providers, [student], n, size, repeats=5)
