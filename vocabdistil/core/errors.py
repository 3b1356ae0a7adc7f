"""The error that a user's input can cause, and the checks that raise it."""

from __future__ import annotations

import os
import re
from numbers import Integral, Real
from typing import Any

__all__ = [
    "VocabdistilError",
    "is_real",
    "need",
    "need_place",
    "need_prompt",
    "need_seed",
    "need_threads",
    "need_whole",
    "one_line",
    "printable",
    "utf8",
]

_LONGEST_LINE = 600
# More threads than any machine has: a million of them would take all its memory.
_MOST_THREADS = 4096


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


def need(ok: bool, name: str, expected: str, value: object) -> None:
    """Raises unless ``ok``: the option ``--name`` was expected to be something else than ``value``."""
    if not ok:
        raise VocabdistilError(f"--{name.replace('_', '-')}: expected {expected}, got {value}")


def is_real(value: Any) -> bool:
    """Whether it is a number, of Python or of numpy, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def need_whole(value: Any, name: str, above: int = 0, most: int = 2**31 - 1) -> None:
    """Raises unless ``value`` is a whole number from ``above + 1`` to ``most``."""
    whole = is_real(value) and isinstance(value, Integral)
    need(whole, name, "a whole number", repr(value))
    need(value > above, name, f"a number above {above}", value)
    need(value <= most, name, f"a number up to {most}", value)


def need_seed(value: Any) -> None:
    """Raises unless ``value`` can be the seed of a run."""
    need(is_real(value), "seed", "a whole number", repr(value))
    need(0 <= value < 2**32, "seed", "a number from 0 to 2^32 - 1", value)
    need_whole(value, "seed", above=-1, most=2**32 - 1)


def need_threads(value: Any) -> None:
    """Raises unless ``value`` can be the number of torch's threads; None leaves it as it is."""
    if value is not None:
        need_whole(value, "threads", most=_MOST_THREADS)


def utf8(text: str) -> bool:
    """Whether UTF-8 can hold it: not, if there are lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def need_prompt(value: Any) -> None:
    """Raises unless ``value`` can stand before every text; None: nobody said."""
    if value is not None:
        need(isinstance(value, str), "prompt", "text", type(value).__name__)
        need(utf8(value), "prompt", "text that UTF-8 can hold", ascii(value))


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
        raise VocabdistilError(f"--{name.replace('_', '-')}: expected {expected}, got {place!r}: {problem}") from None
