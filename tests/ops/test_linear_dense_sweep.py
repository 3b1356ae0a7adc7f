"""The sweep of linear_matched_kl for a GPU on the CPU, with its rows in PyTorch; the size of its chunks; products."""

from __future__ import annotations

import pytest
import torch

from tests.dense_sweep_backend import *  # noqa: F403
from tests.numbers_backend import test_linear_classes_of_one_size_at_any_temperature  # noqa: F401
from vocabdistil.ops import _dense_sweep as sweep
from vocabdistil.ops._products import product


@pytest.fixture
def backend():
    return "torch"


@pytest.fixture
def device():
    return "cpu"


@pytest.mark.parametrize(
    ("rows", "width", "matched", "d_t", "d_s", "limit"),
    [(4096, 4700, 4700, 768, 264, 64e6), (8192, 28000, 28000, 768, 264, 300e6)],
)
def test_the_chunks_keep_within_the_budget(rows, width, matched, d_t, d_s, limit, monkeypatch):
    monkeypatch.undo()
    traffic = 2 * (width * d_s + matched * d_t) + 4 * width * d_s
    fixed, per_row = traffic + 4 * rows * d_s, 4 * (width + matched) + 2 * width * (width > 16384)
    step = sweep.rows_per_chunk(rows, fixed, traffic, per_row)
    assert step % 128 == 0 and step >= 512
    assert 0.8 * limit < fixed + step * per_row <= limit


@pytest.mark.parametrize(("rows", "matched", "limit", "chunks"), [(4096, 4700, 64e6, 3), (8192, 28000, 300e6, 5)])
def test_the_chunks_of_fused_kernels_keep_within_the_budget(rows, matched, limit, chunks, monkeypatch):
    fused = pytest.importorskip("vocabdistil.triton_kernels.linear_matched_kl")
    monkeypatch.undo()
    monkeypatch.setattr(fused, "capability", lambda: 90)
    at, width = fused.layout(matched, 0)
    assert at == width >= matched
    of_weight = 4 * fused.parts_of_weight(rows, width, 264) * width * 264
    gathered, of_hidden = 2 * width * 264, 4 * rows * 264
    per_row = fused.bytes_per_row(at, width, 0, 264, True, True)
    fixed, traffic = gathered + of_hidden + of_weight, gathered + 2 * matched * 768 + 4 * width * 264
    step = sweep.rows_per_chunk(rows, fixed, traffic, per_row)
    assert -(-rows // step) == chunks and fixed + step * per_row <= limit
    parts = fused._parts_of_hidden(step, width, 264)
    numbers = at // 64 * 7 + parts * 264
    assert parts <= fused.MOST_PARTS and 4 * numbers + 2 * (at + width) <= per_row


@pytest.mark.parametrize("rows", [1, 15, 17, 129, 1000])
def test_chunks_are_of_one_size(rows):
    step = sweep.rows_per_chunk(rows, 0, 0, 1 << 20)
    assert 16 <= step <= 64 and step % 16 == 0


def test_columns_of_the_student_with_the_matched_ones_first():
    ids = torch.tensor([4, 1, 6])
    assert sweep.unmatched_last(ids, 8).tolist() == [4, 1, 6, 0, 2, 3, 5, 7]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_are_not_rounded_to_half(dtype):
    a, b = torch.randn(5, 9).to(dtype), torch.randn(9, 4).to(dtype)
    out = torch.full((5, 16), float("nan"))[:, :4]
    product(a, b, out)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-6)
    product(a, b, out, add=True)
    torch.testing.assert_close(out.double(), 2 * (a.double() @ b.double()), rtol=1e-6, atol=1e-6)
