"""Likelihoods of aligned spans from logits (`vocabdistil.span_likelihood`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import vocabdistil as vd

from ._losses import loss_problem, randn
from .harness import Case, Problem, random_pairs

OPERATION = "span_likelihood"
TEMPERATURE = 100.0  # as in the code of the paper


def texts(
    device: torch.device, batch: int, length: int, v_s: int, v_t: int
) -> tuple[list[Tensor], vd.SpanPairs, tuple[int, int]]:
    """Ids of both sides and pairs, of ``length`` tokens of the teacher, and the shape of the student's batch."""
    pairs, shape = random_pairs(batch, length, device)
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(v_s, shape, generator=g), torch.randint(v_t, (batch, length), generator=g)
    return [x.to(device) for x in ids], pairs, shape


def of_spans(logits: Tensor, ids: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The cross entropy of every token, added up by spans, over the temperature."""
    each = -F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten().roll(-1), reduction="none")
    total = F.pad(each.double().cumsum(0), (1, 0))  # of the rows, each of which predicts the token after it
    return (total[end.long() - 1] - total[start.long() - 1]) / TEMPERATURE


def full_logits(
    student: Callable[[], Tensor], student_ids: Tensor, teacher: Callable[[], Tensor], teacher_ids: Tensor,
    pairs: vd.SpanPairs,
) -> Tensor:  # fmt: skip
    """What people write, with the teacher's logits gone before the student's are there."""
    with torch.no_grad():
        log_t = of_spans(teacher(), teacher_ids, pairs.teacher_start, pairs.teacher_end)
    log_s = of_spans(student(), student_ids, pairs.student_start, pairs.student_end)
    counts = (pairs.student_start % student_ids.shape[1] != 0) & (pairs.teacher_start % teacher_ids.shape[1] != 0)
    log_s, log_t = log_s[counts], log_t[counts]
    rest = -log_t.expm1() * ((-log_t.expm1()).log() - (-log_s.expm1()).log())
    return (log_t.exp() * (log_t - log_s) + rest).mean().float()


def rivals(tensors: list[Tensor], pairs: vd.SpanPairs) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    student, student_ids, teacher, teacher_ids = tensors
    return {"full-logits": lambda: full_logits(lambda: student, student_ids, lambda: teacher, teacher_ids, pairs)}, {}


def build(device: torch.device, batch: int, length: int, v_s: int, v_t: int, dtype: torch.dtype) -> Problem:
    (student_ids, teacher_ids), pairs, shape = texts(device, batch, length, v_s, v_t)
    make = functools.partial(randn, device=device, dtype=dtype)
    student, teacher = make(*shape, v_s, seed=1), make(batch, length, v_t, seed=2)
    size = dtype.itemsize * (2 * student.numel() + teacher.numel())
    tensors, options = [student, student_ids, teacher, teacher_ids], {"temperature": TEMPERATURE}
    return loss_problem(OPERATION, tensors, 1, [pairs], options, size, rivals=functools.partial(rivals, pairs=pairs))


def cases(device: torch.device) -> Iterator[Case]:
    half, single = torch.bfloat16, torch.float32
    sizes = [(2, 128, 32000, 50257, single), (2, 128, 32000, 50257, half)]
    if device.type == "cuda":
        sizes = [(4, 1024, 128256, 151936, half), (4, 1024, 128256, 151936, single)]
    for batch, length, v_s, v_t, dtype in sizes:
        make = functools.partial(build, batch=batch, length=length, v_s=v_s, v_t=v_t, dtype=dtype)
        yield Case(f"{batch}x{length}-{v_t}-{v_s}{'-bf16' if dtype == half else ''}", make, dtype, ("fwd+bwd",))
