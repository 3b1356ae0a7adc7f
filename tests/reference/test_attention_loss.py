from __future__ import annotations

import pytest
import torch

from tests.reference_cases import F64, both_spans, no_pairs, rows
from tests.tolerances import LOSS, assert_close
from vocabdistil.alignment.spans import SpanPairs
from vocabdistil.reference import attention_loss, attention_mse


def maps(seed, heads, length, batch=2, grad=False):
    flat = rows(batch * heads * length, length, seed=seed)
    return flat.view(batch, heads, length, length).softmax(-1).detach().requires_grad_(grad)


def some_pairs():
    """Two texts of 5 student and 4 teacher tokens: M:N, gaps, an empty span on each side, another number per text."""
    return SpanPairs([0, 2, 2, 4, 6, 9], [2, 2, 4, 5, 9, 10], [0, 1, 2, 2, 4, 7], [1, 2, 2, 4, 5, 8])


def naive(student, teacher, pairs):
    total, count = student.new_zeros(()), 0
    lengths = student.shape[-1], teacher.shape[-1]
    full = [spans for spans in both_spans(pairs) if all(end > start for start, end in spans)]
    for b in range(student.shape[0]):
        mine = [spans for spans in full if spans[0][0] // lengths[0] == b]
        for h in range(student.shape[1]):
            for p in mine:
                for q in mine:
                    means = []
                    for side, x in enumerate((student, teacher)):
                        i, j = (slice(*(at - b * lengths[side] for at in s[side])) for s in (p, q))
                        means.append(x[b, h, i, j].sum(1).mean(0))
                    total = total + (means[0] - means[1]) ** 2
                    count += 1
    return total / count


def test_by_hand():
    # Two student tokens are one pair. Rows averaged, columns added: [[0.75, 0.25], [0.5, 0.5]].
    student = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]], dtype=F64)[None, None]
    teacher = torch.tensor([[0.75, 0.25], [1.0, 0.0]], dtype=F64)[None, None]
    pairs = SpanPairs([0, 2], [2, 3], [0, 1], [1, 2])
    assert attention_loss(student, teacher, pairs).item() == (0 + 0 + 0.25 + 0.25) / 4


def test_equals_a_loop():
    student, teachers = maps(0, 3, 5), [maps(1, 3, 4), maps(2, 3, 4)]
    mean = (teachers[0] + teachers[1]) / 2
    assert_close(attention_loss(student, teachers, some_pairs()), naive(student, mean, some_pairs()), LOSS, F64)
    few = [maps(3, 2, 5), maps(4, 2, 5)]
    expected = naive(((few[0] + few[1]) / 2).mean(1, keepdim=True), mean.mean(1, keepdim=True), some_pairs())
    assert_close(attention_loss(few, teachers, some_pairs(), average_heads=True), expected, LOSS, F64)


def test_tokens_of_no_pair_reach_neither_loss_nor_gradient():
    pairs = SpanPairs([0, 1, 5], [1, 3, 7], [0, 1, 4], [1, 3, 6])
    student, teacher = maps(0, 2, 5), maps(1, 2, 4)
    expected = attention_loss(student, teacher, pairs)
    student[:, :, 3:] = float("nan")
    student.requires_grad_()
    loss = attention_loss(student, teacher, pairs)
    loss.backward()
    assert torch.equal(loss, expected)
    assert student.grad[:, :, 3:].eq(0).all() and student.grad[:, :, :2, :2].ne(0).all()


def test_gradcheck_and_no_pairs():
    teacher = maps(1, 2, 4)
    student = maps(0, 2, 5, grad=True)
    assert torch.autograd.gradcheck(lambda s: attention_loss(s, teacher, some_pairs()), student)
    for pairs in (no_pairs(), SpanPairs([3], [3], [0], [1])):
        loss = attention_loss(student, teacher, pairs)
        (grad,) = torch.autograd.grad(loss, student)
        assert loss.item() == 0 and grad.eq(0).all()


def test_attention_mse():
    student, teachers = maps(0, 4, 3, grad=True), [maps(s, 4, 3) for s in (1, 2)]
    mean = (teachers[0] + teachers[1]) / 2
    assert_close(attention_mse(student, teachers), (student - mean).square().mean(), LOSS, F64)
    few = maps(3, 2, 3)
    expected = (few.mean(1) - mean.mean(1)).square().mean()
    assert_close(attention_mse(few, teachers, average_heads=True), expected, LOSS, F64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    kept = torch.cat([(student - mean)[0, :, :2, :2].flatten(), (student - mean)[1, :, :1, :1].flatten()])
    assert_close(attention_mse(student, teachers, attention_mask=mask), kept.square().mean(), LOSS, F64)
    assert attention_mse(student, teachers, attention_mask=torch.zeros(2, 3)).item() == 0
    assert torch.autograd.gradcheck(lambda a: attention_mse(a, teachers, attention_mask=mask), student)
    with pytest.raises(ValueError, match="teacher: expected maps of shape"):
        attention_mse(few, teachers)
    with pytest.raises(ValueError, match="teacher: expected maps of shape"):
        attention_mse(student, maps(1, 4, 2))
