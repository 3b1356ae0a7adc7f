"""The texts that two tokenizers agree on least."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count as numbers
from typing import Any

from .coverage import TEXTS_AT_ONCE, checked
from .families import chunks
from .methods import align_texts, check_method, check_ready, locate, ready
from .remap import RemapTable
from .surfaces import known
from .vocab import MatchedVocab

__all__ = ["AlignedText", "worst_aligned"]


@dataclass(frozen=True)
class AlignedText:
    """A text and how well it aligns.

    Attributes:
        text: the text.
        one_to_one: the share of its bytes in UTF-8, ASCII white space left out, that lie inside 1:1 pairs.
    """

    text: str
    one_to_one: float


def _ink(data: bytes) -> int:
    """Bytes without ASCII white space."""
    return sum(map(len, data.split()))


def worst_aligned(
    texts: Iterable[str],
    teacher: Any,
    student: Any,
    count: int,
    method: str = "boundary",
    *,
    table: RemapTable | None = None,
    matched: MatchedVocab | None = None,
    quiet: bool = True,
) -> list[AlignedText]:
    """The ``count`` texts that align worst: those with the smallest share of bytes inside 1:1 pairs.

    Not inside any pair: ``boundary`` and ``word`` pair nearly everything, however many tokens it takes. Of equal shares
    the longer text is the worse one, as a single word easily has none. Texts are read once and a few hundred at a time;
    one that occurs several times counts once, one without ink not at all.

    Args:
        texts: strings.
        teacher, student, method, table, matched: as in :func:`vocabdistil.align`.
        count: at most so many.
        quiet: show no progress.

    Returns:
        The worst first.

    Raises:
        TypeError, ValueError: as :func:`vocabdistil.align`.
    """
    from ..core.progress import counting  # rich takes a while to import, and the losses do not need it

    check_method(method)
    check_ready(table, matched)
    table, matched = ready(method, teacher, student, table, matched)
    sources = known(teacher, "teacher"), known(student, "student")

    def shares(chunk: list[str]) -> Iterator[tuple[float, int]]:
        """Of each text the share and its bytes."""
        left, _, pairs, _ = align_texts(chunk, teacher, student, method, None, table, matched, sources)
        # The teacher's tokens tell which part of the text a 1:1 pair covers: the student's covers the same.
        side, _ = locate(chunk, sources[0], "teacher", None, by_word=False)
        single = (pairs.teacher_end - pairs.teacher_start == 1) & (pairs.student_end - pairs.student_start == 1)
        width = left.input_ids.shape[1]
        inside: list[list[int]] = [[] for _ in chunk]
        for position in pairs.teacher_start[single].tolist():
            inside[position // width].append(position % width)
        for b, text in enumerate(chunk):
            data, at, found = text.encode(), 0, 0
            starts, ends, _ = side.row(b)
            for start, end in ((starts[i], ends[i]) for i in inside[b]):
                if 0 <= start < end:  # others lie nowhere
                    found += _ink(data[max(start, at) : end])  # tokens may share bytes; each counts once
                    at = max(at, end)
            size = _ink(data)
            yield found / max(size, 1), size

    # The best of the worst so far is on top.
    heap: list[tuple[float, int, int, str]] = []
    held: set[str] = set()
    order = numbers(0, -1)
    with counting("Looking for the worst", None, quiet) as advance:
        for chunk in chunks(checked(texts), *TEXTS_AT_ONCE):
            for text, (share, size) in zip(chunk, shares(chunk), strict=True):
                if not size or text in held:
                    continue
                held.add(text)
                entry = (-share, size, next(order), text)
                if len(heap) < count:
                    heapq.heappush(heap, entry)
                else:
                    held.discard(heapq.heappushpop(heap, entry)[-1])
            advance(len(chunk))
    return [AlignedText(text, -share) for share, _, _, text in sorted(heap, reverse=True)]
