"""Inputs that several reference tests share."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from vocabdistil.alignment.spans import SpanPairs

F64 = torch.float64


def rows(n: int, width: int, seed: int = 0, dtype: torch.dtype = F64, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator, dtype=F64).to(dtype).requires_grad_(grad)


def mixed_pairs() -> SpanPairs:
    """7 student and 6 teacher tokens: M:N, 1:1, a gap, an empty span on each side and one empty on both."""
    return SpanPairs([0, 2, 2, 4, 5, 6], [2, 2, 3, 5, 5, 7], [0, 2, 3, 4, 4, 4], [2, 3, 4, 4, 4, 6])


def no_pairs() -> SpanPairs:
    return SpanPairs([], [], [], [])


def identity_pairs(n: int) -> SpanPairs:
    start = torch.arange(n)
    return SpanPairs(start, start + 1, start, start + 1)


def spans(start: Tensor, end: Tensor) -> list[tuple[int, int]]:
    return list(zip(start.tolist(), end.tolist(), strict=True))


def both_spans(pairs: SpanPairs) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    return list(
        zip(
            spans(pairs.student_start, pairs.student_end),
            spans(pairs.teacher_start, pairs.teacher_end),
            strict=True,
        )
    )


def matched(student_ids: list[int], teacher_ids: list[int]) -> SimpleNamespace:
    return SimpleNamespace(student_ids=torch.tensor(student_ids), teacher_ids=torch.tensor(teacher_ids))


def remap(rows_: list[list[int]]) -> SimpleNamespace:
    lengths = torch.tensor([0] + [len(r) for r in rows_])
    return SimpleNamespace(
        indptr=lengths.cumsum(0).to(torch.int32),
        ids=torch.tensor([i for r in rows_ for i in r], dtype=torch.int32),
    )


def naive_kl(q: Tensor, r: Tensor) -> Tensor:
    """``sum q log(q / r)`` of two vectors of probabilities, term by term."""
    total = q.new_zeros(())
    for a, b in zip(q, r, strict=True):
        if a > 0:
            total = total + a * (a.log() - b.log())
    return total
