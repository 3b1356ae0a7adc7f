"""Products of half-precision matrices in float32: on tensor cores, nothing rounded to half on the way."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

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


def split(x: Tensor) -> tuple[Tensor, ...]:
    """float32 as the sum of two bfloat16 matrices, up to 2^-17 of each value."""
    high = x.bfloat16()
    return high, (x - high).bfloat16()


def sum_product(a: Sequence[Tensor], b: Sequence[Tensor], out: Tensor, add: bool = False) -> None:
    """``out = (a_0 + a_1 ...) (b_0 + b_1 ...)``, or ``out +=`` it, without the products of the small parts by each
    other: of :func:`split` matrices three products, exact to about 2^-16 of the sum of the terms' sizes."""
    for i, x in enumerate(a):
        for y in b[: len(a) - i]:
            product(x, y, out, add)
            add = True
