"""The error that a user's input can cause."""

from __future__ import annotations

__all__ = ["VocabdistilError"]


class VocabdistilError(ValueError):
    """Bad input: one line that names the file or the argument. The command line prints it and exits with 2."""
