"""One pair per text, from masks."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd

TWO = torch.ones(2, 3, dtype=torch.bool)
MASK = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]])


def spans(pairs: vd.SpanPairs, side: str) -> list[tuple[int, int]]:
    vectors = (getattr(pairs, f"{side}_{name}").tolist() for name in ("start", "end"))
    return list(zip(*vectors, strict=True))


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("mean", [(0, 2), (6, 8), (8, 12), (16, 16), (17, 18)]),
        ("cls", [(0, 1), (6, 7), (8, 9), (16, 16), (17, 18)]),
        ("lasttoken", [(1, 2), (7, 8), (11, 12), (16, 16), (17, 18)]),
    ],
)
def test_spans(pooling, expected):
    teacher = torch.tensor([[1], [1], [1], [1], [0]], dtype=torch.bool)
    pairs = vd.text_pairs(MASK, teacher, pooling)
    assert spans(pairs, "student") == expected
    assert spans(pairs, "teacher") == [(0, 1), (1, 2), (2, 3), (3, 4), (5, 5)]
    assert pairs.num_nonempty == 3 and (pairs.student_tokens, pairs.teacher_tokens) == (20, 5) and pairs.padded
    # As if they had been checked.
    vd.SpanPairs(pairs.student_start, pairs.student_end, pairs.teacher_start, pairs.teacher_end)


def test_nothing():
    for shape in ((0, 3), (2, 0), (0, 0)):
        pairs = vd.text_pairs(torch.ones(shape, dtype=torch.int64), torch.ones(shape[0], 2, dtype=torch.int64))
        assert len(pairs) == shape[0] and pairs.num_nonempty == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}, ValueError, "student_mask: expected attended tokens"),
        ({"teacher_mask": torch.tensor([[1, 1, 1], [1, 0, 1]])}, ValueError, "teacher_mask: .* of text 1"),
        ({"student_mask": [[1, 1]]}, TypeError, "student_mask: expected a tensor, got list"),
        ({"student_mask": torch.ones(2, 3)}, TypeError, "student_mask: expected bool or integers, got float32"),
        ({"teacher_mask": TWO[0]}, ValueError, r"teacher_mask: expected shape \[B, L\], got \(3,\)"),
        ({"teacher_mask": TWO.T}, ValueError, "teacher_mask: expected 2 texts, got 3"),
        ({"teacher_mask": TWO.to("meta")}, ValueError, "teacher_mask: expected a tensor"),
        ({"pooling": "max"}, ValueError, "pooling: expected one of 'mean', 'cls', 'lasttoken', got 'max'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(change, error, message):
    arguments = {name: torch.ones(2, 3, dtype=torch.int64) for name in ("student_mask", "teacher_mask")} | change
    with pytest.raises(error, match=f"^{message}") as raised:
        vd.text_pairs(**arguments)
    assert "\n" not in str(raised.value)
