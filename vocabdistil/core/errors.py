"""The error that a user's input can cause, and the checks that raise it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

__all__ = [
    "MOST_THREADS",
    "VocabdistilError",
    "is_real",
    "need",
    "need_file",
    "need_place",
    "need_text",
    "need_whole",
    "need_writable",
    "on_command_line",
    "one_line",
    "printable",
    "spell",
    "utf8",
]

_Error = TypeVar("_Error", bound="VocabdistilError")

_LONGEST_LINE = 600
# More threads than any machine has: a million of them would take all its memory.
MOST_THREADS = 4096


# What moves a cursor, colours, hides or turns around what stands beside it, and lone surrogates.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """With control characters, but for tabs and line feeds, as escapes: a name from outside cannot steer a terminal."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: str) -> str:
    """Without line breaks and control characters, and without the middle of what is too long to read."""
    text = printable(" ".join(text.splitlines()))
    half = _LONGEST_LINE // 2
    return text if len(text) <= _LONGEST_LINE else f"{text[:half]} ... {text[-half:]}"


class VocabdistilError(ValueError):
    """Bad input: one line that names the file or the argument. The command line prints it and exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))

    @classmethod
    def of(cls: type[_Error], name: str, problem: str) -> _Error:
        """What is wrong with an option, by its name in Python."""
        return cls(f"{spell(name)}: {problem}")


# While a command runs: what its options are called there. In Python None.
_flags: ContextVar[Mapping[str, str] | None] = ContextVar("flags", default=None)


@contextmanager
def on_command_line(flags: Mapping[str, str]) -> Iterator[None]:
    """Errors raised meanwhile spell options as the command line does.

    Args:
        flags: what they are called there, by their names in Python.
    """
    token = _flags.set(flags)
    try:
        yield
    finally:
        _flags.reset(token)


def spell(name: str, value: object = None) -> str:
    """An option as its user writes it, with its value if there is one: ``keep_layers='0,3'`` in Python,
    ``--keep-layers 0,3`` on the command line."""
    flags = _flags.get()
    if flags is None:
        return name if value is None else f"{name}={value!r}"
    flag = flags.get(name, f"--{name.replace('_', '-')}")
    return flag if value is None or isinstance(value, bool) else f"{flag} {value}"


def need(ok: bool, name: str, expected: str, value: object) -> None:
    """Raises unless ``ok``: the option ``name`` was expected to be something else than ``value``."""
    if not ok:
        raise VocabdistilError.of(name, f"expected {expected}, got {value}")


def is_real(value: Any) -> bool:
    """Whether it is a number, of Python or of numpy, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def need_whole(value: Any, name: str, above: int = 0, most: int = 2**31 - 1) -> None:
    """Raises unless ``value`` is a whole number from ``above + 1`` to ``most``."""
    whole = is_real(value) and isinstance(value, Integral)
    need(whole, name, "a whole number", repr(value))
    need(value > above, name, f"a number above {above}" if above >= 0 else f"a number from {above + 1}", value)
    need(value <= most, name, f"a number up to {most}", value)


def utf8(text: str) -> bool:
    """Whether UTF-8 can hold it: not, if there are lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def need_text(value: Any, name: str) -> None:
    """Raises unless ``value`` is text that a file can hold."""
    need(isinstance(value, str), name, "text", type(value).__name__)
    need(utf8(value), name, "text that UTF-8 can hold", ascii(value))


def need_writable(value: Any, name: str, expected: str) -> None:
    """Raises unless ``value`` can be the name of a file to write: in a folder, and of nothing but a file."""
    place = Path(value)
    fine = place.parent.is_dir() and (place.is_file() or not place.exists())
    need(fine, name, f"{expected}, in a folder", value)


def need_file(value: Any, name: str, expected: str) -> None:
    """Raises unless ``value`` is the name of a file that is there."""
    need_place(value, name, expected)
    file = Path(value)
    if not file.is_file():
        raise VocabdistilError.of(name, f"{'not a file' if file.exists() else 'no such file'}: {file}")


def need_place(value: Any, name: str, expected: str) -> None:
    """Raises unless ``value`` can be the name of a file or folder, whether it is there or not."""
    need(isinstance(value, (str, os.PathLike)), name, expected, type(value).__name__)
    place = os.fspath(value)
    need(bool(place), name, expected, "nothing")
    try:
        place.encode()
        os.lstat(os.path.expanduser(place))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise VocabdistilError.of(name, f"expected {expected}, got {place!r}: {problem}") from None
