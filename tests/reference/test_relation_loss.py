from __future__ import annotations

import math

import pytest
import torch

from tests.reference_cases import F64, both_spans, identity_pairs, mixed_pairs, naive_kl, no_pairs, rows
from tests.tolerances import LOSS, VALUE, assert_close
from vocabdistil.alignment.spans import SpanPairs
from vocabdistil.reference import relation_loss


def naive(student, teacher, pairs, heads):
    """``[P]``, pair by pair and head by head."""
    (_, l_s, d_s), (_, _, d_t) = student.shape, teacher.shape
    s, t = student.flatten(0, 1), teacher.flatten(0, 1)
    means = {}
    for p, ((a, b), (c, d)) in enumerate(both_spans(pairs)):
        if b > a and d > c:
            means[p] = a // l_s, s[a:b].mean(0).view(heads, -1), t[c:d].mean(0).view(heads, -1)
    losses = [student.new_zeros(())] * len(pairs)
    for p, (text, x, y) in means.items():
        others = [value for value in means.values() if value[0] == text]
        for h in range(heads):
            r = torch.stack([x[h] @ other[1][h] for other in others]) / math.sqrt(d_s / heads)
            q = torch.stack([y[h] @ other[2][h] for other in others]) / math.sqrt(d_t / heads)
            losses[p] = losses[p] + naive_kl(q.softmax(0), r.softmax(0)) / heads
    return torch.stack(losses)


def texts():
    """Two texts of 5 student and 4 teacher tokens: M:N, gaps, and an empty span on each side."""
    return SpanPairs([0, 2, 3, 5, 6, 8], [2, 3, 3, 6, 8, 10], [0, 1, 2, 4, 6, 6], [1, 2, 4, 6, 6, 8])


def test_by_hand():
    # Orthogonal teacher rows, each with itself sqrt(2) ln 3: q = (3, 1) / 4. A student of zeros: r = (1, 1) / 2.
    teacher = math.sqrt(math.sqrt(2) * math.log(3)) * torch.eye(2, dtype=F64)[None]
    losses = relation_loss(torch.zeros(1, 2, 5, dtype=F64), teacher, identity_pairs(2), heads=1, reduction="none")
    assert_close(losses, torch.full((2,), 0.75 * math.log(1.5) + 0.25 * math.log(0.5), dtype=F64), LOSS, F64)
    # Two heads of width 1, each of which sees one of the rows: of the other q = (1, 1) / 2 as well.
    teacher = math.sqrt(math.log(3)) * torch.eye(2, dtype=F64)[None]
    losses = relation_loss(torch.zeros(1, 2, 2, dtype=F64), teacher, identity_pairs(2), heads=2, reduction="none")
    assert_close(losses, torch.full((2,), 0.375 * math.log(1.5) + 0.125 * math.log(0.5), dtype=F64), LOSS, F64)


@pytest.mark.parametrize("heads", [1, 2])
def test_equals_a_loop(heads):
    student, teacher = rows(10, 4, grad=True), rows(8, 6, seed=1)
    for pairs, batch in ((texts(), 2), (mixed_pairs(), 1)):
        s, t = (x[: 7 if batch == 1 else None] for x in (student, teacher))
        s, t = s.view(batch, -1, 4), t[: 6 if batch == 1 else None].view(batch, -1, 6)
        losses = relation_loss(s, t, pairs, heads=heads, reduction="none")
        want = naive(s, t, pairs, heads)
        assert_close(losses, want, LOSS, F64)
        grads = [torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (losses, want)]
        assert_close(*grads, VALUE, F64)
        assert_close(relation_loss(s, t, pairs, heads=heads), want.sum() / pairs.num_nonempty, LOSS, F64)
        assert_close(relation_loss(s, t, pairs, heads=heads, reduction="sum"), want.sum(), LOSS, F64)


def test_a_text_has_its_loss_whatever_stands_beside_it():
    student, teacher = rows(10, 4).view(2, 5, 4), rows(8, 6, seed=1).view(2, 4, 6)
    both = relation_loss(student, teacher, texts(), heads=2, reduction="none")
    pairs = SpanPairs([0, 2, 3], [2, 3, 3], [0, 1, 2], [1, 2, 4])
    alone = relation_loss(student[:1], teacher[:1], pairs, heads=2, reduction="none")
    assert_close(both[:3], alone, LOSS, F64)


def test_kinds_are_averaged_and_may_differ_in_width():
    students = [rows(10, width, seed=width).view(2, 5, width) for width in (4, 2)]
    teachers = [rows(8, width, seed=width).view(2, 4, width) for width in (6, 8)]
    each = [relation_loss(s, t, texts(), heads=2) for s, t in zip(students, teachers, strict=True)]
    assert_close(relation_loss(students, tuple(teachers), texts(), heads=2), sum(each) / 2, LOSS, F64)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_gradcheck(reduction):
    student, teacher = rows(10, 4, grad=True), rows(8, 6, seed=1)
    assert torch.autograd.gradcheck(
        lambda s: relation_loss(s.view(2, 5, 4), teacher.view(2, 4, 6), texts(), heads=2, reduction=reduction), student
    )


def test_no_loss_where_there_is_nothing_to_compare():
    student, teacher = rows(6, 4, grad=True), rows(6, 6, seed=1)
    alone = SpanPairs([0, 3], [2, 4], [0, 3], [1, 6])
    for pairs in (no_pairs(), SpanPairs([0], [0], [0], [1]), alone):
        loss = relation_loss(student.view(2, 3, 4), teacher.view(2, 3, 6), pairs, heads=2)
        (grad,) = torch.autograd.grad(loss, student)
        assert loss.item() == 0 and torch.count_nonzero(grad) == 0


def test_equal_sides_and_half_types():
    x = rows(8, 6).view(2, 4, 6)
    spans = texts().teacher_start, texts().teacher_end
    pairs = SpanPairs(*spans, *spans)
    assert relation_loss(x, x, pairs, heads=3).item() == pytest.approx(0, abs=1e-15)
    half = x.bfloat16()
    loss = relation_loss(half, 2 * half, pairs, heads=3)
    assert loss.dtype == torch.float32
    assert_close(loss, relation_loss(half.double(), 2 * half.double(), pairs, heads=3), LOSS, torch.bfloat16)


def test_no_gradient_reaches_the_teacher():
    teacher = rows(8, 6, grad=True)
    loss = relation_loss(rows(10, 4, grad=True).view(2, 5, 4), teacher.view(2, 4, 6), texts(), heads=2)
    loss.backward()
    assert loss > 0 and teacher.grad is None
