"""contrastive against the reference, which holds all scores at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import vocabdistil as vd
from benchmarks._losses import forward_backward, randn

SIZES = ((1024, 264), (2048, 768))  # pairs, D


def rows() -> Iterator[dict[str, Any]]:
    for n, dim in SIZES:
        student, teacher = randn(2 * n, dim, seed=1, learned=True), randn(n, dim, seed=2)
        at = torch.arange(n + 1)
        pairs = vd.SpanPairs(2 * at[:-1], 2 * at[1:], at[:-1], at[1:])
        for negatives in (-1, 64):
            providers = {
                name: lambda m=m, s=student, t=teacher, p=pairs, k=negatives: m.contrastive(s, t, p, negatives=k)
                for name, m in (("vocabdistil", vd), ("reference", vd.reference))
            }
            case = f"{n} pairs, {dim} wide, {negatives if negatives > 0 else 'all'} negatives"
            yield from forward_backward(case, providers, [student], n, 4 * 5 * n * dim)
