"""Values at the edges of float32: high and low temperatures, large common parts, rows without mass, huge rows."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd
from tests.numbers_backend import *  # noqa: F403
from tests.numbers_backend import both
from tests.reference_cases import identity_pairs
from tests.spans import make_pairs
from tests.vocabularies import make_matched, randn


@pytest.fixture
def backend():
    return "cpu"


@pytest.fixture
def device():
    return "cpu"


@pytest.mark.parametrize("divergence", ["kl", "mse", "cosine"])
def test_hidden_states_with_a_large_part_in_common(divergence):
    """Where float32 has no more digits, so has the reference none."""
    pairs, n_s, n_t = make_pairs(40, seed=2)
    student, teacher = 1e4 + randn(n_s, 256), 1e4 + randn(n_t, 256, seed=1)
    loss, _, want, _ = both(lambda m, s, t: m.span_loss(s, t, pairs, divergence=divergence), student, teacher)
    plain = vd.reference.span_loss(student, teacher, pairs, divergence=divergence).double()
    assert abs(loss - want) <= 2 * abs(plain - want) + 1e-6 * want


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e15, 1e30, 3e38])
def test_cosines_of_rows_of_any_size(size):
    pairs, student, teacher = identity_pairs(5), randn(5, 64), randn(5, 64, seed=1)
    student = student / student.abs().max() * size
    masks = torch.ones(5, 1), torch.ones(5, 1)
    for loss in (
        lambda m, s, t: m.span_loss(s, t, pairs, divergence="cosine"),
        lambda m, s, t: m.contrastive(s, t, pairs),
        lambda m, s, t: m.similarity_loss(s, t),
        lambda m, s, t: m.pooled_loss(s[:, None], t[:, None], *(x.bool() for x in masks)),
    ):
        got, grad, want, wanted = both(loss, student, teacher)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert (grad - wanted).norm() <= 1e-4 * wanted.norm() + 1e-37


@pytest.mark.parametrize("module", [vd, vd.reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("unmatched", ["renormalize", "rest"])
def test_rows_of_logits_without_mass(unmatched, module):
    """A teacher that says nothing asks for nothing; a student that says nothing is infinitely far from it."""
    matched = make_matched(12, 10, 7)
    table = vd.RemapTable(torch.arange(9), torch.arange(8), student_vocab_size=12, unk_id=0, pad_id=0)
    student, teacher = randn(4, 12), randn(4, 10, seed=1)
    teacher[1], student[2] = -float("inf"), -float("inf")
    leaf = student.clone().requires_grad_()
    losses = [
        module.matched_kl(leaf, teacher, matched, unmatched=unmatched, reduction="none"),
        module.remapped_kl(leaf, teacher, table, reduction="none"),
    ]
    for loss in losses:
        assert loss[1] == 0 and loss[2] == float("inf")
        assert torch.isfinite(loss[[0, 3]]).all() and (loss[[0, 3]] > 0).all()
        (grad,) = torch.autograd.grad(loss[[0, 1, 3]].sum(), leaf)
        assert torch.count_nonzero(grad[[1]]) == 0
        assert torch.isfinite(grad[[0, 3]]).all() and (grad[[0, 3]].abs().sum(1) > 0).all()


def test_linear_rows_without_mass():
    hidden, weight = randn(3, 4).abs(), randn(9, 4, seed=1)
    bias = torch.full((9,), -float("inf"))
    matched = vd.MatchedVocab(torch.arange(5), torch.arange(5))
    student = hidden.clone().requires_grad_()
    loss = vd.linear_matched_kl(student, weight, hidden, weight, matched, teacher_bias=bias)
    loss.backward()
    assert loss.item() == 0 and torch.count_nonzero(student.grad) == 0


@pytest.mark.parametrize("last", [-87.0, -100.0, 50.0])
def test_jsd_where_a_share_is_subnormal(last):
    student, teacher = torch.zeros(1, 8), torch.zeros(1, 8)
    student[0, 7], teacher[0, 7] = last, 50.0
    got, grad, want, wanted = both(
        lambda m, s, t: m.span_loss(s, t, identity_pairs(1), divergence="jsd"), student, teacher
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)
