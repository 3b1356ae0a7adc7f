"""pooled_loss against the float64 reference: dtypes, padding, compile, bad input."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd
from tests.compiling import assert_compiles
from tests.tolerances import assert_norm_close
from tests.vocabularies import randn

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def masks(side: str, empty: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Six texts of up to 9 student and 7 teacher tokens; ``empty``: two of them have none on a side."""
    out = []
    for length, counts in ((9, [9, 4, 1, 7, 3, 0 if empty else 5]), (7, [7, 0 if empty else 3, 1, 5, 2, 4])):
        mask = torch.arange(length) < torch.tensor(counts)[:, None]
        out.append(mask.flip(1) if side == "left" else mask)
    return out[0], out[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("divergence", ["cosine", "mse"])
@pytest.mark.parametrize(("side", "empty", "projected"), [("left", False, True), ("right", True, False)])
def test_against_float64(dtype, pooling, divergence, side, empty, projected):
    both = masks(side, empty)
    width = 12 if projected else 20
    student, teacher = randn(6, 9, width, seed=1, dtype=dtype), randn(6, 7, 20, seed=2, dtype=dtype)
    weight = randn(20, width, seed=3, dtype=dtype) if projected else None
    options = {"divergence": divergence, "pooling": pooling}
    results = []
    for module, kind in ((vd, dtype), (vd.reference, torch.float64)):
        leaves = [None if x is None else x.to(kind, copy=True).requires_grad_() for x in (student, weight)]
        loss = module.pooled_loss(leaves[0], teacher.to(kind), *both, weight=leaves[1], **options)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in leaves if x is not None)])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for got, want, kind in zip(*results, (wide, dtype, dtype), strict=False):
        assert got.dtype == kind
        assert_norm_close(got, want, kind, "value", factor=2)


def test_padding_of_either_side_changes_nothing():
    left, right = masks("left"), masks("right")
    states = randn(6, 9, 8, seed=1), randn(6, 7, 8, seed=2)
    moved = []
    for x, a, b in zip(states, left, right, strict=True):
        y = torch.full_like(x, 1e6)
        y[b] = x[a]
        moved.append(y)
    torch.testing.assert_close(vd.pooled_loss(*moved, *right), vd.pooled_loss(*states, *left))


def test_no_texts():
    for shape in ((0, 3), (2, 3)):
        mask = torch.zeros(shape, dtype=torch.int64)
        student = randn(*shape, 4).requires_grad_()
        loss = vd.pooled_loss(student, randn(*shape, 4, seed=1), mask, mask)
        loss.backward()
        assert loss.item() == 0 and student.grad.eq(0).all()


def test_gradcheck():
    both = masks("left", empty=True)
    teacher = randn(6, 7, 5, seed=2, dtype=torch.float64)
    leaves = [randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((6, 9, 3), (5, 3))]
    for divergence in ("cosine", "mse"):
        assert torch.autograd.gradcheck(
            lambda s, w, d=divergence: vd.pooled_loss(s, teacher, *both, weight=w, divergence=d), leaves
        )


def test_compiles_as_one_graph():
    both = masks("right", empty=True)
    teacher = randn(6, 7, 8, seed=1)
    assert_compiles(lambda s: vd.pooled_loss(s * 2, teacher, *both), randn(6, 9, 8))


BAD = [
    ({"divergence": "kl"}, ValueError, "divergence: expected one of 'cosine', 'mse', got 'kl'"),
    ({"pooling": "sum"}, ValueError, "pooling: expected one of"),
    ({"student_hidden": torch.randn(4, 5)}, ValueError, "student_hidden: expected 3 dimensions"),
    ({"student_hidden": torch.randn(2, 3, 5)}, ValueError, "weight: expected a projection"),
    ({"student_mask": torch.ones(2, 4).bool()}, ValueError, r"student_mask: expected shape \(2, 3\)"),
    ({"teacher_mask": torch.ones(2, 3)}, TypeError, "teacher_mask: expected bool or integers"),
    ({"weight": torch.randn(3, 4)}, ValueError, "weight: expected shape"),
    ({"backend": "torch"}, ValueError, "backend"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[f"{list(b[0])[0]}-{i}" for i, b in enumerate(BAD)])
def test_bad_input_is_named(change, error, message):
    options = {f"{side}_hidden": torch.randn(2, 3, 4) for side in ("student", "teacher")}
    options |= {f"{side}_mask": torch.ones(2, 3, dtype=torch.int64) for side in ("student", "teacher")}
    with pytest.raises(error, match=f"^{message}"):
        vd.pooled_loss(**{**options, **change})
