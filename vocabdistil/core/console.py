"""What a command prints."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    pass

__all__ = ["Reporter"]


class Reporter:
    """Prints to standard output unless quiet."""

    def __init__(self, quiet: bool = False) -> None:
        width = None if sys.stdout.isatty() else 110
        self.console = None if quiet else Console(width=width)

    def print(self, *objects: Any) -> None:
        if self.console is not None:
            lines = all(isinstance(o, str) for o in objects)
            self.console.print(*objects, sep="\n", highlight=False, soft_wrap=lines)

    def status(self, text: str) -> None:
        self.print(f"{text} ...")
