"""How far a result may lie from the float64 reference, by dtype. One table for all tests.

Losses of half-precision inputs are compared with the reference on the same rounded inputs, so their tolerance
is that of float32 arithmetic; gradients are rounded to the inputs' dtype, which the second table allows for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    rtol: float
    atol: float


LOSS = {
    torch.float64: Tolerance(1e-11, 1e-12),
    torch.float32: Tolerance(2e-5, 1e-6),
    torch.bfloat16: Tolerance(2e-5, 1e-6),
    torch.float16: Tolerance(2e-5, 1e-6),
}

VALUE = {
    torch.float64: Tolerance(1e-11, 1e-12),
    torch.float32: Tolerance(1e-4, 1e-6),
    torch.bfloat16: Tolerance(1e-2, 1e-5),
    torch.float16: Tolerance(2e-3, 1e-5),
}


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, table: dict[torch.dtype, Tolerance], dtype: torch.dtype
) -> None:
    """Compares in float64, by the tolerance of ``dtype`` (the dtype of the inputs)."""
    rtol, atol = table[dtype]
    torch.testing.assert_close(actual.detach().double(), expected.detach().double(), rtol=rtol, atol=atol)
