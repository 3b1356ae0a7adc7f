"""MSE between averaged attention maps, for a student with the teacher's tokenization."""

from __future__ import annotations

import torch
from torch import Tensor

from vocabdistil.core import checks
from vocabdistil.core.checks import Layers
from vocabdistil.reference._common import upcast


def attention_mse(
    student: Layers,
    teacher: Layers,
    *,
    attention_mask: Tensor | None = None,
    average_heads: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Mean squared difference of the attention maps, each side averaged over its layers.

    With ``A`` the mean over the layers of a side (and over its heads with ``average_heads``, which students
    with another number of heads need), ``L = mean_{b, h, i, j} (A_s - A_t)^2`` over the positions i and j
    that are attended. No gradient reaches the teacher.

    Source: model card of ``distilrubert-small-cased-conversational`` (six teacher layers, one student layer).

    Args:
        student, teacher: ``[B, H, L, L]``, or a list of such layers; one dtype and device.
        attention_mask: ``[B, L]``, 0 for padding.
        average_heads: average over the heads of each side first.
        backend: None or ``"reference"``.

    Returns:
        A scalar, 0 when nothing is attended; float64 for float64 inputs, else float32.

    Raises:
        TypeError, ValueError: wrong dtypes, devices, or shapes that do not agree.
    """
    checks.check_reference_backend(backend)
    students, teachers = _maps(student, "student"), _maps(teacher, "teacher")
    checks.check_same_kind(students[0], "student", teachers[0], "teacher")
    a = sum(upcast(x) for x in students) / len(students)
    b = sum(upcast(x.detach()) for x in teachers) / len(teachers)
    if average_heads:
        a, b = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
    if a.shape != b.shape:
        raise ValueError(f"teacher: expected maps of shape {tuple(a.shape)} as student, got {tuple(b.shape)}")
    difference = (a - b).square()
    if attention_mask is None:
        return difference.sum() / max(difference.numel(), 1)
    if attention_mask.shape != (a.shape[0], a.shape[-1]):
        raise ValueError(
            f"attention_mask: expected shape ({a.shape[0]}, {a.shape[-1]}), got {tuple(attention_mask.shape)}"
        )
    attended = attention_mask != 0
    both = (attended[:, None, :, None] & attended[:, None, None, :]).expand_as(difference)
    return torch.where(both, difference, 0.0).sum() / both.sum().clamp(min=1)


def _maps(value: Layers, name: str) -> tuple[Tensor, ...]:
    layers = (value,) if isinstance(value, Tensor) else value
    if not isinstance(layers, (list, tuple)):
        raise TypeError(f"{name}: expected a tensor or a list of tensors, got {type(value).__name__}")
    if not layers:
        raise ValueError(f"{name}: expected at least one layer, got an empty list")
    for i, layer in enumerate(layers):
        checks.check_float(layer, f"{name}[{i}]", dims=(4,))
        checks.check_same_kind(layers[0], f"{name}[0]", layer, f"{name}[{i}]")
        if layer.shape != layers[0].shape:
            raise ValueError(
                f"{name}[{i}]: expected shape {tuple(layers[0].shape)} as {name}[0], got {tuple(layer.shape)}"
            )
    return tuple(layers)
