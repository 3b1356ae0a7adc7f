"""The Triton span_mean kernels in the interpreter against the float64 reference."""

from __future__ import annotations

from tests.span_mean_backend import *  # noqa: F403
