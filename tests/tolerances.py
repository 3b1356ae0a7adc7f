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


# dtype of the value compared -> ||got - want|| / ||want|| allowed. Half types: a rounding of the output.
RELATIVE = {
    torch.float64: 1e-11,
    torch.float32: 3e-6,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-10,
}


def assert_norm_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, name: str, factor: float = 1) -> None:
    """Compares ||got - want|| with ``factor`` times the error allowed for ``dtype`` (the dtype of the inputs)."""
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
    assert torch.isfinite(got).all(), f"{name}: not finite"
    # Where the exact value cancels to 0 (hidden size 1, say) the rounding of its terms remains.
    size = max(float(want.double().norm()), 1e-2)
    error = (got.double() - want.double()).norm() / size
    allowed = factor * RELATIVE[dtype]
    if dtype == torch.float16:  # under 2^-14 its values are 2^-24 apart: a rounding of up to half of that each
        allowed += 2.0**-25 * got.numel() ** 0.5 / size
    assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.1e}"
