"""Text: reading it, and holding some of it out."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..core.errors import VocabdistilError, need, need_place, utf8

__all__ = [
    "GivenTexts",
    "Prefixed",
    "Sample",
    "TextFiles",
    "TextSource",
    "TextSplit",
    "files_of",
    "open_text",
    "read_text",
    "split_text",
]

# What a user may give as text: files, or texts themselves as strings or rows with a column "text".
TextSource = str | os.PathLike | Iterable[Any]


class TextFiles:
    """The training examples of UTF-8 files, in order: read anew, a line at a time, whenever they are iterated over.

    Args:
        paths: text files.
        unit: ``"line"``: every non-blank line is one example; ``"paragraph"``: lines are joined by a space until
            a blank line. Examples are stripped, never empty.

    Raises:
        VocabdistilError: a file is missing or not a file; while reading: undecodable (with the offset of the first
            bad byte), or holds nothing but white space.
    """

    def __init__(self, paths: Sequence[str | os.PathLike], unit: str = "line") -> None:
        if unit not in ("line", "paragraph"):
            raise VocabdistilError.of("unit", f"expected 'line' or 'paragraph', got {unit!r}")
        if not paths:
            raise VocabdistilError.of("text", "expected at least one file")
        self.paths, self.unit = [Path(path) for path in paths], unit
        for given, path in zip(paths, self.paths, strict=True):
            need_place(given, "text", "a file")
            if not path.exists():
                raise VocabdistilError.of("text", f"no such file: {path}")
            if not path.is_file():
                raise VocabdistilError.of("text", f"not a file: {path}")

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            found = None
            for found in self._examples(path):
                yield found
            self._need_some(found, path)

    def look(self) -> None:
        """Raises VocabdistilError for a file that is empty or begins with what is no text, without reading all."""
        for path in self.paths:
            self._need_some(next(self._examples(path), None), path)

    @staticmethod
    def _need_some(found: str | None, path: Path) -> None:
        if found is None:
            raise VocabdistilError.of("text", f"{path} is empty")

    def _examples(self, path: Path) -> Iterator[str]:
        if self.unit == "line":
            yield from filter(None, self._lines(path))
            return
        paragraph: list[str] = []
        for line in chain(self._lines(path), [""]):
            if line:
                paragraph.append(line)
            elif paragraph:
                yield " ".join(paragraph)
                paragraph = []

    def _lines(self, path: Path) -> Iterator[str]:
        offset = 0
        try:
            with open(path, "rb") as file:
                for data in file:
                    text = data.decode() if offset else data.decode().removeprefix("\ufeff")
                    offset += len(data)
                    # A line feed ends a line in any case; str knows other ends of lines too.
                    for line in text.splitlines():
                        yield line.strip()
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise VocabdistilError.of(
                "text",
                f"{path} is not UTF-8: byte 0x{byte:02x} at offset {offset + error.start}"
            ) from None
        except OSError as error:
            raise VocabdistilError.of("text", f"cannot read {path}: {error.strerror}") from None


class GivenTexts:
    """Texts that are at hand: a list, a data set or another iterable of strings, or of rows with a column ``"text"``.

    Examples are stripped, blank ones left out. An iterator, which can be read once only, is read into a list unless
    ``once``.

    Raises:
        VocabdistilError: something else among them (when it is reached), or nothing but white space.
    """

    def __init__(self, texts: Iterable[Any], once: bool = False) -> None:
        self.texts = list(texts) if isinstance(texts, Iterator) and not once else texts

    def __iter__(self) -> Iterator[str]:
        found = False
        for i, item in enumerate(self.texts):
            text = item.get("text") if isinstance(item, Mapping) else item
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


def open_text(text: TextSource, unit: str = "line", once: bool = False) -> TextFiles | GivenTexts:
    """Text to read as often as one likes.

    Args:
        text: a file or a list of files; or texts: a list, a data set or another iterable of strings, or of rows with a
            column ``"text"``. Strings that all name files are files.
        unit: what one example of a file is, see :class:`TextFiles`.
        once: it is read once only, so that an iterator need not be held.

    Raises:
        VocabdistilError: a table, of which no one knows which column is meant; see :class:`TextFiles` and
            :class:`GivenTexts`.
    """
    if (files := files_of(text)) is not None:
        return TextFiles(files, unit)
    # A data frame iterates over the names of its columns.
    if isinstance(text, Mapping) or hasattr(text, "columns") or not isinstance(text, Iterable):
        raise VocabdistilError.of("text", f"expected files or a list of texts, got {type(text).__name__}")
    return GivenTexts(text, once)


class Sample:
    """Hands texts on and keeps some of them: each is kept with the same probability (Vitter, 1985, algorithm R).

    Args:
        texts: read when this is iterated over.
        count: how many to keep at most.
        seed: of the draw.

    Attributes:
        kept: the texts kept so far, distinct.
        seen: how many were handed on.
        digest: identifies them.
    """

    def __init__(self, texts: Iterable[str], count: int, seed: int) -> None:
        self.texts, self.count = texts, count
        self.kept: list[str] = []
        self._held: set[str] = set()
        self._candidates = 0
        self.seen, self._draw, self._hash = 0, random.Random(seed), hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.seen += 1
            self._hash.update(text.encode() + b"\n")
            if text not in self._held:
                self._candidates += 1
                room = len(self.kept) < self.count
                place = len(self.kept) if room else self._draw.randrange(self._candidates)
                if place < self.count:
                    self._held -= set(self.kept[place : place + 1])
                    self._held.add(text)
                    self.kept[place : place + 1] = [text]
            yield text

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


def read_text(paths: Sequence[str | os.PathLike], unit: str = "line") -> list[str]:
    """All of :class:`TextFiles` at once."""
    return list(TextFiles(paths, unit))


@dataclass
class TextSplit:
    """Training and held-out examples; ``digest`` identifies the text that they came from."""

    train: list[str]
    held_out: list[str]
    digest: str


def split_text(
    examples: Sequence[str], fraction: float, seed: int, minimum: int = 8, most: int | None = None
) -> TextSplit:
    """Draws the held-out examples without replacement; the same arguments give the same split.

    An example whose text also occurs on the other side is taken out of the held-out side, so that repeated lines
    ("First Citizen:") are not scored as unseen text.

    Args:
        fraction: held out, but no more than ``most`` examples, if there is such a number.

    Raises:
        VocabdistilError: too little text to hold out ``minimum`` distinct examples and train on the rest.
    """
    if not 0 < fraction < 1:
        raise VocabdistilError.of("held_out", f"expected a fraction between 0 and 1, got {fraction}")
    if most is not None:
        fraction = min(fraction, most / max(len(examples), 1))
    import torch  # takes seconds, and files are looked at before

    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = set(order[: round(len(examples) * fraction)])
    train = [text for i, text in enumerate(examples) if i not in chosen]
    seen = set(train)
    held_out = list(dict.fromkeys(text for i, text in enumerate(examples) if i in chosen and text not in seen))
    if len(held_out) < minimum or len(train) < minimum:
        raise VocabdistilError.of(
            "text",
            f"too little text: {len(examples)} examples leave {len(train)} for training and "
            f"{len(held_out)} distinct held-out ones; at least {minimum} of each are needed"
        )
    digest = hashlib.sha256("\n".join(examples).encode()).hexdigest()
    return TextSplit(train, held_out, digest)
