"""Span KL (`vocabdistil.span_loss`) against PyTorch: eager, compiled, and in the paper's style."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import vocabdistil as vd

from .harness import Case, Problem, Provider, compiled, own_providers, random_pairs

OPERATION = "span_loss"
PAIRS = (1, 10, 100, 1000, 10000)
HIDDEN = (1, 8, 64, 264, 768, 1024, 4096)
# On a GPU two lines through the sizes that fill it, not the whole grid: each case is compiled anew.
GPU_SWEEP = (*((n, 768) for n in (100, 1000, 10000, 100000)), *((10000, d) for d in (64, 264, 1024, 2048, 4096, 8192)))
_SHORT = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def padded(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Spans as positions [P, W], W the widest, and their weights [P, W, 1]: 1 / length, 0 for padding."""
    length = (end - start).long()
    offset = torch.arange(int(length.max()), device=start.device)
    inside = offset < length[:, None]
    index = torch.where(inside, start[:, None] + offset, 0)
    return index, (inside / length[:, None]).unsqueeze(-1).float()


def _layer_mean(layers: Sequence[Tensor]) -> Tensor:
    mean = layers[0] if len(layers) == 1 else torch.stack(list(layers)).mean(0)
    return mean.flatten(0, -2)


def padded_gather(
    student: Sequence[Tensor], teacher: Sequence[Tensor], pairs: vd.SpanPairs, weight: Tensor | None
) -> Callable[[], Tensor]:
    """The style of the published code: gather padded groups, average, project, log_softmax, F.kl_div."""
    sides = [padded(pairs.student_start, pairs.student_end), padded(pairs.teacher_start, pairs.teacher_end)]

    def call() -> Tensor:
        # Half types become float32 where autocast would do so, at the softmax.
        s, t = (
            (_layer_mean(x)[index] * share).sum(1) for x, (index, share) in zip((student, teacher), sides, strict=True)
        )
        if weight is not None:
            s = F.linear(s, weight)
        return F.kl_div(F.log_softmax(s, dim=-1), F.log_softmax(t, dim=-1), reduction="batchmean", log_target=True)

    return call


def segment_means(start: Tensor, end: Tensor, count: int) -> Callable[[Tensor], Tensor]:
    """Span averages through torch.segment_reduce: the gaps between spans are segments too, and dropped."""
    gaps = start - torch.cat([end.new_zeros(1), end[:-1]])
    lengths = torch.cat([torch.stack([gaps, end - start], 1).flatten(), (count - end[-1:])]).long()
    spans = (end - start)[:, None]
    return lambda rows: torch.segment_reduce(rows, "sum", lengths=lengths, axis=0)[1:-1:2] / spans


def liger(
    student: Sequence[Tensor], teacher: Sequence[Tensor], pairs: vd.SpanPairs, weight: Tensor | None
) -> Callable[[], Tensor]:
    """Liger-Kernel's KL on averages of torch.segment_reduce."""
    from liger_kernel.transformers import LigerKLDIVLoss

    divergence = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    sides = [
        segment_means(pairs.student_start, pairs.student_end, student[0].flatten(0, -2).shape[0]),
        segment_means(pairs.teacher_start, pairs.teacher_end, teacher[0].flatten(0, -2).shape[0]),
    ]

    def call() -> Tensor:
        s, t = (mean(_layer_mean(x)).float() for x, mean in zip((student, teacher), sides, strict=True))
        if weight is not None:
            s = F.linear(s, weight)
        return divergence(F.log_softmax(s, dim=-1), F.log_softmax(t, dim=-1))

    return call


def build(
    device: torch.device,
    shape: tuple[int, int],
    d_t: int,
    d_s: int,
    dtype: torch.dtype,
    n_s: int = 1,
    n_t: int = 1,
    filled: float = 1.0,
    upstream: float = 1.0,
) -> Problem:
    """``shape``: batch and length of the teacher; ``n_s``, ``n_t``: layers of each side; ``filled``: share of the
    tokens that are no padding; ``upstream``: gradient of the loss, as a trainer that scales losses has it."""
    pairs, student_shape = random_pairs(*shape, device, filled=filled)
    g = torch.Generator(device).manual_seed(1)

    def hidden(shape: tuple[int, int], width: int) -> Tensor:
        return torch.randn(*shape, width, generator=g, device=device).to(dtype)

    student = [hidden(student_shape, d_s).requires_grad_() for _ in range(n_s)]
    teacher = [hidden(shape, d_t) for _ in range(n_t)]
    weight = None
    if d_s != d_t:
        weight = (torch.randn(d_t, d_s, generator=g, device=device) * d_s**-0.5).requires_grad_()
    leaves = [*student, *([] if weight is None else [weight])]
    sides = (student if n_s > 1 else student[0], teacher if n_t > 1 else teacher[0])

    def truth() -> list[Tensor]:
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        loss = vd.reference.span_loss(
            wide[:n_s], [x.double() for x in teacher], pairs, weight=None if weight is None else wide[-1]
        )
        (upstream * loss).backward()
        return [loss.detach(), *(leaf.grad for leaf in wide)]

    here, missing = own_providers(OPERATION, device)
    compiled_reference = compiled(vd.reference.span_loss)
    providers = {
        "reference": Provider(lambda: vd.reference.span_loss(*sides, pairs, weight=weight)),
        "compile": Provider(lambda: compiled_reference(*sides, pairs, weight=weight)),
        "official": Provider(padded_gather(student, teacher, pairs, weight)),
    }
    if device.type == "cuda":
        try:
            providers["liger"] = Provider(liger(student, teacher, pairs, weight))
        except ImportError:
            missing["liger"] = "liger_kernel is not installed"
    for name, backend in here.items():
        providers[name] = Provider(functools.partial(vd.span_loss, *sides, pairs, weight=weight, backend=backend))
    tokens = int((pairs.student_end - pairs.student_start).sum())
    read = (n_s * tokens * d_s + n_t * len(pairs) * d_t) * dtype.itemsize
    write = sum(x.numel() for x in student) * dtype.itemsize
    nbytes = {"fwd": read, "fwd+bwd": read + write}
    scale = None if upstream == 1 else torch.tensor(upstream, device=device)
    return Problem(providers, truth, nbytes, leaves, scale, missing)


def _case(
    batch: int,
    length: int,
    d_t: int,
    dtype: torch.dtype = torch.float32,
    d_s: int = 0,
    layers: tuple[int, int] = (1, 1),
    suffix: bool = True,
    filled: float = 1.0,
    upstream: float = 1.0,
) -> Case:
    name = f"b{batch}-l{length}-d{d_t}" + (f"-from{d_s}" if d_s else "")
    name += f"-layers{layers[1]}to{layers[0]}" if layers != (1, 1) else ""
    name += f"-{filled:.0%}" if filled != 1 else ""
    name += f"-upstream{upstream:g}" if upstream != 1 else ""
    name += f"-{_SHORT[dtype]}" if suffix else ""
    shape, given = (batch, length), {"filled": filled, "upstream": upstream}
    return Case(name, lambda device: build(device, shape, d_t, d_s or d_t, dtype, *layers, **given), dtype)


def _sweep(pairs: int, hidden: int) -> Case:
    def make(device: torch.device) -> Problem:
        return build(device, (1, pairs), hidden, hidden, torch.float32)

    return Case(f"sweep-{pairs}-{hidden}", make, modes=("fwd+bwd",), rounds=7, seconds=0.5)


def cases(device: torch.device) -> Iterator[Case]:
    half, single = torch.bfloat16, torch.float32
    if device.type == "cuda":
        yield _case(64, 512, 1024, half)
        yield _case(16, 2048, 4096, half)
        yield _case(64, 512, 768, single)
        yield _case(32, 256, 768, half)
        yield _case(32, 256, 768, half, 264)
        yield _case(32, 256, 768, single, 264)
        yield _case(32, 256, 768, half, layers=(3, 12))
        yield _case(64, 512, 768, half)
        yield _case(64, 512, 768, half, filled=0.6)
        yield _case(64, 512, 768, half, upstream=2.0)
        yield _case(64, 512, 264, half)
        yield _case(64, 512, 264, single)
        # All that is to be seen of these is the host.
        yield _case(1, 8, 64, single)
        yield _case(1, 8, 64, single, 32)
        yield from (_sweep(pairs, hidden) for pairs, hidden in GPU_SWEEP)
        return
    yield _case(8, 256, 768, suffix=False)
    yield _case(8, 256, 768, d_s=264, suffix=False)
    yield _case(8, 256, 768, half)
    yield _case(8, 256, 768, suffix=False, filled=0.6)
    yield _case(8, 256, 768, suffix=False, upstream=2.0)
    yield _case(4, 1024, 1024, suffix=False)
    yield from (_sweep(pairs, hidden) for pairs in PAIRS for hidden in HIDDEN)
