"""What the compiler says of the CUDA kernels (benchmarks/static.py)."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from benchmarks import static
from benchmarks.__main__ import main

USAGE = static.Usage("kernel", 90, threads=256, registers=32, shared=0, stack=0, spilled=0)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if not all((static.find_tool("nvcc"), static.find_tool("ptxas"), shutil.which("c++filt"))):
        pytest.skip("nvcc, ptxas or c++filt is neither on the PATH nor in CUDA_HOME")
    return static.usage(static.compile_ptx(static.SOURCE, tmp_path_factory.mktemp("ptx"), min(static.ARCHITECTURES)))


@pytest.fixture(scope="module")
def known(found):
    known = static.read_spills(static.SPILLS, static.release())
    if known is None:
        pytest.skip("benchmarks/spills.csv is of another release of CUDA")
    return known


def test_no_triton_kernel_spills_more_than_it_did(tmp_path):
    """After a change for the better: ``python -m benchmarks static --triton --spills benchmarks/triton_spills.csv``."""
    pytest.importorskip("triton", reason="triton is not installed")
    from tests.ptx.launch import TritonLauncher

    known = static.read_spills(static.TRITON_SPILLS, static.triton_release())
    if known is None or not TritonLauncher.possible():
        pytest.skip("benchmarks/triton_spills.csv is of another release of Triton")
    found = static.triton_usage(tmp_path, static.calls_of(*static.REAL), [90])
    assert not static.new_spills(found, known)
    assert {key for key in known if key[1] == 90} <= {(u.kernel, u.architecture) for u in found}


def test_no_kernel_spills_more_than_it_did(found, known):
    """After a change for the better: ``python -m benchmarks static --spills benchmarks/spills.csv``."""
    assert not static.new_spills(found, known)
    assert set(known) <= {(u.kernel, u.architecture) for u in found}


def test_what_a_new_spill_is():
    more, as_before, less = (replace(USAGE, kernel=f"k{i}", spilled=spilled) for i, spilled in enumerate((12, 8, 4)))
    known = {("k0", 90): 8, ("k1", 90): 8, ("k2", 90): 8, ("kernel", 80): 8}
    new = replace(USAGE, spilled=4)
    assert static.new_spills([more, as_before, less, USAGE, new], known) == [more, new]


def test_every_kernel_fits_a_multiprocessor_in_its_largest_block(found):
    assert {u.architecture for u in found} == set(static.ARCHITECTURES)
    assert not [u for u in found if not u.registers or u.warps(u.threads) < u.threads // 32]


def test_the_command_prints_the_table_and_writes_the_spills(tmp_path, capsys, monkeypatch):
    found = [USAGE, replace(USAGE, kernel="other<1>", spilled=8)]
    monkeypatch.setattr(static, "compile_ptx", lambda *arguments: None)
    monkeypatch.setattr(static, "usage", lambda ptx: found)
    monkeypatch.setattr(static, "find_tool", lambda name: name)
    monkeypatch.setattr(static, "release", lambda: "1.2")
    monkeypatch.setattr(static, "costs", lambda folder, triton, calls: "of Triton" if triton else "of CUDA")
    assert main(["static", "--spills", str(tmp_path / "spills.csv")]) == 0
    assert capsys.readouterr().out == static.table(found) + "\n"
    assert main(["static", "--costs"]) == 0
    assert capsys.readouterr().out == static.table(found) + "\n\nof CUDA\n"
    assert static.read_spills(tmp_path / "spills.csv", "1.2") == {("other<1>", 90): 8}
    assert static.read_spills(tmp_path / "spills.csv", "1.3") is None
    others = [replace(USAGE, kernel="loss_kernel, span_loss kl", spilled=4)]
    monkeypatch.setattr(static, "triton_usage", lambda folder, calls: others)
    monkeypatch.setattr(static, "triton_release", lambda: "3.0")
    assert main(["static", "--triton", "--costs", "--spills", str(tmp_path / "others.csv")]) == 0
    assert capsys.readouterr().out == static.table(others) + "\n\nof Triton\n"
    assert static.read_spills(tmp_path / "others.csv", "3.0") == {("loss_kernel, span_loss kl", 90): 4}


@pytest.mark.parametrize(
    ("changes", "threads", "warps"),
    [
        ({}, 256, 64),
        ({}, 32, 32),  # blocks
        ({"registers": 33}, 256, 48),  # 40 of each thread, as they are given out
        ({"registers": 255}, 128, 8),
        ({"shared": 48 << 10}, 128, 16),
        ({"shared": 48 << 10, "architecture": 80}, 128, 12),
    ],
)
def test_what_limits_the_warps(changes, threads, warps):
    assert replace(USAGE, **changes).warps(threads) == warps


def test_the_table_has_a_line_per_kernel():
    found = [replace(USAGE, architecture=80, registers=40), USAGE, replace(USAGE, kernel="other<1>")]
    *_, first, second = static.table(found).splitlines()
    assert first == "| `kernel` | 256 | 40 / 32 | 0 | 0 | 0 | 48 / 64 | 48 / 64 |"
    assert second == "| `other<1>` | 256 | 32 | 0 | 0 | 0 | 64 | 64 |"
