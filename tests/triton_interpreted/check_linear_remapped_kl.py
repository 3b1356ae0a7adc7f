"""linear_remapped_kl in chunks of rows with the Triton kernel in the interpreter against the float64 reference."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd
from tests.linear_remapped_kl_backend import *  # noqa: F403
from tests.linear_remapped_kl_backend import ROWS, V_S, compare, run
from tests.output_layers import make
from tests.remapped_kl_backend import make_table, make_weights
from tests.spans import make_pairs
from tests.triton_interpreted.check_remapped_kl import small_pieces  # noqa: F401
from vocabdistil.ops import _dense_sweep

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_chunks_of_rows(dtype, backend, monkeypatch):
    monkeypatch.setattr(_dense_sweep, "BUDGET", 0)
    monkeypatch.setattr(_dense_sweep, "_TIMES", 0)
    table = make_table(ROWS, V_S)
    compare(make(37, 37, dtype=dtype), table, backend, entry_weights=3 * make_weights(table))


def test_nothing_is_read_that_was_not_written(backend, fresh_memory_holds_nan):
    pairs, n_s, n_t = make_pairs(9, seed=3, gaps=True, empty=True)
    got = run(vd, make(n_s, n_t), make_table(ROWS, V_S), pairs=pairs, top_k=5, backend=backend)
    assert all(value.isfinite().all() for value in got.values())
