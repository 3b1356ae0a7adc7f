"""Text: reading it, and holding some of it out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from ..core.errors import VocabdistilError

__all__ = ["TextFiles", "TextSplit", "read_text", "split_text"]


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
            raise VocabdistilError(f"--unit: expected 'line' or 'paragraph', got {unit!r}")
        if not paths:
            raise VocabdistilError("--text: expected at least one file")
        self.paths, self.unit = [Path(path) for path in paths], unit
        for path in self.paths:
            if not path.exists():
                raise VocabdistilError(f"--text: no such file: {path}")
            if not path.is_file():
                raise VocabdistilError(f"--text: not a file: {path}")

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            found = False
            for example in self._examples(path):
                found = True
                yield example
            if not found:
                raise VocabdistilError(f"--text: {path} is empty")

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
            raise VocabdistilError(
                f"--text: {path} is not UTF-8: byte 0x{byte:02x} at offset {offset + error.start}"
            ) from None
        except OSError as error:
            raise VocabdistilError(f"--text: cannot read {path}: {error.strerror}") from None


def read_text(paths: Sequence[str | os.PathLike], unit: str = "line") -> list[str]:
    """All of :class:`TextFiles` at once."""
    return list(TextFiles(paths, unit))


@dataclass
class TextSplit:
    """Training and held-out examples; ``digest`` identifies the text that they came from."""

    train: list[str]
    held_out: list[str]
    digest: str


def split_text(examples: Sequence[str], fraction: float, seed: int, minimum: int = 8) -> TextSplit:
    """Draws the held-out examples without replacement; the same arguments give the same split.

    An example whose text also occurs on the other side is taken out of the held-out side, so that repeated lines
    ("First Citizen:") are not scored as unseen text.

    Raises:
        VocabdistilError: too little text to hold out ``minimum`` distinct examples and train on the rest.
    """
    if not 0 < fraction < 1:
        raise VocabdistilError(f"--held-out: expected a fraction between 0 and 1, got {fraction}")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = set(order[: round(len(examples) * fraction)])
    train = [text for i, text in enumerate(examples) if i not in chosen]
    seen = set(train)
    held_out = list(dict.fromkeys(text for i, text in enumerate(examples) if i in chosen and text not in seen))
    if len(held_out) < minimum or len(train) < minimum:
        raise VocabdistilError(
            f"--text: too little text: {len(examples)} examples leave {len(train)} for training and "
            f"{len(held_out)} distinct held-out ones; at least {minimum} of each are needed"
        )
    digest = hashlib.sha256("\n".join(examples).encode()).hexdigest()
    return TextSplit(train, held_out, digest)
