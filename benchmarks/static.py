"""``python -m benchmarks static``: what the compiler says of every CUDA kernel, without a GPU: registers, spills,
shared memory, and how many warps a multiprocessor then holds.

``--spills FILE`` writes the spills alone, which tests/test_cuda_static.py compares with benchmarks/spills.csv;
``--costs`` adds what a pair of a span loss costs, counted in the interpreter of tests/ptx.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "csrc/cuda/kernels.cu"
SPILLS = Path(__file__).parent / "spills.csv"
ARCHITECTURES = (80, 90, 100)
# What a multiprocessor has: bytes of shared memory, and how many blocks it holds. All have 65,536 registers, given out
# by 256 to a warp, and hold 64 warps; a block takes 1 KB of shared memory besides its own.
SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
BLOCKS = 32


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture; bytes are per thread, those of shared memory per block."""

    kernel: str
    architecture: int
    threads: int  # of the largest block
    registers: int
    shared: int
    stack: int
    spilled: int  # bytes stored

    def warps(self, threads: int) -> int:
        """How many a multiprocessor holds, in blocks of so many threads."""
        each = threads // 32
        registers = -(-self.registers * 32 // 256) * 256 * each
        shared = self.shared + 1024
        return each * min(BLOCKS, 64 // each, 65536 // registers, SHARED[self.architecture] // shared)


def find_tool(name: str) -> str | None:
    """A tool such as ``nvcc``: on the PATH, or of the CUDA toolkit of ``CUDA_HOME``."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which(name) or (shutil.which(name, path=str(Path(home) / "bin")) if home else None)


def kernel_names(mangled: Sequence[str]) -> list[str]:
    """As ``loss_kernel<Kind 1, 16, 512>``."""
    lines = subprocess.run(["c++filt", *mangled], capture_output=True, text=True, check=True).stdout.splitlines()
    return [kernel_name(line) for line in lines]


def kernel_name(demangled: str) -> str:
    # An enumerator is written as a number that is cast: (space::(anonymous namespace)::Kind)1.
    demangled = re.sub(r"\((?:\w+::|\(anonymous namespace\)::)*(\w+)\)(?=\d)", r"\1 ", demangled)
    name = re.search(r"(\w+(?:<.*>)?)\((?!anonymous)", demangled)
    assert name, demangled
    return name[1]


def compile_ptx(source: Path, folder: Path, architecture: int) -> Path:
    """The PTX of a file, with the options of the build."""
    nvcc = find_tool("nvcc")
    assert nvcc is not None
    path = folder / f"{source.stem}.ptx"
    options = ["-ptx", f"-arch=compute_{architecture}", "-std=c++17", "-O3"]
    subprocess.run([nvcc, *options, str(source), "-o", str(path)], check=True)
    return path


def usage(ptx: Path, architectures: Iterable[int] = ARCHITECTURES) -> list[Usage]:
    """Of every kernel in a file of PTX, compiled for each architecture, as the build does from sm_80 on."""
    text = ptx.read_text(encoding="utf-8")
    blocks = dict(re.findall(r"\.entry (\w+)\([^{]*?\.maxntid (\d+)", text))
    found = []
    for architecture in architectures:
        ptxas = find_tool("ptxas")
        assert ptxas is not None
        command = [ptxas, "-v", f"-arch=sm_{architecture}", str(ptx), "-o", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True, check=True)
        parts = re.split(r"Compiling entry function '(\w+)'", told.stderr + told.stdout)[1:]
        for mangled, name, report in zip(parts[::2], kernel_names(parts[::2]), parts[1::2], strict=True):
            numbers = {
                key: int(match[1]) if (match := re.search(pattern, report)) else 0
                for key, pattern in (
                    ("registers", r"Used (\d+) registers"), ("shared", r"(\d+) bytes smem"),
                    ("stack", r"(\d+) bytes stack frame"), ("spilled", r"(\d+) bytes spill stores"),
                )
            }  # fmt: skip
            found.append(Usage(name, architecture, int(blocks.get(mangled, 256)), **numbers))
    return sorted(found, key=lambda u: (u.kernel, u.architecture))


COLUMNS: dict[str, Callable[[Usage], int]] = {
    "registers": lambda u: u.registers, "stack": lambda u: u.stack, "spilled": lambda u: u.spilled,
    "shared": lambda u: u.shared, "warps": lambda u: u.warps(u.threads), "in blocks of 128": lambda u: u.warps(128),
}  # fmt: skip


def table(found: Sequence[Usage]) -> str:
    """Markdown: a line per kernel; a number for all architectures, or one for each."""
    lines = [["kernel", "largest block", *COLUMNS], ["---", *["---:"] * (1 + len(COLUMNS))]]
    for kernel, usages in groupby(found, lambda u: u.kernel):
        each = list(usages)
        numbers = [[str(column(u)) for u in each] for column in COLUMNS.values()]
        cells = [values[0] if len(set(values)) == 1 else " / ".join(values) for values in numbers]
        lines.append([f"`{kernel}`", str(each[0].threads), *cells])
    architectures = sorted({u.architecture for u in found})
    title = f"sm_{' / sm_'.join(map(str, architectures))}; bytes, and warps per multiprocessor of 64"
    return "\n".join([title, "", *(f"| {' | '.join(line)} |" for line in lines)])


def release() -> str:
    """Of the toolkit, as 13.0: another compiler spills otherwise."""
    ptxas = find_tool("ptxas")
    assert ptxas is not None
    told = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\S+),", told)
    assert found, told
    return found[1]


def write_spills(found: Sequence[Usage], path: Path, compiler: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["release", "kernel", "architecture", "bytes"])
        rows.writerows([compiler, u.kernel, u.architecture, u.spilled] for u in found if u.spilled)


def read_spills(path: Path, compiler: str) -> dict[tuple[str, int], int] | None:
    """(kernel, architecture) -> bytes; None where the file is of another compiler."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if any(row["release"] != compiler for row in rows):
        return None
    return {(row["kernel"], int(row["architecture"])): int(row["bytes"]) for row in rows}


def new_spills(found: Sequence[Usage], known: dict[tuple[str, int], int]) -> list[Usage]:
    """Those that spill more than is known."""
    return [u for u in found if u.spilled > known.get((u.kernel, u.architecture), 0)]


COSTS = ((264, "bfloat16"), (768, "bfloat16"), (1024, "bfloat16"), (4096, "bfloat16"), (768, "float32"))
PAIRS = 64  # 8 a warp: what a warp does once is shared out


def cost_table(folder: Path) -> str:
    """Markdown: of the KL of spans of one row, with its gradient, the instructions of a warp and the bytes of memory,
    each counted once, per pair; the bytes that its three rows take; and the instructions per row of padding."""
    import pytest
    import torch

    from tests import cuda_on_host
    from tests.ptx.launch import compile_cuda, launching, span_loss_cost

    lines = [["hidden size", "instructions", "bytes", "of its rows", "instructions per row of padding"]]
    lines.append(["---", *["---:"] * 4])
    module, programs = cuda_on_host.build(folder), compile_cuda(SOURCE, folder)
    with pytest.MonkeyPatch.context() as patch:
        for launches in launching(module, programs, patch):
            for dim, name in COSTS:
                dtype = getattr(torch, name)
                full, padded = (span_loss_cost(launches, dim, dtype, PAIRS, padding) for padding in (0, 1024))
                each = full.instructions / PAIRS, full.bytes / PAIRS, 3 * dim * dtype.itemsize
                more = (padded.instructions - full.instructions) / 1024
                lines.append([f"{dim} {name}", *(f"{n:.0f}" for n in (*each, more))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks static", description=__doc__)
    parser.add_argument("--spills", type=Path, metavar="FILE", help="also write the spills to this file")
    parser.add_argument("--costs", action="store_true", help="also count what a pair costs; takes a C++ compiler")
    args = parser.parse_args(argv)
    for tool in ("nvcc", "ptxas"):
        if find_tool(tool) is None:
            parser.error(f"{tool} is neither on the PATH nor in CUDA_HOME")
    with tempfile.TemporaryDirectory() as folder:
        found = usage(compile_ptx(SOURCE, Path(folder), min(ARCHITECTURES)))
        costs = cost_table(Path(folder)) if args.costs else ""
    print(table(found))
    if costs:
        print(f"\n{costs}")
    if args.spills:
        write_spills(found, args.spills, release())
    return 0
