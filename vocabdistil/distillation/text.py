"""Text that is read as a stream: files or whatever else a user may give, and a sample of it."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from ..core.errors import VocabdistilError, need, need_place, utf8
from .formats import COLUMN, as_row, read_examples, rows_of

__all__ = [
    "COUNTED",
    "Digested",
    "GivenTexts",
    "Prefixed",
    "TextFiles",
    "TextSource",
    "files_of",
    "open_text",
    "read_text",
    "sample_text",
]

# What a user may give as text: files, or texts themselves as strings or rows with a column "text".
TextSource = str | os.PathLike | Iterable[Any]
# Bytes of text that vocabularies are counted on: about eight seconds on one thread. 8,000 tokens trimmed for MiniLM on
# 0.5 / 1 / 2 / 4 / 8 MB of 12 MB of English (prose, plays, documentation) read held-out text in 2.0 / 0.8 / 0.4 / 0.2 /
# 0.0% more tokens than those from all 12 MB, and 75 / 81 / 87 / 91 / 96% of them are the same; of tokens trained anew
# 73 / 79 / 84 / 90 / 95% are, and read it in between 0.6% fewer and 0.1% more. For multilingual-e5-small on 0.5 / 1 / 2
# of 3.9 MB of Russian it is 1.8 / 0.8 / 0.2% more when trimmed, 2.1 / 0.9 / 0.2% when trained.
COUNTED = 8 << 20


class TextFiles:
    """The training examples of files, in order: read anew, a little at a time, whenever they are iterated over.

    Args:
        paths: plain text, UTF-8 or, with a byte order mark, UTF-16; JSON lines, each an object with a string
            ``"text"``; either of them compressed by gzip or zstd; or Parquet with a column ``"text"``.
        unit: of plain text: ``"line"``: every non-blank line is one example; ``"paragraph"``: lines are joined by a
            space until a blank line. Examples are stripped, never empty.
        rows: examples are JSON objects, as a causal model is trained on, see :func:`.formats.read_examples`.

    Raises:
        VocabdistilError: a file is missing or not a file; while reading: it is damaged or of another kind, needs a
            package that is not there, is undecodable (with the offset of the first bad byte), has a row without a text
            (with its number), or holds nothing but white space.
    """

    def __init__(self, paths: Sequence[str | os.PathLike], unit: str = "line", rows: bool = False) -> None:
        if unit not in ("line", "paragraph"):
            raise VocabdistilError.of("unit", f"expected 'line' or 'paragraph', got {unit!r}")
        if not paths:
            raise VocabdistilError.of("text", "expected at least one file")
        self.paths, self.unit, self.rows = [Path(path) for path in paths], unit, rows
        for given, path in zip(paths, self.paths, strict=True):
            need_place(given, "text", "a file")
            if not path.exists():
                raise VocabdistilError.of("text", f"no such file: {path}")
            if not path.is_file():
                raise VocabdistilError.of("text", f"not a file: {path}")

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            found = None
            for found in read_examples(path, self.unit, self.rows):
                yield found
            self._need_some(found, path)

    def look(self) -> None:
        """Raises VocabdistilError for a file that is empty or begins with what is no text, without reading all."""
        for path in self.paths:
            self._need_some(next(read_examples(path, self.unit, self.rows), None), path)

    def stamp(self) -> list[Any]:
        """What is the same only as long as the files are.

        Raises:
            VocabdistilError: one of them is gone.
        """
        found: list[Any] = [self.unit, "rows"] if self.rows else [self.unit]
        for path in self.paths:
            try:
                status = path.stat()
            except OSError as error:
                raise VocabdistilError.of("text", f"cannot read {path}: {error.strerror}") from None
            # Whoever changes a file can give it an older date, but when its status changed is the system's to say.
            place = os.path.realpath(path), status.st_ino
            found.append([*place, status.st_size, status.st_mtime_ns, status.st_ctime_ns])
        return found

    @staticmethod
    def _need_some(found: str | None, path: Path) -> None:
        if found is None:
            raise VocabdistilError.of("text", f"{path} is empty")


class GivenTexts:
    """Texts that are at hand: a list, a data set or another iterable of strings, or of rows with a column ``"text"``.

    Examples are stripped, blank ones left out. An iterator can be read once only.

    Args:
        rows: examples are JSON objects, as those of :class:`TextFiles`.

    Raises:
        VocabdistilError: something else among them (when it is reached), or nothing but white space.
    """

    def __init__(self, texts: Iterable[Any], rows: bool = False) -> None:
        self.texts, self.rows = texts, rows

    def __iter__(self) -> Iterator[str]:
        found = False
        for i, item in (None if self.rows else rows_of(self.texts)) or enumerate(self.texts):
            text = item.get(COLUMN) if isinstance(item, Mapping) else item
            if self.rows and (isinstance(item, Mapping) or text):
                text = as_row(item if isinstance(item, Mapping) else {COLUMN: text})
            if not isinstance(text, str):
                raise VocabdistilError.of(
                    "text",
                    f"expected strings, or rows with a column 'text', got {type(item).__name__} at {i}"
                )
            if text := text.strip():
                need(utf8(text), "text", "text that UTF-8 can hold", f"{ascii(text)} at {i}")
                found = True
                yield text
        if not found:
            raise VocabdistilError.of("text", "expected at least one text, got none")

    def stamp(self) -> None:
        """Nobody knows whether they are the same without reading them."""


@dataclass
class Prefixed:
    """Texts with a prompt before each, to read as often as those without."""

    texts: Iterable[str]
    prompt: str

    def __iter__(self) -> Iterator[str]:
        return (self.prompt + text for text in self.texts)


def _is_path(item: Any) -> bool:
    """Whether an item of a list means a file: a path does, and a string without white space that looks like one."""
    if isinstance(item, os.PathLike):
        return True
    if not isinstance(item, str) or not item or len(item) > 4096 or "\n" in item or "\0" in item:
        return False
    return os.path.exists(item) or (len(item.split()) == 1 and (os.sep in item or Path(item).suffix[1:].isalnum()))


def files_of(text: TextSource) -> list[str | os.PathLike] | None:
    """The files that are meant, or None: these are texts."""
    if isinstance(text, (str, os.PathLike)):
        return [text]
    return list(text) if isinstance(text, (list, tuple)) and all(map(_is_path, text)) else None


def open_text(text: TextSource, unit: str = "line", rows: bool = False) -> TextFiles | GivenTexts:
    """Text to read.

    Args:
        text: a file or a list of files; or texts: a list, a data set or another iterable of strings, or of rows with a
            column ``"text"``. Strings that all name files are files.
        unit: what one example of a file is, see :class:`TextFiles`.
        rows: examples are JSON objects, see there.

    Raises:
        VocabdistilError: a table, of which no one knows which column is meant; see :class:`TextFiles` and
            :class:`GivenTexts`.
    """
    if (files := files_of(text)) is not None:
        return TextFiles(files, unit, rows)
    # A data frame iterates over the names of its columns.
    if isinstance(text, Mapping) or hasattr(text, "columns") or not isinstance(text, Iterable):
        raise VocabdistilError.of("text", f"expected files or a list of texts, got {type(text).__name__}")
    return GivenTexts(text, rows)


def read_text(paths: Sequence[str | os.PathLike], unit: str = "line") -> list[str]:
    """All of :class:`TextFiles` at once."""
    return list(TextFiles(paths, unit))


class Digested:
    """Hands texts on, counts them and finds what identifies them and the places where one ends and another begins.

    Attributes:
        seen: how many were handed on.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.seen = texts, 0
        self._texts, self._sizes = hashlib.sha256(), hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            data = text.encode()
            self._texts.update(data)
            self._sizes.update(len(data).to_bytes(8, "little"))
            self.seen += 1
            yield text

    @property
    def digest(self) -> str:
        """Of the texts so far, in hexadecimal."""
        return hashlib.sha256(self._texts.digest() + self._sizes.digest()).hexdigest()


def sample_text(texts: Iterable[str], seed: int, most: int = COUNTED) -> list[str]:
    """As much of a text as vocabularies are counted on, all examples being as likely: those of the smallest of random
    numbers (bottom-k sampling, Cohen and Kaplan, 2007), with a bound on their size in place of their number.

    Args:
        texts: read once, to the end; only what may still be in the sample is held.
        seed: of the draw.
        most: bytes of UTF-8; a single example may have more.

    Returns:
        The examples in their order; all of them if they are not more.
    """
    draw, size, below = random.Random(seed), 0, 1.0
    # The largest number first. What comes later must have a smaller one than what was given up, however short it is.
    kept: list[tuple[float, int, str]] = []
    for place, text in enumerate(texts):
        number = draw.random()
        if number >= below:
            continue
        heappush(kept, (-number, place, text))
        size += len(text.encode())
        while size > most and len(kept) > 1:
            number, _, dropped = heappop(kept)
            below, size = -number, size - len(dropped.encode())
    return [text for _, text in sorted((place, text) for _, place, text in kept)]
