"""Native code that follows ids and offsets, under sanitizers, with random input of every kind."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vocabdistil.core import native

ROOT = Path(__file__).parent.parent
SECONDS = float(os.environ.get("VOCABDISTIL_FUZZ_SECONDS", "5"))
FLAGS = ["-std=c++17", "-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-pthread"]


def _compiler() -> str | None:
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


# The flags that CMakeLists.txt gives each instruction set.
ISAS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}


def run_under_sanitizers(tmp_path: Path, sources: list[str], options: list[str]) -> None:
    """Compiles the sources, runs them for SECONDS: cases, and no complaint."""
    compiler = _compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    built = subprocess.run(
        [compiler, *FLAGS, str(probe), "-o", str(tmp_path / "probe")], capture_output=True, text=True
    )
    if built.returncode or subprocess.run([str(tmp_path / "probe")], capture_output=True).returncode:
        pytest.skip(f"{compiler} has no working address and undefined behaviour sanitizers")
    flags = [*FLAGS, *options, "-Wall", "-Wextra", "-Werror", "-D_GLIBCXX_ASSERTIONS", f"-I{ROOT / 'csrc'}"]
    sources = [*sources, "csrc/parallel.cpp"]
    objects = [str(tmp_path / f"{Path(source).stem}{i}.o") for i, source in enumerate(sources)]
    compiling = [
        subprocess.Popen([compiler, *flags, "-c", str(ROOT / source), "-o", out], stderr=subprocess.PIPE, text=True)
        for source, out in zip(sources, objects, strict=True)
    ]
    for process in compiling:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
    program = tmp_path / "fuzz"
    built = subprocess.run(
        [compiler, *FLAGS, *objects, "-ldl", "-o", str(program)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    run = subprocess.run([str(program), str(SECONDS)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(run.stdout.split()[0]) > 10


def test_alignments(tmp_path: Path) -> None:
    names = ("remap", "match", "boundary", "layout", "locate", "words")
    run_under_sanitizers(tmp_path, ["tests/native/fuzz_remap.cpp", *(f"csrc/remap/{n}.cpp" for n in names)], [])


PRODUCTS = ("csrc/cpu/panels.cpp", "csrc/cpu/tiles.cpp")


def test_linear_matched_kl(tmp_path: Path) -> None:
    isa = native.module().active_isa()
    sources = ["tests/native/fuzz_linear.cpp", "csrc/cpu/linear_matched_kl.cpp", *PRODUCTS]
    run_under_sanitizers(tmp_path, sources, [f"-DVD_ISA={isa}", "-fopenmp-simd", *ISAS[isa]])


def test_linear_remapped_kl(tmp_path: Path) -> None:
    isa = native.module().active_isa()
    sources = ["tests/native/fuzz_linear_remapped.cpp", "csrc/cpu/linear_remapped_kl.cpp", *PRODUCTS]
    run_under_sanitizers(tmp_path, sources, [f"-DVD_ISA={isa}", "-fopenmp-simd", *ISAS[isa]])


def test_log_prob(tmp_path: Path) -> None:
    isa = native.module().active_isa()
    names = ("log_prob", "linear_log_prob")
    sources = ["tests/native/fuzz_log_prob.cpp", *(f"csrc/cpu/{name}.cpp" for name in names), *PRODUCTS]
    run_under_sanitizers(tmp_path, sources, [f"-DVD_ISA={isa}", "-fopenmp-simd", *ISAS[isa]])


def test_relation_loss(tmp_path: Path) -> None:
    isa = native.module().active_isa()
    sources = ["tests/native/fuzz_relation.cpp", "csrc/cpu/relation_loss.cpp", "csrc/cpu/tiles.cpp"]
    run_under_sanitizers(tmp_path, sources, [f"-DVD_ISA={isa}", "-fopenmp-simd", *ISAS[isa]])


def test_spans_that_are_written_to_after_they_were_checked(tmp_path: Path) -> None:
    isa = native.module().active_isa()
    names = ("rows", "span_mean", "span_loss", "matched_kl", "remapped_kl")
    sources = ["tests/native/fuzz_spans.cpp", *(f"csrc/cpu/{name}.cpp" for name in names)]
    run_under_sanitizers(tmp_path, sources, [f"-DVD_ISA={isa}", "-fopenmp-simd", *ISAS[isa]])
