"""What the shared tests of a backend are to run here, and memory in which nothing goes unnoticed."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def backend():
    return "triton"


@pytest.fixture
def device():
    return "cpu"


@pytest.fixture
def fresh_memory_holds_nan(monkeypatch):
    empty = torch.Tensor.new_empty

    def poisoned(x, *shape, **options):
        out = empty(x, *shape, **options)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
