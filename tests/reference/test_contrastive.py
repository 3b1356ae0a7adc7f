from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.reference_cases import F64, both_spans, identity_pairs, mixed_pairs, no_pairs, rows
from tests.tolerances import LOSS, VALUE, assert_close
from vocabdistil.alignment.spans import SpanPairs
from vocabdistil.reference import contrastive


def naive(student, teacher, pairs, temperature, side, weight=None):
    kept = [p for p, ((a, b), (c, d)) in enumerate(both_spans(pairs)) if b > a and d > c]
    s, t = {}, {}
    for p in kept:
        (a, b), (c, d) = both_spans(pairs)[p]
        s[p], t[p] = student[a:b].mean(0), teacher[c:d].mean(0)
        if weight is not None:
            s[p] = weight @ s[p]
    losses = []
    for p in range(len(pairs)):
        if p not in kept:
            losses.append(student.new_zeros(()))
            continue
        anchor, other = (t, s) if side == "student" else (s, t)
        terms = {n: (F.cosine_similarity(anchor[p], other[n], dim=0) / temperature).exp() for n in kept}
        losses.append(-(terms[p] / sum(terms.values())).log())
    return torch.stack(losses)


def test_by_hand():
    # Two orthogonal pairs, each student vector along its teacher's: sim+ = 1, sim- = 0.
    student, teacher = torch.eye(2, dtype=F64), 3 * torch.eye(2, dtype=F64)
    expected = -math.log(math.exp(2) / (math.exp(2) + 1))
    for side in ("student", "teacher"):
        loss = contrastive(student, teacher, identity_pairs(2), temperature=0.5, side=side)
        assert loss.item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_all_negatives_equal_a_loop(side, projected):
    pairs = mixed_pairs()
    student, teacher = rows(7, 3 if projected else 5, grad=True), rows(6, 5, seed=1)
    weight = rows(5, 3, seed=2) if projected else None
    losses = contrastive(student, teacher, pairs, temperature=0.3, side=side, weight=weight, reduction="none")
    expected = naive(student, teacher, pairs, 0.3, side, weight)
    assert_close(losses, expected, LOSS, F64)
    (grad,) = torch.autograd.grad(losses.sum(), student)
    (expected_grad,) = torch.autograd.grad(expected.sum(), student)
    assert_close(grad, expected_grad, VALUE, F64)
    mean = contrastive(student, teacher, pairs, temperature=0.3, side=side, weight=weight)
    assert_close(mean, expected.sum() / 3, LOSS, F64)


def test_sampled_negatives():
    # Orthogonal teacher vectors equal to the student's: each negative adds e^0, so the loss counts them.
    n, k = 12, 4
    eye = torch.eye(n, dtype=F64)
    losses = contrastive(eye, eye, identity_pairs(n), negatives=k, reduction="none")
    assert_close(losses, torch.full((n,), math.log((math.e + k) / math.e), dtype=F64), LOSS, F64)
    assert_close(
        contrastive(eye, eye, identity_pairs(n), negatives=n + 5),
        contrastive(eye, eye, identity_pairs(n)),
        LOSS,
        F64,
    )


def test_sampling_skips_empty_pairs_and_follows_the_generator():
    pairs = SpanPairs(
        torch.arange(40), torch.arange(40) + (torch.arange(40) % 4 > 0), torch.arange(40), torch.arange(1, 41)
    )
    eye = torch.eye(40, dtype=F64)
    losses = contrastive(eye, eye, pairs, negatives=5, reduction="none")
    expected = torch.where(
        torch.arange(40) % 4 > 0, math.log((math.e + 5) / math.e), torch.zeros((), dtype=F64)
    )
    assert_close(losses, expected, LOSS, F64)

    student, teacher = rows(40, 6), rows(40, 6, seed=1)
    drawn = [
        contrastive(
            student, teacher, pairs, negatives=3, generator=torch.Generator().manual_seed(seed)
        ).item()
        for seed in (7, 7, 8)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_every_other_pair_is_drawn_equally_often():
    # The teacher vectors of others have distinct similarities to anchor 0, so its loss tells which one was
    # drawn.
    angles = torch.linspace(0, 3, 6, dtype=F64)
    x = torch.stack([angles.cos(), angles.sin()], 1)
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(6)
    expected = torch.log1p((x[0] @ x.T - 1).exp())
    for _ in range(1000):
        loss = contrastive(
            x, x, identity_pairs(6), negatives=1, side="teacher", reduction="none", generator=generator
        )[0]
        counts[(expected - loss).abs().argmin()] += 1
    assert counts[0] == 0
    assert ((counts[1:] - 200).abs() < 60).all()


@pytest.mark.parametrize("negatives", [-1, 1])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_gradcheck(side, negatives):
    teacher = rows(6, 4, seed=1)
    inputs = (rows(7, 3, grad=True), rows(4, 3, seed=2, grad=True), rows(1, 4, seed=3)[0].requires_grad_())

    def loss(student, weight, bias):
        return contrastive(
            student,
            teacher,
            mixed_pairs(),
            temperature=0.7,
            negatives=negatives,
            side=side,
            weight=weight,
            bias=bias,
            generator=torch.Generator().manual_seed(3),
        )

    assert torch.autograd.gradcheck(loss, inputs)


def test_few_pairs_give_zero():
    student = rows(3, 4, grad=True)
    for pairs in (no_pairs(), SpanPairs([0], [2], [0], [1]), SpanPairs([0], [0], [0], [1])):
        loss = contrastive(student, rows(3, 4, seed=1), pairs, negatives=8)
        (grad,) = torch.autograd.grad(loss, student)
        assert loss.item() == 0 and grad.eq(0).all()


def test_teacher_gets_no_gradient():
    student, teacher = rows(7, 4, grad=True), rows(6, 4, seed=1, grad=True)
    contrastive(student, teacher, mixed_pairs()).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    student, teacher = rows(7, 4, dtype=dtype), rows(6, 4, seed=1, dtype=dtype)
    loss = contrastive(student, teacher, mixed_pairs())
    assert loss.dtype == torch.float32
    assert_close(loss, contrastive(student.double(), teacher.double(), mixed_pairs()), LOSS, dtype)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"negatives": 0}, ValueError, "negatives: expected a number >= 1, or -1 for all, got 0"),
        ({"negatives": 2.0}, TypeError, "negatives: expected an integer, got float"),
        ({"side": "both"}, ValueError, "side: expected one of 'student', 'teacher', got 'both'"),
        ({"temperature": 0}, ValueError, "temperature: expected"),
        ({"weight": torch.zeros(3, 4, dtype=F64)}, ValueError, r"weight: expected shape \(4, 4\)"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        contrastive(rows(7, 4), rows(6, 4), mixed_pairs(), **options)
