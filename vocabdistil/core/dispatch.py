"""Which implementation serves which operation on which device: one table, one override.

``backend=`` of a call, or the environment variable ``VOCABDISTIL_BACKEND``, overrides the table. An explicit choice
that cannot run raises and says why; the variable holds for the operations that have such an implementation. An
automatic fallback to the reference warns once. Under ``torch.func`` transforms every loss is the reference's.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable

import torch

from . import native

# operation -> device type -> implementations, best first. On a GPU both move the same bytes at any size; CUDA stands
# first because it pads rows less where Triton pads to a power of two (768 to 1024), takes fewer instructions for them
# (``python -m benchmarks static --costs``), and starts sooner, which is what small inputs pay for. Of matched_kl Triton
# stands first: it keeps a row in registers, where CUDA reads the student's again from the cache. A remap is small, so
# what starts sooner stands first. That order is by reasoning, not yet measured.
TABLE: dict[str, dict[str, tuple[str, ...]]] = {
    "span_mean": {"cpu": ("cpu",), "cuda": ("cuda", "triton")},
    "span_loss": {"cpu": ("cpu",), "cuda": ("cuda", "triton")},
    "matched_kl": {"cpu": ("cpu",), "cuda": ("triton", "cuda")},
    "remapped_kl": {"cpu": ("cpu",), "cuda": ("triton",)},
    "relation_loss": {"cpu": ("cpu",), "cuda": ("triton",)},
    "contrastive": {"cpu": ("torch",), "cuda": ("triton", "torch")},
    "linear_matched_kl": {"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")},
    "linear_remapped_kl": {"cpu": ("cpu",), "cuda": ("triton",)},
    "span_likelihood": {"cpu": ("cpu",), "cuda": ("triton",)},
    "linear_span_likelihood": {"cpu": ("cpu",), "cuda": ("triton",)},
    "remap": {"cpu": ("cpu",), "cuda": ("cuda", "triton", "torch")},
}
BACKENDS = ("cpu", "cuda", "triton", "torch", "reference")


@functools.cache
def unavailable(backend: str) -> str | None:
    """Why this backend cannot run on this installation and machine; None if it can."""
    if backend in ("torch", "reference"):
        return None
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            return "torch finds no CUDA device (TRITON_INTERPRET=1 runs the kernels in the interpreter)"
        return None
    if error := native.load_error():
        return f"the compiled module vocabdistil._C could not be loaded: {error}"
    if backend == "cuda":
        if not native.module().cuda_compiler:
            return "the compiled module was built without CUDA (no nvcc, or VOCABDISTIL_CUDA=OFF)"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        if problem := native.module().cuda_problem():
            return f"its kernels cannot run: {problem}"
    return None


@functools.cache
def _warn_fallback(op: str, device: str, reasons: str) -> None:
    warnings.warn(
        f"vocabdistil.{op}: running the reference implementation on {device}: {reasons}", stacklevel=4
    )


def _has(op: str, device: str, backend: str) -> bool:
    """Whether there is such an implementation; Triton's interpreter runs kernels for a GPU on the CPU."""
    interpreted = backend == "triton" and device == "cpu" and "triton" in TABLE[op].get("cuda", ())
    return backend == "reference" or backend in TABLE[op].get(device, ()) or interpreted


@functools.cache
def _resolve(
    op: str, device: str, backend: str | None, source: str, limits: tuple[tuple[str, str], ...]
) -> tuple[str, str]:
    choices = TABLE[op].get(device, ())
    limit = dict(limits)
    if backend is None:
        reasons = {b: unavailable(b) or limit.get(b) for b in choices}
        for choice, reason in reasons.items():
            if not reason:
                return choice, ""
        told = "; ".join(f"{b}: {why}" for b, why in reasons.items())
        return "reference", told or f"there is no native {op} for this device"
    if backend not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if not _has(op, device, backend):
        raise ValueError(
            f"{source}: {backend!r} has no {op} for {device} tensors; available: "
            f"{', '.join((*choices, 'reference'))}"
        )
    if backend in limit:
        raise ValueError(f"{source}: {backend!r} cannot take these inputs to {op}: {limit[backend]}")
    if why := unavailable(backend):
        raise RuntimeError(f"{source}: {backend!r} cannot run here: {why}")
    return backend, ""


def transformed() -> bool:
    """Whether this runs inside ``torch.func.grad``, ``vmap`` or another of their kind."""
    return torch._C._are_functorch_transforms_active()


def _choose(op: str, device: str, backend: str | None, limits: tuple[tuple[str, str], ...]) -> str:
    source = "backend"
    if backend is None and (backend := os.environ.get("VOCABDISTIL_BACKEND") or None):
        source = "VOCABDISTIL_BACKEND"
        if backend in BACKENDS and not _has(op, device, backend):
            backend = None
    if transformed():
        why = "torch.func transforms it with backend='reference' alone"
        limits += tuple((b, why) for b in BACKENDS if b != "reference")
    choice, reasons = _resolve(op, device, backend, source, limits)
    if reasons:
        _warn_fallback(op, device, reasons)
    return choice


# What torch.compiler.assume_constant_result does; calling it would import torch._dynamo, which takes seconds.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def resolve(op: str, device: torch.device, backend: str | None, limits: tuple[tuple[str, str], ...] = ()) -> str:
    """The implementation of ``op`` to run on ``device`` (a constant of the graph under torch.compile).

    Args:
        limits: pairs of a backend that cannot take these inputs, and why.

    Raises:
        ValueError: an unknown backend, or one that has no such operation for the device or the inputs.
        RuntimeError: a backend that cannot run on this installation or machine; the text says why.
    """
    return _choose(op, device.type, backend, limits)


def implementation(op: str, backend: str, name: str) -> Callable:
    """The function ``name`` of an operation in a backend: a file of triton_kernels or reference, or the compiled
    module."""
    if backend in ("triton", "torch", "reference"):
        folder = "triton_kernels" if backend == "triton" else "reference"
        return getattr(importlib.import_module(f"vocabdistil.{folder}.{op}"), name)
    return getattr(native, f"cuda_{name}" if backend == "cuda" else name)
