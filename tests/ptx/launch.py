"""Launches of kernels go to the machine: those of the CUDA sources through their host build (tests/cuda_on_host), those
of Triton through its own launcher. So grid, block and arguments are what a call really passes."""

from __future__ import annotations

import ctypes
import functools
import importlib
import inspect
import re
import struct
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch

import vocabdistil as vd
from benchmarks import static
from tests import cuda_on_host
from vocabdistil.core import native

from .machine import Counts, Machine, Program
from .memory import Tensors
from .parser import parse

ROOT = Path(__file__).parent.parent.parent
WRITTEN = ("out", "loss", "total", "grad", "grads", "slopes")  # the arguments of operations that their kernels write


def tensors_of(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from tensors_of(item)


class Launches:
    """What a test has launched, and what its kernels may touch."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.tensors = Tensors()
        self.counts: Counts | None = None  # of those from here on, if wanted

    def known(self, function: Callable) -> Callable:
        """A function whose tensors its launches may read and, of some names, write."""
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: object, **options: object) -> object:
            self.tensors = Tensors()
            for name, value in signature.bind(*args, **options).arguments.items():
                for tensor in tensors_of(value):
                    self.tensors.add(tensor, name in WRITTEN)
            return function(*args, **options)

        return call

    def made(self, function: Callable, written: bool = False) -> Callable:
        """A function whose results, copies of what was given perhaps, are for its launches to read or to write."""

        @functools.wraps(function)
        def call(*args: object) -> object:
            result = function(*args)
            for tensor in tensors_of(result):
                self.tensors.add(tensor, written)
            return result

        return call

    def run(
        self, name: str, program: Program, grid: Sequence[int], block: Sequence[int], shared: int, params: bytes
    ) -> None:
        self.count[name] += 1
        Machine(program, tuple(grid), tuple(block), shared, params, self.tensors, self.counts).run()


# CUDA.


def compile_cuda(source: Path, folder: Path, architecture: int = 90) -> dict[str, Program]:
    """The kernels of a file, by names such as ``loss_kernel<Kind 1, 16, 512>``."""
    kernels = parse(static.compile_ptx(source, folder, architecture).read_text(encoding="utf-8"))
    return dict(zip(static.kernel_names([*kernels]), map(Program, kernels.values()), strict=True))


CUDA_OPERATIONS = (
    "cuda_span_loss", "cuda_span_mean_fwd", "cuda_span_mean_bwd", "cuda_matched_kl", "cuda_remap_measure",
    "cuda_remap_write",
)  # fmt: skip


def host_name(demangled: str) -> str:
    """The same of a kernel that was compiled for the host, whose half types are its own."""
    name = static.kernel_name(demangled).replace("vocabdistil::host::bf16", "__nv_bfloat16")
    return name.replace("vocabdistil::host::f16", "__half")


class HostLauncher:
    """Sends the launches of a host build to the machine while it is entered."""

    def __init__(self, module: ModuleType, programs: dict[str, Program], launches: Launches) -> None:
        library = ctypes.CDLL(module.__file__)
        lines = subprocess.run(["nm", "-C", module.__file__], capture_output=True, text=True, check=True).stdout
        found = [line.split(" ", 2) for line in lines.splitlines() if re.match(r"[0-9a-f]+ [tT] ", line)]
        places = {name: int(place, 16) for place, _, name in found}
        self.set, self.programs, self.launches = library.launch_with, programs, launches
        self.base = ctypes.cast(self.set, ctypes.c_void_p).value - places["launch_with"]
        self.names = {at: host_name(name) for name, at in places.items() if re.search(r"_kernel(<.*>)?\(", name)}
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint * 6), ctypes.c_size_t, ctypes.c_void_p,
            ctypes.c_size_t,
        )  # fmt: skip
        self.callback = kind(self.launch)
        self.failure: BaseException | None = None

    def launch(self, kernel: int, sizes: object, shared: int, arguments: int, size: int) -> int:
        try:
            name, sizes = self.names[kernel - self.base], tuple(sizes.contents)
            params = ctypes.string_at(arguments, size)
            self.launches.run(name, self.programs[name], sizes[:3], sizes[3:], shared, params)
        except BaseException as failure:  # nothing may leave through C++
            self.failure = failure
            return 1
        return 0

    def __enter__(self) -> HostLauncher:
        self.set(self.callback)
        return self

    def __exit__(self, *exception: object) -> None:
        self.set(None)

    def guard(self, function: Callable) -> Callable:
        """Raises what a launch has met, in place of the error that the module makes of it."""

        @functools.wraps(function)
        def call(*args: object, **options: object) -> object:
            self.failure = None
            try:
                return function(*args, **options)
            except RuntimeError:
                if self.failure is not None:
                    raise self.failure from None
                raise

        return call


def launching(module: ModuleType, programs: dict[str, Program], patch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Calls with CPU tensors to the backend "cuda" run the programs."""
    launches = Launches()
    cuda_on_host.serve_the_host(patch, module)
    with HostLauncher(module, programs, launches) as launcher:
        for name in CUDA_OPERATIONS:
            patch.setattr(native, name, launcher.guard(launches.known(getattr(native, name))))
        for name in ("total_parts", "_new_tables"):
            patch.setattr(native, name, launches.made(getattr(native, name), written=True))
        patch.setattr(native, "matched_tables", launches.made(native.matched_tables))
        yield launches


def span_loss_cost(
    launches: Launches, dim: int, dtype: torch.dtype, pairs: int, padding: int = 0, close: bool = False
) -> Counts:
    """Of the KL and its gradient for spans of one row each, with rows behind them that belong to none."""
    generator, start = torch.Generator().manual_seed(0), torch.arange(pairs, dtype=torch.int32)
    student, teacher = (torch.randn(n, dim, generator=generator).to(dtype) for n in (pairs + padding, pairs))
    if close:
        teacher = student[:pairs] + 0.01 * teacher
    spans = vd.SpanPairs(start, start + 1, start, start + 1)
    counts = launches.counts = Counts()
    vd.span_loss(student.requires_grad_(), teacher, spans, backend="cuda")
    launches.counts = None
    return counts


# Triton.


class TritonLauncher:
    """Compiles for a GPU that is not there, as the arguments of a call want it, and launches on the machine."""

    def __init__(self, cache: Path, capability: int = 90) -> None:
        from triton.backends.compiler import GPUTarget

        self.cache, self.target, self.launches = cache, GPUTarget("cuda", capability, 32), Launches()
        self.programs: dict[str, Program] = {}

    @staticmethod
    def possible() -> bool:
        """Whether a launch of this triton can be taken over."""
        from triton.compiler import CompiledKernel

        return isinstance(getattr(CompiledKernel, "run", None), property)

    # What Triton asks of a driver.
    def get_current_device(self) -> object:
        return self  # its compiled kernels are kept apart from those of a GPU

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_current_target(self) -> object:
        return self.target

    def install(self, patch: pytest.MonkeyPatch) -> None:
        from triton.backends.nvidia.compiler import CUDABackend
        from triton.compiler import CompiledKernel
        from triton.runtime.driver import driver

        patch.setenv("TRITON_CACHE_DIR", str(self.cache))
        patch.setattr(driver, "_active", self)
        patch.setattr(CUDABackend, "make_cubin", lambda *arguments: b"")  # nobody runs it
        patch.setattr(CompiledKernel, "launch_metadata", lambda *arguments: None)
        patch.setattr(CompiledKernel, "run", property(lambda kernel: functools.partial(self.launch, kernel)))

    def launch(self, kernel: object, x: int, y: int, z: int, *rest: object) -> None:
        arguments = rest[-len(kernel.src.signature) :]
        ptx = kernel.asm["ptx"]
        if ptx not in self.programs:
            (parsed,) = parse(ptx).values()
            self.programs[ptx] = Program(parsed)
        program, params = self.programs[ptx], b""
        for kind, value in zip(kernel.src.signature.values(), arguments, strict=True):
            if kind == "constexpr":
                continue
            if kind.startswith("*"):
                # What the operation was not given it has made for its kernels.
                self.launches.tensors.add(value, not self.launches.tensors.overlap(value))
                kind, value = "*", value.data_ptr()
            params += bytes(-len(params) % struct.calcsize(FORMATS[kind])) + struct.pack("<" + FORMATS[kind], value)
        params = params.ljust(program.kernel.bytes["param"], b"\0")  # scratch memory, of which there is none
        block = (32 * kernel.metadata.num_warps, 1, 1)
        self.launches.run(kernel.metadata.name, program, (x, y, z), block, kernel.metadata.shared, params)


FORMATS = {
    "*": "Q", "i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u8": "B", "u32": "I", "u64": "Q", "fp32": "f",
    "fp64": "d",
}  # fmt: skip

# What the kernels of each file are launched by; its tensors are those that they may touch.
TRITON_OPERATIONS = {
    "span_loss": ["span_loss"],
    "span_mean": ["span_mean_fwd", "span_mean_bwd"],
    "remap": ["measure", "remap"],
    "matched_kl": ["matched_kl"],
    "linear_matched_kl": ["tiles", "masses", "combine", "grad_hidden", "grad_weight"],
    "remapped_kl": ["remapped_kl"],
    "log_prob": ["log_prob_fwd", "log_prob_bwd"],
    "relation_loss": ["relation_loss"],
    "contrastive": ["softmax"],
}


def triton_launching(launcher: TritonLauncher, patch: pytest.MonkeyPatch) -> Launches:
    """Calls with CPU tensors to the backend "triton" run on the machine."""
    cuda_on_host.serve_the_host(patch)
    launches = launcher.launches = Launches()
    launcher.install(patch)
    for file, names in TRITON_OPERATIONS.items():
        module = importlib.import_module(f"vocabdistil.triton_kernels.{file}")
        for name in names:
            patch.setattr(module, name, launches.known(getattr(module, name)))
        if hasattr(module, "one_stride"):
            patch.setattr(module, "one_stride", launches.made(module.one_stride))
    return launches
