"""The CUDA half of the build, on a machine with nvcc and without a GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import vocabdistil as vd
from vocabdistil.core import native

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH"),
    pytest.mark.skipif(not native.module().cuda_compiler, reason="built with VOCABDISTIL_CUDA=OFF"),
]


@pytest.mark.skipif("VOCABDISTIL_CUDA_ARCHITECTURES" in os.environ, reason="the architectures were chosen by hand")
def test_every_architecture_from_sm_75_on_is_built():
    listed = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    known = {int(arch.removeprefix("compute_")) for arch in listed}
    built = {int(arch.split("-")[0]) for arch in vd.backends()["build"]["cuda_architectures"]}
    assert built == {arch for arch in known if arch >= 75}


def test_kernels_are_in_the_module():
    triton = importlib.util.find_spec("triton")  # brings the tool along
    bundled = Path(triton.origin).parent / "backends/nvidia/bin" if triton else None
    cuobjdump = shutil.which("cuobjdump") or (bundled and shutil.which("cuobjdump", path=bundled))
    if cuobjdump is None:
        pytest.skip("cuobjdump is not on the PATH")
    run = subprocess.run([cuobjdump, "-elf", native.module().__file__], capture_output=True, text=True, check=True)
    for kernel in ("fwd_kernel", "bwd_kernel", "loss_kernel", "total_kernel"):
        assert kernel in run.stdout, kernel


def test_as_many_layers_are_allowed_as_the_kernels_take():
    rows = Path(__file__).parent.parent / "csrc/ops.h"
    assert f"kMaxLayers = {native.CUDA_MAX_LAYERS};" in rows.read_text(encoding="utf-8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_call_without_a_driver_says_so(monkeypatch):
    monkeypatch.setattr(native, "_cuda_stream", lambda device: contextlib.nullcontext(0))
    span, x = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 4)
    options = (0, True, 1.0, 0.5, torch.zeros(1), torch.zeros(()), [x], None)
    for call in (
        lambda: native.cuda_span_mean_fwd([x], span, span, None, True, x),
        lambda: native.cuda_span_mean_bwd(x, span, span, None, True, [x]),
        lambda: native.cuda_span_loss([x], [x], [span] * 4, None, 1.0, None, None, *options),
    ):
        with pytest.raises(RuntimeError, match="CUDA driver"):
            call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_backends_say_why_cuda_cannot_run():
    cuda = vd.backends()["backends"]["cuda"]
    assert not cuda["available"] and "CUDA device" in cuda["reason"]
