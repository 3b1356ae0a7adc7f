"""The CUDA kernels and their bindings, compiled for the host (tests/cuda_on_host) and run there: what they compute is
proven without a GPU, how fast is not."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.span_loss_backend import *  # noqa: F403
from tests.span_mean_backend import *  # noqa: F403
from vocabdistil.core import dispatch, native

COMPILER = os.environ.get("CXX") or shutil.which("c++")
SOURCES = Path(__file__).parent / "cuda_on_host"

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    path = tmp_path_factory.mktemp("cuda_on_host") / "_cuda_on_host.so"
    folders = [str(SOURCES), sysconfig.get_path("include")]
    flags = ["-std=c++17", "-O0", "-shared", "-fPIC", "-fvisibility=hidden", *(f"-I{folder}" for folder in folders)]
    subprocess.run([COMPILER, *flags, str(SOURCES / "module.cpp"), "-o", str(path)], check=True)
    spec = importlib.util.spec_from_file_location("_cuda_on_host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def on_host(module, monkeypatch):
    """CPU tensors go to the CUDA path, and its launches to the host."""

    def choose(op, device, backend, limits):
        if backend in dict(limits):
            raise ValueError(f"backend: {dict(limits)[backend]}")
        return backend or "cpu"

    monkeypatch.setattr(dispatch, "_choose", choose)
    monkeypatch.setattr(native, "_module", module)
    monkeypatch.setattr(native, "_cuda_stream", lambda device: contextlib.nullcontext(0))


@pytest.fixture
def backend():
    return "cuda"


@pytest.fixture
def device():
    return "cpu"
