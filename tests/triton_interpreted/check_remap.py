"""The Triton remap kernels in the interpreter against the native code."""

from __future__ import annotations

import pytest

from tests.remap_backend import *  # noqa: F403


@pytest.fixture
def backend():
    return "triton"


@pytest.fixture
def device():
    return "cpu"
