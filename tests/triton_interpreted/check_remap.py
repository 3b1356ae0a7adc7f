"""The Triton remap kernels in the interpreter against the native code."""

from __future__ import annotations

from tests.remap_backend import *  # noqa: F403
