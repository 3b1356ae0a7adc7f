"""The CUDA kernels and their bindings, compiled for the host (tests/cuda_on_host) and run there: what they compute is
proven without a GPU, how fast is not."""

from __future__ import annotations

import pytest

from tests import cuda_on_host
from tests.cuda_on_host.fixtures import *  # noqa: F403
from tests.span_loss_backend import *  # noqa: F403
from tests.span_mean_backend import *  # noqa: F403

pytestmark = pytest.mark.skipif(cuda_on_host.COMPILER is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def on_host(module, monkeypatch):
    """CPU tensors go to the CUDA path, and its launches to the host."""
    cuda_on_host.serve_the_host(monkeypatch, module)
