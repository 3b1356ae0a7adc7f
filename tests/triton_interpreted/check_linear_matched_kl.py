"""linear_matched_kl with the Triton kernels in the interpreter against the float64 reference: of half-precision hidden
states those of linear_matched_kl.py, of others the row kernel of matched_kl.py."""

from __future__ import annotations

import importlib

import pytest
import torch
from vocabdistil.triton_kernels import linear_matched_kl as fused
from vocabdistil.triton_kernels import matched_kl as kernels

import vocabdistil as vd
from tests.dense_sweep_backend import *  # noqa: F403
from tests.dense_sweep_backend import UNMATCHED, compare
from tests.ops.test_linear_matched_kl import make, run
from tests.spans import make_pairs
from tests.vocabularies import make_matched

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")


@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_rows_that_do_not_fit_in_registers(unmatched, backend, monkeypatch):
    """Their gradient has memory of its own."""
    monkeypatch.setattr(kernels, "RESIDENT", 1)
    monkeypatch.setattr(kernels, "TURN", 32)
    compare(make(20, 20), make_matched(50, 90, 37), backend, unmatched=unmatched, temperature=1.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_nothing_is_read_that_was_not_written(unmatched, dtype, backend, fresh_memory_holds_nan):
    pairs, n_s, n_t = make_pairs(18, seed=3, gaps=True, empty=True)
    tensors = make(n_s, n_t, dtype=dtype)
    got = run(vd, tensors, make_matched(50, 90, 37), pairs=pairs, unmatched=unmatched, backend=backend)
    assert all(value.isfinite().all() for value in got.values())


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("architecture", [80, 100])
def test_tiles_of_other_gpus_and_products_in_parts(architecture, parts, backend, monkeypatch):
    """Rows in one chunk."""
    sweep = importlib.import_module("vocabdistil.ops._dense_sweep")
    monkeypatch.setattr(sweep, "BUDGET", 64_000_000)
    monkeypatch.setattr(fused, "capability", lambda: architecture)
    monkeypatch.setattr(fused, "MOST_PARTS", parts)
    monkeypatch.setattr(fused, "PROGRAMS", 1 << 20)
    tensors = make(400, 400, v_s=600, v_t=500, d_s=150, dtype=torch.bfloat16)
    tensors["student_weight"] *= 0.3
    compare(tensors, make_matched(600, 500, 380), backend, unmatched="rest", temperature=1.3)


def test_a_product_is_cut_into_as_few_columns_as_can_be():
    found = {dim: fused.widths(dim, widest) for dim, widest in ((1, 272), (264, 272), (384, 272), (768, 272))}
    assert found == {1: (1, 16, 0), 264: (1, 256, 16), 384: (2, 128, 64), 768: (3, 256, 0)}
    for widest in (144, 272):
        for dim in range(1, 1100):
            programs, main, tail = fused.widths(dim, widest)
            assert programs * (main + tail) >= dim > (programs - 1) * (main + tail) and main + tail <= widest


@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_rows_of_other_strides(unmatched, backend):
    """Columns that are not adjacent, and rows of the teacher's weight that begin anywhere."""
    tensors, matched = make(20, 20, dtype=torch.bfloat16), make_matched(50, 90, 37)
    want = run(vd, tensors, matched, backend=backend, unmatched=unmatched)
    strided = {k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in tensors.items()}
    wide = torch.zeros(90, 23, dtype=torch.bfloat16)[:, 3:]
    for weight in (strided["teacher_weight"], wide.copy_(tensors["teacher_weight"])):
        got = run(vd, {**strided, "teacher_weight": weight}, matched, backend=backend, unmatched=unmatched)
        assert all(torch.equal(got[k], want[k]) for k in got)
