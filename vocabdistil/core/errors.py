"""The error that a user's input can cause."""

from __future__ import annotations

__all__ = ["VocabdistilError"]


class VocabdistilError(ValueError):
    """Bad input: one line that names the file or the argument. The command line prints it and exits with 2."""


def need(ok: bool, name: str, expected: str, value: object) -> None:
    """Raises unless ``ok``: the option ``--name`` was expected to be something else than ``value``."""
    if not ok:
        raise VocabdistilError(f"--{name.replace('_', '-')}: expected {expected}, got {value}")


