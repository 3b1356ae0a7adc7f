"""Launches of GPU kernels, small, for a sanitizer, or large, for a profiler: ``python -m benchmarks.launches``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

import vocabdistil as vd
from vocabdistil.core import dispatch

from .harness import random_pairs
from .smoke import Call, calls

# Batch, length, width, dtype, divergence: sizes that fill a GPU.
LARGE = (
    (64, 512, 1024, torch.bfloat16, "kl"),
    (64, 512, 768, torch.float32, "kl"),
    (64, 512, 264, torch.bfloat16, "kl"),
    (16, 2048, 4096, torch.bfloat16, "kl"),
    (64, 512, 768, torch.bfloat16, "jsd"),
)


def launch(call: Call, backend: str) -> None:
    """Forward and backward; the upstream gradient is not 1, so that the backward kernels run too."""
    leaves = [leaf.clone().requires_grad_() for leaf in call.leaves]
    (3 * call.run(vd, leaves, call.rest, backend).sum()).backward()


def _backends(operation: str, device: torch.device) -> list[str]:
    """Those of ours that can run here."""
    return [name for name in dispatch.TABLE[operation][device.type] if dispatch.unavailable(name) is None]


def small(device: torch.device, operation: str) -> None:
    """The calls of the smoke test."""
    for call in calls(device):
        for backend in _backends(operation, device) if call.operation == operation else ():
            launch(call, backend)


def large(device: torch.device) -> None:
    for batch, length, width, dtype, divergence in LARGE:
        pairs, shape = random_pairs(batch, length, device)
        student = torch.randn(*shape, width, device=device).to(dtype).requires_grad_()
        teacher = torch.randn(batch, length, width, device=device).to(dtype)
        for backend in _backends("span_loss", device):
            vd.span_loss(student, teacher, pairs, divergence=divergence, backend=backend).backward()


def main(argv: Sequence[str]) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if list(argv) == ["large"]:
        large(device)
    elif len(argv) == 2 and argv[0] == "small" and argv[1] in dispatch.TABLE:
        small(device, argv[1])
    else:
        print(f"usage: python -m benchmarks.launches large | small {{{','.join(dispatch.TABLE)}}}", file=sys.stderr)
        return 2
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
