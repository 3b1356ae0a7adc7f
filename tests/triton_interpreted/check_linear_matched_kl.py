"""linear_matched_kl with the Triton row kernel in the interpreter against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from vocabdistil.triton_kernels import matched_kl as kernels

import vocabdistil as vd
from tests.dense_sweep_backend import *  # noqa: F403
from tests.dense_sweep_backend import UNMATCHED, compare
from tests.ops.test_linear_matched_kl import make, run
from tests.spans import make_pairs
from tests.vocabularies import make_matched

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_rows_that_do_not_fit_in_registers(unmatched, dtype, backend, monkeypatch):
    """Their gradient has memory of its own."""
    monkeypatch.setattr(kernels, "RESIDENT", 1)
    monkeypatch.setattr(kernels, "TURN", 32)
    tensors = make(20, 20, dtype=dtype, bias=dtype == torch.float32)
    compare(tensors, make_matched(50, 90, 37), backend, unmatched=unmatched, temperature=1.7)


@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_nothing_is_read_that_was_not_written(unmatched, backend, fresh_memory_holds_nan):
    pairs, n_s, n_t = make_pairs(18, seed=3, gaps=True, empty=True)
    got = run(vd, make(n_s, n_t), make_matched(50, 90, 37), pairs=pairs, unmatched=unmatched, backend=backend)
    assert all(value.isfinite().all() for value in got.values())
