"""Seeds of the parts of a run."""

from __future__ import annotations

__all__ = ["mix_seed"]


def mix_seed(seed: int, step: int) -> int:
    """One seed for each step: everything random in a step depends on the two alone, so that resuming is exact."""
    return (seed * 0x9E3779B1 + step * 0x85EBCA77 + 0x2545F491) % (1 << 62)
