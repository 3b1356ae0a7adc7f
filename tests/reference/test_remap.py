"""The remap in plain PyTorch against the native code."""

from __future__ import annotations

import pytest

from tests.remap_backend import *  # noqa: F403


@pytest.fixture
def backend():
    return "reference"


@pytest.fixture
def device():
    return "cpu"
