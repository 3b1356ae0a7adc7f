"""Random matched vocabularies and what the tests of the losses over a vocabulary share."""

from __future__ import annotations

import torch

import vocabdistil as vd

LEARNED = ("weight", "bias", "student_weight", "student_bias")


def make_matched(student: int, teacher: int, count: int, seed: int = 0) -> vd.MatchedVocab:
    """``count`` of the columns of each side, the teacher's ascending, the student's in any order."""
    g = torch.Generator().manual_seed(seed)
    teacher_ids = torch.randperm(teacher, generator=g)[:count].sort().values
    return vd.MatchedVocab(teacher_ids, torch.randperm(student, generator=g)[:count])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
