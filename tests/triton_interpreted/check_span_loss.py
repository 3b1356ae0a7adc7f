"""The Triton span_loss kernels in the interpreter against the float64 reference."""

from __future__ import annotations

import pytest

from tests.span_loss_backend import *  # noqa: F403

# Of what stands on rows without a value: minus infinity less minus infinity, the logarithm of 0.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
