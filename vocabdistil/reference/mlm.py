"""Masked language modelling with frequency-smoothed masking."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from vocabdistil.alignment.masking import IGNORE
from vocabdistil.core import checks
from vocabdistil.reference._common import upcast


def mlm_loss(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    ignore_index: int = IGNORE,
    positions: Tensor | None = None,
) -> Tensor:
    """``-mean_i log softmax(head(h_i))[y_i]`` over the masked positions i; only they go through the output
    layer.

    Source: Devlin et al., arXiv 1810.04805, section 3.1.

    Args:
        hidden: ``[..., D]``, the last hidden states.
        labels: integer ``[...]``, ``ignore_index`` where nothing is to be predicted.
        head: maps ``[M, D]`` hidden states to ``[M, V]`` logits.
        ignore_index: the label of the other positions.
        positions: int64 ``[M]``, the masked ones, ascending, if they are known: finding them waits for a device.

    Returns:
        A scalar, 0 when nothing is masked; float64 for float64 logits, else float32.

    Raises:
        TypeError, ValueError: wrong dtypes, or labels whose shape is not that of the positions.
    """
    checks.check_columns(hidden, "hidden")
    checks.check_tensor(labels, "labels")
    if labels.dtype not in checks.INDEX_DTYPES:
        raise TypeError(f"labels: expected int32 or int64, got {labels.dtype}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels: expected shape {tuple(hidden.shape[:-1])}, got {tuple(labels.shape)}")
    if positions is None:
        positions = (labels.flatten() != ignore_index).nonzero()[:, 0]
    logits = upcast(head(hidden.flatten(0, -2)[positions]))
    return F.cross_entropy(logits, labels.flatten()[positions].long(), reduction="sum") / max(
        positions.numel(), 1
    )
