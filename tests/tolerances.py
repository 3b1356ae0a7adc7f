"""What each dtype may lose against the float64 reference: one table for all tests."""

from __future__ import annotations

import torch

# dtype of the value compared -> ||got - want|| / ||want|| allowed. Half types: a rounding of the output.
RELATIVE = {
    torch.float64: 1e-11,
    torch.float32: 3e-6,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-10,
}


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
    assert torch.isfinite(got).all(), f"{name}: not finite"
    # Where the exact value cancels to 0 (hidden size 1, say) the rounding of its terms remains.
    error = (got.double() - want.double()).norm() / max(float(want.double().norm()), 1e-2)
    assert error <= RELATIVE[dtype], f"{name}: relative error {error:.2e}, allowed {RELATIVE[dtype]:.0e}"
