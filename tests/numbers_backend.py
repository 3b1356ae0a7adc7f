"""The divergences at the edges of float32, which every backend has to reach against the float64 reference: each loss at
temperatures from 1e-3 to 1e6, of rows far apart and of rows that are close. A tier imports these tests and says by its
fixtures which ``backend`` runs on which ``device``."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd
from tests.reference_cases import identity_pairs
from tests.vocabularies import make_matched, randn

TEMPERATURES = [10.0**n for n in (-3, 0, 3, 6)]


def both(loss, student, *others, device="cpu"):
    """The loss and its gradient in float32 by the kernels, and by the reference in float64."""
    results = []
    for module, cast in ((vd, lambda x: x.to(device)), (vd.reference, lambda x: x.double())):
        leaf = cast(student).detach().clone().requires_grad_()
        value = loss(module, leaf, *(cast(x) for x in others))
        grad = torch.autograd.grad(value.sum(), leaf)[0]
        results += [value.detach().cpu().double(), grad.cpu().double()]
    return results


def exact(got, want, bound=1e-4):
    """Up to what float32 holds no number for."""
    return float((got - want).norm()) <= bound * float(want.norm()) + 1e-37


def check(loss, student, *others, signed=False, bound=1e-4, device="cpu"):
    """The loss and its gradient are as exact as ``bound``, and it is never negative but for what is no divergence."""
    got, grad, want, wanted = both(loss, student, *others, device=device)
    assert signed or (got >= 0).all()
    assert exact(got, want, bound)
    assert exact(grad, wanted, bound)


def chosen(module, backend, **options):
    """Options of a loss: the backend is that of the kernels alone."""
    return {**options, "reduction": "none", "backend": backend if module is vd else None}


def product_bound(temperature):
    """Products of hidden states and weights are rounded before the temperature divides what they differ by."""
    return 1e-4 + 1e-6 / temperature


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "jsd"])
def test_span_divergences_at_any_temperature(divergence, temperature, near, backend, device):
    pairs, student, teacher = identity_pairs(4), randn(4, 768), randn(4, 768, seed=1)
    if near:
        teacher = student + 1e-3 * teacher
    loss, grad, want, wanted = both(
        lambda m, s, t: m.span_loss(
            s, t, pairs.to(s.device), divergence=divergence, temperature=temperature, beta=0.4, **chosen(m, backend)
        ),
        student, teacher, device=device,
    )  # fmt: skip
    assert (loss >= 0).all()
    assert exact(loss, want)
    if temperature > 0.05:  # below it is what rounding leaves of one column's share
        assert exact(grad, wanted)


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("unmatched", ["renormalize", "rest", "drop"])
def test_divergences_over_a_matched_vocabulary_at_any_temperature(unmatched, temperature, near, backend, device):
    student, teacher = randn(2, 3000), randn(2, 2500, seed=1)
    matched = make_matched(3000, 2500, 2000)
    if near:
        student = 1e-3 * student
        student[:, :2500] += teacher
        matched = vd.MatchedVocab(torch.arange(2000), torch.arange(2000))
    if unmatched == "drop" and near and temperature < 0.01:
        pytest.skip("what one column leaves to all others is less than float32 holds")
    options = {"temperature": temperature, "unmatched": unmatched}
    check(
        lambda m, s, t: m.matched_kl(s, t, matched, **chosen(m, backend, **options)),
        student, teacher, signed=unmatched == "drop", device=device,
    )  # fmt: skip


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("combine", ["sum", "logsumexp"])
def test_divergences_over_a_remapped_vocabulary_at_any_temperature(combine, temperature, near, backend, device):
    student, teacher = randn(4, 120), randn(4, 100, seed=1)
    table = vd.RemapTable(torch.arange(101), torch.arange(100), student_vocab_size=120, unk_id=0, pad_id=0)
    if near:
        student = 1e-3 * student
        student[:, :100] += teacher
    options = {"temperature": temperature, "combine": combine}
    check(
        lambda m, s, t: m.remapped_kl(s, t, table, **chosen(m, backend, **options)), student, teacher, device=device
    )


@pytest.mark.parametrize("others", [1, 1000])
@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_classes_of_one_size_at_any_temperature(temperature, near, others, backend, device):
    """As many unmatched columns on both sides: at a high temperature their masses are the same but for few digits."""
    hidden, student, teacher, matched = classes_of_one_size(near, others)
    options = {"temperature": temperature, "unmatched": "rest"}
    check(
        lambda m, s, t: m.matched_kl(s, t, matched, **chosen(m, backend, **options)),
        hidden @ student.T, hidden @ teacher.T, device=device,
    )  # fmt: skip


@pytest.mark.parametrize("others", [1, 1000])
@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_linear_classes_of_one_size_at_any_temperature(temperature, near, others, backend, device):
    hidden, student, teacher, matched = classes_of_one_size(near, others)
    options = {"temperature": temperature, "unmatched": "rest"}
    check(
        lambda m, h, w, t: m.linear_matched_kl(h, w, hidden.to(h), t, matched, **chosen(m, backend, **options)),
        hidden, student, teacher, bound=product_bound(temperature), device=device,
    )  # fmt: skip


def classes_of_one_size(near, others):
    columns = 2000 + others
    matched = make_matched(columns, columns, 2000)
    student, teacher = randn(columns, 32, seed=2, scale=0.2), randn(columns, 32, seed=3, scale=0.2)
    if near:
        teacher = student + 0.03 * teacher
        matched = vd.MatchedVocab(torch.arange(2000), torch.arange(2000))
    return randn(2, 32), student, teacher, matched


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("unmatched", ["renormalize", "rest", "drop"])
def test_linear_divergences_at_any_temperature(unmatched, temperature, near, backend, device):
    """One row among them whose student knows nothing of the teacher; on the CPU rows of several panels."""
    count, v_s, v_t, v_m = (50, 900, 700, 500) if backend == "cpu" else (3, 120, 90, 60)
    hidden, rows = randn(count, 24), randn(count, 24, seed=1)
    student, teacher = randn(v_s, 24, seed=2, scale=0.2), randn(v_t, 24, seed=3, scale=0.2)
    matched, bias = make_matched(v_s, v_t, v_m), randn(v_s, seed=4)
    if near:
        student, bias = 0.03 * student, 0.03 * bias
        student[:v_t] += teacher
        rows = hidden.clone()
        rows[2] = -rows[2]
        matched = vd.MatchedVocab(torch.arange(v_m), torch.arange(v_m))
    options = {"temperature": temperature, "unmatched": unmatched}
    check(
        lambda m, h, w, b, r, t: m.linear_matched_kl(
            h, w, r, t, matched, student_bias=b, **chosen(m, backend, **options)
        ),
        hidden, student, bias, rows, teacher, signed=unmatched == "drop", bound=product_bound(temperature),
        device=device,
    )  # fmt: skip
