"""Pictures of alignments: everything in them, in order, and readable."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

import vocabdistil as vd
from tests._families import FAMILIES, SCRIPTS, family
from tests.alignment.test_collator import METHODS, PAIRS
from vocabdistil.alignment.drawing import visible
from vocabdistil.alignment.picture import Pictures
from vocabdistil.alignment.worst import worst_aligned
from vocabdistil.core.errors import VocabdistilError

TEXTS = [*SCRIPTS, "", " ", "e\u0301x <b>&amp;\"'", "a\u200bb\u202ec\x00", "[SEP] <s> ##a ▁b"]


class Page(HTMLParser):
    """The items of each list, as the text of their parts by class; fails on tags that do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.figures: list[list[dict[str, list[str]]]] = []
        self.directions: list[str] = []
        self.legends: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag == "meta":
            return
        values = dict(attrs)
        assert not any(name.startswith("on") or name in ("src", "href") for name in values)
        assert tag != "script" and tag != "link"
        self.open.append(tag)
        name = (values.get("class") or "").split(" ")[0]
        if tag == "dl":
            self.legends.append("")
        elif tag == "ol":
            self.figures.append([])
            self.directions.append(values["dir"])
        elif tag == "li":
            self.figures[-1].append({"kind": [name], "vd-n": [], "vd-x": [], "vd-t": [], "vd-s": []})
        elif name in ("vd-n", "vd-x", "vd-t", "vd-s"):
            self.place = name
        elif name == "vd-k":
            self.figures[-1][-1][self.place].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "dl" in self.open:
            self.legends[-1] += data
        if "ol" not in self.open:
            return
        assert ("bdi" in self.open) == (self.place != "vd-n" and data != "∅")
        found = self.figures[-1][-1][self.place]
        if self.place in ("vd-n", "vd-x"):
            found.append(data)
        elif found:
            found[-1] += data


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_pictures_hold_the_text_the_tokens_and_the_pairs(teacher: str, student: str, method: str) -> None:
    tokenizers = family(teacher), family(student)
    for text in TEXTS:
        picture = vd.show_alignment(text, *tokenizers, method)
        batch = vd.align([text], *tokenizers, method)
        assert b"".join(group.text for group in picture.groups) == text.encode()
        for side, tokens in (("teacher", batch.teacher), ("student", batch.student)):
            assert [p.id for group in picture.groups for p in getattr(group, side)] == tokens.input_ids[0].tolist()
        sizes = [(len(group.teacher), len(group.student)) for group in picture.groups if group.pair is not None]
        spans = batch.pairs
        assert sizes == list(
            zip(
                (spans.teacher_end - spans.teacher_start).tolist(),
                (spans.student_end - spans.student_start).tolist(),
                strict=True,
            )
        )
        assert [g.pair for g in picture.groups if g.pair is not None] == list(range(1, len(sizes) + 1))
        assert picture.coverage == batch.coverage
        (figure,) = Page(picture.html()).figures
        for item, group in zip(figure, picture.drawn, strict=True):
            assert item["vd-t"] == [str(piece) for piece in group.teacher]
            assert item["vd-s"] == [str(piece) for piece in group.student]
            assert "".join(item["vd-x"]) == group.shown
            assert ("".join(item["vd-n"]) == "no pair") == (item["kind"] == ["vd-none"]) == (group.pair is None)


@settings(max_examples=80, deadline=None)
@given(
    st.text(max_size=30),
    st.sampled_from(sorted(FAMILIES)),
    st.sampled_from(sorted(FAMILIES)),
    st.sampled_from(METHODS),
    st.integers(5, 90),
)
def test_any_text(text: str, teacher: str, student: str, method: str, width: int) -> None:
    picture = vd.show_alignment(text, family(teacher), family(student), method)
    assert b"".join(group.text for group in picture.groups) == text.encode()
    page = Page(Pictures({"": [picture], "again": [picture]}).html())
    assert len(page.legends) == 1
    assert len(page.figures) == 2 and page.figures[0] == page.figures[1]
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(picture)
    lines = console.file.getvalue().splitlines()
    # Where there is room for anything, nothing is cut off.
    assert width < 20 or all(cell_len(line) <= width for line in lines if line.startswith("teacher │"))
    rows = [line.split("│") for line in (lines if width > 20 else str(picture).splitlines()) if line[:7] == "teacher"]
    shown = "".join(cell.strip().replace("\u2068", "").replace("\u2069", "") for row in rows for cell in row[1:])
    want = "".join(
        str(piece) if group.pair is not None else f"({piece})" for group in picture.drawn for piece in group.teacher
    )
    assert shown.replace(" ", "") == want.replace(" ", "").replace("\xa0", "")


def test_what_could_not_be_seen() -> None:
    for text, want in (
        ("a\nb\tc\r", "a⏎b⇥c␍"),
        ("\x00\x1b[31m", "␀␛[31m"),
        ("\u0301a", "◌\u0301a"),
        ("e\u0301", "e\u0301"),
        ("👩\u200d👧", "👩\u200d👧"),
        ("\u200dx\u200d", "⟨200D⟩x⟨200D⟩"),
        ("a\u202eb\u00a0\ufeff\u2028", "a⟨202E⟩b⟨00A0⟩⟨FEFF⟩⟨2028⟩"),
        ("❤\ufe0f", "❤\ufe0f"),
        ("plain text", "plain text"),
    ):
        assert visible(text) == want


def test_tokens_as_their_families_spell_them() -> None:
    def pieces(text: str, name: str) -> list[str]:
        picture = vd.show_alignment(text, family(name), family("wordpiece"))
        return [str(piece) for group in picture.groups for piece in group.teacher]

    assert pieces(" walking", "byte-level")[0].startswith("Ġ")
    assert "".join(pieces(" щ", "byte-level small")) == "Ġ⟨D1⟩⟨89⟩"
    assert pieces("щ", "llama")[-2:] == ["⟨D1⟩", "⟨89⟩"]
    assert any(token.startswith("##") for token in pieces("walkinghome", "wordpiece"))
    assert pieces("walking", "unigram")[1].startswith("▁")


def test_rows_run_from_left_to_right_in_any_script() -> None:
    arabic = SCRIPTS[3]
    pictures = [vd.show_alignment(text, family("byte-level"), family("wordpiece")) for text in (arabic, "abc", "42")]
    assert Page(Pictures({"": pictures}).html()).directions == ["ltr"] * 3
    text = str(pictures[0])
    assert text.count("\u2068") == text.count("\u2069") > 3
    assert "\u2068" not in str(pictures[1])
    # Each token by itself, or those of one cell would run the other way.
    right = [str(piece) for group in pictures[0].groups for piece in group.student if "ا" <= piece.label[:1] <= "ي"]
    assert len(right) > 3
    for token in right:
        assert f"\u2068{token}\u2069" in text


def test_every_line_has_its_labels() -> None:
    picture = vd.show_alignment(" ".join(SCRIPTS), family("byte-level"), family("wordpiece"))
    lines = str(picture).split("\n\n")[0:-1]
    assert len(lines) > 3
    for block in lines:
        rows = [line for line in block.splitlines() if "│" in line]
        assert [row.partition("│")[0].strip() for row in rows] == ["pair", "text", "teacher", "student"]
    # As HTML the browser breaks lines: every cell has a label on its left, which the cell before it hides.
    page = picture.html()
    for name, label in (("n", "pair"), ("x", "text"), ("t", "teacher"), ("s", "student")):
        assert f'.vd-{name}::before{{content:"{label}"}}' in page
        assert page.count(f'<span class="vd-{name}"') == len(picture.drawn)
    rule = re.search(r"\.vd-b>::before{([^}]*)}", page)[1]
    assert "position:absolute" in rule and "right:100%" in rule and "z-index:-1" in rule
    assert "background:var(--page)" in re.search(r"\.vd-row li{([^}]*)}", page)[1]
    assert "isolation:isolate" in re.search(r"\.vd-row{([^}]*)}", page)[1]


def test_ratios_stand_above_their_pairs_and_the_legend_explains_them() -> None:
    picture = vd.show_alignment("walking home", family("byte-level"), family("wordpiece"))
    text = str(picture)
    pairs = next(line for line in text.splitlines() if line.startswith("pair")).split("│")[1:-1]
    for cell, group in zip(pairs, picture.drawn, strict=True):
        sizes = len(group.teacher), len(group.student)
        assert cell.strip() == ("" if group.pair is None or sizes == (1, 1) else "{}:{}".format(*sizes))
    assert any(cell.strip() for cell in pairs)
    assert "2:1 above a pair: two tokens of the teacher" in text and "Colours" in text and "(parentheses)" in text
    for page in (picture.html(), picture._repr_html_()):
        (legend,) = Page(page).legends
        assert "2:1" in legend and "Colours" in legend and "Dashed cells" in legend and "∅" in legend
    both = str(Pictures({"One": [picture], "Two": [picture]}))
    assert both.count("2:1 above a pair") == 1 and both.index("One") < both.index("Two")


def test_pictures_are_saved_by_the_ending_of_their_name(tmp_path) -> None:
    picture = vd.show_alignment("Я шёл domой", family("byte-level"), family("wordpiece"))
    picture.save(tmp_path / "page.HTML")
    picture.save(str(tmp_path / "page.txt"))
    assert (tmp_path / "page.HTML").read_text(encoding="utf-8") == picture.html()
    assert (tmp_path / "page.txt").read_text(encoding="utf-8") == str(picture)
    (tmp_path / "folder.html").mkdir()
    for path, kind, message in (
        (tmp_path / "page.png", VocabdistilError, r"^path: expected a name that ends with .html or .txt, got '.*png'$"),
        (tmp_path / "page", VocabdistilError, r"^path: expected a name that ends with .html or .txt, got '.*page'$"),
        ("", VocabdistilError, r"^path: expected a name that ends with .html or .txt, got ''$"),
        (tmp_path / "no" / "page.txt", VocabdistilError, "^path: cannot write .*: No such file or directory$"),
        (tmp_path / "folder.html", VocabdistilError, "^path: cannot write .*folder.html': Is a directory$"),
        ("a\0b.txt", VocabdistilError, "^path: cannot write "),
        (3, TypeError, "^path: expected a file name, got int$"),
        (b"page.txt", TypeError, "^path: expected a file name, got bytes$"),
    ):
        with pytest.raises(kind, match=message) as caught:
            picture.save(path)
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.html", "page.HTML", "page.txt"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_the_worst_texts_are_those_with_the_least_in_one_to_one_pairs(teacher: str, student: str, method: str) -> None:
    tokenizers = family(teacher), family(student)

    def share(text: str) -> tuple[float, int]:
        ink = [len(c.encode()) if c not in " \t\n\r\v\f" else 0 for c in text]
        of_byte = [n // max(n, 1) for n, c in zip(ink, text, strict=True) for _ in c.encode()]
        inside = [0] * len(of_byte)
        for group in vd.show_alignment(text, *tokenizers, method).groups:
            if group.pair is not None and len(group.teacher) == len(group.student) == 1:
                (piece,) = group.teacher
                inside[max(piece.start, 0) : max(piece.end, 0)] = [1] * (max(piece.end, 0) - max(piece.start, 0))
        return sum(a * b for a, b in zip(inside, of_byte, strict=True)) / max(sum(ink), 1), -sum(ink)

    want = sorted((text for text in dict.fromkeys(TEXTS) if text.strip()), key=share)
    found = worst_aligned([*TEXTS, *TEXTS[::-1]], *tokenizers, len(want) + 5, method)
    assert [item.text for item in found] == want
    assert not any(a.one_to_one > b.one_to_one for a, b in pairwise(found))
    assert [item.one_to_one for item in found] == pytest.approx([share(text)[0] for text in want])
    assert worst_aligned(iter(TEXTS), *tokenizers, 3, method) == found[:3]


def test_notebooks_and_names(teacher_folder) -> None:
    from transformers import AutoTokenizer

    teacher = AutoTokenizer.from_pretrained(teacher_folder)
    picture = vd.show_alignment("Olga walks.", teacher, family("byte-level"))
    assert picture.names == ("teacher", "")
    shown = picture._repr_html_()
    assert shown.startswith("<style>") and "<html" not in shown and "<figure" in shown
    assert "http" not in picture.html()


def test_bad_text() -> None:
    for text, kind, message in (
        (3, TypeError, "text: expected a string, got int"),
        ("\ud800", ValueError, "text: expected text that UTF-8 can hold"),
    ):
        with pytest.raises(kind, match=message):
            vd.show_alignment(text, family("byte-level"), family("wordpiece"))
