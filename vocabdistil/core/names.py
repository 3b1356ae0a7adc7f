"""What models and files are called where there is little room."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["display_names"]

# Last parts of paths that many models share: what stands before them says more.
_SAY_NOTHING = ("model", "final", "best", "out", "output")


def _parts(name: str) -> tuple[str, ...]:
    path = Path(name)
    return Path(os.path.abspath(name)).parts if name and path.name in ("", "..") else path.parts


def display_names(names: Sequence[str]) -> list[str]:
    """Short names of folders and models: the last part of each, and as many more as tell them apart.

    A last part such as ``model`` never stands alone if there is something before it. The same name twice stays so.
    """
    parts = [_parts(name) for name in names]
    shown = [min(len(p), 2 if p and (p[-1] in _SAY_NOTHING or p[-1].startswith("checkpoint")) else 1) for p in parts]
    while True:
        found = [os.path.join(*p[-n:]) if p else "" for p, n in zip(parts, shown, strict=True)]
        alike = [
            any(a == b and p != q for b, q in zip(found, parts, strict=True)) for a, p in zip(found, parts, strict=True)
        ]
        grown = [min(n + same, len(p)) for n, same, p in zip(shown, alike, parts, strict=True)]
        if grown == shown:
            return found
        shown = grown
