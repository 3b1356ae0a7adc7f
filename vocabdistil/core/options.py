"""What an option may be, and what it means: said once, for Python and for the command line.

An option is a field of a dataclass whose annotation holds an :class:`Option`:

    seed: Annotated[int, Option(Whole(-1), "of everything random")] = 0

:func:`check_options` then looks at values given in Python, and :func:`add_options` makes arguments of a parser, which
reads words and leaves it to the same check to refuse them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from .errors import MOST_THREADS, is_real, need, need_place, need_text, need_whole

__all__ = [
    "FAMILIES",
    "METHODS",
    "ROW_COLUMNS",
    "SEED",
    "TEXT_FILES",
    "TEXT_FORMATS",
    "Choice",
    "Files",
    "Flag",
    "Json",
    "Kind",
    "Numbers",
    "Option",
    "Place",
    "Prompt",
    "Real",
    "Seed",
    "Text",
    "Threads",
    "TrustRemoteCode",
    "Unit",
    "Whole",
    "add_options",
    "check_options",
    "flags_of",
    "listed",
    "names_of",
    "options_of",
]

# Kinds of tokenizers that can be trained, and ways to align two; what implements them stands in other wings.
FAMILIES = ("wordpiece", "byte-bpe", "bpe", "unigram")
METHODS = ("boundary", "word", "match", "reduce")
# Of the rows that a causal model is trained on, in the form that TRL's SFT has them.
ROW_COLUMNS = ("text", "messages", "prompt", "completion", "tools", "chat_template_kwargs")


def listed(names: Sequence[str]) -> str:
    """``a, b or c``."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


@dataclass(frozen=True)
class Kind:
    """What a value may be: anything, if whoever uses it looks at it.

    Attributes:
        metavar: what stands for it in the help.
    """

    metavar: str = field(default="TEXT", kw_only=True)

    def read(self, word: str) -> Any:
        """What a word of the command line means; a word that means nothing stays one, for the check to refuse."""
        return word

    def check(self, value: Any, name: str) -> None:
        """Raises VocabdistilError where ``value`` cannot be that of the option ``name``."""


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number from ``above + 1`` to ``most``."""

    above: int = 0
    most: int = 2**31 - 1
    metavar: str = field(default="N", kw_only=True)

    def read(self, word: str) -> int | str:
        try:
            return int(word)
        except ValueError:
            return word

    def check(self, value: Any, name: str) -> None:
        need_whole(value, name, self.above, self.most)


@dataclass(frozen=True)
class Real(Kind):
    """A number above ``low``, or ``low`` itself where ``closed``, and below ``high``."""

    expected: str = "a number above 0"
    low: float = 0.0
    high: float = float("inf")
    closed: bool = False
    metavar: str = field(default="X", kw_only=True)

    def read(self, word: str) -> float | str:
        try:
            return float(word)
        except ValueError:
            return word

    def check(self, value: Any, name: str) -> None:
        need(is_real(value), name, self.expected, repr(value))
        need((self.low < value or self.closed and value == self.low) and value < self.high, name, self.expected, value)


@dataclass(frozen=True)
class Numbers(Kind):
    """Numbers; on the command line with commas between them."""

    metavar: str = field(default="X,...", kw_only=True)

    def read(self, word: str) -> list[float] | str:
        try:
            return [float(part) for part in word.split(",")]
        except ValueError:
            return word


@dataclass(frozen=True)
class Choice(Kind):
    """One of some names."""

    names: tuple[str, ...] = ()
    metavar: str = field(default="NAME", kw_only=True)

    def check(self, value: Any, name: str) -> None:
        need(isinstance(value, str) and value in self.names, name, listed(self.names), repr(value))


@dataclass(frozen=True)
class Text(Kind):
    """Text that UTF-8 can hold."""

    def check(self, value: Any, name: str) -> None:
        need_text(value, name)


@dataclass(frozen=True)
class Place(Kind):
    """The name of a file or folder, whether it is there or not."""

    expected: str = "a file"
    metavar: str = field(default="FILE", kw_only=True)

    def check(self, value: Any, name: str) -> None:
        need_place(value, name, self.expected)


@dataclass(frozen=True)
class Files(Kind):
    """Files; or in Python texts themselves, so that whoever reads them looks at them."""

    metavar: str = field(default="FILE", kw_only=True)

    def read(self, word: str) -> Path:
        if not word:
            raise argparse.ArgumentTypeError("expected a file, got nothing")
        return Path(word)


@dataclass(frozen=True)
class Flag(Kind):
    """True or False; on the command line an option without a value."""

    def check(self, value: Any, name: str) -> None:
        need(isinstance(value, bool), name, "True or False", repr(value))


@dataclass(frozen=True)
class Option:
    """What stands in the annotation of a field that is an option.

    Attributes:
        kind: what the value may be; where there may be several, each of them. None is fine where it is the default.
        help: what it means. A default that is told here is not told again.
        flag: what it is called on the command line; empty: as in Python, with dashes.
        several: there may be several values, after one flag or after a flag for each.
    """

    kind: Kind
    help: str
    flag: str = ""
    several: bool = False

    def check(self, value: Any, name: str) -> None:
        for item in value if self.several and isinstance(value, (list, tuple)) else (value,):
            self.kind.check(item, name)


# What several commands have.
SEED = Whole(-1, 2**32 - 1)
# What the files of a text may be.
TEXT_FORMATS = "text: plain, JSON lines or Parquet (column text; of decoders conversations too), also as .gz or .zst"
TEXT_FILES = Option(Files(), TEXT_FORMATS, several=True)
Seed = Annotated[int, Option(SEED, "of everything random")]
Threads = Annotated[int | None, Option(Whole(0, MOST_THREADS), "CPU threads of torch")]
Unit = Annotated[str, Option(Choice(names=("line", "paragraph")), "what one text is: line or paragraph")]
Prompt = Annotated[
    str | None,
    Option(Text(), "what stands before every text, such as 'query: ' (default: what the model's folder says)"),
]
TrustRemoteCode = Annotated[bool, Option(Flag(), "run code that comes with a model")]
Json = Annotated[bool, Option(Flag(), "print JSON")]


@cache
def options_of(kind: type) -> Mapping[str, tuple[Field, Option]]:
    """The options among the fields of a dataclass, by their names."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        declared.name: (declared, part)
        for declared in fields(kind)
        for part in getattr(hints[declared.name], "__metadata__", ())
        if isinstance(part, Option)
    }


def check_options(config: Any) -> None:
    """Raises VocabdistilError for the first option of a dataclass that cannot be."""
    kind: type = type(config)
    for name, (declared, option) in options_of(kind).items():
        value = getattr(config, name)
        if value is not None or declared.default is not None:
            option.check(value, name)


def flags_of(kind: type) -> dict[str, str]:
    """What options are called on the command line."""
    return {
        name: option.flag or f"--{'no-' if declared.default is True else ''}{name.replace('_', '-')}"
        for name, (declared, option) in options_of(kind).items()
    }


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """Gives a parser the options of a dataclass; what it finds is arguments for the class, by name."""
    for name, (declared, option) in options_of(kind).items():
        flag, default = flags_of(kind)[name], declared.default
        if declared.default_factory is not MISSING:
            default = declared.default_factory()
        how: dict[str, Any] = {"help": option.help.replace("%", "%%")}
        if flag.startswith("-"):
            how |= {"dest": name, "required": default is MISSING}
        if default is not MISSING:
            how["default"] = default
            if default not in (None, "", []) and not isinstance(default, bool) and "(default" not in option.help:
                how["help"] += f" (default {default})"
        if isinstance(option.kind, Flag):
            how["action"] = "store_false" if default is True else "store_true"
        else:
            how |= {"type": option.kind.read, "metavar": option.kind.metavar}
        if option.several:
            how |= {"action": "extend", "nargs": "+"}
        parser.add_argument(flag, **how)


def names_of(value: Any) -> list[Any]:
    """One name or several as a list; what is none stays for the check to refuse."""
    several = isinstance(value, Iterable) and not isinstance(value, (str, os.PathLike, Mapping))
    return [os.fspath(item) if isinstance(item, os.PathLike) else item for item in (value if several else [value])]
