"""Reading text, training the student's vocabulary, batches."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import vocabdistil as vd
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.distillation import student as student_module
from vocabdistil.distillation.batches import DistillCollator
from vocabdistil.distillation.text import TextFiles, read_text, sample_text
from vocabdistil.distillation.text_store import split_text
from vocabdistil.models.vocabularies import train_vocabulary


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return AutoTokenizer.from_pretrained(teacher_folder)


@pytest.fixture(scope="module")
def student(teacher, demo_lines):
    return train_vocabulary(teacher, demo_lines, 150).tokenizer


def test_lines_and_paragraphs(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n  two \n\n \nthree\n".encode())
    assert read_text([path]) == ["one", "two", "three"]
    assert read_text([path], "paragraph") == ["one two", "three"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b" \n\n", "is empty"), (b"", "is empty"), (b"good\nbad \xff\n", "0xff at offset 9"),
     (b"\xef\xbb\xbfab\xff", "0xff at offset 5")],
)
def test_bad_text(tmp_path, content, message):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VocabdistilError, match=message) as caught:
        read_text([path])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.text("ab \n\r\x0b\x1c\x85\u2028é", max_size=40), st.booleans())
def test_lines_are_those_of_the_whole_text(tmp_path_factory, text, marked):
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    path.write_bytes(("\ufeff" * marked + text).encode())
    lines = [line.strip() for line in text.splitlines()]
    paragraphs = [" ".join(group) for blank, group in itertools.groupby(lines, lambda line: not line) if not blank]
    for unit, want in (("line", [line for line in lines if line]), ("paragraph", paragraphs)):
        if want:
            texts = TextFiles([path], unit)
            assert list(texts) == list(texts) == want
        else:
            with pytest.raises(VocabdistilError, match="is empty"):
                read_text([path], unit)


def test_split_is_reproducible_and_keeps_held_out_text_unseen():
    texts = [f"text {i % 60}" for i in range(100)] + [f"once {i}" for i in range(300)]
    a, b, other = split_text(texts, 0.2, 3), split_text(texts, 0.2, 3), split_text(texts, 0.2, 4)
    assert a == b and a.held_out != other.held_out
    assert not set(a.held_out) & set(a.train)
    with pytest.raises(VocabdistilError, match="too little text"):
        split_text(texts[:10], 0.2, 3)


def test_a_sample_is_all_of_little_text_and_a_bounded_part_of_much():
    texts = [f"{i:03} {'é' * (i % 5)}" for i in range(400)]
    assert sample_text(iter(texts), 0) == texts
    assert sample_text([], 0) == [] and sample_text(["far too long", "too"], 0, most=2) in (["far too long"], ["too"])
    parts = [sample_text(iter(texts), seed, most=1000) for seed in range(300)]
    assert parts[7] == sample_text(texts, 7, most=1000) != parts[8]
    for part in parts:
        size = sum(len(text.encode()) for text in part)
        assert 980 <= size <= 1000 and part == sorted(part)
    # All texts are as likely: each is drawn about as often, wherever it stands and however long it is.
    counts = Counter(text for part in parts for text in part)
    expected = sum(map(len, parts)) / len(texts)
    for group in (texts[:100], texts[100:300], texts[300:], texts[0::5], texts[4::5]):
        assert sum(counts[text] for text in group) / len(group) == pytest.approx(expected, rel=0.07)


def test_a_vocabulary_is_counted_on_a_sample(teacher, demo_lines, monkeypatch):
    sizes = []
    monkeypatch.setattr(student_module, "sample_text", lambda texts, seed: sample_text(texts, seed, most=20_000))
    monkeypatch.setattr(
        student_module, "vocabulary_from", lambda source, tokenizer, texts, *a: sizes.append(len("".join(texts)))
    )
    student_module.make_vocabulary("trim", teacher, iter(demo_lines), 200, seed=3)
    student_module.make_vocabulary("somewhere", teacher, iter(demo_lines), None)
    assert 19_000 < sizes[0] <= 20_000 and sizes[1] == len("".join(demo_lines))


def test_batches_align(teacher, student, demo_lines):
    tables = [vd.RemapTable.from_tokenizers(teacher, student)]
    matched = [vd.MatchedVocab.from_tokenizers(teacher, student)]
    collator = DistillCollator([teacher], student, tables, matched, 16, 24)
    batch = collator([{"text": text} for text in demo_lines[:6]])
    size, width = 6, batch["student_ids"].shape[1]
    assert batch["student_ids"].shape == (2 * size, width) and width <= 24
    reduced, own = batch["student_ids"][:size].flatten(), batch["student_ids"][size:].flatten()
    ids = batch["teacher_ids"][0].flatten()
    pairs = batch["reduce_pairs"][0]
    for s, e, t in zip(pairs.student_start, pairs.student_end, pairs.teacher_start, strict=True):
        a, b = tables[0].indptr[ids[t]], tables[0].indptr[ids[t] + 1]
        assert reduced[s:e].tolist() == tables[0].ids[a:b].tolist()
    pairs = batch["own_pairs"][0]
    assert len(pairs) > 0 and bool((pairs.student_end - pairs.student_start == 1).all())
    ours = student.convert_ids_to_tokens(own[pairs.student_start.long()].tolist())
    theirs = teacher.convert_ids_to_tokens(ids[pairs.teacher_start.long()].tolist())
    assert ours == theirs
    # A position of one text never pairs with one of another.
    assert torch.equal(pairs.student_start // width, pairs.teacher_start // batch["teacher_ids"][0].shape[1])


def test_reduce_rows_end_as_the_students_tokenizer_cuts(teacher_folder):
    teacher, student = (AutoTokenizer.from_pretrained(teacher_folder) for _ in range(2))
    student.truncation_side = "left"
    table, matched = vd.RemapTable.from_tokenizers(teacher, student), vd.MatchedVocab.from_tokenizers(teacher, student)
    texts = ["Olga mends the old net in the harbour at noon.", "A short one."]
    batch = DistillCollator([teacher], student, [table], [matched], 64, 8)(texts)
    rows, mask = batch["student_ids"][:2], batch["student_mask"][:2]
    whole = teacher(texts)["input_ids"]
    assert [ids[kept.bool()].tolist() for ids, kept in zip(rows, mask, strict=True)] == [
        [ids[0], *ids[1:][-7:]] for ids in whole
    ]
