"""similarity_loss against the float64 reference: dtypes, memory, compile, bad input."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd
from tests.compiling import assert_compiles
from tests.tolerances import assert_norm_close
from tests.vocabularies import LargestAllocation, randn

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "widths"), [(1, (3, 4)), (7, (2, 9)), (60, (20, 33))])
def test_against_float64(dtype, batch, widths):
    student, teacher = (randn(batch, d, seed=i, dtype=dtype) for i, d in enumerate(widths))
    results = []
    for module, kind in ((vd, dtype), (vd.reference, torch.float64)):
        leaf = student.to(kind, copy=True).requires_grad_()
        loss = module.similarity_loss(leaf, teacher.to(kind))
        (loss * -1.5).backward()
        results.append((loss.detach(), leaf.grad))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for got, want, kind in zip(*results, (wide, dtype), strict=True):
        assert got.dtype == kind
        assert_norm_close(got, want, kind, "value", factor=2)


def test_gradcheck():
    teacher = randn(5, 4, seed=1, dtype=torch.float64)
    student = randn(5, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: vd.similarity_loss(s, teacher), student)


def test_by_hand_and_edges():
    # Cosines of the student 1 and 0, of the teacher 1 and 1: two of the four pairs differ, each by 1.
    assert vd.similarity_loss(torch.eye(2) * 3, torch.ones(2, 5)).item() == pytest.approx(0.5)
    same = randn(6, 4).requires_grad_()
    loss = vd.similarity_loss(same, same.detach() * 2)
    loss.backward()
    assert loss.item() < 1e-12 and same.grad.abs().max() < 1e-6
    none = torch.zeros(0, 4, requires_grad=True)
    vd.similarity_loss(none, torch.zeros(0, 3)).backward()
    assert vd.similarity_loss(none, torch.zeros(0, 3)).item() == 0 and none.grad.shape == (0, 4)
    # A row of zeros has no direction, and is no NaN.
    assert vd.similarity_loss(torch.zeros(2, 3), torch.eye(2)).item() == pytest.approx(0.5)


def test_only_the_student_gets_a_gradient_under_autocast_too():
    student, teacher = randn(6, 4).requires_grad_(), randn(6, 8, seed=1).requires_grad_()
    loss = vd.similarity_loss(student, teacher)
    loss.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vd.similarity_loss(student, teacher), loss)


def test_nothing_larger_than_the_matrix_is_allocated():
    student, teacher = randn(300, 8, seed=1).requires_grad_(), randn(300, 12, seed=2)
    with LargestAllocation() as largest:
        vd.similarity_loss(student, teacher).backward()
    assert 0 < largest.nbytes <= 4 * 300 * 300


def test_compiles_as_one_graph():
    teacher = randn(9, 8, seed=1)
    assert_compiles(lambda s: vd.similarity_loss(s * 2, teacher) * 3, randn(9, 5))


@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        (torch.randn(3, 4), torch.randn(4, 4), ValueError, "teacher: expected 3 rows as student, got 4"),
        (torch.randn(3, 4), torch.randn(3, 2, 4), ValueError, "teacher: expected 2 dimensions"),
        (torch.ones(3, 4, dtype=torch.int64), torch.randn(3, 4), TypeError, "student: expected float32"),
        ([1.0], torch.randn(3, 4), TypeError, "student: expected a tensor"),
    ],
)
def test_bad_input_is_named(student, teacher, error, message):
    with pytest.raises(error, match=f"^{message}"):
        vd.similarity_loss(student, teacher)
