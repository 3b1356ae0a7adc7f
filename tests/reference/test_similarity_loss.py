from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.reference_cases import F64, rows
from tests.tolerances import LOSS, assert_close
from vocabdistil.reference import similarity_loss


def test_by_hand():
    # Cosines of the student 1 and 0, of the teacher 1 and 1: two of the four pairs differ, each by 1.
    student = torch.tensor([[2.0, 0.0], [0.0, 3.0]], dtype=F64)
    teacher = torch.tensor([[1.0, 0.0, 0.0], [4.0, 0.0, 0.0]], dtype=F64)
    assert similarity_loss(student, teacher).item() == 0.5


def test_equals_a_loop_and_ignores_lengths_and_rotations():
    student, teacher = rows(5, 3), rows(5, 4, seed=1)
    total = sum(
        (F.cosine_similarity(student[i], student[j], dim=0) - F.cosine_similarity(teacher[i], teacher[j], dim=0)) ** 2
        for i in range(5) for j in range(5)
    )  # fmt: skip
    assert_close(similarity_loss(student, teacher), total / 25, LOSS, F64)
    turned = torch.linalg.qr(rows(4, 4, seed=2)).Q
    stretched = (teacher @ turned) * torch.arange(1, 6, dtype=F64)[:, None]
    assert_close(similarity_loss(student, stretched), total / 25, LOSS, F64)
    assert similarity_loss(teacher, stretched).item() == pytest.approx(0, abs=1e-30)


def test_gradcheck():
    teacher = rows(4, 5, seed=1)
    assert torch.autograd.gradcheck(lambda s: similarity_loss(s, teacher), rows(4, 3, grad=True))
