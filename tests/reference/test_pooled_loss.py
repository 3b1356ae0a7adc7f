from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.reference_cases import F64, rows
from tests.tolerances import LOSS, assert_close
from vocabdistil.reference import pooled_loss

MASKS = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1]]), torch.tensor([[1, 0], [1, 1], [0, 1]])


def hidden(length: int, width: int, seed: int, grad: bool = False) -> torch.Tensor:
    return rows(3 * length, width, seed=seed).view(3, length, width).requires_grad_(grad)


def pooled(x: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    each = [row[keep != 0] for row, keep in zip(x, mask, strict=True)]
    return torch.stack([{"mean": e.mean(0), "cls": e[0], "lasttoken": e[-1]}[pooling] for e in each])


def test_by_hand():
    # Means (2, 0) and (0, 1): orthogonal, and 5 apart when squared; the padding is far away.
    student = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [9.0, 9.0]]], dtype=F64)
    teacher = torch.tensor([[[7.0, 7.0], [0.0, 1.0]]], dtype=F64)
    masks = torch.tensor([[1, 1, 0]]), torch.tensor([[0, 1]])
    assert pooled_loss(student, teacher, *masks).item() == 1
    assert pooled_loss(student, teacher, *masks, divergence="mse").item() == 5
    assert pooled_loss(student, teacher, *masks, divergence="mse", pooling="cls").item() == 2
    assert pooled_loss(student, teacher, *masks, divergence="mse", pooling="lasttoken").item() == 10


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("projected", [False, True])
def test_equals_a_loop(pooling, projected):
    student, teacher = hidden(3, 4 if projected else 5, 0), hidden(2, 5, 1)
    weight = rows(5, 4, seed=2) if projected else None
    s, t = pooled(student, MASKS[0], pooling), pooled(teacher, MASKS[1], pooling)
    if projected:
        s = s @ weight.T
    for divergence, expected in (
        ("cosine", 1 - F.cosine_similarity(s, t).mean()), ("mse", (s - t).square().sum(1).mean()),
    ):  # fmt: skip
        loss = pooled_loss(student, teacher, *MASKS, divergence=divergence, pooling=pooling, weight=weight)
        assert_close(loss, expected, LOSS, F64)


def test_gradcheck():
    teacher = hidden(2, 5, 1)
    for divergence in ("cosine", "mse"):
        assert torch.autograd.gradcheck(
            lambda s, w, d=divergence: pooled_loss(s, teacher, *MASKS, divergence=d, weight=w),
            (hidden(3, 4, 0, grad=True), rows(5, 4, seed=2, grad=True)),
        )
