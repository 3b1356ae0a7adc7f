"""Several teachers: averages of their losses and of their distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vocabdistil.core import checks
from vocabdistil.reference._common import upcast


def average_losses(losses: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """``sum_k w_k L_k / sum_k w_k`` over the teachers k; uniform without weights.

    Each teacher has its own tokenizer, so its own alignment and its own loss.

    Source: Avram et al., arXiv 2112.12650.

    Args:
        losses: tensors of one shape, one per teacher.
        weights: one number >= 0 per teacher, not all 0.

    Raises:
        TypeError, ValueError: no losses, losses of different shapes, weights that do not fit.
    """
    shares = _shares(losses, weights, "losses")
    return _mixed(shares, losses)


def ensemble_distribution(
    logits: Sequence[Tensor], weights: Sequence[float] | None = None, temperature: float = 1.0
) -> Tensor:
    """``sum_k w_k softmax(z_k / T) / sum_k w_k``: the mean of the teachers' distributions.

    Source: Avram et al., arXiv 2112.12650 (label and probability of an ensemble).

    Args:
        logits: ``[..., C]``, one tensor per teacher, over the same classes.
        weights: one number >= 0 per teacher, not all 0.
        temperature: T > 0, finite.

    Returns:
        Probabilities ``[..., C]``, without gradient; float64 for float64 logits, else float32.

    Raises:
        TypeError, ValueError: no logits, logits of different shapes, weights that do not fit.
    """
    checks.check_temperature(temperature)
    shares = _shares(logits, weights, "logits")
    for i, z in enumerate(logits):
        checks.check_float(z, f"logits[{i}]")
    return _mixed(shares, [torch.softmax(upcast(z.detach()) / temperature, -1) for z in logits])


def _mixed(shares: list[float], parts: Sequence[Tensor]) -> Tensor:
    total = shares[0] * parts[0]
    for share, part in zip(shares[1:], parts[1:], strict=True):
        total = total + share * part
    return total


def _shares(values: Sequence[Tensor], weights: Sequence[float] | None, name: str) -> list[float]:
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name}: expected a list of tensors, got {type(values).__name__}")
    if not values:
        raise ValueError(f"{name}: expected at least one teacher, got an empty list")
    for i, value in enumerate(values):
        checks.check_tensor(value, f"{name}[{i}]")
        if value.shape != values[0].shape:
            raise ValueError(
                f"{name}[{i}]: expected shape {tuple(values[0].shape)} as {name}[0], got {tuple(value.shape)}"
            )
    if weights is None:
        return [1 / len(values)] * len(values)
    if len(weights) != len(values):
        raise ValueError(f"weights: expected one per teacher ({len(values)}), got {len(weights)}")
    total = math.fsum(weights)
    if min(weights) < 0 or not (math.isfinite(total) and total > 0):
        raise ValueError(f"weights: expected finite numbers >= 0 that are not all 0, got {list(weights)}")
    return [weight / total for weight in weights]
