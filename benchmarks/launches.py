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


def small(device: torch.device, operation: str) -> int:
    """The calls of the smoke test, and a remap, which is none of them as it has no gradient; returns how many."""
    count = 0
    if operation == "remap":
        table = vd.RemapTable(torch.arange(61), torch.arange(60) % 50, student_vocab_size=50, unk_id=1, pad_id=0)
        ids = torch.arange(60, device=device).view(2, 30)
        for backend in _backends(operation, device):
            for width in (None, 40):
                table.remap(ids, max_length=width, backend=backend)
                count += 1
        return count
    for call in calls(device):
        for backend in _backends(operation, device) if call.operation == operation else ():
            launch(call, backend)
            count += 1
    return count


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
