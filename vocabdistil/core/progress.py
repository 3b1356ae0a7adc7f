"""How far a long job is, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .console import LastingConsole

__all__ = ["counted", "counting"]

_Item = TypeVar("_Item")

# Seconds between two lines where there is no terminal.
_EVERY = 20.0


@contextmanager
def counting(label: str, total: int | None = None, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with how many more items are done.

    A bar on a terminal or in a notebook; elsewhere a line now and then, and if there was one another at the end;
    nothing if quiet.
    """
    console = LastingConsole(sys.stderr)
    if quiet:
        yield lambda count: None
    elif console.is_terminal or console.is_jupyter:
        columns = TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda count: bar.advance(task, count)
    else:
        done, told, said = 0, 0, time.monotonic()

        def tell() -> None:
            nonlocal told, said
            told, said = done, time.monotonic()
            console.print(f"{label}: {done:,}" + (f" of {total:,}" if total else ""), highlight=False)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if time.monotonic() - said >= _EVERY:
                tell()

        yield advance
        if 0 < told < done:
            tell()


def counted(items: Sequence[_Item], label: str, quiet: bool = False) -> Iterator[_Item]:
    """The items one after the other, with :func:`counting`."""
    with counting(label, len(items), quiet) as advance:
        for item in items:
            yield item
            advance(1)
