"""Every loss with kernels once on every backend, small, against float64: ``python -m benchmarks smoke``.

A minute that says whether anything on a machine is badly wrong, before the tests say what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vocabdistil as vd
from vocabdistil.core import dispatch

from ._losses import as_truth
from .harness import ALLOWED, OURS_FROM_HALF, judge, random_pairs, worst_error

__all__ = ["Call", "calls", "smoke"]

SPAN_SHAPES = (
    (264, torch.bfloat16), (768, torch.float16), (1030, torch.float32), (4096, torch.bfloat16), (8192, torch.float32),
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One call of an operation.

    Attributes:
        run: of the module that has it (``vocabdistil`` or its reference), the leaves and ``backend=``.
        leaves: tensors that get a gradient.
        rest: other tensors; the reference reads those of numbers as float64.
    """

    operation: str
    name: str
    run: Callable[..., Tensor]
    leaves: Sequence[Tensor]
    rest: Sequence[Tensor]


def _call(
    operation: str, name: str, leaves: Sequence[Tensor], rest: Sequence[Tensor], *given: Any, **options: Any
) -> Call:
    def run(module: Any, tensors: Sequence[Tensor], others: Sequence[Tensor], backend: str | None) -> Tensor:
        chosen = {} if backend is None else {"backend": backend}
        return getattr(module, operation)(*tensors, *others, *given, **options, **chosen)

    return Call(operation, name, run, leaves, rest)


@dataclass(frozen=True)
class Sizes:
    """Tokens of both vocabularies and of what they share, and hidden sizes of both sides."""

    student: int = 50
    teacher: int = 60
    matched: int = 40
    student_dim: int = 24
    teacher_dim: int = 48


def calls(device: torch.device, sizes: Sizes = Sizes()) -> Iterator[Call]:  # noqa: B008 - frozen
    """All losses with kernels, in their kinds."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    pairs, (batch, width) = random_pairs(4, 16, device, filled=0.7)
    v_s, v_t, d_s, d_t = sizes.student, sizes.teacher, sizes.student_dim, sizes.teacher_dim
    matched = vd.MatchedVocab(torch.arange(sizes.matched), torch.arange(sizes.matched)).to(device)
    ends = (torch.arange(v_t) % 5).cumsum(0)  # rows of up to 4 pieces
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    table = vd.RemapTable(indptr, torch.arange(int(ends[-1])) % v_s, student_vocab_size=v_s, unk_id=1, pad_id=0)
    # The kernels of a GPU take no float64.
    for dim, dtype in SPAN_SHAPES if device.type == "cuda" else (*SPAN_SHAPES, (768, torch.float64)):
        for divergence in ("kl", "reverse_kl", "jsd", "mse", "cosine"):
            sides = [made(4, n, dim, dtype=dtype) for n in (width, 16)]
            name = f"{divergence} {dim} {str(dtype).removeprefix('torch.')}"
            yield _call("span_loss", name, sides[:1], sides[1:], pairs, divergence=divergence, temperature=1.7)
    rows = made(4 * width, 264)
    yield _call("span_mean", "264", [rows], [], pairs.student_start, pairs.student_end)
    for unmatched in ("renormalize", "rest", "drop"):
        logits = [made(64, v_s)], [made(64, v_t)]
        yield _call("matched_kl", unmatched, *logits, matched, unmatched=unmatched)
        for dtype in (torch.float32, torch.bfloat16):
            tensors = [made(*shape, dtype=dtype) for shape in ((64, d_s), (v_s, d_s), (64, d_t), (v_t, d_t))]
            name = unmatched if dtype == torch.float32 else f"{unmatched} bfloat16"
            yield _call("linear_matched_kl", name, tensors[:2], tensors[2:], matched, unmatched=unmatched)
    for combine in ("sum", "logsumexp"):
        for top_k in (None, 7):
            options = {"combine": combine, "top_k": top_k}
            name = f"{combine}{f' of the {top_k} largest' if top_k else ''}"
            yield _call("remapped_kl", name, [made(64, v_s)], [made(64, v_t)], table, **options)
            hidden, weight, teacher = made(64, d_s), made(v_s, d_s), [made(64, d_t), made(v_t, d_t)]
            yield _call("linear_remapped_kl", name, [hidden, weight], teacher, table, **options)
    options = {"combine": "logsumexp", "entry_weights": table.projection_weights(0.5)}
    yield _call("remapped_kl", "weighted", [made(64, v_s)], [made(64, v_t)], table, **options)
    for remainder in ("drop", "renormalize"):
        options = {"top_k": 7, "remainder": remainder}
        yield _call("remapped_kl", f"7 largest, {remainder}", [made(64, v_s)], [made(64, v_t)], table, **options)
    ids = [torch.randint(sizes.matched, shape, generator=generator).to(device) for shape in ((4, width), (4, 16))]
    for divergence in ("kl", "total_variation"):
        options = {"divergence": divergence, "temperature": 2.0}
        rest = [ids[0], made(4, 16, v_t), ids[1]]
        yield _call("span_likelihood", divergence, [made(4, width, v_s)], rest, pairs, **options)
        hidden, weight = made(4, width, d_s), made(v_s, d_s)
        rest = [ids[0], made(4, 16, d_t), made(v_t, d_t), ids[1]]
        yield _call("linear_span_likelihood", divergence, [hidden, weight], rest, pairs, **options)
    yield _call("relation_loss", "4 heads", [made(4, width, 64)], [made(4, 16, 128)], pairs, heads=4)
    yield _call("contrastive", "64", [made(4, width, 64)], [made(4, 16, 64)], pairs)


def _outcome(call: Call, backend: str | None, want: Sequence[Tensor]) -> tuple[str, str]:
    """What is wrong, and how far from float64 it is otherwise."""
    try:
        leaves = [leaf.clone().requires_grad_() for leaf in call.leaves]
        loss = call.run(vd, leaves, call.rest, backend)
        loss.sum().backward()
        got = [loss.detach(), *(leaf.grad for leaf in leaves)]
        dtype = leaves[0].dtype
        slack = OURS_FROM_HALF if dtype.itemsize == 2 else ALLOWED[dtype]
        return judge(got, want, slack), worst_error(got, want)
    except Exception as error:  # the others are to be seen too
        return f"{type(error).__name__}: {error}".splitlines()[0][:160], ""


def smoke(device: torch.device) -> int:
    """Prints a line for each call on each backend; returns how many are wrong."""
    wrong = 0
    for call in calls(device):
        wide = [leaf.to(torch.float64, copy=True).requires_grad_() for leaf in call.leaves]
        truth = call.run(vd.reference, wide, [as_truth(x) for x in call.rest], None)
        truth.sum().backward()
        want = [truth.detach(), *(leaf.grad for leaf in wide)]
        for backend in dispatch.TABLE[call.operation][device.type]:
            problem = dispatch.unavailable(backend)
            error, distance = (f"cannot run: {problem}", "") if problem else _outcome(call, backend, want)
            # What is not built here is to be seen, too, where there is a GPU for it.
            wrong += bool(error)
            print(f"{call.operation:24s}{call.name:28s}{backend:8s}{f'<<< {error}' if error else distance}", flush=True)
    print(f"{wrong} wrong" if wrong else "all right")
    return wrong
