from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import jensenshannon

from tests.reference_cases import rows
from vocabdistil.evaluation import loyalty


def test_label():
    student = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.6, 0.4], [0.0, 3.0]])
    teacher = torch.tensor([[1.0, 2.0], [5.0, 1.0], [0.0, 9.0], [-1.0, 0.0]])
    assert loyalty.label(student, teacher).item() == 0.75
    assert loyalty.label(student.view(2, 2, 2), teacher.view(2, 2, 2)).item() == 0.75
    assert loyalty.label(teacher, teacher).item() == 1


@pytest.mark.parametrize("base", [None, 2, 10.0])
def test_probability_equals_scipy(base):
    student, teacher = rows(20, 7), rows(20, 7, seed=1)
    p_s, p_t = (x.softmax(-1).numpy() for x in (student, teacher))
    expected = np.mean([1 - jensenshannon(a, b, base=base) for a, b in zip(p_t, p_s, strict=True)])
    assert loyalty.probability(student, teacher, base).item() == pytest.approx(expected, abs=1e-12)
    batched = loyalty.probability(student.view(4, 5, 7), teacher.view(4, 5, 7), base)
    assert batched.item() == pytest.approx(expected, abs=1e-12)


def test_probability_bounds():
    inf = math.inf
    student, teacher = torch.tensor([[0.0, -inf]]), torch.tensor([[-inf, 0.0]])
    assert loyalty.probability(student, teacher).item() == pytest.approx(1 - math.sqrt(math.log(2)))
    assert loyalty.probability(student, teacher, base=2).item() == pytest.approx(0, abs=1e-12)
    x = rows(5, 9)
    assert loyalty.probability(x, x).item() == 1
    assert loyalty.probability(x.bfloat16(), x.bfloat16()).item() == 1
    assert loyalty.probability(x, x + 1e-9).item() == pytest.approx(1, abs=1e-7)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=30))
def test_regression_equals_scipy(scores):
    # Small integers make many ties.
    student, teacher = (torch.tensor(v, dtype=torch.float64) for v in zip(*scores, strict=True))
    actual = loyalty.regression(student, teacher)
    if student.unique().numel() == 1 or teacher.unique().numel() == 1:
        assert actual.pearson.isnan() and actual.spearman.isnan()
        return
    assert actual.pearson.item() == pytest.approx(stats.pearsonr(student, teacher).statistic, abs=1e-12)
    assert actual.spearman.item() == pytest.approx(stats.spearmanr(student, teacher).statistic, abs=1e-12)


def test_regression():
    x = rows(30, 1)
    assert loyalty.regression(2 * x + 1, x).pearson.item() == pytest.approx(1)
    cubed = loyalty.regression(-(x**3), x)
    assert cubed.spearman.item() == pytest.approx(-1) and -1 < cubed.pearson.item() < -0.5
    tiny = loyalty.regression(1e-200 * x, 1e-200 * x)
    assert tiny.pearson.item() == pytest.approx(1)
    x[3] = float("nan")
    assert all(v.isnan() for v in loyalty.regression(x, rows(30, 1, seed=1)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: loyalty.label([1.0], rows(1, 1)), TypeError, "student_logits: expected a tensor, got list"),
        (
            lambda: loyalty.label(rows(2, 3), rows(3, 3)),
            ValueError,
            r"teacher_logits: expected shape \(2, 3\)",
        ),
        (lambda: loyalty.label(rows(0, 3), rows(0, 3)), ValueError, "student_logits: expected shape"),
        (lambda: loyalty.probability(rows(2, 3), rows(2, 4)), ValueError, "teacher_logits: expected shape"),
        (
            lambda: loyalty.probability(rows(2, 3), rows(2, 3), base=1),
            ValueError,
            "base: expected a finite number > 1",
        ),
        (
            lambda: loyalty.probability(rows(2, 3), rows(2, 3), base="e"),
            TypeError,
            "base: expected a number, got str",
        ),
        (
            lambda: loyalty.regression(torch.arange(3), rows(3, 1)),
            TypeError,
            "student_scores: expected float32",
        ),
        (
            lambda: loyalty.regression(rows(1, 1), rows(1, 1)),
            ValueError,
            "student_scores: expected at least 2 scores",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
