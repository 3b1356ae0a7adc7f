"""Coverage: counted once more by hand, for every family; in pieces; from the command line."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib import import_module

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import vocabdistil as vd
from tests._families import FAMILIES, SCRIPTS, family
from tests._wordpiece import small_text
from tests.alignment.test_collator import METHODS, PAIRS, rows_of
from vocabdistil.alignment.collator import SPANS
from vocabdistil.cli import main
from vocabdistil.evaluation.report import coverage_tables
from vocabdistil.models.vocabularies import train_vocabulary

TEXTS = [*SCRIPTS, "", "quux ☃", *small_text(60)]


def by_hand(texts: list[str], teacher, student, method: str) -> dict[str, object]:
    rows = rows_of(vd.align(texts, teacher, student, method))
    values: dict[str, object] = {"pairs": 0, "one_to_one_pairs": 0}
    left_out = {"teacher": Counter(), "student": Counter()}
    counts = Counter()
    for row in rows:
        spans = zip(*(row[name] for name in SPANS), strict=True)
        full = [span for span in spans if span[0] < span[1] and span[2] < span[3]]
        values["pairs"] += len(full)
        values["one_to_one_pairs"] += sum(t1 - t0 == s1 - s0 == 1 for t0, t1, s0, s1 in full)
        for side, tokenizer, k in (("teacher", teacher, 0), ("student", student, 2)):
            ids = row[f"{side}_ids"]
            inside = {i for span in full for i in range(span[k], span[k + 1])}
            counts[f"{side}_tokens"] += len(ids)
            left_out[side].update(tokenizer.id_to_token(t) for i, t in enumerate(ids) if i not in inside)
            unknown = {tokenizer.token_to_id(token) for token in ("[UNK]", "<unk>")} - {None}
            counts[f"{side}_unknown"] += sum(t in unknown for t in ids)
    values.update(counts)
    for side, found in left_out.items():
        values[f"{side}_unaligned"] = found.total()
        values[f"{side}_examples"] = tuple(sorted(found.items(), key=lambda item: (-item[1], item[0])))
    return values


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_counts(teacher: str, student: str) -> None:
    teacher, student = family(teacher), family(student)
    report = vd.coverage(iter(TEXTS), teacher, student)
    assert tuple(report.methods) == METHODS and report.texts == len(TEXTS)
    matched = vd.MatchedVocab.from_tokenizers(teacher, student)
    own = {}
    for side, tokenizer, ids in (
        ("teacher", teacher, matched.teacher_ids.tolist()),
        ("student", student, matched.student_ids.tolist()),
    ):
        rows = own[side] = [tokenizer.encode(text).ids for text in TEXTS]
        assert getattr(report, f"{side}_tokens") == sum(map(len, rows))
        assert getattr(report, f"{side}_vocab") == tokenizer.get_vocab_size()
        assert getattr(report, f"{side}_matched") == sum(i in set(ids) for row in rows for i in row)
    assert report.matched_vocab == len(matched)
    for method, found in report.methods.items():
        want = by_hand(TEXTS, teacher, student, method)
        for name, value in want.items():
            got = getattr(found, name)
            if name.endswith("examples"):
                got = tuple(sorted(got, key=lambda item: (-item[1], item[0])))
            assert got == value, (method, name)
        assert found.teacher_covered == pytest.approx(1 - want["teacher_unaligned"] / want["teacher_tokens"])
        assert found.student_span * found.pairs == pytest.approx(want["student_tokens"] - want["student_unaligned"])
        assert found.text_bytes == sum(len("".join(text.split()).encode()) for text in TEXTS)
        pictures = [vd.show_alignment(text, teacher, student, method) for text in TEXTS]
        inside = [group.text.decode(errors="ignore") for p in pictures for group in p.groups if group.pair is not None]
        split = sum(group.text != group.text.decode(errors="ignore").encode() for p in pictures for group in p.groups)
        assert abs(found.covered_bytes - len("".join("".join(inside).split()).encode())) <= 4 * split
    reduced = [row["student_ids"] for row in rows_of(vd.align(TEXTS, teacher, student, "reduce"))]
    assert report.equal_texts == sum(a == b for a, b in zip(reduced, own["student"], strict=True))
    assert report.pieces_per_token == sum(map(len, reduced)) / report.teacher_tokens


def test_long_texts_are_counted_in_pieces(monkeypatch) -> None:
    teacher, student = family("byte-level"), family("wordpiece")
    whole = vd.coverage(TEXTS, teacher, student)
    module = import_module("vocabdistil.alignment.coverage")
    monkeypatch.setattr(module, "TEXTS_AT_ONCE", (7, 90))
    pieces = vd.coverage(TEXTS, teacher, student)

    def plain(report: vd.CoverageReport) -> dict:
        values = report.as_dict()
        for method, found in report.methods.items():
            for side in ("teacher", "student"):
                values["methods"][method][f"{side}_examples"] = dict(getattr(found, f"{side}_examples"))
        return values

    assert plain(pieces) == plain(whole)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(TEXTS), min_size=1, max_size=8),
    st.lists(st.sampled_from(TEXTS), min_size=1, max_size=8),
    st.sampled_from(sorted(FAMILIES)),
    st.sampled_from(METHODS),
)
def test_sums(a: list[str], b: list[str], name: str, method: str) -> None:
    teacher, student = family(name), family("wordpiece uncased")
    both = vd.coverage(a + b, teacher, student, [method]).methods[method]
    parts = [vd.coverage(part, teacher, student, [method]).methods[method] for part in (a, b)]
    total = parts[0] + parts[1]
    for side in ("teacher", "student"):
        assert dict(getattr(total, f"{side}_examples")) == dict(getattr(both, f"{side}_examples"))
    for key, value in both.as_dict().items():
        if not key.endswith("examples"):
            assert total.as_dict()[key] == value


def test_the_report_of_a_run(teacher_folder, demo_lines) -> None:
    """The keys that metrics.json has had from the first, worked out with transformers."""
    teacher = AutoTokenizer.from_pretrained(teacher_folder)
    student = train_vocabulary(teacher, demo_lines, 150).tokenizer
    texts = [*demo_lines[:40], "quux ☃"]
    table = vd.RemapTable.from_tokenizers(teacher, student)
    found = vd.coverage(texts, teacher, student, ("match", "reduce"), table=table).as_dict()
    rows, own = ([tokenizer(text)["input_ids"] for text in texts] for tokenizer in (teacher, student))
    reduced = [[piece for i in row for piece in table.rows(i)] for row in rows]
    flat = [piece for row in reduced for piece in row]
    tokens = [token for row in rows for token in teacher.convert_ids_to_tokens(row)]
    vocabulary = set(teacher.get_vocab()) & set(student.get_vocab())

    def unknown(tokenizer, ids: list[int]) -> float:
        return ids.count(tokenizer.unk_token_id) / len(ids)

    want = {
        "teacher_vocab": len(teacher),
        "student_vocab": len(student),
        "matched_vocab": len(vocabulary),
        "texts": len(texts),
        "teacher_tokens": len(tokens),
        "student_tokens": sum(map(len, own)),
        "pieces_per_token": len(flat) / len(tokens),
        "unk_rate_reduce": unknown(student, flat),
        "unk_rate_own": unknown(student, [i for row in own for i in row]),
        "unk_rate_teacher": unknown(teacher, [i for row in rows for i in row]),
        "matched_tokens": sum(token in vocabulary for token in tokens) / len(tokens),
        "reduce_equals_own": sum(a == b for a, b in zip(reduced, own, strict=True)) / len(texts),
    }
    assert {name: value for name, value in found.items() if name != "methods"} == pytest.approx(want)
    assert want["unk_rate_own"] > 0 and 0 < want["reduce_equals_own"] < 1
    without = vd.coverage(texts, teacher, student, ["match"])
    assert without.pieces_per_token is without.unk_rate_reduce is without.reduce_equals_own is None


def test_bad_arguments() -> None:
    a, b = family("byte-level"), family("wordpiece")
    for texts, methods, kind, message in (
        ("text", METHODS, TypeError, "texts: expected a list of strings, got str"),
        (["a", 3], METHODS, TypeError, r"texts\[1\]: expected a string, got int"),
        ([], METHODS, ValueError, "texts: expected at least one"),
        (["a"], ["words"], ValueError, "method: expected one of"),
        (["a"], "word", TypeError, "methods: expected a list"),
        (["a"], None, TypeError, "methods: expected a list of methods, got None"),
        (None, ["word"], TypeError, "texts: expected a list of strings, got NoneType"),
    ):
        with pytest.raises(kind, match=message):
            vd.coverage(texts, a, b, methods)
    with pytest.raises(TypeError, match="table: expected a RemapTable, got int"):
        vd.coverage(["a"], a, b, table=3)
    with pytest.raises(ValueError, match=r"matched.student_ids: expected ids from 0 to \d+, got 1000000"):
        vd.coverage(["a"], a, b, matched=vd.MatchedVocab([0], [10**6]))


@pytest.fixture(scope="module")
def folders(teacher_folder, tmp_path_factory) -> tuple[str, str]:
    """A WordPiece teacher and a byte-level student, as transformers saves them."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("coverage") / "bytes"
    PreTrainedTokenizerFast(tokenizer_object=family("byte-level"), pad_token="<pad>").save_pretrained(folder)
    return str(teacher_folder), str(folder)


def test_command_prints_a_table_and_json(folders, text_file, capsys) -> None:
    command = ["coverage", "--teacher", folders[0], "--student", folders[1], "--text", str(text_file)]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert tuple(found["methods"]) == METHODS and found["student_vocab"] == 500
    assert found["methods"]["boundary"]["covered_text"] > 0.99
    assert main([*command, "--method", "word", "--method", "match"]) == 0
    out = capsys.readouterr().out
    share = found["methods"]["word"]["teacher_covered"]
    assert f"{share:.1%}" in out and "word" in out and "boundary" not in out and "[CLS]" in out
    assert main([*command, "--method", "words"]) == 2
    assert "--method: expected boundary, word, match or reduce, got 'words'\n" in capsys.readouterr().err


def test_command_trains_a_vocabulary_of_the_teacher_s_family(folders, text_file, capsys) -> None:
    command = ["coverage", "--teacher", folders[1], "--text", str(text_file), "--vocab-size"]
    assert main([*command, "400"]) == 0
    out = capsys.readouterr().out
    assert "a new vocabulary of 400" in out and "supports only" not in out and "Ġ" in out
    assert main([*command, "40000"]) == 0
    assert "supports only" in capsys.readouterr().out
    assert main([*command, "40"]) == 2
    assert capsys.readouterr().err.startswith("vocabdistil: --vocab-size: expected at least the 2")


@pytest.mark.parametrize(
    ("teacher", "student", "noted"),
    [
        ("wordpiece", "wordpiece uncased", True),
        ("byte-level", "wordpiece uncased", True),
        ("wordpiece uncased", "wordpiece uncased", False),
        ("wordpiece uncased", "wordpiece", False),
        ("unigram NFKC", "byte-level", False),
    ],
)
def test_the_table_notes_upper_case_that_the_student_lowers(teacher: str, student: str, noted: bool) -> None:
    sides = family(teacher), family(student)
    for methods in (METHODS, ["word"]):
        tables = coverage_tables(("a", "b"), sides, vd.coverage(["One Two"], *sides, methods))
        assert ("upper case" in str(tables[1].caption)) == (noted and "reduce" in methods)


def test_command_draws(folders, text_file, tmp_path, capsys) -> None:
    both = ["coverage", "--teacher", folders[0], "--student", folders[1]]
    page = tmp_path / "page.html"
    assert main([*both, "--show", "Olga [walks] <b>home</b>.", "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert out.endswith(f"Wrote {page} (1 picture)\n") and out.count("2:1 above a pair") == 1
    assert "teacher │([CLS])│" in out and "boundary: " in out and "span pairs" not in out
    written = page.read_text(encoding="utf-8")
    assert "&lt;" in written and "<b>" not in written
    assert main([*both, "--show", "one", "--show", "two", "--method", "match", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["texts"] == 2
    assert main([*both, "--text", str(text_file), "--html", str(page), "--method", "reduce", "--method", "word"]) == 0
    assert page.read_text(encoding="utf-8").count("<figure") == 40
    assert capsys.readouterr().out.endswith(f"Wrote {page} (40 pictures)\n")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    for options, message in (
        ([], "--text: expected a file, or --show with a text, got neither"),
        (
            ["--show", "a", "--html", str(tmp_path / "no" / "p.html")],
            "--html: expected a file to write, in a folder, got",
        ),
    ):
        capsys.readouterr()
        assert main([*both, *options]) == 2
        assert message in capsys.readouterr().err
    assert main([*both[:3], "--show", "a"]) == 2
    assert "--student: expected a tokenizer, or --text to train one on" in capsys.readouterr().err


def test_command_draws_the_worst_texts_beside_the_first(folders, text_file, tmp_path, capsys) -> None:
    command = ["coverage", "--teacher", folders[0], "--student", folders[1], "--text", str(text_file), "--worst", "3"]
    page = tmp_path / "page.html"
    assert main([*command, "--method", "word", "--json", "--html", str(page)]) == 0
    captured = capsys.readouterr()
    assert captured.err.endswith(f"Wrote {page} (23 pictures)\n")
    worst = json.loads(captured.out)["worst"]["word"]
    assert len(worst) == 3 and worst[0]["one_to_one"] <= worst[2]["one_to_one"] < 1
    headings = ["<h2>First texts (20)</h2>", "<h2>Texts that align worst by word (3): "]
    before, first, last = re.split("|".join(map(re.escape, headings)), page.read_text(encoding="utf-8"))
    assert (before.count("<figure"), first.count("<figure"), last.count("<figure")) == (0, 20, 3)
    assert main([*command, "--method", "word"]) == 0
    out = capsys.readouterr().out
    first, last = out.split("First texts (3)")[1].split("Texts that align worst by word (3)")
    assert first.count("word: ") == last.count("word: ") == 3 and "Wrote" not in out
    words = worst[0]["text"].split()
    assert all(word[:3] in last for word in words if word.isalpha())
    assert main([*command, "--show", "Olga", "--method", "word", "--method", "match"]) == 0
    out = capsys.readouterr().out
    assert "Texts asked for" in out and "First texts" not in out
    assert "align worst by word (3)" in out and "align worst by match (3)" in out
