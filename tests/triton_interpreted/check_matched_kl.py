"""The Triton matched_kl kernel in the interpreter against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from vocabdistil.triton_kernels import matched_kl as kernels

import vocabdistil as vd
from tests.matched_kl_backend import *  # noqa: F403
from tests.matched_kl_backend import UNMATCHED, compare
from tests.vocabularies import make_matched, randn

# -inf less -inf, and more, in lanes that are masked afterwards: numpy, which plays the GPU here, tells of it.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")


@pytest.fixture(params=["whole rows", "turns"], autouse=True)
def rows(request, monkeypatch):
    """Rows that stay in registers, and rows that are read twice, a block of columns at a time."""
    if request.param == "turns":
        monkeypatch.setattr(kernels, "RESIDENT", 1)
        monkeypatch.setattr(kernels, "TURN", 1024)


@pytest.mark.parametrize("unmatched", UNMATCHED)
@pytest.mark.parametrize(("v_s", "v_t", "v_m"), [(2, 3, 1), (50, 33, 32), (1100, 2100, 900)])
def test_float64(v_s, v_t, v_m, unmatched, backend, device):
    student, teacher = (randn(3, v, seed=v, dtype=torch.float64, scale=2) for v in (v_s, v_t))
    matched = make_matched(v_s, v_t, v_m)
    compare(student, teacher, matched, backend, device, unmatched=unmatched, temperature=1.7)


def test_tables_are_kept_until_the_ids_change(monkeypatch, backend, device):
    made = []
    make = kernels._tables.make
    monkeypatch.setattr(kernels._tables, "make", lambda *a: made.append(a) or make(*a))
    matched, other = make_matched(12, 20, 8), make_matched(12, 20, 8, seed=1)
    inputs = randn(3, 12), randn(3, 20, seed=1)
    for _ in range(2):
        compare(*inputs, matched, backend, device)
    assert len(made) == 1
    compare(*inputs, matched, backend, device, unmatched="rest")
    compare(inputs[0], randn(3, 25, seed=1), matched, backend, device)
    assert len(made) == 3
    matched.teacher_ids.copy_(other.teacher_ids)
    compare(*inputs, matched, backend, device)
    matched.student_ids = other.student_ids
    compare(*inputs, matched, backend, device)
    compare(*inputs, vd.MatchedVocab(matched.teacher_ids.flip(0), other.student_ids), backend, device)
    assert len(made) == 6
    kept = len(kernels._tables._of)
    del matched, other
    made.clear()
    assert len(kernels._tables._of) < kept
