"""The Triton kernel of contrastive in the interpreter against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from vocabdistil.triton_kernels import contrastive as kernels

import vocabdistil as vd
from tests.compiling import assert_compiles
from tests.contrastive_backend import *  # noqa: F403
from tests.contrastive_backend import PARTS, compare_op, module, run
from tests.spans import make_pairs
from tests.vocabularies import randn

# -inf less -inf, and more, in lanes that are masked afterwards: numpy, which plays the GPU here, tells of it.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """A few pairs at a time, so that small inputs take several turns."""
    monkeypatch.setattr(module, "GPU_BUDGET", 1 << 14)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("known", [None, False], ids=["all", "unknown"])
@pytest.mark.parametrize("negatives", [0, 5])
@pytest.mark.parametrize("count", [37, 64])
def test_rows_that_a_program_does_not_hold(count, negatives, known, parts, backend, device, monkeypatch):
    monkeypatch.setattr(kernels, "RESIDENT", 1)
    monkeypatch.setattr(kernels, "TURN", 32)
    monkeypatch.setattr(module, "_SPARSE", 10**9)
    compare_op(count, negatives, known, parts, backend, device)


def test_nothing_is_read_that_was_not_written(fresh_memory_holds_nan):
    pairs, n_s, n_t = make_pairs(61, seed=3, gaps=True, empty=True)
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = randn(n_s, 20, seed=1, dtype=dtype), randn(n_t, 20, seed=2, dtype=dtype)
        got = run(vd, student, teacher, pairs, backend="triton")
        assert got["loss"].isfinite() and got["student"].isfinite().all()


def test_compiles_as_one_graph():
    pairs, n_s, n_t = make_pairs(12, seed=4, empty=True)
    student, teacher = randn(n_s, 8), randn(n_t, 8, seed=1)

    def loss(s):
        return vd.contrastive(s * 2, teacher, pairs, temperature=0.5, backend="triton") * 3

    assert_compiles(loss, student)


def test_float64_is_refused():
    pairs, n_s, n_t = make_pairs(12, seed=4)
    with pytest.raises(ValueError, match="^backend: 'triton' cannot take .*float64 goes through torch"):
        vd.contrastive(
            randn(n_s, 4, dtype=torch.float64), randn(n_t, 4, seed=1, dtype=torch.float64), pairs, backend="triton"
        )
