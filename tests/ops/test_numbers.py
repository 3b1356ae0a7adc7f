"""Values at the edges of float32: high and low temperatures, large common parts, rows without mass, huge rows."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd
from tests.reference_cases import identity_pairs
from tests.spans import make_pairs
from tests.vocabularies import make_matched, randn

TEMPERATURES = [10.0**n for n in range(-3, 7)]


def both(loss, student, *others):
    """The loss and its gradient in float32 by the kernels, and by the reference in float64."""
    results = []
    for module, cast in ((vd, lambda x: x), (vd.reference, lambda x: x.double())):
        leaf = cast(student).detach().clone().requires_grad_()
        value = loss(module, leaf, *(cast(x) for x in others))
        results += [value.detach().double(), torch.autograd.grad(value.sum(), leaf)[0].double()]
    return results


def apart(got, want):
    return float((got - want).norm() / want.norm())


def check(loss, student, *others, signed=False, bound=1e-4):
    """The loss and its gradient are as exact as ``bound``, and it is never negative but for what is no divergence."""
    got, grad, want, wanted = both(loss, student, *others)
    assert signed or (got >= 0).all()
    assert apart(got, want) < bound
    assert apart(grad, wanted) < bound


def product_bound(temperature):
    """Products of hidden states and weights are rounded before the temperature divides what they differ by."""
    return 1e-4 + 1e-6 / temperature


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "jsd"])
def test_span_divergences_at_any_temperature(divergence, temperature, near):
    pairs, student, teacher = identity_pairs(16), randn(16, 768), randn(16, 768, seed=1)
    if near:
        teacher = student + 1e-3 * teacher
    loss, grad, want, wanted = both(
        lambda m, s, t: m.span_loss(s, t, pairs, divergence=divergence, temperature=temperature, reduction="none"),
        student, teacher,
    )  # fmt: skip
    assert (loss >= 0).all()
    assert apart(loss, want) < 1e-4
    if temperature > 0.05:  # below it is what rounding leaves of one column's share
        assert apart(grad, wanted) < 1e-4


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", ["renormalize", "rest", "drop", "remapped"])
def test_divergences_over_a_vocabulary_at_any_temperature(name, temperature, near):
    student, teacher = randn(8, 3000), randn(8, 2500, seed=1)
    matched = make_matched(3000, 2500, 2000)
    table = vd.RemapTable(torch.arange(2501), torch.arange(2500), student_vocab_size=3000, unk_id=0, pad_id=0)
    if near:
        student = 1e-3 * student
        student[:, :2500] += teacher
        matched = vd.MatchedVocab(torch.arange(2000), torch.arange(2000))

    def loss(module, s, t):
        options = {"temperature": temperature, "reduction": "none"}
        if name == "remapped":
            return module.remapped_kl(s, t, table, **options)
        return module.matched_kl(s, t, matched, unmatched=name, **options)

    if name == "drop" and near and temperature < 0.01:
        pytest.skip("what one column leaves to all others is less than float32 holds")
    check(loss, student, teacher, signed=name == "drop")


@pytest.mark.parametrize("others", [1, 5, 1000])
@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("linear", [False, True])
def test_classes_of_one_size_at_any_temperature(linear, temperature, near, others):
    """As many unmatched columns on both sides: at a high temperature their masses are the same but for few digits."""
    columns, hidden = 2000 + others, randn(8, 32)
    matched = make_matched(columns, columns, 2000)
    student, teacher = randn(columns, 32, seed=2, scale=0.2), randn(columns, 32, seed=3, scale=0.2)
    if near:
        teacher = student + 0.03 * teacher
        matched = vd.MatchedVocab(torch.arange(2000), torch.arange(2000))
    options = {"temperature": temperature, "reduction": "none", "unmatched": "rest"}
    if linear:
        check(lambda m, h, w, t: m.linear_matched_kl(h, w, hidden.to(h.dtype), t, matched, **options),
              hidden, student, teacher, bound=product_bound(temperature))  # fmt: skip
    else:
        check(lambda m, s, t: m.matched_kl(s, t, matched, **options), hidden @ student.T, hidden @ teacher.T)


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("unmatched", ["renormalize", "rest", "drop"])
def test_linear_divergences_at_any_temperature(unmatched, temperature, near):
    """Rows of several panels, and one among them whose student knows nothing of the teacher."""
    hidden, rows = randn(50, 24), randn(50, 24, seed=1)
    student, teacher = randn(900, 24, seed=2, scale=0.2), randn(700, 24, seed=3, scale=0.2)
    matched, bias = make_matched(900, 700, 500), randn(900, seed=4)
    if near:
        student, bias = 0.03 * student, 0.03 * bias
        student[:700] += teacher
        rows = hidden.clone()
        rows[7] = -rows[7]
        matched = vd.MatchedVocab(torch.arange(500), torch.arange(500))

    def loss(module, h, w, b, r, t):
        return module.linear_matched_kl(
            h, w, r, t, matched, student_bias=b, temperature=temperature, unmatched=unmatched, reduction="none"
        )

    check(loss, hidden, student, bias, rows, teacher, signed=unmatched == "drop", bound=product_bound(temperature))


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
