"""Random matched vocabularies and what the tests of the losses over a vocabulary share."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

import vocabdistil as vd


def make_matched(student: int, teacher: int, count: int, seed: int = 0) -> vd.MatchedVocab:
    """``count`` of the columns of each side, the teacher's ascending, the student's in any order."""
    g = torch.Generator().manual_seed(seed)
    teacher_ids = torch.randperm(teacher, generator=g)[:count].sort().values
    return vd.MatchedVocab(teacher_ids, torch.randperm(student, generator=g)[:count])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


class LargestAllocation:
    """``nbytes``: the largest single piece of memory that an operation within allocates."""

    nbytes = 0

    def __enter__(self) -> LargestAllocation:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._profile.__exit__(*error)
        self.nbytes = max(event.self_cpu_memory_usage for event in self._profile.events())
