"""KL over the matched vocabulary from hidden states (`vocabdistil.linear_matched_kl`); the reference takes the matched
rows of the weights first."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from ._losses import loss_problem, randn
from .harness import Case, Problem
from .matched_kl import make_matched

OPERATION = "linear_matched_kl"


def build(
    device: torch.device, rows: int, v_t: int, v_s: int, v_m: int, d_t: int, d_s: int, dtype: torch.dtype
) -> Problem:
    make = functools.partial(randn, device=device, dtype=dtype)
    tensors = [make(rows, d_s, seed=1), make(v_s, d_s, seed=3) / d_s**0.5]
    tensors += [make(rows, d_t, seed=2), make(v_t, d_t, seed=4) / d_t**0.5]
    size = dtype.itemsize * (2 * rows * d_s + rows * d_t + v_m * (d_t + d_s) + v_s * d_s)
    return loss_problem(OPERATION, tensors, 2, [make_matched(v_s, v_t, v_m)], {}, size)


def cases(device: torch.device) -> Iterator[Case]:
    sizes = [(512, 30522, 5000, 4500, 384, 264, torch.float32)]
    if device.type == "cuda":
        half = torch.bfloat16
        sizes = [(4096, 119547, 5031, 4700, 768, 264, half), (8192, 151936, 32000, 28000, 768, 264, half)]
    for rows, v_t, v_s, v_m, d_t, d_s, dtype in sizes:
        make = functools.partial(build, rows=rows, v_t=v_t, v_s=v_s, v_m=v_m, d_t=d_t, d_s=d_s, dtype=dtype)
        yield Case(f"{rows}-{v_t}-{v_s}-{v_m}", make, dtype, ("fwd+bwd",))
