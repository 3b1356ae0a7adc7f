"""What is prepared under ``torch.inference_mode()``, as a teacher runs, is as good for training as any other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import vocabdistil as vd
from tests._families import family
from tests.vocabularies import randn
from vocabdistil.alignment.collator import AlignmentCollator

TEXTS = ["There is a tide in the affairs of men", "quux ☃", ""]


def _align(method: str) -> Callable:
    return lambda teacher, student: vd.align(TEXTS, teacher, student, method).pairs


def _remap(teacher, student) -> vd.SpanPairs:
    table = vd.RemapTable.from_tokenizers(teacher, student)
    return table.remap([teacher.encode(text).ids for text in TEXTS[:2]]).pairs


def _collate(teacher, student) -> vd.SpanPairs:
    return AlignmentCollator(teacher, student)(TEXTS)["pairs"]


MADE = {**{method: _align(method) for method in ("boundary", "match", "word")}, "remap": _remap, "collator": _collate}


@pytest.mark.parametrize("name", MADE)
def test_pairs(name: str) -> None:
    sides = family("wordpiece"), family("wordpiece uncased")
    want = MADE[name](*sides)
    with torch.inference_mode():
        pairs = MADE[name](*sides)
    student = randn(pairs.student_tokens, 8).requires_grad_()
    teacher = randn(pairs.teacher_tokens, 8, seed=1)
    vd.span_kl(student, teacher, pairs).backward()
    (expected,) = torch.autograd.grad(vd.span_kl(student, teacher, want), student)
    assert torch.equal(student.grad, expected)


def test_coverage() -> None:
    sides = family("wordpiece"), family("wordpiece uncased")
    with torch.inference_mode():
        assert vd.coverage(TEXTS, *sides).methods == vd.coverage(TEXTS, *sides).methods


def test_tables_and_vocabularies() -> None:
    sides = family("wordpiece"), family("wordpiece uncased")
    with torch.inference_mode():
        table, matched = vd.RemapTable.from_tokenizers(*sides), vd.MatchedVocab.from_tokenizers(*sides)
        moved = matched.to("cpu")
    teacher_size, student_size = (side.get_vocab_size() for side in sides)
    student, teacher = randn(3, student_size).requires_grad_(), randn(3, teacher_size, seed=1)
    for loss in (
        vd.matched_kl(student, teacher, matched),
        vd.matched_kl(student, teacher, moved, unmatched="rest"),
        vd.remapped_kl(student, teacher, table),
    ):
        loss.backward()
    assert torch.isfinite(student.grad).all()
