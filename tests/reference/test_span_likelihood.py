from __future__ import annotations

import math

import pytest
import torch

from tests.reference_cases import F64, both_spans, mixed_pairs, no_pairs, rows
from tests.tolerances import LOSS, VALUE, assert_close
from vocabdistil.alignment.spans import SpanPairs
from vocabdistil.core.checks import LIKELIHOOD_DIVERGENCES
from vocabdistil.reference import linear_span_likelihood, span_likelihood
from vocabdistil.reference.span_likelihood import binary_divergence


def divergence_of(q, r, kind):
    if kind == "total_variation":
        return abs(q - r)
    rest = 0 if q == 1 else (1 - q) * math.log((1 - q) / (1 - r))
    return (0 if q == 0 else q * math.log(q / r)) + rest


def of_shares(*texts):
    """Logits ``[B, L, V]`` whose softmax these are, each row off by a constant of its own."""
    logits = torch.tensor(texts, dtype=F64).log()
    return logits + torch.arange(logits[..., 0].numel(), dtype=F64).view(logits.shape[:2])[..., None]


ANY = [0.25, 0.25, 0.25, 0.25]
# Two texts. The student reads the first as tokens 3 0 1 2, the teacher as 1 3 0; the second as 2 1 and as 0 2.
STUDENT_IDS = torch.tensor([[3, 0, 1, 2], [2, 1, -100, -100]])
TEACHER_IDS = torch.tensor([[1, 3, 0], [0, 2, 999]])
STUDENT = of_shares(
    [[0.5, 0.2, 0.2, 0.1], [0.3, 0.25, 0.25, 0.2], [0.1, 0.1, 0.4, 0.4], ANY],
    [[0.2, 0.6, 0.1, 0.1], ANY, ANY, ANY],
)
TEACHER = of_shares(
    [[0.1, 0.2, 0.3, 0.4], [0.75, 0.05, 0.1, 0.1], ANY],
    [[0.1, 0.1, 0.5, 0.3], ANY, ANY],
)
# Of the first text token 0 (which nothing predicts), tokens 1 and 2 with token 1, and the last of both; of the second
# its beginning together with what follows, which is left out whole.
PAIRS = SpanPairs([0, 1, 3, 4], [1, 3, 4, 6], [0, 1, 2, 3], [1, 2, 3, 5])


@pytest.mark.parametrize("divergence", LIKELIHOOD_DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 100.0])
def test_by_hand(divergence, temperature):
    each = span_likelihood(
        STUDENT, STUDENT_IDS, TEACHER, TEACHER_IDS, PAIRS, temperature=temperature, divergence=divergence,
        reduction="none",
    )  # fmt: skip
    # p_s(0 after 3) p_s(1 after 3 0) against p_t(3 after 1), and p_s(2 | 3 0 1) against p_t(0 | 1 3).
    power = 1 / temperature
    want = [0.0, *(divergence_of(q**power, r**power, divergence) for q, r in ((0.4, 0.5 * 0.25), (0.75, 0.4))), 0.0]
    torch.testing.assert_close(each, torch.tensor(want, dtype=F64), rtol=1e-12, atol=1e-15)
    options = {"temperature": temperature, "divergence": divergence}
    mean = span_likelihood(STUDENT, STUDENT_IDS, TEACHER, TEACHER_IDS, PAIRS, **options)
    assert mean.item() == pytest.approx(sum(want) / 2, rel=1e-12)  # of the two pairs that are predicted


def test_a_span_from_the_beginning_counts_where_its_first_token_is_predicted_there():
    """A masked model's row is about its own token, the first of a text too."""
    teacher = of_shares([[0.5, 0.2, 0.2, 0.1], [0.1, 0.3, 0.2, 0.4]])
    student = of_shares([[0.2, 0.2, 0.5, 0.1]])
    ids = torch.tensor([[0, 3]]), torch.tensor([[2]])
    pairs = SpanPairs([0], [1], [0], [2])
    loss = span_likelihood(student, ids[1], teacher, ids[0], pairs, student_shift=0, teacher_shift=0, temperature=1.0)
    assert loss.item() == pytest.approx(divergence_of(0.5 * 0.4, 0.5, "kl"), rel=1e-12)
    assert span_likelihood(student, ids[1], teacher, ids[0], pairs, student_shift=0).item() == 0
    second = SpanPairs([0], [1], [1], [2])
    loss = span_likelihood(student, ids[1], teacher, ids[0], second, student_shift=0, temperature=1.0)
    assert loss.item() == pytest.approx(divergence_of(0.1, 0.5, "kl"), rel=1e-12)


def test_what_is_left_out_is_not_read():
    student, teacher = STUDENT.clone(), TEACHER.clone()
    student[0, 3], student[1], teacher[0, 2], teacher[1] = (float("nan"),) * 4
    student.requires_grad_()
    loss = span_likelihood(student, STUDENT_IDS, teacher, TEACHER_IDS, PAIRS)
    loss.backward()
    assert_close(loss, span_likelihood(STUDENT, STUDENT_IDS, TEACHER, TEACHER_IDS, PAIRS), LOSS, F64)
    assert student.grad.isfinite().all() and not student.grad[0, 3].any() and not student.grad[1].any()
    assert student.grad[0, :3].any(-1).all()


def test_a_weight_of_0_leaves_a_pair_out():
    student = STUDENT.clone()
    student[0, 2] = float("nan")
    weights = torch.tensor([1.0, 3.0, 0.0, 1.0], dtype=F64)
    each = span_likelihood(STUDENT, STUDENT_IDS, TEACHER, TEACHER_IDS, PAIRS, reduction="none")
    for reduction, want in (("none", each * weights), ("sum", 3 * each[1]), ("batchmean", 3 * each[1] / 2)):
        options = {"pair_weights": weights, "reduction": reduction}
        assert_close(span_likelihood(student, STUDENT_IDS, TEACHER, TEACHER_IDS, PAIRS, **options), want, LOSS, F64)
    learned = weights.clone().requires_grad_()
    options = {"pair_weights": learned, "reduction": "sum"}
    span_likelihood(STUDENT, STUDENT_IDS, TEACHER, TEACHER_IDS, PAIRS, **options).backward()
    assert_close(learned.grad, each, LOSS, F64)


@pytest.mark.parametrize("divergence", LIKELIHOOD_DIVERGENCES)
def test_a_perfect_pair_is_0(divergence):
    logits, ids = rows(10, 7, dtype=torch.float32).view(2, 5, 7), torch.arange(10).view(2, 5) % 7
    pairs = SpanPairs([1, 3, 7], [3, 5, 8], [1, 3, 7], [3, 5, 8])
    leaf = logits.clone().requires_grad_()
    loss = span_likelihood(leaf, ids, logits, ids, pairs, divergence=divergence)
    loss.backward()
    assert loss.item() == 0 and leaf.grad.abs().max() < 1e-9
    assert span_likelihood(2 * logits, ids, logits, ids, pairs, divergence=divergence).item() > 0


def naive(z_s, z_t, ids_s, ids_t, pairs, temperature, divergence):
    """Of rows that are about their own tokens."""
    losses = []
    for (s0, s1), (t0, t1) in both_spans(pairs):
        if s0 == s1 or t0 == t1:
            losses.append(0.0)
            continue
        r, q = (
            math.prod(torch.softmax(z[i], 0)[ids[i]].item() for i in range(*span)) ** (1 / temperature)
            for z, ids, span in ((z_s, ids_s, (s0, s1)), (z_t, ids_t, (t0, t1)))
        )
        losses.append(divergence_of(q, r, divergence))
    return torch.tensor(losses, dtype=F64)


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
@pytest.mark.parametrize("divergence", LIKELIHOOD_DIVERGENCES)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_products_of_probabilities(dtype, divergence, reduction):
    pairs, ids_s, ids_t = mixed_pairs(), torch.arange(7) % 5, torch.arange(6) % 4
    student, teacher = rows(7, 5, 1, dtype), rows(6, 4, 2, dtype)
    each = naive(student.double(), teacher.double(), ids_s, ids_t, pairs, 3.0, divergence)
    want = {"none": each, "sum": each.sum(), "batchmean": each.sum() / 3}[reduction]
    options = {"temperature": 3.0, "divergence": divergence, "student_shift": 0, "teacher_shift": 0}
    got = span_likelihood(student, ids_s, teacher, ids_t, pairs, reduction=reduction, **options)
    assert got.dtype == (F64 if dtype == F64 else torch.float32)
    assert_close(got, want, LOSS, dtype)


@pytest.mark.parametrize("divergence", LIKELIHOOD_DIVERGENCES)
def test_gradcheck(divergence):
    student = rows(10, 6, 3, grad=True)
    teacher, ids = rows(8, 5, 4).view(2, 4, 5), torch.arange(10).view(2, 5) % 6
    pairs = SpanPairs([0, 1, 3, 6, 8], [1, 3, 4, 8, 8], [0, 1, 2, 5, 6], [1, 2, 4, 6, 7])
    weights = torch.rand(5, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def loss(student, weights):
        return span_likelihood(
            student.view(2, 5, 6), ids, teacher, torch.arange(8).view(2, 4) % 5, pairs, temperature=2.0,
            divergence=divergence, pair_weights=weights, reduction="none",
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (student, weights))
    assert torch.autograd.gradgradcheck(loss, (student, weights))


def test_the_teacher_gets_no_gradient():
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    span_likelihood(student, STUDENT_IDS, teacher, TEACHER_IDS, PAIRS).backward()
    assert teacher.grad is None and student.grad.any()


# Log-likelihoods near 0, moderate, very negative; sure and impossible texts.
LOGS = [0.0, -1e-300, -1e-35, -1e-20, -1e-7, -0.1, -0.6931, -0.7, -3.0, -40.0, -800.0, -1e30, -float("inf")]


@pytest.mark.parametrize("divergence", LIKELIHOOD_DIVERGENCES)
def test_every_gradient_is_finite(divergence):
    log_t, log_s = (x.flatten() for x in torch.meshgrid(*(torch.tensor(LOGS, dtype=F64),) * 2, indexing="ij"))
    log_s.requires_grad_()
    loss = binary_divergence(log_s, log_t, 1.0, divergence)
    (grad,) = torch.autograd.grad(loss.sum(), log_s)
    assert grad.isfinite().all() and grad.float().isfinite().all() and not loss.isnan().any()
    assert torch.equal(loss[log_s == log_t], torch.zeros(len(LOGS), dtype=F64)) and (loss >= 0).all()
    # Infinite only where the student finds impossible what the teacher does not.
    impossible = (log_s == -float("inf")) & (log_t.exp() > 0)
    assert (loss.isinf() == (impossible & (divergence == "kl"))).all()


def test_both_ends_are_exact():
    def kl(log_t, log_s):
        return binary_divergence(torch.tensor([log_s], dtype=F64), torch.tensor([log_t], dtype=F64), 1.0, "kl").item()

    # Of rests x and y alone: x log(x / y) - x + y, and likewise of small likelihoods.
    rest = 2e-12 * math.log(2) - 1e-12
    assert kl(-2e-12, -1e-12) == pytest.approx(rest, rel=1e-9)
    assert kl(math.log(2e-12), math.log(1e-12)) == pytest.approx(rest, rel=1e-9)


def test_a_sure_token_keeps_its_digits():
    """Of likelihoods that are 1 when rounded, the rest stays in proportion."""
    student, teacher = torch.tensor([[[50.0, 0.0]]], dtype=F64), torch.tensor([[[50.0 - math.log(3), 0.0]]], dtype=F64)
    ids, pairs = torch.tensor([[0]]), SpanPairs([0], [1], [0], [1])
    options = {"student_shift": 0, "teacher_shift": 0, "temperature": 1.0}
    rest = math.exp(-50)
    loss = span_likelihood(student, ids, teacher, ids, pairs, divergence="total_variation", **options)
    assert loss.item() == pytest.approx(2 * rest, rel=1e-9)


def test_rows_of_minus_infinity_alone_have_no_gradient():
    student = rows(3, 4).view(1, 3, 4)
    student[0, 1] = -float("inf")
    student.requires_grad_()
    teacher, ids = rows(3, 4, 1).view(1, 3, 4), torch.tensor([[0, 1, 2]])
    pairs = SpanPairs([1, 2], [2, 3], [1, 2], [2, 3])
    each = span_likelihood(student, ids, teacher, ids, pairs, reduction="none")
    each[0].backward()
    assert each[1].isinf() and student.grad.isfinite().all()


def test_one_token_alone_is_sure():
    ones = torch.zeros(1, 3, 1, dtype=F64, requires_grad=True)
    ids, pairs = torch.zeros(1, 3, dtype=torch.int64), SpanPairs([1], [3], [1], [3])
    loss = span_likelihood(ones, ids, ones, ids, pairs)
    loss.backward()
    assert loss.item() == 0 and not ones.grad.any()


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_hidden_states_and_output_layers(dtype):
    pairs, (ids_s, ids_t) = SpanPairs([1, 3, 6], [3, 4, 9], [1, 2, 5], [2, 3, 6]), (
        torch.arange(10).view(2, 5) % 9, torch.arange(8).view(2, 4) % 11,
    )  # fmt: skip
    hidden, weight, bias = (rows(*shape, seed, dtype, True) for seed, shape in enumerate([(10, 3), (9, 3), (1, 9)]))
    teacher, teacher_weight = rows(8, 2, 5, dtype), rows(11, 2, 6, dtype)
    loss = linear_span_likelihood(
        hidden.view(2, 5, 3), weight, ids_s, teacher.view(2, 4, 2), teacher_weight, ids_t, pairs, student_bias=bias[0]
    )
    got = torch.autograd.grad(loss, (hidden, weight, bias))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    logits = (wide[0] @ wide[1].t() + wide[2]).view(2, 5, 9)
    others = (teacher.double() @ teacher_weight.double().t()).view(2, 4, 11)
    want = span_likelihood(logits, ids_s, others, ids_t, pairs)
    assert_close(loss, want, LOSS, dtype)
    for a, b in zip(got, torch.autograd.grad(want, wide), strict=True):
        assert_close(a, b, VALUE, dtype)


@pytest.mark.parametrize("pairs", [no_pairs(), SpanPairs([0, 5], [2, 7], [0, 4], [1, 8])], ids=["none", "beginnings"])
def test_nothing_that_counts(pairs):
    student = rows(10, 6, grad=True)
    ids = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64)
    loss = span_likelihood(student.view(2, 5, 6), ids[0], rows(8, 5).view(2, 4, 5), ids[1], pairs)
    loss.backward()
    assert loss.item() == 0 and not student.grad.any()
