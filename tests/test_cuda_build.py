"""The CUDA half of the build, on a machine with nvcc and without a GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import vocabdistil as vd
from benchmarks.static import find_tool
from vocabdistil.core import native

SOURCES = Path(__file__).parent.parent / "csrc/cuda"
CMAKE = shutil.which("cmake")
needs_cmake = pytest.mark.skipif(CMAKE is None, reason="cmake is not on the PATH")

pytestmark = [
    pytest.mark.skipif(find_tool("nvcc") is None, reason="nvcc is neither on the PATH nor in CUDA_HOME"),
    pytest.mark.skipif(not native.module().cuda_compiler, reason="built with VOCABDISTIL_CUDA=OFF"),
]


def cmake(tmp_path: Path, code: str, **env: str) -> list[str]:
    """``result`` after lines of the build."""
    script = tmp_path / "call.cmake"
    script.write_text(
        "cmake_minimum_required(VERSION 3.24)\n"
        f'include("{SOURCES / "nvcc.cmake"}")\n'
        f"{code}\n"
        'message(STATUS "result: ${result}")\n'
    )
    command = [CMAKE, "-P", str(script)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env={**os.environ, **env})
    return run.stdout.split("result: ")[1].strip().split(";")


def chosen(tmp_path: Path, nvcc: str | Path, path: str | None = None) -> list[str]:
    """What the build would choose with this nvcc, and with the nvidia-smi of ``path``."""
    return cmake(tmp_path, f'choose_cuda_architectures("{nvcc}" result)', PATH=path or os.environ["PATH"])


def program(path: Path, output: str, code: int = 0) -> Path:
    path.write_text(f"#!/bin/sh\nprintf '{output}'\nexit {code}\n")
    path.chmod(0o755)
    return path


@pytest.mark.skipif("VOCABDISTIL_CUDA_ARCHITECTURES" in os.environ, reason="the architectures were chosen by hand")
@needs_cmake
def test_the_architectures_of_the_gpus_or_of_every_family_are_built(tmp_path):
    assert vd.backends()["build"]["cuda_architectures"] == chosen(tmp_path, find_tool("nvcc"))


ARM = [] if platform.machine() == "x86_64" else ["110-real"]  # of boards that have no other processor
FAMILIES = ["75-real", "80-real", "90-real", "100-real", *ARM, "120"]


@pytest.mark.parametrize(
    ("seen", "architectures"),
    [
        ("9.0\\n8.6\\n9.0\\n", ["86-real", "90-real"]),
        ("12.1\\n", ["121-real"]),
        ("7.0\\n", FAMILIES),  # too old
        ("8.6\\n13.0\\n", FAMILIES),  # too new
        ("No devices were found\\n", FAMILIES),
        ("", FAMILIES),
        (None, FAMILIES),
    ],
)
@needs_cmake
def test_architectures_are_chosen_by_what_nvidia_smi_sees(seen, architectures, tmp_path):
    listed = (50, 70, 75, 80, 86, 90, 100, 103, 110, 120, 121)
    nvcc = program(tmp_path / "nvcc", "".join(f"compute_{arch}\\n" for arch in listed))
    program(tmp_path / "nvidia-smi", seen or "", code=9 if seen is None else 0)
    assert chosen(tmp_path, nvcc, f"{tmp_path}{os.pathsep}{os.environ['PATH']}") == architectures


@pytest.mark.parametrize(
    ("architectures", "code"),
    [
        ("75-real;90-real;80-real;120", ["75,code=[sm_75]", "80,code=[sm_90,sm_80,sm_120,compute_80]"]),
        ("90;100", ["90,code=[sm_90,compute_90,sm_100]"]),
        ("86-real;90-virtual", ["86,code=[sm_86,compute_86]"]),
        ("75;80-virtual", ["75,code=[sm_75,compute_75]", "80,code=[compute_80]"]),
        ("80;90a-real", [""]),
        ("native", [""]),
    ],
)
@needs_cmake
def test_architectures_share_what_is_compiled_up_to_ptx(architectures, code, tmp_path):
    prefix = "--generate-code=arch=compute_"
    options = cmake(tmp_path, f'share_cuda_front_ends("{architectures}" result)')
    assert [option.removeprefix(prefix) for option in options] == code


def found(tmp_path: Path, **env: str) -> str:
    """The CUDA compiler that the build takes, or why it takes none."""
    only_cmake = {"PATH": str(tmp_path / "bin"), "CUDACXX": "", "CUDA_HOME": "", "CUDA_PATH": ""}
    (place,) = cmake(tmp_path, 'find_nvcc(result why)\nstring(APPEND result "${why}")', **only_cmake | env)
    return place


@needs_cmake
def test_a_cuda_compiler_is_looked_for_where_people_have_it(tmp_path):
    for folder in ("bin", "toolkit/bin", "other"):
        (tmp_path / folder).mkdir(parents=True)
    assert found(tmp_path) == "no CUDA compiler (nvcc) was found"
    inside, named = program(tmp_path / "toolkit/bin/nvcc", ""), program(tmp_path / "other/nvcc-12", "")
    assert found(tmp_path, CUDA_HOME=str(tmp_path / "toolkit")) == str(inside)
    assert found(tmp_path, CUDA_PATH=str(tmp_path / "toolkit"), CUDACXX=str(named)) == str(named)


@needs_cmake
def test_a_cuda_compiler_that_refuses_the_host_compiler_is_told(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'unsupported GNU version' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    said = found(tmp_path, CUDACXX=str(nvcc))
    assert said == f"the CUDA compiler {nvcc} does not work here (1 unsupported GNU version)"
    assert found(tmp_path, CUDACXX=str(tmp_path / "none")).startswith(f"the CUDA compiler {tmp_path / 'none'} does not")


def test_kernels_are_in_the_module():
    triton = importlib.util.find_spec("triton")  # brings the tool along
    bundled = Path(triton.origin).parent / "backends/nvidia/bin" if triton else None
    cuobjdump = find_tool("cuobjdump") or (bundled and shutil.which("cuobjdump", path=bundled))
    if cuobjdump is None:
        pytest.skip("cuobjdump is not on the PATH")
    run = subprocess.run([cuobjdump, "-elf", native.module().__file__], capture_output=True, text=True, check=True)
    spans = "fwd_kernel", "bwd_kernel", "loss_kernel", "finish_kernel"
    for kernel in (*spans, "matched_kernel", "table_kernel", "measure_kernel", "remap_kernel"):
        assert kernel in run.stdout, kernel


def test_sizes_are_those_of_the_kernels():
    rows = Path(__file__).parent.parent / "csrc/ops.h"
    text = rows.read_text(encoding="utf-8")
    assert f"kMaxLayers = {native.CUDA_MAX_LAYERS};" in text
    assert f"kTotalPairs = {native.CUDA_TOTAL_PAIRS};" in text
    assert f"kRemapChunk = {native.CUDA_REMAP_CHUNK};" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_call_without_a_driver_says_so(monkeypatch):
    monkeypatch.setattr(native, "_cuda_stream", lambda device: contextlib.nullcontext(0))
    span, x = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 4)
    options = (0, True, 1.0, 0.5, torch.zeros(1), torch.zeros(()), [x], None, None)
    for call in (
        lambda: native.cuda_span_mean_fwd([x], span, span, None, True, x),
        lambda: native.cuda_span_mean_bwd(x, span, span, None, True, [x]),
        lambda: native.cuda_span_loss([x], [x], [span] * 4, None, 1.0, None, None, *options),
        lambda: native.cuda_matched_kl(x, x, [], span, span, x[0], 0, True, 1.0, False, x[0], x[0, 0], None),
        lambda: native.cuda_measure(x.long(), None, span),
        lambda: native.cuda_remap(x.long(), None, span, span, 0, 0, 3),
    ):
        with pytest.raises(RuntimeError, match="CUDA driver"):
            call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_backends_say_why_cuda_cannot_run():
    cuda = vd.backends()["backends"]["cuda"]
    assert not cuda["available"] and "CUDA device" in cuda["reason"]
