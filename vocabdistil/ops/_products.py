"""Products of half-precision matrices in float32: on tensor cores, nothing rounded to half on the way."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


@functools.cache
def native_products(device: torch.device) -> tuple[bool, bool]:
    """Whether ``torch.mm`` and ``torch.addmm`` of this torch write float32 from half inputs (since 2.8, on CUDA; adding
    to float32 came later). Tried once per device with one element, as no version number tells for the second."""
    if device.type != "cuda":
        return False, False
    one = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
    out = torch.zeros(8, 8, device=device)

    def runs(operation: str, *arguments: Tensor) -> bool:
        try:
            getattr(torch.ops.aten, operation).dtype_out(*arguments, torch.float32, out=out)
        except (AttributeError, NotImplementedError, RuntimeError):
            return False
        return True

    return runs("mm", one, one), runs("addmm", out, one, one)


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """Allows products of float32 matrices in TF32 for a while: 11 significant bits of each factor, which is all that
    float16 and bfloat16 values have. The older setting cannot be read while the newer one says something else."""
    matmul = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    before, wanted = getattr(matmul, name), "tf32" if name == "fp32_precision" else True
    if before == wanted:
        yield
        return
    setattr(matmul, name, wanted)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """``out = a b``, or ``out += a b``: ``[n, k]``, ``[k, m]`` of one dtype, ``out [n, m]`` in it or, for half types,
    in float32, and accumulated in that."""
    if a.dtype == out.dtype:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
        return
    written, added = native_products(a.device)
    if written and not add:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    elif added and add:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    elif written:
        out.add_(torch.ops.aten.mm.dtype(a, b, out.dtype))
    else:
        # Half the speed of half products and a copy of each operand, but nothing lost: half values are exact in TF32.
        with tf32():
            product(a.to(out.dtype), b.to(out.dtype), out, add)


@functools.cache
def tf32_pays(device: torch.device) -> bool:
    """Whether three products in TF32 take less time than one in float32: on the GPUs of data centres, which do 7 times
    as many operations of the first kind a second, or more. On others it is as many or half."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0), (10, 3))


def whole(x: Tensor) -> tuple[Tensor]:
    return (x,)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as the sum of two bfloat16 matrices, up to 2^-17 of each value."""
    high = x.bfloat16()
    return high, (x - high).bfloat16()


def split_tf32(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as the sum of a matrix of TF32 values and of what is left, of which TF32 keeps all but 2^-21 of x."""
    high = ((x.view(torch.int32) + 4096) & -8192).view(torch.float32)
    return high, x - high


SPLITS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {"whole": whole, "bfloat16": split, "tf32": split_tf32}


def left_parts(high: Tensor, low: Tensor | None = None) -> Tensor:
    """The parts of a matrix ``[n, k]`` as ``[n, 3, k]``: with the :func:`right_parts` of another, one product with 3 k
    terms for each of k, exact to about 2^-16 (bfloat16) or 2^-21 (TF32) of the sum of the terms' sizes; that of the
    small parts by each other is not among them. Of a matrix that is whole ``[n, 1, k]``."""
    return high[:, None] if low is None else torch.stack([high, low, high], 1)


def right_parts(high: Tensor, low: Tensor | None = None) -> Tensor:
    return high[:, None] if low is None else torch.stack([high, high, low], 1)
