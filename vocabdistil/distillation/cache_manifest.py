"""The manifest of what teachers made of texts: read and checked before torch is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.errors import VocabdistilError
from ..core.shards import COUNT, MANIFEST, RECORD, TEXT, Fields, check_folder, read_manifest

__all__ = ["FORMAT", "KINDS", "NAME", "PINNED", "cache_folders", "look_at_cache", "read_cache_manifest", "told_of"]

# The option that names the folder.
NAME = "cache_teacher"
FORMAT = 2
KINDS = ("hidden", "pooled")
# What the states depend on.
PINNED = ("weights", "configuration", "tokenizer", "dtype", "whitening")
_FIELDS: Fields = dict.fromkeys(("name", *PINNED), TEXT)
_RECORD: Fields = {**RECORD, "what": (" or ".join(map(repr, KINDS)), lambda value: value in KINDS), "tokens": COUNT}


def cache_folders(folder: str | os.PathLike[str], teachers: int) -> list[Path]:
    """The folder of each teacher: one below, if there are several."""
    root = Path(os.path.expanduser(folder))
    return [root / f"teacher-{t}" for t in range(teachers)] if teachers > 1 else [root]


def look_at_cache(folder: Path) -> bool:
    """Whether there is anything in a folder.

    Raises:
        VocabdistilError: it holds something else, or its manifest is damaged or of another format.
    """
    with told_of(folder):
        check_folder(folder, NAME)
        if not (folder / MANIFEST).exists():
            return False
        read_cache_manifest(folder)
        return True


def read_cache_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, with every field what it must be, see :func:`vocabdistil.core.shards.read_manifest`."""
    return read_manifest(folder, NAME, "states of a teacher", FORMAT, _FIELDS, _RECORD)


@contextmanager
def told_of(folder: Path) -> Iterator[None]:
    """What the disk refuses, in one line."""
    try:
        yield
    except OSError as error:
        raise VocabdistilError.of(NAME, f"cannot use {folder}: {error.strerror or error}") from None
