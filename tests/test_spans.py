"""SpanPairs: what it accepts, what it refuses, moving and pickling."""

from __future__ import annotations

import pickle

import pytest
import torch

import vocabdistil as vd


def pairs(*fields):
    return vd.SpanPairs(*(torch.tensor(f) for f in fields))


def test_counts_and_dtype():
    p = pairs([0, 2, 2], [2, 2, 5], [0, 1, 2], [1, 2, 3])
    assert (len(p), p.num_nonempty, p.student_tokens, p.teacher_tokens) == (3, 2, 5, 3)
    assert all(getattr(p, f).dtype == torch.int32 for f in ("student_start", "teacher_end"))
    assert vd.SpanPairs([0], [1], [0], [2]).teacher_end.tolist() == [2]
    assert len(vd.SpanPairs([], [], [], [])) == 0


def test_moves_and_pickles():
    p = pickle.loads(pickle.dumps(pairs([0], [2], [0], [1])))
    assert (p.student_end.tolist(), p.student_tokens) == ([2], 2)
    assert p.to("meta").device.type == "meta" and p.to("meta").num_nonempty == 1


@pytest.mark.parametrize(
    ("fields", "error", "name"),
    [
        (([0, 1], [2, 3], [0, 1], [1, 2]), ValueError, "student_start"),
        (([0, 1], [1, 2], [1, 0], [2, 1]), ValueError, "teacher_start"),
        (([-1], [1], [0], [1]), ValueError, "student_start"),
        (([0], [1], [3], [1]), ValueError, "teacher_end"),
        (([0], [1, 2], [0], [1]), ValueError, "student_start and student_end"),
        (([0], [1], [0, 1], [1, 2]), ValueError, "teacher_start"),
        (([[0]], [[1]], [[0]], [[1]]), ValueError, "student_start"),
        (([0.5], [1.0], [0.0], [1.0]), TypeError, "student_start"),
        (([0], [2**31], [0], [1]), ValueError, "student_end"),
    ],
)
def test_bad_spans_are_named(fields, error, name):
    with pytest.raises(error, match=f"^{name}") as caught:
        pairs(*fields)
    assert "\n" not in str(caught.value)
