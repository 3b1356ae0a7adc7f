"""linear_matched_kl with the Triton row kernel in the interpreter against the float64 reference."""

from __future__ import annotations

import pytest

from tests.dense_sweep_backend import *  # noqa: F403

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")


@pytest.fixture
def backend():
    return "triton"
