"""KL through the remap table from hidden states (`vocabdistil.linear_remapped_kl`), on the table of `remapped_kl`, over
all mapped tokens or the teacher's most probable ones. ``full-logits`` forms all logits first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import vocabdistil as vd

from ._losses import loss_problem, randn
from .harness import Case, Problem
from .remapped_kl import make_table

OPERATION = "linear_remapped_kl"


def build(
    device: torch.device, rows: int, v_t: int, v_s: int, d_t: int, d_s: int, top_k: int | None, dtype: torch.dtype
) -> Problem:
    make = functools.partial(randn, device=device, dtype=dtype)
    tensors = [make(rows, d_s, seed=1), make(v_s, d_s, seed=3) / d_s**0.5]
    tensors += [make(rows, d_t, seed=2), make(v_t, d_t, seed=4) / d_t**0.5]
    table = make_table(v_t, v_s)
    options = {"combine": "logsumexp", "top_k": top_k}
    size = dtype.itemsize * (2 * rows * d_s + rows * d_t + v_t * d_t + 2 * v_s * d_s)
    size += 4 * (table.ids.numel() + table.indptr.numel())

    def rivals(tensors: list[Tensor]) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
        x, w, y, v = tensors
        return {"full-logits": lambda: vd.remapped_kl(x @ w.t(), y @ v.t(), table, **options)}, {}

    return loss_problem(OPERATION, tensors, 2, [table], options, size, rowwise=(0, 2), rivals=rivals)


def cases(device: torch.device) -> Iterator[Case]:
    sizes = [(512, 30522, 5000, 384, 264, torch.float32)]
    if device.type == "cuda":
        half = torch.bfloat16
        sizes = [(4096, 119547, 5031, 768, 264, half), (8192, 151936, 32000, 768, 264, half)]
    for rows, v_t, v_s, d_t, d_s, dtype in sizes:
        for top_k in (None, 100):
            make = functools.partial(
                build, rows=rows, v_t=v_t, v_s=v_s, d_t=d_t, d_s=d_s, top_k=top_k, dtype=dtype
            )
            yield Case(f"{rows}-{v_t}-{v_s}{f'-top{top_k}' if top_k else ''}", make, dtype, ("fwd+bwd",))
