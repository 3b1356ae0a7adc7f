"""The vocabulary losses against the float64 reference: needs a CUDA device."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd
from tests.spans import make_pairs
from tests.tolerances import assert_norm_close
from tests.vocabularies import make_matched

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("unmatched", ["renormalize", "rest", "drop"])
@pytest.mark.parametrize("paired", [False, True])
def test_matched_kl_against_float64(paired, unmatched, dtype):
    pairs, n_s, n_t = make_pairs(300, seed=3, gaps=True, empty=True)
    pairs, n_s, n_t = (pairs.to("cuda"), n_s, n_t) if paired else (None, 300, 300)
    matched = make_matched(5031, 20000, 4700)
    student, teacher = (torch.randn(n, v, device="cuda").to(dtype) for n, v in ((n_s, 5031), (n_t, 20000)))

    def both(module, s, t, **options):
        leaf = s.clone().requires_grad_()
        loss = module.matched_kl(leaf, t, matched, pairs=pairs, unmatched=unmatched, temperature=1.7, **options)
        loss.backward()
        return loss.detach(), leaf.grad

    loss, grad = both(vd, student, teacher, backend="triton")
    again = both(vd, student, teacher, backend="triton")
    want, want_grad = both(vd.reference, student.double(), teacher.double())
    assert torch.equal(loss, again[0]) and torch.equal(grad, again[1])
    assert_norm_close(loss, want, torch.float64 if dtype == torch.float64 else torch.float32, "loss", 2)
    assert_norm_close(grad, want_grad, dtype, "gradient", 2)


@pytest.mark.parametrize("unmatched", ["renormalize", "rest", "drop"])
def test_linear_matched_kl_against_float64(unmatched):
    matched = make_matched(5031, 20000, 4700)
    tensors = [torch.randn(*shape, device="cuda") / 8 for shape in ((700, 64), (5031, 64), (700, 96), (20000, 96))]

    def all_of(module, dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_(i < 2) for i, x in enumerate(tensors)]
        loss = module.linear_matched_kl(*leaves, matched, unmatched=unmatched)
        loss.backward()
        return loss.detach(), leaves[0].grad, leaves[1].grad

    for got, want in zip(all_of(vd, torch.float32), all_of(vd.reference, torch.float64), strict=True):
        assert_norm_close(got, want, torch.float32, unmatched, 10)


@pytest.mark.parametrize("negatives", [-1, 32])
def test_contrastive_is_deterministic_and_reproducible(negatives):
    pairs, n_s, n_t = make_pairs(3000, seed=1, gaps=True, empty=True)
    pairs = pairs.to("cuda")
    student, teacher = torch.randn(n_s, 64, device="cuda"), torch.randn(n_t, 64, device="cuda")

    def once():
        leaf = student.clone().requires_grad_()
        generator = torch.Generator("cuda").manual_seed(1)
        loss = vd.contrastive(leaf, teacher, pairs, negatives=negatives, generator=generator)
        loss.backward()
        return loss.detach(), leaf.grad

    first, second = once(), once()
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    if negatives == -1:
        want = vd.reference.contrastive(student.double(), teacher.double(), pairs)
        assert_norm_close(first[0], want, torch.float32, "loss", 2)


@pytest.mark.parametrize("unmatched", ["renormalize", "rest"])
def test_matched_kl_of_equal_sides_is_zero(unmatched):
    x, ids = torch.randn(200, 5031, device="cuda"), torch.randperm(5031)[:4000].sort().values
    leaf = x.clone().requires_grad_()
    matched = vd.MatchedVocab(ids, ids)
    loss = vd.matched_kl(leaf, x, matched, unmatched=unmatched, temperature=1.3, backend="triton")
    loss.backward()
    assert loss.item() == 0 and torch.count_nonzero(leaf.grad) == 0
