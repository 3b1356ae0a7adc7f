"""How pictures of alignments are drawn: for the terminal, and as HTML with nothing to load."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.text import Text

if TYPE_CHECKING:
    from .picture import AlignmentPicture, Group, Piece

__all__ = ["LEGEND", "SIDES", "fragment", "lines", "page", "visible"]

SIDES = ("teacher", "student")
_COLOURS = ("#cfe2ff", "#ffe0b8", "#d3f2d0", "#f6d5ec", "#fff3a8", "#d6f0f2")
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


def _ratio(group: Group) -> str:
    """``"2:1"``, or nothing for a pair of one token each and for what is in no pair."""
    sizes = [len(getattr(group, side)) for side in SIDES]
    return "" if group.pair is None or sizes == [1, 1] else "{}:{}".format(*sizes)


LEGEND = (
    "2:1 above a pair: two tokens of the teacher belong to one of the student; without figures it is 1:1.",
    "Colours only tell neighbouring pairs apart. Tokens in (parentheses) are in no pair.",
)


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


def _packed(tokens: Sequence[str], width: int) -> list[str]:
    """Tokens in lines of at most so many cells, a space between two; what is wider than a line goes on in the next.

    Each is isolated by itself: the next one stands to its right, whatever their script.
    """
    packed: list[list[str]] = [[]]
    used = 0
    for part in (part for token in tokens for part in _chopped(token, width)):
        if packed[-1] and used + 1 + cell_len(part) > width:
            packed.append([])
        used = cell_len(part) + (used + 1 if packed[-1] else 0)
        packed[-1].append(_isolated(part))
    return [" ".join(line) for line in packed]


def lines(picture: AlignmentPicture, width: int) -> Iterator[Text]:
    """The picture in lines of ``width`` cells: blocks of four rows, each with its label."""
    labels = ("pair", "text", *SIDES)
    margin = max(map(len, labels)) + 1
    room = max(width - margin - 1, 8)
    cells: list[tuple[tuple[str, ...], str]] = []
    for group in picture.drawn:
        shape = "{}" if group.pair is not None else "({})"
        style = f"black on {_COLOURS[group.pair % len(_COLOURS)]}" if group.pair is not None else "italic"
        sides = ([shape.format(piece) for piece in getattr(group, side)] for side in SIDES)
        # What is wider than the terminal goes on in further cells, which have a border too.
        rows = ([_ratio(group)], [group.shown], *sides)
        for row in zip_longest(*(_packed(row, room - 1) for row in rows), fillvalue=""):
            cells.append((row, style))
    while cells:
        sizes: list[int] = []
        for row, _ in cells:
            size = max(map(cell_len, row))
            if sizes and sum(sizes) + len(sizes) + size + 1 > room:
                break
            sizes.append(size)
        for k, label in enumerate(labels):
            line = Text(f"{label:<{margin}}│", no_wrap=True, overflow="ignore")
            line.stylize("dim", 0, margin)
            for (row, style), size in zip(cells, sizes, strict=False):
                line.append(row[k] + " " * (size - cell_len(row[k])), style)
                line.append("│", "dim")
            yield line
        yield Text("")
        cells = cells[len(sizes) :]


# A row's labels belong to every group of it and lie to the left of each, beneath the groups before it: so they are seen
# wherever a line begins, however wide the window is. That is why groups have a ground of the page's colour and no gaps.
_STYLE = """
.vd{--page:#fff;--ink:#1c1f24;--soft:#454b54;--chip:#eceef1;
font:15px/1.35 system-ui,"Noto Sans",sans-serif;color:var(--ink);background:var(--page);text-align:left}
@media (prefers-color-scheme:dark){.vd{--page:#16181c;--ink:#eceef1;--soft:#b9c0ca;--chip:#31353c}}
@media print{.vd,.vd *{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
.vd *{box-sizing:border-box}
.vd-page{margin:0;padding:2rem}
.vd h1{font-size:1.25rem;line-height:1.3;margin:0 0 1rem}
.vd h2{font-size:1.05rem;line-height:1.3;margin:2rem 0 1rem}
.vd figure{margin:0 0 2rem;padding:0}
.vd figcaption{margin:0 0 .6rem;color:var(--soft)}
.vd-legend{margin:0 0 1.5rem;font-size:.86rem;color:var(--soft)}
.vd-legend div{display:flex;gap:.6rem;margin:0 0 .25rem}
.vd-legend dt{flex:0 0 4.6rem;margin:0;text-align:right;font-weight:400}
.vd-legend dd{margin:0}
.vd-w{display:inline-block;width:1.2rem;height:.9rem;margin-left:2px;border:1.5px solid #69707b;border-radius:4px;
vertical-align:-.1rem}
.vd-row{display:flex;flex-wrap:wrap;isolation:isolate;list-style:none;margin:0;padding:0 0 0 5.2rem}
.vd-row li{display:flex;margin:0;padding:0 6px 8px 0;max-width:100%;background:var(--page)}
.vd-b{flex:1;display:flex;flex-direction:column;min-width:2.2rem;max-width:100%;
border:1.5px solid #69707b;border-radius:6px}
.vd-b>*{position:relative;padding:.15rem .45rem;display:flex;gap:4px;align-items:center;justify-content:center;
flex-wrap:wrap;min-width:0}
.vd-b>::before{position:absolute;z-index:-1;top:0;bottom:0;right:100%;width:5rem;padding-right:.6rem;display:flex;
align-items:center;justify-content:flex-end;font:.82rem system-ui,sans-serif;color:var(--soft);white-space:nowrap}
.vd-n::before{content:"pair"}
.vd-x::before{content:"text"}
.vd-t::before{content:"teacher"}
.vd-s::before{content:"student"}
.vd-n{flex:0 0 1.2rem;font-size:.68rem;color:#3b4048;font-variant-numeric:tabular-nums;white-space:nowrap}
.vd-b>.vd-x{display:block;flex:0 0 auto;min-height:1.7rem;text-align:center;font-size:1.05rem;
white-space:pre-wrap;overflow-wrap:anywhere}
.vd-t,.vd-s{flex:1 0 auto;border-top:1px solid rgba(60,66,76,.45);font-size:.82rem;
font-family:ui-monospace,"DejaVu Sans Mono","Noto Sans Mono",monospace}
.vd-k{background:rgba(255,255,255,.75);border-radius:4px;padding:0 .3rem;white-space:pre-wrap;overflow-wrap:anywhere;
min-width:0;max-width:100%}
.vd-k i{font-style:normal;color:#5b616b}
.vd-sp{font-weight:600;border:1px solid rgba(60,66,76,.5)}
.vd-row .vd-b{color:#1c1f24}
.vd-none .vd-b{border-style:dashed;color:var(--ink)}
.vd-none .vd-t,.vd-none .vd-s{border-top-color:var(--chip)}
.vd-none .vd-k{background:var(--chip)}
.vd-none .vd-k i,.vd-none .vd-n,.vd-none .vd-e{color:var(--soft)}
.vd-e{color:#3b4048}
""" + "".join(f".vd-c{k} .vd-b,.vd-w.vd-c{k}{{background:{colour}}}\n" for k, colour in enumerate(_COLOURS))


def _swatches() -> str:
    return "".join(f'<span class="vd-w vd-c{k}"></span>' for k in range(1, 4))


def _legend() -> str:
    entries = (
        ("7 · 2:1", "The seventh pair: two tokens of the teacher belong to one of the student. 7 alone is a 1:1 pair."),
        (_swatches(), "Colours only tell neighbouring pairs apart."),
        (
            '<span class="vd-w" style="border-style:dashed"></span>',
            "Dashed cells are in no pair: tokens that the alignment leaves out, text that no pair covers.",
        ),
        ("∅", "No token on this side."),
        (
            "Ġ ▁ ##",
            "In grey: the vocabulary's own signs of where words begin or go on. ⟨D1⟩: a byte of a character.",
        ),
    )
    rows = "".join(f"<div><dt>{sign}</dt><dd>{text}</dd></div>" for sign, text in entries)
    return f'<dl class="vd-legend">{rows}</dl>'


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


def _chip(piece: Piece) -> str:
    place = f", bytes {piece.start} to {piece.end}" if piece.start >= 0 else ""
    title = _escape(f"{visible(piece.token)} (id {piece.id}{place})")
    marks = [f"<i>{_escape(mark)}</i>" if mark else "" for mark in (piece.before, piece.after)]
    kind = "vd-k vd-sp" if piece.special else "vd-k"
    return f'<bdi class="{kind}" title="{title}">{marks[0]}{_escape(piece.label)}{marks[1]}</bdi>'


def _item(group: Group) -> str:
    number = "no pair"
    if group.pair is not None:
        number = " · ".join(filter(None, (str(group.pair), _ratio(group))))
    rows = [
        f'<span class="vd-{side[0]}">'
        + ("".join(map(_chip, getattr(group, side))) or '<span class="vd-e" aria-label="nothing">∅</span>')
        + "</span>"
        for side in SIDES
    ]
    kind = "vd-none" if group.pair is None else f"vd-c{group.pair % len(_COLOURS)}"
    text = f'<span class="vd-x"><bdi>{_escape(group.shown)}</bdi></span>'
    sizes = ", ".join(f"{len(getattr(group, side))} of the {side}" for side in SIDES)
    head = f'<span class="vd-n" title="tokens: {sizes}">{number}</span>'
    return f'<li class="{kind}"><div class="vd-b">{head}{text}{"".join(rows)}</div></li>'


def _figure(picture: AlignmentPicture) -> str:
    items = "".join(map(_item, picture.drawn))
    # From left to right in any script: the rows are a table, and only what stands in a cell is text.
    return (
        f'<figure dir="ltr"><figcaption>{_escape(picture.summary)}</figcaption>'
        f'<ol class="vd-row" dir="ltr">{items}</ol></figure>'
    )


def fragment(picture: AlignmentPicture) -> str:
    """One picture and the legend, to stand inside another page."""
    return f'<style>{_STYLE}</style><div class="vd" dir="ltr">{_legend()}{_figure(picture)}</div>'


def page(sections: Mapping[str, Sequence[AlignmentPicture]], title: str) -> str:
    """A page of its own: the legend, then the pictures of each section below its heading."""
    parts = []
    for heading, pictures in sections.items():
        parts += [f"<h2>{_escape(heading)}</h2>"] if heading else []
        parts += map(_figure, pictures)
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en" dir="ltr"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_escape(title)}</title>\n<style>{_STYLE}</style></head>\n"
        f'<body class="vd vd-page"><h1>{_escape(title)}</h1>\n{_legend()}\n{body}\n</body></html>\n'
    )
