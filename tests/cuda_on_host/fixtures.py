"""What the tests of a backend (tests/span_loss_backend.py and others) need to run on the host build."""

from __future__ import annotations

import pytest

from tests import cuda_on_host

__all__ = ["backend", "device", "module"]


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    return cuda_on_host.build(tmp_path_factory.mktemp("cuda_on_host"))


@pytest.fixture
def backend():
    return "cuda"


@pytest.fixture
def device():
    return "cpu"
