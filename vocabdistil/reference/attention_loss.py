"""MSE between the attention of aligned spans to aligned spans."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vocabdistil.alignment.spans import SpanPairs, check_pairs
from vocabdistil.core import checks
from vocabdistil.core.checks import Layers
from vocabdistil.reference._common import span_pool, weighted_mean

# Layers of rows [N, L], start, end, "mean" or "sum" -> [S, L], the mean over the layers.
Pool = Callable[[Sequence[Tensor], Tensor, Tensor, str], Tensor]


def attention_loss(
    student_maps: Layers,
    teacher_maps: Layers,
    pairs: SpanPairs,
    *,
    average_heads: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Mean squared difference of the attention of spans to spans, for any two tokenizations of the same texts.

    With ``A`` the mean over the layers of a side, ``b`` a text with ``n_b`` pairs, and ``S_p`` the tokens of pair p on
    that side::

        M[b, h, p, q] = mean_{i in S_p} sum_{j in S_q} A[b, h, i, j]
        L = sum_b sum_h sum_{p, q} (M_s - M_t)^2 / (H sum_b n_b^2)

    A row of M is what a span attends to: its sum is 1 less what goes to tokens in no span. With ``average_heads``,
    which students with another number of heads need, M is first averaged over the heads of each side, and H is 1.
    Pairs with an empty span count for nothing. No gradient reaches the teacher.

    Sources: averaged maps of six teacher layers and one student layer: model card of
    ``distilrubert-small-cased-conversational``; attention between words of several tokens, rows averaged and columns
    summed: Clark et al., arXiv 1906.04341, section 4.1. The same over spans of two tokenizations is our reading.

    Args:
        student_maps: ``[B, H_s, L_s, L_s]``, or a list of such layers.
        teacher_maps: ``[B, H_t, L_t, L_t]``, or a list, on the device of the student's.
        pairs: P span pairs over positions ``b * L_s + i`` and ``b * L_t + j``.
        average_heads: average over the heads of each side first.
        backend: None or ``"reference"``.

    Returns:
        A scalar, 0 without pairs; float64 for float64 inputs, else float32.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: wrong shapes or devices, pairs past the end of a side or across texts (looked at in host memory).
    """
    checks.check_reference_backend(backend)

    def pool(layers: Sequence[Tensor], start: Tensor, end: Tensor, pooling: str) -> Tensor:
        return span_pool(weighted_mean(layers, None), start, end, pooling)

    return compare_maps(*check_maps(student_maps, teacher_maps, average_heads), pairs, average_heads, pool)


def attention_mse(
    student: Layers,
    teacher: Layers,
    *,
    attention_mask: Tensor | None = None,
    average_heads: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`attention_loss` of a student with the teacher's tokenization: each attended token is a pair.

    Args:
        student, teacher: ``[B, H, L, L]``, or a list of such layers; one dtype and device.
        attention_mask: ``[B, L]``, 0 for padding.
        average_heads, backend: as in `attention_loss`.

    Returns:
        A scalar, 0 when nothing is attended; float64 for float64 inputs, else float32.

    Raises:
        TypeError, ValueError: wrong dtypes, devices, or shapes that do not agree.
    """
    students, teachers = check_maps(student, teacher, average_heads)
    (batch, _, length, _), device = students[0].shape, students[0].device
    if teachers[0].shape[2:] != students[0].shape[2:]:
        raise ValueError(
            f"teacher: expected maps of shape {tuple(students[0].shape)} as student, got {tuple(teachers[0].shape)}"
        )
    start = torch.arange(batch * length, dtype=torch.int32, device=device)
    end = start + 1
    if attention_mask is not None:
        if attention_mask.shape != (batch, length):
            raise ValueError(f"attention_mask: expected shape ({batch}, {length}), got {tuple(attention_mask.shape)}")
        end = start + (attention_mask != 0).flatten()
    pairs = SpanPairs._trusted((start, end, start, end), (end > start).sum(), len(start), len(start))
    return attention_loss(students, teachers, pairs, average_heads=average_heads, backend=backend)


def check_maps(
    student: Layers, teacher: Layers, average_heads: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Both sides as layers ``[B, H, L, L]``, the teacher's detached."""
    students, teachers = _maps(student, "student"), _maps(teacher, "teacher")
    checks.check_sides(students[0], "student", teachers[0], "teacher")
    shape, other = tuple(students[0].shape), tuple(teachers[0].shape)
    if shape[0] != other[0]:
        raise ValueError(f"teacher: expected maps of {shape[0]} texts as student, got shape {other}")
    if shape[1] != other[1] and not average_heads:
        raise ValueError(
            f"teacher: expected maps of shape ({shape[0]}, {shape[1]}, L, L), as many heads as student, or "
            f"average_heads, got {other}"
        )
    return students, tuple(layer.detach() for layer in teachers)


def _maps(value: Layers, name: str) -> tuple[Tensor, ...]:
    layers = (value,) if isinstance(value, Tensor) else value
    if not isinstance(layers, (list, tuple)):
        raise TypeError(f"{name}: expected a tensor or a list of tensors, got {checks.kind_of(value)}")
    if not layers:
        raise ValueError(f"{name}: expected at least one layer, got an empty list")
    for i, layer in enumerate(layers):
        checks.check_float(layer, f"{name}[{i}]", dims=(4,))
        checks.check_same_kind(layers[0], f"{name}[0]", layer, f"{name}[{i}]")
        if layer.shape[2] != layer.shape[3]:
            raise ValueError(f"{name}[{i}]: expected shape [B, H, L, L], got {tuple(layer.shape)}")
        if layer.shape != layers[0].shape:
            raise ValueError(
                f"{name}[{i}]: expected shape {tuple(layers[0].shape)} as {name}[0], got {tuple(layer.shape)}"
            )
    return tuple(layers)


def compare_maps(
    students: Sequence[Tensor], teachers: Sequence[Tensor], pairs: SpanPairs, average_heads: bool, pool: Pool
) -> Tensor:
    """The loss of maps that were checked. A map is seen as rows, and pooled where it lies."""
    (batch, _, student_length, _), teacher_length = students[0].shape, teachers[0].shape[2]
    check_pairs(pairs, *(layers[0][:, 0, :, 0].flatten() for layers in (students, teachers)))
    sides, counts = _spans_of_texts(pairs, batch, student_length, teacher_length)
    means = [
        _span_maps(layers, *spans, average_heads, pool)
        for layers, spans in zip((students, teachers), sides, strict=True)
    ]
    total = (means[0] - means[1]).square().sum()
    return total / (counts.square().sum() * means[0].shape[1]).clamp(min=1)


def _spans_of_texts(
    pairs: SpanPairs, batch: int, student_length: int, teacher_length: int
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """``(start, end)`` of both sides, ``[B, n]`` positions within each text, and the pairs of each text, ``[B]``.

    A text has at most ``n = min(L_s, L_t)`` pairs without an empty span; the places that it leaves free hold empty
    spans at its end, so that spans ascend. No shape depends on the values: nothing waits for a device.
    """
    slots = min(student_length, teacher_length)
    sides = (pairs.student_start, pairs.student_end), (pairs.teacher_start, pairs.teacher_end)
    lengths = student_length, teacher_length
    full = (sides[0][1] > sides[0][0]) & (sides[1][1] > sides[1][0])
    # Those that are not full go to a text past the last one, and to a place past the last one.
    text = torch.where(full, sides[0][0] // max(student_length, 1), batch).long()
    if pairs.device.type == "cpu" and not torch.compiler.is_compiling():
        for (start, end), length in zip(sides, lengths, strict=True):
            outside = full & ((start // max(length, 1) != text) | ((end - 1) // max(length, 1) != text))
            if bool(outside.any()):
                raise ValueError(
                    f"pairs: expected both spans of a pair within one text, got another in pair "
                    f"{int(outside.nonzero()[0])}"
                )
    counts = text.new_zeros(batch + 1).scatter_add(0, text, torch.ones_like(text))
    rank = full.cumsum(0) - 1 - (counts.cumsum(0) - counts)[text]
    place = torch.where(full, text * slots + rank, batch * slots)
    placed = []
    for side, length in zip(sides, lengths, strict=True):
        ends = text.new_full((2, batch * slots + 1), length)
        local = [end.scatter(0, place, at - text * length) for end, at in zip(ends, side, strict=True)]
        placed.append((local[0][:-1].view(batch, slots), local[1][:-1].view(batch, slots)))
    return placed, counts[:-1]


def _span_maps(layers: Sequence[Tensor], start: Tensor, end: Tensor, average_heads: bool, pool: Pool) -> Tensor:
    """``[B, H, L, L]`` layers -> ``[B, H, n, n]``: rows averaged and columns added over the spans of each text."""
    batch, heads, length, _ = layers[0].shape
    slots = start.shape[1]
    maps = length * torch.arange(batch * heads, device=start.device).view(batch, heads, 1)
    first, last = ((maps + at[:, None]).flatten().to(torch.int32) for at in (start, end))
    rows = pool([layer.flatten(0, 2) for layer in layers], first, last, "mean").view(batch * heads, slots, length)
    out = pool([rows.transpose(1, 2).flatten(0, 1)], first, last, "sum").view(batch, heads, slots, slots)
    return out.mean(1, keepdim=True) if average_heads else out
