"""Pictures of texts as two tokenizers read them, for the terminal and as HTML."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.text import Text

from ..core.errors import VocabdistilError
from ..core.files import whole_file
from ..core.names import display_names
from .coverage import Coverage
from .drawing import LEGEND, SIDES, fragment, lines, page, visible
from .methods import align_texts, check_lengths, check_text, locate
from .remap import RemapTable
from .surfaces import BYTES, Known, known, runs
from .vocab import MatchedVocab

__all__ = ["AlignmentPicture", "Group", "Piece", "Pictures", "readable", "show_alignment"]

_WIDTH = 100  # of text that no terminal shows


def _hex(data: bytes) -> str:
    return f"⟨{data.hex(' ').upper()}⟩"


def _readable(data: bytes) -> str:
    """Bytes as text, those that are no whole character in hexadecimal."""
    shown, broken = [], b""
    for run in (*runs(data), ""):
        if isinstance(run, int):
            broken += bytes([run])
            continue
        if broken:
            shown.append(_hex(broken))
            broken = b""
        shown.append(visible(run))
    return "".join(shown)


@dataclass(frozen=True)
class Piece:
    """One token in a picture.

    Attributes:
        token: its string in the vocabulary.
        id: its id.
        start, end: where it lies in the text, in bytes; -1 where it lies nowhere (special tokens, pieces of
            ``reduce``).
        before, label, after: how it is shown: what marks a space, the inside or the end of a word in its vocabulary
            (``Ġ``, ``▁``, ``##``, ``</w>``), and the text between; bytes that are no whole character in hexadecimal.
        special: whether it is a special token.
    """

    token: str
    id: int
    start: int
    end: int
    before: str
    label: str
    after: str
    special: bool

    @classmethod
    def of(cls, source: Known, i: int, start: int, end: int) -> Piece:
        info, surfaces = source.info, source.surfaces
        token = info.tokens[i] or ""
        special = i in info.special.values()
        before, label, after = "", token, ""
        if special:
            label = visible(token)
        elif surfaces.kinds[i] == BYTES:
            data = surfaces.texts[i]
            if surfaces.byte_level and data[:1] == b" ":
                before, data = "Ġ", data[1:]
            label = _readable(data)
            if surfaces.suffix and token.endswith(surfaces.suffix):
                after = surfaces.suffix
        else:
            for mark in filter(None, (surfaces.mark, surfaces.prefix)):
                if label.startswith(mark):
                    before, label = mark, label[len(mark) :]
                    break
            if surfaces.suffix and label.endswith(surfaces.suffix):
                label, after = label[: -len(surfaces.suffix)], surfaces.suffix
            label = visible(label)
        return cls(token, i, start, end, before, label, after, special)

    def __str__(self) -> str:
        return self.before + self.label + self.after


@dataclass(frozen=True)
class Group:
    """Tokens that belong together, or stand between those that do.

    Attributes:
        text: their part of the text in UTF-8; may begin and end inside a character.
        teacher, student: the tokens of each side.
        pair: the number of the span pair from 1 on, or None: these tokens are in no pair.
    """

    text: bytes
    teacher: tuple[Piece, ...]
    student: tuple[Piece, ...]
    pair: int | None

    @property
    def shown(self) -> str:
        """The text to show: without the white space around it, which is not what is compared."""
        if not self.text:
            return ""
        return _readable(self.text.strip(b" ")) or "␣"


class _Drawn:
    """What can be printed with ``rich``, made a string of, and saved."""

    def html(self) -> str:
        raise NotImplementedError

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=_WIDTH, color_system=None, legacy_windows=False)
        console.print(self)
        return console.file.getvalue()  # type: ignore[attr-defined]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to a file: a page of its own for ``.html``, plain text for ``.txt``; the file appears whole.

        Raises:
            TypeError: a path that is none.
            VocabdistilError: another ending, or a place where nothing can be written.
        """
        if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
            raise TypeError(f"path: expected a file name, got {type(path).__name__}")
        forms = {".html": self.html, ".txt": self.__str__}
        make = forms.get(Path(path).suffix.lower())
        if make is None:
            raise VocabdistilError(f"path: expected a name that ends with .html or .txt, got {str(path)!r}")
        try:
            with whole_file(path) as file:
                file.write(make().encode())
        except (OSError, ValueError) as error:  # ValueError: a name with a zero in it
            reason = getattr(error, "strerror", None) or error
            raise VocabdistilError(f"path: cannot write {str(path)!r}: {reason}") from None


@dataclass(frozen=True)
class AlignmentPicture(_Drawn):
    """One text as two tokenizers read it: prints in colours with ``rich``, shows itself in notebooks.

    Attributes:
        text: the text.
        method: the alignment.
        names: of teacher and student, as far as they are known.
        groups: in the order of the text; their parts of the text make up all of it.
        coverage: the counts of this text.
    """

    text: str
    method: str
    names: tuple[str, str]
    groups: tuple[Group, ...]
    coverage: Coverage

    @property
    def summary(self) -> str:
        """The alignment in numbers, and the names of the models."""
        found = self.coverage
        names = [f"; {side} {name}" for side, name in zip(SIDES, self.names, strict=True) if name]
        return (
            f"{self.method}: {found.pairs} pairs, {found.one_to_one:.0%} of them 1:1; in pairs "
            f"{found.teacher_covered:.0%} of {found.teacher_tokens} teacher tokens and "
            f"{found.student_covered:.0%} of {found.student_tokens} student tokens{''.join(names)}"
        )

    @property
    def drawn(self) -> list[Group]:
        """The groups that there is something to see of."""
        return [group for group in self.groups if group.teacher or group.student or group.text.strip()]

    def html(self) -> str:
        """A page of its own, with nothing to load."""
        return Pictures({"": [self]}).html()

    def _repr_html_(self) -> str:
        return fragment(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield from Pictures({"": [self]}).__rich_console__(console, options)


@dataclass(frozen=True)
class Pictures(_Drawn):
    """Several pictures and one legend for all.

    Attributes:
        sections: the pictures of each section by its heading, which may be empty.
    """

    sections: Mapping[str, Sequence[AlignmentPicture]]

    def __len__(self) -> int:
        return sum(map(len, self.sections.values()))

    def html(self, title: str = "Aligned tokenizations") -> str:
        """A page with nothing to load."""
        return page(self.sections, title)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        for heading, pictures in self.sections.items():
            if heading:
                yield Text(f"{heading}\n", style="bold underline")
            for picture in pictures:
                yield Text(picture.summary, style="bold")
                yield from lines(picture, options.max_width)
        for line in LEGEND:
            yield Text(line, style="dim")


def readable(tokenizer: Any, token: str) -> str:
    """A token of a vocabulary as pictures show it."""
    source = known(tokenizer, "tokenizer")
    i = source.info.backend.token_to_id(token)
    return visible(token) if i is None else str(Piece.of(source, i, -1, -1))


def show_alignment(
    text: str,
    teacher: Any,
    student: Any,
    method: str = "boundary",
    max_length: int | Sequence[int | None] | None = None,
    *,
    table: RemapTable | None = None,
    matched: MatchedVocab | None = None,
) -> AlignmentPicture:
    """A picture of one text and its alignment: the text, the teacher's tokens and the student's, pair by pair.

    Args:
        text: one text.
        teacher, student, method, max_length, table, matched: as in :func:`align`.

    Returns:
        Something to ``rich.print``, to end a notebook's cell with, or to write to a file: ``.save("picture.html")``.

    Raises:
        TypeError, ValueError: as :func:`align`.
    """
    check_text(text, "text")
    sources = known(teacher, "teacher"), known(student, "student")
    left, right, pairs, counted = align_texts([text], teacher, student, method, max_length, table, matched, sources)
    limits = check_lengths(max_length)
    pieces = []
    for name, side, source, limit in zip(SIDES, (left, right), sources, limits, strict=True):
        ids = side.input_ids[0].tolist()
        if name == "student" and method == "reduce":
            places = [(-1, -1)] * len(ids)
        else:
            located, _ = locate([text], source, name, limit, by_word=False)
            starts, ends, _ = located.row(0)
            places = [(a, b) if 0 <= a < b else (-1, -1) for a, b in zip(starts, ends, strict=True)]
        pieces.append([Piece.of(source, i, *place) for i, place in zip(ids, places, strict=True)])
    spans = zip(
        *(getattr(pairs, f"{side}_{end}").tolist() for side in SIDES for end in ("start", "end")), strict=True
    )
    names = display_names([str(getattr(tokenizer, "name_or_path", "")) for tokenizer in (teacher, student)])
    return AlignmentPicture(
        text,
        method,
        (names[0], names[1]),
        tuple(_groups(text.encode(), pieces[0], pieces[1], list(spans), method in ("boundary", "word"))),
        Coverage.of(left, right, pairs, sources, counted),
    )


def _groups(
    text: bytes, teacher: list[Piece], student: list[Piece], spans: list[tuple[int, int, int, int]], both: bool
) -> Iterator[Group]:
    """``both``: the tokens of both sides of a pair lie over the same text; else it is the teacher's that tell it."""
    at, t, s = 0, 0, 0

    def cut(upto: int) -> bytes:
        nonlocal at
        part = text[at : max(at, upto)]
        at = max(at, upto)
        return part

    for number, (t0, t1, s0, s1) in enumerate([*spans, (len(teacher), len(teacher), len(student), len(student))], 1):
        last = number > len(spans)
        inside = [p for p in (*teacher[t0:t1], *(student[s0:s1] if both else ())) if p.start >= 0]
        first = len(text) if last else min((p.start for p in inside), default=at)
        between, left, right = cut(first), teacher[t:t0], student[s:s0]
        if between or left or right:
            yield Group(between, tuple(left), tuple(right), None)
        if not last:
            part = cut(max((p.end for p in inside), default=at))
            yield Group(part, tuple(teacher[t0:t1]), tuple(student[s0:s1]), number)
        t, s = t1, s1
