"""Pictures of alignments: everything in them, in order, and readable."""

from __future__ import annotations

import io
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

import vocabdistil as vd
from tests._families import FAMILIES, SCRIPTS, family
from tests.alignment.test_collator import METHODS, PAIRS
from vocabdistil.alignment.picture import html_page, visible

TEXTS = [*SCRIPTS, "", " ", "e\u0301x <b>&amp;\"'", "a\u200bb\u202ec\x00", "[SEP] <s> ##a ▁b"]


class Page(HTMLParser):
    """The items of each list, as the text of their parts by class; fails on tags that do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.figures: list[list[dict[str, list[str]]]] = []
        self.directions: list[str] = []
        self.places: list[str] = []
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
        if tag == "ol":
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
        if "ol" not in self.open or self.figures[-1][-1]["kind"] == ["vd-key"]:
            return
        found = self.figures[-1][-1][self.place]
        if self.place in ("vd-n", "vd-x"):
            found.append(data)
        elif found:
            found[-1] += data


def drawn(picture: vd.AlignmentPicture):
    return [group for group in picture.groups if group.teacher or group.student or group.text.strip()]


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
        for item, group in zip(figure[1:], drawn(picture), strict=True):
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
    page = Page(html_page([picture, picture]))
    assert len(page.figures) == 2 and page.figures[0] == page.figures[1]
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(picture)
    lines = console.file.getvalue().splitlines()
    # Where there is room for anything, nothing is cut off.
    assert width < 20 or all(cell_len(line) <= width for line in lines if line.startswith("teacher │"))
    rows = [line.split("│") for line in (lines if width > 20 else str(picture).splitlines()) if line[:7] == "teacher"]
    shown = "".join(cell.strip().replace("\u2068", "").replace("\u2069", "") for row in rows for cell in row[1:])
    want = "".join(
        str(piece) if group.pair is not None else f"({piece})" for group in drawn(picture) for piece in group.teacher
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


def test_direction_and_text_of_right_to_left() -> None:
    arabic, latin = SCRIPTS[3], "abc"
    pictures = [vd.show_alignment(text, family("byte-level"), family("wordpiece")) for text in (arabic, latin, "42")]
    assert Page(html_page(pictures)).directions == ["rtl", "ltr", "ltr"]
    text = str(pictures[0])
    assert text.count("\u2068") == text.count("\u2069") > 3
    assert "\u2068" not in str(pictures[1])


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
