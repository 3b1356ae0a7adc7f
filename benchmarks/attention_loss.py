"""Attention of spans to spans (`vocabdistil.attention_loss`): several layers of the teacher, heads averaged."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

import vocabdistil as vd

from .harness import Case, Problem, Provider, compiled, random_pairs

OPERATION = "attention_loss"


def build(device: torch.device, batch: int, length: int, heads: tuple[int, int], layers: int) -> Problem:
    pairs, (_, width) = random_pairs(batch, length, device)
    g = torch.Generator(device).manual_seed(1)

    def maps(count: int, size: int) -> torch.Tensor:
        return torch.randn(batch, count, size, size, generator=g, device=device).softmax(-1)

    student = maps(heads[0], width).requires_grad_()
    teachers = [maps(heads[1], length) for _ in range(layers)]
    options = {"average_heads": heads[0] != heads[1]}

    def truth() -> list[torch.Tensor]:
        wide = student.detach().double().requires_grad_()
        total = vd.reference.attention_loss(wide, [x.double() for x in teachers], pairs, **options)
        total.backward()
        return [total.detach(), wide.grad]

    compiled_reference = compiled(vd.reference.attention_loss)
    providers = {
        name: Provider(functools.partial(call, student, teachers, pairs, **options))
        for name, call in (
            ("reference", vd.reference.attention_loss), ("compile", compiled_reference), ("ours", vd.attention_loss),
        )
    }  # fmt: skip
    size = 2 * student.nbytes + sum(x.nbytes for x in teachers)
    return Problem(providers, truth, {"fwd+bwd": size}, [student])


def cases(device: torch.device) -> Iterator[Case]:
    for heads, layers in (((12, 12), 1), ((4, 12), 6)):
        call = functools.partial(build, batch=4, length=128, heads=heads, layers=layers)
        yield Case(f"b4-l128-h{heads[0]}-h{heads[1]}x{layers}", call, modes=("fwd+bwd",))
