"""The text of a run, on disk: read once, from wherever it comes, then as often and in whatever order it is needed."""

from __future__ import annotations

import json
import mmap
import random
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from ..alignment.families import chunks
from ..core.errors import VocabdistilError, spell
from ..core.files import finish_folder, write_json
from ..core.progress import counting
from .run_folder import OtherRun, RunFolder
from .text import Digested, GivenTexts, TextFiles

__all__ = ["AllBut", "TextSplit", "TextStore", "split_text", "stored", "watched"]

_DATA, _OFFSETS, _WHOLE = "texts", "offsets", "whole.json"
_OFFSET = np.dtype("<i8")
_CHUNK_TEXTS, _CHUNK_CHARACTERS = 1024, 1 << 20


class _Texts(Sequence[str]):
    """Texts by their places, each read when it is asked for."""

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self._at(place) for place in range(*i.indices(len(self)))]
        place = i + len(self) if i < 0 else i
        if not 0 <= place < len(self):
            raise IndexError(f"expected a text from 0 to {len(self) - 1}, got {i}")
        return self._at(place)

    def _at(self, place: int) -> str:
        raise NotImplementedError


class TextStore(_Texts):
    """Texts in a folder, mapped into memory: a file of UTF-8, and one of int64 that say where each text ends.

    It can be sent to other processes, which map it for themselves.

    Args:
        folder: that :meth:`write` has finished.
        prompt: what stands before every text.

    Attributes:
        digest: identifies the texts, without the prompt.
        stamp: of what they were read from, see :meth:`.text.TextFiles.stamp`.

    Raises:
        OSError, ValueError, KeyError: the folder is not whole.
    """

    def __init__(self, folder: Path, prompt: str = "") -> None:
        self.folder, self.prompt = folder, prompt
        told = json.loads((folder / _WHOLE).read_text(encoding="utf-8"))
        self.digest, self.stamp = told["digest"], told["stamp"]
        self._offsets = np.memmap(folder / _OFFSETS, _OFFSET, "r", shape=(told["texts"] + 1,))
        with open(folder / _DATA, "rb") as file:
            self._data = mmap.mmap(file.fileno(), told["bytes"], access=mmap.ACCESS_READ)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.prompt)

    @classmethod
    def write(cls, texts: Iterable[str], folder: Path, stamp: Any = None) -> TextStore:
        """Reads the texts, of which there must be one at least, to the end, in constant memory.

        The folder, which is made anew, is whole when its last file is there: if the process is killed before, it is no
        store.
        """
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        read, end = Digested(texts), 0
        with open(folder / _DATA, "wb") as data, open(folder / _OFFSETS, "wb") as offsets:
            offsets.write(np.zeros(1, _OFFSET).tobytes())
            for chunk in chunks(read, _CHUNK_TEXTS, _CHUNK_CHARACTERS):
                encoded = [text.encode() for text in chunk]
                ends = end + np.cumsum([len(text) for text in encoded], dtype=_OFFSET)
                data.write(b"".join(encoded))
                offsets.write(ends.tobytes())
                end = int(ends[-1])
        finish_folder(folder)
        write_json(
            folder / _WHOLE, {"texts": read.seen, "bytes": end, "digest": read.digest, "stamp": stamp}
        )
        return cls(folder)

    @classmethod
    def whole(cls, folder: Path) -> TextStore | None:
        """The store in a folder, if there is one."""
        try:
            return cls(folder)
        except (OSError, ValueError, KeyError):
            return None

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def _at(self, place: int) -> str:
        start, end = self._offsets[place : place + 2].tolist()
        return self.prompt + self._data[start:end].decode()

    def __iter__(self) -> Iterator[str]:
        # Not by the map: what is read only once need not stay.
        with open(self.folder / _DATA, "rb") as file:
            for first in range(0, len(self), _CHUNK_TEXTS):
                offsets = self._offsets[first : first + _CHUNK_TEXTS + 1]
                data = file.read(int(offsets[-1] - offsets[0]))
                places = (offsets - offsets[0]).tolist()
                for start, end in zip(places, places[1:], strict=False):
                    yield self.prompt + data[start:end].decode()


def stored(text: TextFiles | GivenTexts, folder: RunFolder, prompt: str = "", quiet: bool = False) -> TextStore:
    """The text of a run, in its folder: read when the run begins; when it goes on only to see whether it is the same,
    and not even for that if nobody has touched its files.

    Args:
        folder: of the run, held.
        prompt: what is to stand before every text.

    Raises:
        OtherRun: the text has changed since.
        VocabdistilError: see :func:`.text.open_text`.
    """
    place, stamp, before = folder.path / "text", text.stamp(), folder.record.get("text")
    store = TextStore.whole(place)
    if store is None or before not in (None, store.digest):
        store = TextStore.write(watched(text, quiet), place, stamp)
        digest = store.digest
    elif stamp is None or stamp != store.stamp:
        read = Digested(watched(text, quiet))
        for _ in read:
            pass
        digest = read.digest
    else:
        digest = store.digest
    if digest != (before or store.digest):
        problem = f"the text has changed since the run that {spell('resume', True)} would continue"
        raise OtherRun.of("text", problem)
    folder.store(text=digest)
    store.prompt = prompt
    return store


def watched(texts: Iterable[str], quiet: bool) -> Iterator[str]:
    """The texts, while it is told how many have been read."""
    with counting("Reading text", None, quiet) as advance:
        for text in texts:
            advance(1)
            yield text


@dataclass
class AllBut(_Texts):
    """Texts without some of them.

    Attributes:
        left_out: their places, ascending.
    """

    texts: Sequence[str]
    left_out: list[int]

    def __post_init__(self) -> None:
        # Of each that is left out how many that stay are before it.
        self._before = [place - j for j, place in enumerate(self.left_out)]

    def __len__(self) -> int:
        return len(self.texts) - len(self.left_out)

    def _at(self, place: int) -> str:
        return self.texts[place + bisect_right(self._before, place)]

    def __iter__(self) -> Iterator[str]:
        left_out = set(self.left_out)
        return (text for i, text in enumerate(self.texts) if i not in left_out)


@dataclass
class TextSplit:
    """Training and held-out examples."""

    train: Sequence[str]
    held_out: list[str]


def split_text(
    examples: Sequence[str], fraction: float, seed: int, minimum: int = 8, most: int | None = None
) -> TextSplit:
    """Draws the held-out examples without replacement; the same arguments give the same split.

    An example whose text also occurs on the other side is taken out of the held-out side, so that repeated lines
    ("First Citizen:") are not scored as unseen text. Only what is held out is held in memory.

    Args:
        examples: read one by one, and once from the first to the last.
        fraction: held out, but no more than ``most`` examples, if there is such a number.

    Raises:
        VocabdistilError: too little text to hold out ``minimum`` distinct examples and train on the rest.
    """
    if not 0 < fraction < 1:
        raise VocabdistilError.of("held_out", f"expected a fraction between 0 and 1, got {fraction}")
    if most is not None:
        fraction = min(fraction, most / max(len(examples), 1))
    drawn = random.Random(seed).sample(range(len(examples)), round(len(examples) * fraction))
    train = AllBut(examples, sorted(drawn))
    # A dictionary keeps their order.
    unseen = dict.fromkeys(examples[i] for i in train.left_out)
    for text in train if unseen else ():
        unseen.pop(text, None)
    held_out = list(unseen)
    if len(held_out) < minimum or len(train) < minimum:
        raise VocabdistilError.of(
            "text",
            f"too little text: {len(examples)} examples leave {len(train)} for training and "
            f"{len(held_out)} distinct held-out ones; at least {minimum} of each are needed"
        )
    return TextSplit(train, held_out)
