"""The Triton matched_kl kernel in the interpreter against the float64 reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from vocabdistil.triton_kernels import matched_kl as kernels

import vocabdistil as vd
from tests.compiling import assert_compiles
from tests.numbers_backend import (  # noqa: F401
    test_classes_of_one_size_at_any_temperature,
    test_divergences_over_a_matched_vocabulary_at_any_temperature,
)
from tests.spans import make_pairs
from tests.tolerances import assert_norm_close
from tests.upstream import assert_guesses_the_upstream_gradient
from tests.vocabularies import make_matched, randn

# -inf less -inf, and more, in lanes that are masked afterwards: numpy, which plays the GPU here, tells of it.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")

UNMATCHED = ["renormalize", "rest", "drop"]
INF = float("inf")


@pytest.fixture(params=["whole rows", "turns"], autouse=True)
def rows(request, monkeypatch):
    """Rows that stay in registers, and rows that are read twice, a block of columns at a time."""
    if request.param == "turns":
        monkeypatch.setattr(kernels, "RESIDENT", 1)
        monkeypatch.setattr(kernels, "TURN", 1024)


def run(module, student, teacher, matched, **options):
    student = student.clone().requires_grad_()
    loss = module.matched_kl(student, teacher, matched, **options)
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
    (loss * upstream).sum().backward()
    return loss.detach(), student.grad


def compare(student, teacher, matched, **options):
    loss, grad = run(vd, student, teacher, matched, backend="triton", **options)
    want_loss, want_grad = run(vd.reference, student.double(), teacher.double(), matched, **options)
    dtype = student.dtype
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == exact and grad.dtype == dtype
    assert_norm_close(loss, want_loss, exact, "loss", 2)
    # The interpreter cuts a float32 to bfloat16 instead of rounding.
    assert_norm_close(grad, want_grad, dtype, "gradient", 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("unmatched", UNMATCHED)
@pytest.mark.parametrize(("v_s", "v_t", "v_m"), [(2, 3, 1), (50, 33, 32), (1100, 2100, 900)])
def test_against_float64(v_s, v_t, v_m, unmatched, dtype):
    student, teacher = randn(3, v_s, seed=1, dtype=dtype, scale=2), randn(3, v_t, seed=2, dtype=dtype, scale=2)
    compare(student, teacher, make_matched(v_s, v_t, v_m), unmatched=unmatched, temperature=1.7)


@pytest.mark.parametrize(("pooling", "reduction"), [("mean", "batchmean"), ("sum", "none")])
@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_pairs(unmatched, pooling, reduction):
    pairs, n_s, n_t = make_pairs(9, seed=3, gaps=True, empty=True)
    options = {"pairs": pairs, "pooling": pooling, "unmatched": unmatched, "reduction": reduction}
    compare(randn(n_s, 20, seed=1), randn(n_t, 30, seed=2), make_matched(20, 30, 17), temperature=2.0, **options)


@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_minus_infinity_and_far_apart(unmatched):
    matched = make_matched(40, 50, 30)
    student, teacher = randn(4, 40, seed=1, scale=20), randn(4, 50, seed=2, scale=20)
    s, t = matched.student_ids, matched.teacher_ids
    teacher[0, t[:7]] = student[0, s[:7]] = -INF
    teacher[1, t[1:]] = -INF
    student[2, s] += 400
    student[3, s] -= 400
    compare(student, teacher, matched, unmatched=unmatched)


@pytest.mark.parametrize("unmatched", ["renormalize", "rest"])
def test_gradient_is_zero_where_both_sides_are_equal(unmatched):
    x, ids = randn(3, 60), torch.randperm(60)[:20].sort().values
    loss, grad = run(vd, x, x, vd.MatchedVocab(ids, ids), unmatched=unmatched, backend="triton")
    assert loss.item() == 0 and torch.count_nonzero(grad) == 0


@pytest.mark.parametrize("unmatched", UNMATCHED)
@pytest.mark.parametrize("v_m", [1, 3])
def test_few_columns_and_all_mass_on_one(v_m, unmatched):
    student, teacher = randn(4, 5, seed=1), randn(4, 6, seed=2)
    matched = make_matched(5, 6, v_m)
    student[1] = teacher[1] = -INF
    student[1, matched.student_ids[0]] = teacher[1, matched.teacher_ids[0]] = 3.0
    teacher[2, matched.teacher_ids[0]] = 300.0
    compare(student, teacher, matched, unmatched=unmatched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upstream_gradients_are_folded_in_once(dtype):
    matched, teacher = make_matched(40, 50, 30), randn(6, 50, seed=2, dtype=dtype)
    grads = []
    for upstream in (1.0, -4.0, 2.0**-30):
        leaf = randn(6, 40, seed=1, dtype=dtype).requires_grad_()
        vd.matched_kl(leaf, teacher, matched, backend="triton").backward(torch.tensor(upstream))
        grads.append(leaf.grad / upstream)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
    loss = partial(vd.matched_kl, teacher_logits=teacher, matched=matched, backend="triton")
    assert_guesses_the_upstream_gradient(loss, randn(6, 40, seed=1, dtype=dtype))


@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_every_element_of_the_results_is_written(unmatched):
    pairs, n_s, n_t = make_pairs(9, seed=3, gaps=True, empty=True)
    student, teacher, matched = randn(n_s, 20, seed=1), randn(n_t, 30, seed=2), make_matched(20, 30, 17)
    scale, loss, grad = torch.ones(9), torch.full((9,), float("nan")), torch.full((n_s, 20), float("nan"))
    spans = (pairs.student_start, pairs.student_end, pairs.teacher_start, pairs.teacher_end)
    total = kernels.matched_kl(
        student, teacher, spans, matched.student_ids, matched.teacher_ids, scale, UNMATCHED.index(unmatched), True, 1.0,
        True, loss, grad,
    )  # fmt: skip
    assert total.isfinite() and loss.isfinite().all() and grad.isfinite().all()


def test_tables_are_kept_until_the_ids_change(monkeypatch):
    made = []
    make_tables = kernels._Tables._make
    monkeypatch.setattr(kernels._Tables, "_make", staticmethod(lambda *a: made.append(a) or make_tables(*a)))
    matched, other = make_matched(12, 20, 8), make_matched(12, 20, 8, seed=1)
    inputs = randn(3, 12), randn(3, 20, seed=1)
    for _ in range(2):
        compare(*inputs, matched)
    assert len(made) == 1
    compare(*inputs, matched, unmatched="rest")
    compare(inputs[0], randn(3, 25, seed=1), matched)
    assert len(made) == 3
    matched.teacher_ids.copy_(other.teacher_ids)
    compare(*inputs, matched)
    matched.student_ids = other.student_ids
    compare(*inputs, matched)
    compare(*inputs, vd.MatchedVocab(matched.teacher_ids.flip(0), other.student_ids))
    assert len(made) == 6
    kept = len(kernels._tables._of)
    del matched, other
    made.clear()
    assert len(kernels._tables._of) < kept


def test_compiles_as_one_graph():
    matched, teacher = make_matched(12, 20, 8), randn(3, 20, seed=1, dtype=torch.bfloat16)

    def loss(x):
        return vd.matched_kl(x * 2, teacher, matched, unmatched="rest", backend="triton") * 3

    assert_compiles(loss, randn(3, 12, dtype=torch.bfloat16))


def test_strides_and_no_rows():
    matched = make_matched(12, 20, 8)
    student, teacher = randn(4, 24)[:, :12], randn(4, 40, seed=1)[:, :20]
    for got, want in zip(
        run(vd, student, teacher, matched, backend="triton"), run(vd.reference, student, teacher, matched), strict=True
    ):
        torch.testing.assert_close(got, want)
    loss, grad = run(vd, student[:0], teacher[:0], matched, backend="triton")
    assert loss.item() == 0 and grad.shape == (0, 12)
