"""Where the tests that all backends share run in this folder: as a call without a backend does, on the CPU."""

from __future__ import annotations

import pytest


@pytest.fixture
def backend():
    return None


@pytest.fixture
def device():
    return "cpu"
