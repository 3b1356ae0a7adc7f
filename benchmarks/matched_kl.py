"""matched_kl against the reference, which gathers the matched columns first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import vocabdistil as vd
from benchmarks._losses import forward_backward, randn

# rows, V_t, V_s, matched, dtype
SIZES = (
    (512, 30522, 5000, 4500, torch.float32),
    (512, 30522, 5000, 4500, torch.bfloat16),
    (128, 119547, 5031, 4700, torch.float32),
    (64, 151936, 32000, 28000, torch.float32),
)


def make_matched(student: int, teacher: int, count: int) -> vd.MatchedVocab:
    """``count`` random tokens of each side, the teacher's ascending."""
    g = torch.Generator().manual_seed(0)
    teacher_ids = torch.randperm(teacher, generator=g)[:count].sort().values
    return vd.MatchedVocab(teacher_ids, torch.randperm(student, generator=g)[:count])


def rows() -> Iterator[dict[str, Any]]:
    for n, v_t, v_s, v_m, dtype in SIZES:
        student, teacher = randn(n, v_s, seed=1, dtype=dtype, learned=True), randn(n, v_t, seed=2, dtype=dtype)
        matched = make_matched(v_s, v_t, v_m)
        for unmatched in ("renormalize", "rest"):
            providers = {
                name: lambda m=m, s=student, t=teacher, v=matched, u=unmatched: m.matched_kl(s, t, v, unmatched=u)
                for name, m in (("vocabdistil", vd), ("reference", vd.reference))
            }
            read = 2 * v_m if unmatched == "renormalize" else v_s + v_t
            case = f"{n} rows, {v_t} -> {v_s}, {v_m} matched, {unmatched}, {str(dtype)[6:]}"
            yield from forward_backward(case, providers, [student], n, student.element_size() * n * (read + v_s))
