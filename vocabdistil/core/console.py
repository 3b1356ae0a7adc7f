"""What a command prints."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from typing import Any, TextIO, cast

from rich.console import Console
from rich.text import Text

from .clock import begun
from .errors import printable

__all__ = ["LastingConsole", "LastingStream", "Reporter", "print_line"]

# Of a pipe that nobody reads any more, and of a terminal that is gone: these do not come back.
_GONE = (errno.EPIPE, errno.EIO)


class LastingStream:
    """Standard output or error, of which no error ends a job: what cannot be printed any more is dropped, and what the
    encoding lacks is escaped."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        # What kept text from being written.
        self.refused: Exception | None = None

    @property
    def encoding(self) -> str:
        return getattr(self.stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        self._attempt("write", text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        self._attempt("flush")

    def isatty(self) -> bool:
        try:
            return self.stream is not None and self.stream.isatty()
        except ValueError:  # closed
            return False

    def fileno(self) -> int:
        if self.stream is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self.stream.fileno()

    def _attempt(self, method: str, *args: Any) -> None:
        if self.stream is None:
            return
        try:
            getattr(self.stream, method)(*args)
        except (OSError, ValueError) as error:
            self.refused = error
            if getattr(error, "errno", None) in _GONE:
                # What the stream still holds would fail once more when the interpreter ends.
                with contextlib.suppress(OSError, ValueError):
                    null = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(null, self.stream.fileno())
                    os.close(null)
                self.stream = None


def print_line(text: str, stream: TextIO | None) -> Exception | None:
    """A line as it is, but for control characters, on a :class:`LastingStream`; returns what kept it from being
    written."""
    lasting = LastingStream(stream)
    lasting.write(printable(text) + "\n")
    lasting.flush()
    return lasting.refused


class LastingConsole(Console):
    """A console on a :class:`LastingStream` that takes strings as they are: no markup and no emoji codes, control
    characters escaped."""

    def __init__(self, stream: TextIO | None, width: int | None = None) -> None:
        super().__init__(file=cast(TextIO, LastingStream(stream)), width=width, markup=False, emoji=False)

    def render_str(self, text: str, **kwargs: Any) -> Text:
        return super().render_str(printable(text), **kwargs)


class Reporter:
    """Prints to standard output unless quiet, and when something begins how long that took.

    Attributes:
        begun: when all of it began, on the monotonic clock.
    """

    def __init__(self, quiet: bool = False) -> None:
        width = None if LastingStream(sys.stdout).isatty() else 110
        self.console = None if quiet else LastingConsole(sys.stdout, width)
        self.begun = begun()

    @property
    def seconds(self) -> float:
        """Since then."""
        return time.monotonic() - self.begun

    def print(self, *objects: Any) -> None:
        if self.console is not None and objects:
            lines = all(isinstance(o, str) for o in objects)
            self.console.print(*objects, sep="\n", highlight=False, soft_wrap=lines)

    def status(self, text: str) -> None:
        self.print(f"[{self.seconds:.0f} s] {text} ...")
