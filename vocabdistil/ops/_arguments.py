"""What the span operations check before any native code runs. Nothing here reads a tensor's values, except for spans
given as bare vectors, which are checked once for each pair of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._native import DIVERGENCE_CODES, DTYPE_CODES
from ..spans import SpanPairs, check_spans

POOLINGS = ("mean", "sum")
REDUCTIONS = ("batchmean", "sum", "none")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_rows(x: Any, name: str) -> Tensor:
    """[N, D] or [B, L, D] -> [N, D] with unit column stride; a view wherever the strides allow one."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPE_CODES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.dim() not in (2, 3):
        raise ValueError(f"{name}: expected shape [N, D] or [B, L, D], got {list(x.shape)}")
    if x.shape[-1] == 0:
        raise ValueError(f"{name}: expected a hidden size of at least 1, got shape {list(x.shape)}")
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def check_layers(value: Any, name: str) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [check_rows(value, name)]
    if not isinstance(value, Sequence) or not value:
        raise TypeError(f"{name}: expected a tensor or a non-empty list of tensors, got {type(value).__name__}")
    layers = [check_rows(x, f"{name}[{i}]") for i, x in enumerate(value)]
    for i, x in enumerate(layers):
        if x.shape != layers[0].shape or value[i].shape != value[0].shape:
            raise ValueError(
                f"{name}[{i}]: expected the shape of the other layers, {list(value[0].shape)}, "
                f"got {list(value[i].shape)}"
            )
        if x.dtype != layers[0].dtype:
            raise TypeError(f"{name}[{i}]: expected the dtype of the other layers, {layers[0].dtype}, got {x.dtype}")
        check_device(x, f"{name}[{i}]", layers[0].device)
    return layers


def check_device(x: Tensor, name: str, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name}: expected device {device}, got {x.device}")


def check_vector(x: Any, name: str, size: int, what: str, device: torch.device) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
    if x.shape != (size,):
        raise ValueError(f"{name}: expected shape [{size}] ({what}), got {list(x.shape)}")
    check_device(x, name, device)


def check_span_vectors(start: Any, end: Any, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    for name, value in (("start", start), ("end", end)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected an integer tensor, got {type(value).__name__}")
        if value.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: expected int32 or int64 positions, got {value.dtype}")
        if value.dim() != 1:
            raise ValueError(f"{name}: expected shape [P], got {list(value.shape)}")
        check_device(value, name, device)
    if start.shape != end.shape:
        raise ValueError(f"end: expected shape {list(start.shape)} (as start), got {list(end.shape)}")
    if not torch.compiler.is_compiling():
        # Vectors on a GPU cost a synchronisation here, the first time they are seen.
        seen = (id(end), start._version, end._version)
        known = getattr(start, "_vocabdistil_checked", None)
        if known is None or known[0] != seen:
            known = (seen, check_spans(start, end, "x"))
            start._vocabdistil_checked = known  # type: ignore[attr-defined]
        if known[1] > rows:
            raise ValueError(f"end: expected positions up to {rows} (the rows of x), got {known[1]}")
    return start.to(torch.int32).contiguous(), end.to(torch.int32).contiguous()


def _check_layer_weights(value: Any, name: str, layers: list[Tensor]) -> None:
    if value is None:
        return
    if isinstance(value, Tensor):
        check_vector(value, name, len(layers), "one per layer", layers[0].device)
    elif len(value) != len(layers):
        raise ValueError(f"{name}: expected {len(layers)} numbers (one per layer), got {len(value)}")


def check_span_loss(
    student: Any, teacher: Any, pairs: Any, *, divergence: str, temperature: float, weight: Any, bias: Any,
    pair_weights: Any, beta: float, pooling: str, reduction: str, student_layer_weights: Any,
    teacher_layer_weights: Any,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Raises on anything the kernels could not take; returns both sides as lists of [N, D] layers."""
    check_choice("divergence", divergence, tuple(DIVERGENCE_CODES))
    check_choice("pooling", pooling, POOLINGS)
    check_choice("reduction", reduction, REDUCTIONS)
    if not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature!r}")
    if divergence == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta: expected 0 < beta < 1 (its limits are kl and reverse_kl), got {beta!r}")
    if not isinstance(pairs, SpanPairs):
        raise TypeError(f"pairs: expected SpanPairs, got {type(pairs).__name__}")
    students, teachers = check_layers(student, "student"), check_layers(teacher, "teacher")
    s, t = students[0], teachers[0]
    check_device(t, "teacher", s.device)
    check_device(pairs.student_start, "pairs", s.device)
    autocast = torch.is_autocast_enabled(s.device.type)
    if s.dtype != t.dtype and not autocast:
        raise TypeError(f"teacher: expected the student's dtype, {s.dtype}, got {t.dtype}")
    if pairs.student_tokens > s.shape[0]:
        raise ValueError(
            f"pairs: a student span ends at {pairs.student_tokens}, but student has {s.shape[0]} token positions"
        )
    if pairs.teacher_tokens > t.shape[0]:
        raise ValueError(
            f"pairs: a teacher span ends at {pairs.teacher_tokens}, but teacher has {t.shape[0]} token positions"
        )
    if weight is None:
        if s.shape[1] != t.shape[1]:
            raise ValueError(
                f"student: expected the teacher's hidden size {t.shape[1]}, or a projection (weight), "
                f"got {s.shape[1]}"
            )
        if bias is not None:
            raise ValueError("bias: expected None without weight, got a tensor")
    else:
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight: expected a tensor, got {type(weight).__name__}")
        if weight.shape != (t.shape[1], s.shape[1]):
            raise ValueError(
                f"weight: expected shape [{t.shape[1]}, {s.shape[1]}] (teacher by student hidden size), "
                f"got {list(weight.shape)}"
            )
        check_device(weight, "weight", s.device)
        if weight.dtype != s.dtype and not autocast:
            raise TypeError(f"weight: expected the student's dtype, {s.dtype}, got {weight.dtype}")
        if bias is not None:
            check_vector(bias, "bias", t.shape[1], "the teacher's hidden size", s.device)
            if bias.dtype != s.dtype and not autocast:
                raise TypeError(f"bias: expected the student's dtype, {s.dtype}, got {bias.dtype}")
    if pair_weights is not None:
        check_vector(pair_weights, "pair_weights", len(pairs), "one per pair", s.device)
    _check_layer_weights(student_layer_weights, "student_layer_weights", students)
    _check_layer_weights(teacher_layer_weights, "teacher_layer_weights", teachers)
    return students, teachers
