"""``python -m benchmarks static``: what the compiler says of every CUDA kernel, without a GPU: registers, spills,
shared memory, and how many warps a multiprocessor then holds.

``--triton`` says it of the Triton kernels, as calls with the sizes of real models compile them; ``--spills FILE``
writes the spills alone, which tests/test_cuda_static.py compares with benchmarks/spills.csv and triton_spills.csv;
``--costs`` adds what calls cost, counted in the interpreter of tests/ptx.
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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.ptx.launch import Launches

SOURCE = Path(__file__).parent.parent / "csrc/cuda/kernels.cu"
SPILLS = Path(__file__).parent / "spills.csv"
TRITON_SPILLS = SPILLS.with_name("triton_spills.csv")
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


def assemble(ptx: Path, target: str, ptxas: str | None = None) -> dict[str, dict[str, int]]:
    """What ptxas, by default that of the toolkit, says of every kernel in a file of PTX, by its mangled name."""
    ptxas = ptxas or find_tool("ptxas")
    assert ptxas is not None
    command = [ptxas, "-v", f"-arch={target}", str(ptx), "-o", os.devnull]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    parts = re.split(r"Compiling entry function '(\w+)'", told.stderr + told.stdout)[1:]
    patterns = {
        "registers": r"Used (\d+) registers", "shared": r"(\d+) bytes smem", "stack": r"(\d+) bytes stack frame",
        "spilled": r"(\d+) bytes spill stores",
    }  # fmt: skip
    return {
        mangled: {key: int(match[1]) if (match := re.search(p, report)) else 0 for key, p in patterns.items()}
        for mangled, report in zip(parts[::2], parts[1::2], strict=True)
    }


def usage(ptx: Path, architectures: Iterable[int] = ARCHITECTURES) -> list[Usage]:
    """Of every kernel in a file of PTX, compiled for each architecture, as the build does from sm_80 on."""
    text = ptx.read_text(encoding="utf-8")
    blocks = dict(re.findall(r"\.entry (\w+)\([^{]*?\.maxntid (\d+)", text))
    found = []
    for architecture in architectures:
        told = assemble(ptx, f"sm_{architecture}")
        for (mangled, numbers), name in zip(told.items(), kernel_names(list(told)), strict=True):
            found.append(Usage(name, architecture, int(blocks.get(mangled, 256)), **numbers))
    return sorted(found, key=lambda u: (u.kernel, u.architecture))


def triton_usage(folder: Path, calls: Iterable[Any], architectures: Iterable[int] = ARCHITECTURES) -> list[Usage]:
    """Of the Triton kernels that calls (benchmarks/smoke.py) launch, none of which runs: named by the kernel, the first
    call that launches it, and how many such there were in this call before."""
    import pytest
    import torch
    from triton.backends.nvidia.compiler import get_ptxas

    import vocabdistil as vd
    from tests import cuda_on_host
    from tests.ptx.launch import TritonLauncher
    from vocabdistil.core import dispatch

    class Compiler(TritonLauncher):
        """Only looks at what would be launched."""

        def launch(self, kernel: Any, *others: object) -> None:
            seen.setdefault((kernel.metadata.name, kernel.asm["ptx"]), (name, kernel.metadata))

    calls, found = list(calls), []
    for architecture in architectures:
        seen: dict[tuple[str, str], tuple[str, Any]] = {}
        with pytest.MonkeyPatch.context() as patch:
            cuda_on_host.serve_the_host(patch)
            Compiler(folder / "cache", architecture).install(patch)
            for call in calls:
                if "triton" not in dispatch.TABLE[call.operation]["cuda"] or call.leaves[0].dtype == torch.float64:
                    continue
                name = f"{call.operation} {call.name}"
                leaves = [leaf.clone().requires_grad_() for leaf in call.leaves]
                call.run(vd, leaves, call.rest, "triton").sum().backward()
        for i, ((kernel, code), (name, metadata)) in enumerate(seen.items()):
            (path := folder / f"{i}.ptx").write_text(code, encoding="utf-8")
            target = re.search(r"\.target (\w+)", code)
            assert target is not None
            (numbers,) = assemble(path, target[1], get_ptxas(architecture).path).values()
            numbers["shared"] = metadata.shared  # asked for at the launch
            before = sum(u.kernel.startswith(f"{kernel}, {name}") for u in found if u.architecture == architecture)
            label = f"{kernel}, {name}{f', {before + 1}' if before else ''}"
            found.append(Usage(label, architecture, 32 * metadata.num_warps, **numbers))
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
    return f"{title}\n\n{markdown(lines)}"


def markdown(lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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


def pair_costs(launches: Launches) -> str:
    """Markdown: of the KL of spans of one row, with its gradient, the instructions of a warp and the bytes of memory,
    each counted once, per pair; the bytes that its three rows take; and the instructions of a pair whose rows are close
    and per row of padding."""
    import torch

    from tests.ptx.launch import span_loss_cost

    names = ("instructions", "bytes", "of its rows", "instructions of close rows", "per row of padding")
    lines = [["hidden size", *names], ["---", *["---:"] * len(names)]]
    for dim, name in COSTS:
        dtype = getattr(torch, name)
        full, padded = (span_loss_cost(launches, dim, dtype, PAIRS, padding) for padding in (0, 1024))
        close = span_loss_cost(launches, dim, dtype, PAIRS, close=True)
        rows = full.bytes / PAIRS, 3 * dim * dtype.itemsize
        each = full.instructions / PAIRS, *rows, close.instructions / PAIRS
        more = (padded.instructions - full.instructions) / 1024
        lines.append([f"{dim} {name}", *(f"{n:.0f}" for n in (*each, more))])
    return markdown(lines)


def call_costs(launches: Launches, backend: str, calls: Iterable[Any]) -> str:
    """Markdown: of calls (benchmarks/smoke.py) and their gradients, the instructions of warps, the bytes of memory that
    were read and written, each counted once, and the bytes of the tensors that a call has to read and to write. Not of
    those from hidden states, which are products of torch's above all."""
    import torch

    import vocabdistil as vd
    from tests.ptx.machine import Counts
    from vocabdistil.core import dispatch

    names = ("instructions", "bytes", "of its tensors", "bytes per instruction")
    lines = [["call", *names], ["---", *["---:"] * len(names)]]
    for call in calls:
        served = backend in dispatch.TABLE[call.operation]["cuda"] and not call.operation.startswith("linear_")
        if not served or call.leaves[0].dtype == torch.float64:
            continue
        leaves = [leaf.clone().requires_grad_() for leaf in call.leaves]
        counts = launches.counts = Counts()
        call.run(vd, leaves, call.rest, backend).sum().backward()
        launches.counts = None
        tensors = 2 * sum(x.nbytes for x in leaves) + sum(x.nbytes for x in call.rest)
        numbers = counts.instructions, counts.bytes, tensors, f"{tensors / counts.instructions:.1f}"
        lines.append([f"{call.operation} {call.name}", *map(str, numbers)])
    return markdown(lines)


def costs(folder: Path, triton: bool, calls: Iterable[Any]) -> str:
    """The tables of what calls cost, counted on the machine of tests/ptx."""
    import pytest

    from tests import cuda_on_host
    from tests.ptx.launch import TritonLauncher, compile_cuda, launching, triton_launching

    with pytest.MonkeyPatch.context() as patch:
        if triton:
            return call_costs(triton_launching(TritonLauncher(folder / "costs"), patch), "triton", calls)
        module, programs = cuda_on_host.build(folder), compile_cuda(SOURCE, folder)
        found = [
            f"{pair_costs(launches)}\n\n{call_costs(launches, 'cuda', calls)}"
            for launches in launching(module, programs, patch)
        ]
        return found[0]


def triton_release() -> str:
    import triton

    return triton.__version__


def calls_of(*sizes: int) -> Iterable[Any]:
    """Of every loss, with these numbers of tokens and hidden sizes."""
    import torch

    from .smoke import Sizes, calls

    return calls(torch.device("cpu"), Sizes(*sizes))


REAL = (5031, 30522, 4700, 384, 768)
COUNTED = (503, 3052, 470, 48, 96)  # an interpreter takes its time


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks static", description=__doc__)
    parser.add_argument("--spills", type=Path, metavar="FILE", help="also write the spills to this file")
    parser.add_argument("--triton", action="store_true", help="the Triton kernels instead; takes minutes")
    parser.add_argument("--costs", action="store_true", help="also count what calls cost; takes a C++ compiler")
    args = parser.parse_args(argv)
    for tool in () if args.triton else ("nvcc", "ptxas"):
        if find_tool(tool) is None:
            parser.error(f"{tool} is neither on the PATH nor in CUDA_HOME")
    with tempfile.TemporaryDirectory() as folder:
        if args.triton:
            found = triton_usage(Path(folder), calls_of(*REAL))
        else:
            found = usage(compile_ptx(SOURCE, Path(folder), min(ARCHITECTURES)))
        counted = costs(Path(folder), args.triton, calls_of(*COUNTED)) if args.costs else ""
    print(table(found))
    if counted:
        print(f"\n{counted}")
    if args.spills:
        write_spills(found, args.spills, triton_release() if args.triton else release())
    return 0
