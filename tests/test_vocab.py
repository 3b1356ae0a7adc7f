from __future__ import annotations

import pytest
import torch

from tests._wordpiece import SPECIALS, small_text, train, wordpiece
from vocabdistil.vocab import MatchedVocab


def test_same_strings_on_both_sides() -> None:
    teacher, student = train(small_text(), 600), train(small_text(), 120)
    matched = MatchedVocab.from_tokenizers(teacher, student)
    common = set(teacher.get_vocab()) & set(student.get_vocab())
    strings = [teacher.id_to_token(i) for i in matched.teacher_ids.tolist()]
    assert strings == [student.id_to_token(i) for i in matched.student_ids.tolist()]
    assert set(strings) == common and set(SPECIALS) <= common and len(matched) == len(common)
    assert matched.teacher_ids.dtype == matched.student_ids.dtype == torch.int64
    assert (matched.teacher_ids.diff() > 0).all()
    assert matched.to("cpu").teacher_ids.tolist() == matched.teacher_ids.tolist()
    assert str(len(matched)) in repr(matched)


def test_nothing_in_common() -> None:
    matched = MatchedVocab.from_tokenizers(wordpiece(["[UNK]", "a"]), wordpiece(["b"]))
    assert len(matched) == 0 and matched.slots()[0].numel() == 0


def test_slots() -> None:
    teacher, student = MatchedVocab(teacher_ids=[5, 1], student_ids=[0, 2]).slots()
    assert teacher.tolist() == [-1, 1, -1, -1, -1, 0] and student.tolist() == [0, -1, 1]


@pytest.mark.parametrize(
    ("teacher", "student", "error", "text"),
    [
        ([1, 2], [1], ValueError, "student_ids"),
        ([1, 1], [1, 2], ValueError, "teacher_ids.*1 repeatedly"),
        ([1, 2], [3, 3], ValueError, "student_ids.*3 repeatedly"),
        ([-1], [0], ValueError, "teacher_ids.*-1"),
        ([0.5], [0], TypeError, "teacher_ids.*float"),
        ([[0]], [[0]], ValueError, "teacher_ids.*shape"),
        ([0], torch.zeros(1, dtype=torch.bool), TypeError, "student_ids.*bool"),
    ],
)
def test_bad_ids(teacher, student, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        MatchedVocab(teacher_ids=teacher, student_ids=student)
