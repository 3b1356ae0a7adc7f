"""attention_loss: span means of maps, over their rows and then over their columns. Formula:
``reference/attention_loss.py``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..alignment.spans import SpanPairs
from ..core.checks import Layers
from ..core.dispatch import resolve
from ..reference.attention_loss import attention_loss as reference_attention_loss
from ..reference.attention_loss import check_maps, compare_maps
from .span_mean import native_rows, pooled_rows


def attention_loss(
    student_maps: Layers,
    teacher_maps: Layers,
    pairs: SpanPairs,
    *,
    average_heads: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Mean squared difference of the attention of spans to spans; formula in
    :func:`vocabdistil.reference.attention_loss`.

    Layers are averaged while their rows are; nothing larger than one map of a side is made.

    Args:
        student_maps: ``[B, H_s, L_s, L_s]``, or a list of such layers (their mean); float32, float64, bfloat16 or
            float16.
        teacher_maps: ``[B, H_t, L_t, L_t]``, the same for the teacher. It gets no gradient.
        pairs: the aligned spans, on the same device, each within a text.
        average_heads: average over the heads of each side first; required where their numbers differ.
        backend: as in :func:`span_mean`.

    Returns:
        The loss, ``[]``, float32 (float64 for float64); 0 without pairs.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, value or device, named in the text; a span
            across texts, if pairs lie in host memory.
    """
    students, teachers = check_maps(student_maps, teacher_maps, average_heads)
    choice = resolve("span_mean", students[0].device, backend)
    if choice == "reference":
        return reference_attention_loss(students, teachers, pairs, average_heads=average_heads)

    def pool(layers: Sequence[Tensor], start: Tensor, end: Tensor, pooling: str) -> Tensor:
        return pooled_rows([native_rows(x) for x in layers], start, end, None, pooling == "mean", True, choice)

    return compare_maps(students, teachers, pairs, average_heads, pool)
