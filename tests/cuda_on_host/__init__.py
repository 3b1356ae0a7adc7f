"""The CUDA kernels and their bindings, compiled for the host."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from vocabdistil.core import dispatch, native

COMPILER = os.environ.get("CXX") or shutil.which("c++")
SOURCES = Path(__file__).parent


def build(folder: Path, repository: Path = SOURCES.parent.parent) -> ModuleType:
    """The module of the sources in a checkout, or a copy of its ``csrc`` and of this folder, built into ``folder``."""
    path, sources = folder / "_cuda_on_host.so", repository / "tests/cuda_on_host"
    includes = [str(sources), sysconfig.get_path("include")]
    flags = ["-std=c++17", "-O0", "-shared", "-fPIC", "-fvisibility=hidden", *(f"-I{x}" for x in includes)]
    subprocess.run([COMPILER, *flags, str(sources / "module.cpp"), "-o", str(path)], check=True)
    spec = importlib.util.spec_from_file_location("_cuda_on_host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def serve_the_host(patch: pytest.MonkeyPatch, module: ModuleType | None = None) -> None:
    """Calls with CPU tensors go to the backend that they name, those to CUDA to ``module``,
    which has nothing else."""

    def choose(op, device, backend, limits):
        if backend in dict(limits):
            raise ValueError(f"backend: {dict(limits)[backend]}")
        return backend or "cpu"

    patch.setattr(dispatch, "_choose", choose)
    if module is not None:
        patch.setattr(native, "_cuda_stream", lambda device: current_stream(module))
        both = vars(native.module()) | vars(module)
        patch.setattr(native, "_module", SimpleNamespace(**both))


@contextlib.contextmanager
def current_stream(module: ModuleType, handle: int = 1 << 20) -> Iterator[int]:
    """The stream that launches have to go to, and only while it is entered."""
    stream_is = ctypes.CDLL(module.__file__).stream_is
    stream_is(ctypes.c_void_p(handle))
    try:
        yield handle
    finally:
        stream_is(None)
