"""Random span pairs that look like real ones: one teacher token, one to three student pieces."""

from __future__ import annotations

import torch

import vocabdistil as vd


def make_pairs(
    count: int, seed: int, gaps: bool = False, empty: bool = False, same: bool = False
) -> tuple[vd.SpanPairs, int, int]:
    """The pairs and the number of student and teacher tokens. ``gaps``: some tokens lie in no span; ``empty``: some
    spans hold no token; ``same``: both sides share their spans."""
    g = torch.Generator().manual_seed(seed)

    def side(longest: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        length = torch.randint(0 if empty else 1, longest + 1, (count,), generator=g)
        gap = torch.randint(0, 3, (count,), generator=g) if gaps else torch.zeros(count, dtype=torch.int64)
        end = (length + gap).cumsum(0)
        return end - length, end, int(end[-1]) + (2 if gaps else 0)

    student = side(3)
    teacher = student if same else side(2)
    return vd.SpanPairs(*student[:2], *teacher[:2]), student[2], teacher[2]


def pairs_list(pairs: vd.SpanPairs) -> list[tuple[int, int, int, int]]:
    """Start and end of each pair's spans: the student's, then the teacher's."""
    fields = (pairs.student_start, pairs.student_end, pairs.teacher_start, pairs.teacher_end)
    return list(zip(*(field.tolist() for field in fields), strict=True))
