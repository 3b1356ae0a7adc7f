"""Pictures of one text as two tokenizers read it, for the terminal and as HTML."""

from __future__ import annotations

import html
import io
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.text import Text

from ..core.names import display_names
from .coverage import Coverage
from .methods import align_texts, check_lengths, check_text, locate
from .remap import RemapTable
from .surfaces import BYTES, Known, known, runs
from .vocab import MatchedVocab

__all__ = ["AlignmentPicture", "Group", "Piece", "html_page", "readable", "show_alignment", "visible"]

_SIDES = ("teacher", "student")
_NAMES = {"\n": "⏎", "\r": "␍", "\t": "⇥"}
_JOINERS = "\u200c\u200d"


def visible(text: str) -> str:
    """Text with signs for what could not be seen or would change what stands around it.

    Line ends, tabs and other control characters become the signs for them, other invisible characters their code point
    (``⟨200B⟩``); a combining mark at the beginning gets a dotted circle to stand on. Joiners inside stay.
    """
    shown = []
    for i, c in enumerate(text):
        category = unicodedata.category(c)
        if c in _NAMES:
            c = _NAMES[c]
        elif ord(c) < 0x20:
            c = chr(0x2400 + ord(c))
        elif c in _JOINERS and 0 < i < len(text) - 1:
            pass
        elif category in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp") or (category == "Zs" and c != " "):
            c = f"⟨{ord(c):04X}⟩"
        elif category[0] == "M" and not i:
            c = "◌" + c
        shown.append(c)
    return "".join(shown)


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


@dataclass(frozen=True)
class AlignmentPicture:
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
        found = self.coverage
        return (
            f"{self.method}: {found.pairs} pairs, {found.one_to_one:.0%} of them 1:1; in pairs "
            f"{found.teacher_covered:.0%} of {found.teacher_tokens} teacher tokens and "
            f"{found.student_covered:.0%} of {found.student_tokens} student tokens"
        )

    def html(self) -> str:
        """A page of its own, with nothing to load."""
        return html_page([self])

    def _repr_html_(self) -> str:
        return f"<style>{_STYLE}</style>{_figure(self)}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield Text(self.summary, style="bold")
        yield from _lines(self, options.max_width)
        yield Text("│ stands between pairs; tokens in (parentheses) are in none", style="dim")

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=100, color_system=None, legacy_windows=False)
        console.print(self)
        return console.file.getvalue()  # type: ignore[attr-defined]


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
        Something to ``rich.print``, to end a notebook's cell with, or to write to a file: ``.html()``.

    Raises:
        TypeError, ValueError: as :func:`align`.
    """
    check_text(text, "text")
    sources = known(teacher, "teacher"), known(student, "student")
    left, right, pairs, counted = align_texts([text], teacher, student, method, max_length, table, matched, sources)
    limits = check_lengths(max_length)
    pieces = []
    for name, side, source, limit in zip(_SIDES, (left, right), sources, limits, strict=True):
        ids = side.input_ids[0].tolist()
        if name == "student" and method == "reduce":
            places = [(-1, -1)] * len(ids)
        else:
            located, _ = locate([text], source, name, limit, by_word=False)
            starts, ends, _ = located.row(0)
            places = [(a, b) if 0 <= a < b else (-1, -1) for a, b in zip(starts, ends, strict=True)]
        pieces.append([Piece.of(source, i, *place) for i, place in zip(ids, places, strict=True)])
    spans = zip(
        *(getattr(pairs, f"{side}_{end}").tolist() for side in _SIDES for end in ("start", "end")), strict=True
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


_COLOURS = ("#cfe2ff", "#ffe0b8", "#d3f2d0", "#f6d5ec", "#fff3a8", "#d6f0f2")


def _isolated(text: str) -> str:
    """Keeps letters that are written from right to left from reordering what stands around them."""
    return f"\u2068{text}\u2069" if any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in text) else text


def _chopped(text: str, width: int) -> list[str]:
    """The text in parts that are at most so many cells wide, one at least."""
    parts = [""]
    for c in text:
        if cell_len(parts[-1] + c) > width:
            parts.append("")
        parts[-1] += c
    return parts


def _lines(picture: AlignmentPicture, width: int) -> Iterator[Text]:
    labels = ("text", *_SIDES)
    margin = max(map(len, labels)) + 1
    room = max(width - margin - 1, 8)
    cells: list[tuple[list[str], str]] = []
    for group in picture.groups:
        if not (group.teacher or group.student or group.text.strip()):
            continue
        shape = "{}" if group.pair is not None else "({})"
        rows = [
            group.shown,
            *(" ".join(shape.format(piece) for piece in getattr(group, side)) for side in _SIDES),
        ]
        style = f"black on {_COLOURS[group.pair % len(_COLOURS)]}" if group.pair is not None else "italic"
        # What is wider than the terminal goes on in further cells; the border and two marks of direction have room too.
        for row in zip_longest(*(_chopped(row, room - 3) for row in rows), fillvalue=""):
            cells.append((list(row), style))
    while cells:
        count, used = 0, 0
        while count < len(cells):
            used += max(cell_len(_isolated(row)) for row in cells[count][0]) + 1
            if count and used > room:
                break
            count += 1
        sizes = [max(map(cell_len, row)) for row, _ in cells[:count]]
        for k, label in enumerate(labels):
            line = Text(f"{label:<{margin}}│", no_wrap=True, overflow="ignore")
            line.stylize("dim", 0, margin)
            for (row, style), size in zip(cells[:count], sizes, strict=True):
                line.append(_isolated(row[k]) + " " * (size - cell_len(row[k])), style)
                line.append("│", "dim")
            yield line
        yield Text("")
        cells = cells[count:]


_STYLE = """
.vd-page{margin:0;padding:2rem;background:#fff;color:#1c1f24}
.vd-page h1{font:600 1.25rem/1.3 system-ui,sans-serif;margin:0 0 1.5rem}
.vd{font:15px/1.35 system-ui,"Noto Sans",sans-serif;color:#1c1f24;background:#fff;margin:0 0 2rem;padding:0}
.vd *{box-sizing:border-box}
.vd figcaption{margin:0 0 .6rem;color:#454b54}
.vd-row{display:flex;flex-wrap:wrap;gap:6px;align-items:stretch;list-style:none;margin:0;padding:0}
.vd-row li{display:grid;grid-template-rows:1.1rem minmax(1.7rem,auto) 1fr 1fr;border:1.5px solid #69707b;
border-radius:6px;overflow:hidden;margin:0;padding:0;min-width:2.2rem;max-width:100%}
.vd-row li>*{padding:.15rem .45rem;display:flex;gap:4px;align-items:center;justify-content:center;flex-wrap:wrap}
.vd-n{font-size:.68rem;color:#3b4048;font-variant-numeric:tabular-nums}
.vd-x{font-size:1.05rem;white-space:pre-wrap;overflow-wrap:anywhere}
.vd-t,.vd-s{border-top:1px solid rgba(60,66,76,.45);font-size:.82rem;
font-family:ui-monospace,"DejaVu Sans Mono","Noto Sans Mono",monospace}
.vd-k{background:rgba(255,255,255,.75);border-radius:4px;padding:0 .3rem;white-space:pre;max-width:100%;
overflow-wrap:anywhere}
.vd-k i{font-style:normal;color:#5b616b}
.vd-sp{font-weight:600;border:1px solid rgba(60,66,76,.5)}
.vd-none{border-style:dashed!important;background:#fff}
.vd-none .vd-k{background:#eceef1}
.vd-empty{color:#5b616b}
.vd-key{border-color:transparent!important;color:#454b54;font-size:.82rem}
.vd-key>*{justify-content:flex-end!important;font:inherit!important;border-color:transparent!important}
""" + "".join(f".vd-c{k}{{background:{colour}}}\n" for k, colour in enumerate(_COLOURS)) + """
@media (prefers-color-scheme:dark){
.vd-page,.vd,.vd-none{background:#16181c;color:#eceef1}
.vd figcaption,.vd-key,.vd-empty{color:#b9c0ca}
.vd-none .vd-k{background:#31353c;color:#eceef1}
.vd-none .vd-k i,.vd-none .vd-n{color:#b9c0ca}
.vd-row [class*=vd-c]{color:#1c1f24}
}
"""


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


def _direction(text: str) -> str:
    """Which way the text runs: by its first letter that has a direction."""
    for c in text:
        kind = unicodedata.bidirectional(c)
        if kind in ("L", "R", "AL"):
            return "ltr" if kind == "L" else "rtl"
    return "ltr"


def _chip(piece: Piece) -> str:
    place = f", bytes {piece.start} to {piece.end}" if piece.start >= 0 else ""
    title = _escape(f"{visible(piece.token)} (id {piece.id}{place})")
    marks = [f"<i>{_escape(mark)}</i>" if mark else "" for mark in (piece.before, piece.after)]
    kind = "vd-k vd-sp" if piece.special else "vd-k"
    return f'<bdi class="{kind}" title="{title}">{marks[0]}{_escape(piece.label)}{marks[1]}</bdi>'


def _item(group: Group) -> str:
    sides = {side: getattr(group, side) for side in _SIDES}
    number = "no pair"
    if group.pair is not None:
        ratio = ":".join(str(len(pieces)) for pieces in sides.values())
        number = f"{group.pair}" if ratio == "1:1" else f"{group.pair} · {ratio}"
    rows = [
        f'<span class="vd-{side[0]}">'
        + ("".join(map(_chip, pieces)) or '<span class="vd-empty" aria-label="nothing">∅</span>')
        + "</span>"
        for side, pieces in sides.items()
    ]
    kind = "vd-none" if group.pair is None else f"vd-c{group.pair % len(_COLOURS)}"
    text = f'<bdi class="vd-x">{_escape(group.shown)}</bdi>'
    sizes = ", ".join(f"{len(pieces)} of the {side}" for side, pieces in sides.items())
    head = f'<span class="vd-n" dir="ltr" title="tokens: {sizes}">{number}</span>'
    return f'<li class="{kind}">{head}{text}{"".join(rows)}</li>'


def _figure(picture: AlignmentPicture) -> str:
    key = (
        '<li class="vd-key"><span>pair</span><span>text</span>'
        '<span class="vd-t">teacher</span><span class="vd-s">student</span></li>'
    )
    names = [f"{side} {name}" for side, name in zip(_SIDES, picture.names, strict=True) if name]
    caption = "; ".join([picture.summary, *names])
    items = "".join(
        _item(group) for group in picture.groups if group.teacher or group.student or group.text.strip()
    )
    # The order of the tokens follows the writing, as a reader of the text would expect.
    return (
        f'<figure class="vd"><figcaption>{_escape(caption)}</figcaption>'
        f'<ol class="vd-row" dir="{_direction(picture.text)}">{key}{items}</ol></figure>'
    )


def html_page(pictures: Sequence[AlignmentPicture], title: str = "Aligned tokenizations") -> str:
    """A page with several pictures, one below the other, with nothing to load."""
    figures = "\n".join(map(_figure, pictures))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>{_STYLE}</style></head>\n"
        f'<body class="vd-page"><h1>{_escape(title)}</h1>\n{figures}\n</body></html>\n'
    )
