"""GOLD's loss."""

import math

import pytest
import torch

from vocabdistil.alignment.spans import SpanPairs
from vocabdistil.alignment.vocab import MatchedVocab
from vocabdistil.reference import gold_loss


def pairs(*spans):
    return SpanPairs(*(torch.tensor(x, dtype=torch.int32) for x in zip(*spans, strict=True)))


def logits_of(rows):
    return torch.tensor(rows, dtype=torch.float64).log()[None]


def test_by_hand():
    """Student ``a b``, teacher ``ab``: the student's row is its row before ``a``, times its probability of ``b``."""
    # Tokens of the student: a, b, c; of the teacher: ab, c, d. Both have c. Row 0 reads the token before.
    student = logits_of([[0.5, 0.1, 0.4], [0.2, 0.6, 0.2], [0.3, 0.3, 0.4]])
    teacher = logits_of([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    ids_s, ids_t = torch.tensor([[2, 0, 1]]), torch.tensor([[1, 0]])
    found = gold_loss(student, teacher, ids_s, ids_t, MatchedVocab([1], [2]), pairs((1, 3, 1, 2)))
    c_s, c_t = 0.4 * 0.6, 0.2
    middle = math.log((c_s + c_t) / 2)
    exact = (c_t * (math.log(c_t) - middle) + c_s * (math.log(c_s) - middle)) / 2
    rest = abs(0.5 * 0.6 - 0.7) + abs(0.1 * 0.6 - 0.1)
    assert found.item() == pytest.approx(exact / 3 + rest * 2 / 3, rel=1e-9)


def test_the_same_model_gives_0_and_any_other_more():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 6, dtype=torch.float64)
    ids = torch.randint(6, (2, 5))
    every = MatchedVocab(range(6), range(6))
    spans = pairs((1, 2, 1, 2), (2, 4, 2, 4), (6, 9, 6, 9))
    assert gold_loss(logits, logits, ids, ids, every, spans).item() == pytest.approx(0, abs=1e-12)
    assert gold_loss(logits, logits.flip(2), ids, ids, every, spans).item() > 1e-3
    each = gold_loss(logits, logits.flip(2), ids, ids, every, spans, reduction="none")
    assert each.shape == (3,)
    assert gold_loss(logits, logits.flip(2), ids, ids, every, spans).item() == pytest.approx(each.mean().item())


def test_gradient():
    torch.manual_seed(1)
    logits = torch.randn(1, 4, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 3, 4, dtype=torch.float64)
    ids = torch.tensor([[0, 3, 1, 2]]), torch.tensor([[0, 2, 1]])
    matched = MatchedVocab([1, 3], [0, 2])
    spans = pairs((1, 3, 1, 2), (3, 4, 2, 3))
    assert torch.autograd.gradcheck(lambda x: gold_loss(x, teacher, *ids, matched, spans), [logits])


def test_bad_input():
    x, ids, matched = torch.zeros(1, 3, 4), torch.zeros(1, 3, dtype=torch.int64), MatchedVocab([0], [0])
    spans = pairs((1, 2, 1, 2))
    with pytest.raises(ValueError, match="student_ids: expected shape"):
        gold_loss(x, x, ids[:, :2], ids, matched, spans)
    with pytest.raises(ValueError, match="beta: expected"):
        gold_loss(x, x, ids, ids, matched, spans, beta=1.0)
    with pytest.raises(ValueError, match="pairs: expected"):
        gold_loss(x, x, ids, ids, matched, pairs((1, 2, 1, 9)))
