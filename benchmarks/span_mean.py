"""Span averages (`vocabdistil.span_mean`) against PyTorch eager, compiled, and F.embedding_bag."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import vocabdistil as vd

from .harness import Case, Problem, Provider, compiled, own_providers, random_pairs

OPERATION = "span_mean"


def build(device: torch.device, batch: int, length: int, hidden: int, dtype: torch.dtype) -> Problem:
    pairs, shape = random_pairs(batch, length, device)
    start, end = pairs.student_start, pairs.student_end
    g = torch.Generator(device).manual_seed(1)
    x = torch.randn(*shape, hidden, generator=g, device=device).to(dtype).requires_grad_()
    upstream = torch.randn(len(pairs), hidden, generator=g, device=device).to(dtype)

    def truth() -> list[Tensor]:
        wide = x.detach().double().requires_grad_()
        out = vd.reference.span_mean(wide, start, end)
        out.backward(upstream.double())
        return [out.detach(), wide.grad]

    sizes = (end - start).long()
    offsets = sizes.cumsum(0) - sizes
    tokens = torch.arange(int(sizes.sum()), device=device) + (start - offsets).repeat_interleave(sizes)
    here, missing = own_providers(OPERATION, device)
    compiled_reference = compiled(vd.reference.span_mean)
    providers = {
        "reference": Provider(lambda: vd.reference.span_mean(x, start, end)),
        "compile": Provider(lambda: compiled_reference(x, start, end)),
        "embedding_bag": Provider(lambda: F.embedding_bag(tokens, x.flatten(0, -2), offsets, mode="mean")),
    }
    for name, backend in here.items():
        providers[name] = Provider(functools.partial(vd.span_mean, x, start, end, backend=backend))
    forward = (tokens.numel() + len(pairs)) * hidden * dtype.itemsize
    backward = (x.numel() + upstream.numel()) * dtype.itemsize
    nbytes = {"fwd": forward, "fwd+bwd": forward + backward}
    return Problem(providers, truth, nbytes, [x], upstream, missing)


def cases(device: torch.device) -> Iterator[Case]:
    half, single = torch.bfloat16, torch.float32
    sizes = [(8, 256, 768, single), (8, 256, 768, half), (4, 1024, 1024, single)]
    if device.type == "cuda":
        sizes = [(64, 512, 1024, half), (64, 512, 768, single), (32, 256, 768, half), (32, 256, 264, single)]
    for batch, length, hidden, dtype in sizes:
        suffix = "-bf16" if dtype == half else ""
        yield Case(
            f"b{batch}-l{length}-d{hidden}{suffix}",
            functools.partial(build, batch=batch, length=length, hidden=hidden, dtype=dtype),
            dtype,
        )
