"""Hiding tokens for masked language modelling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vocabdistil.core import checks

__all__ = ["MaskedTokens", "mask_tokens", "masking_probabilities"]

# What marks a position without a target, as in torch.nn.functional.cross_entropy.
IGNORE = -100


class MaskedTokens(NamedTuple):
    """``input_ids``: what the student reads; ``labels``: the original ids where masked, -100 elsewhere."""

    input_ids: Tensor
    labels: Tensor


def masking_probabilities(counts: Tensor, special_ids: Sequence[int] = (), smoothing: float = 0.7) -> Tensor:
    """How likely each token of the vocabulary is to be masked, up to a factor: ``max(count, 1)^-smoothing``.

    Rare tokens are masked more often; specials never.

    Source: Kolesnikova et al., arXiv 2205.02340, after Lample and Conneau, arXiv 1901.07291, and the training
    code of Sanh et al., arXiv 1910.01108 (0.7).

    Args:
        counts: ``[V]``, how often each token occurs in the training text.
        special_ids: ids that get 0.
        smoothing: the exponent, >= 0.

    Returns:
        float32 ``[V]``.

    Raises:
        TypeError, ValueError: counts that are no vector, special ids outside it, a negative exponent.
    """
    checks.check_tensor(counts, "counts")
    if counts.dim() != 1:
        raise ValueError(f"counts: expected a vector, got shape {tuple(counts.shape)}")
    if not (math.isfinite(smoothing) and smoothing >= 0):
        raise ValueError(f"smoothing: expected a finite number >= 0, got {smoothing}")
    probabilities = counts.clamp(min=1).to(torch.float64).pow(-smoothing)
    for special in special_ids:
        if not 0 <= special < counts.numel():
            raise ValueError(f"special_ids: expected ids from 0 to {counts.numel() - 1}, got {special}")
        probabilities[special] = 0
    return probabilities.to(torch.float32)


def mask_tokens(
    input_ids: Tensor,
    probabilities: Tensor,
    mask_id: int,
    *,
    attention_mask: Tensor | None = None,
    mlm_probability: float = 0.15,
    replace_with_mask: float = 0.8,
    replace_with_random: float = 0.1,
    generator: torch.Generator | None = None,
) -> MaskedTokens:
    """Chooses the tokens to predict and hides them.

    ``ceil(mlm_probability * n)`` of the batch's n attended tokens (specials counted) are drawn without
    replacement, each with probability proportional to ``probabilities[id]``; fewer if fewer have a
    probability above 0. Of the drawn tokens 80% become ``mask_id``, 10% a uniformly drawn token of those with
    a probability above 0, and 10% stay as they are, independently of each other.

    Source: Devlin et al., arXiv 1810.04805, section 3.1 (80/10/10); the drawing as in the training code of
    Sanh et al., arXiv 1910.01108.

    Args:
        input_ids: integer ``[B, L]``.
        probabilities: ``[V]`` from `masking_probabilities`, on the device of ``input_ids``.
        mask_id: the id of the mask token.
        attention_mask: ``[B, L]``, 0 for padding; all tokens attended by default.
        mlm_probability: the share of tokens to predict.
        replace_with_mask, replace_with_random: the shares of 80% and 10%; the remainder keeps its token.
        generator: makes the drawing reproducible; on the device of ``input_ids``.

    Returns:
        `MaskedTokens`; the input is not changed.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, devices, shares, or ids outside the vocabulary.
    """
    checks.check_tensor(input_ids, "input_ids")
    if input_ids.dtype not in checks.INDEX_DTYPES:
        raise TypeError(f"input_ids: expected int32 or int64, got {input_ids.dtype}")
    checks.check_float(probabilities, "probabilities", dims=(1,))
    if probabilities.device != input_ids.device:
        raise ValueError(f"probabilities: expected device {input_ids.device}, got {probabilities.device}")
    checks.check_index_range(input_ids.flatten(), "input_ids", probabilities.numel())
    if not 0 <= mask_id < probabilities.numel():
        raise ValueError(f"mask_id: expected an id from 0 to {probabilities.numel() - 1}, got {mask_id}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected shape {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}"
        )
    if not 0 <= mlm_probability <= 1:
        raise ValueError(f"mlm_probability: expected a number from 0 to 1, got {mlm_probability}")
    if min(replace_with_mask, replace_with_random) < 0 or replace_with_mask + replace_with_random > 1:
        raise ValueError(
            f"replace_with_mask, replace_with_random: expected shares >= 0 with a sum of at most 1, "
            f"got {replace_with_mask} and {replace_with_random}"
        )

    flat = input_ids.flatten()
    weights = probabilities[flat.long()]
    attended = torch.full((), flat.numel(), device=flat.device)
    if attention_mask is not None:
        attends = attention_mask.flatten() != 0
        weights = weights * attends
        attended = attends.sum()
    allowed = probabilities > 0
    # The only time that a device is waited for.
    attended, possible, num_words = torch.stack([attended, (weights > 0).sum(), allowed.sum()]).tolist()
    count = min(math.ceil(mlm_probability * attended), possible)
    masked, labels = flat.clone(), torch.full_like(flat, IGNORE)
    if count:
        # As torch.multinomial draws without replacement, which looks at the weights on the host first.
        keys = weights / torch.empty_like(weights).exponential_(generator=generator)
        chosen = keys.topk(count).indices
        fate = torch.rand(count, generator=generator, device=flat.device)
        which = torch.randint(num_words, (count,), generator=generator, device=flat.device)
        drawn = torch.searchsorted(allowed.cumsum(0), which + 1)
        original = flat[chosen]
        replaced = torch.where(fate < replace_with_mask + replace_with_random, drawn.to(flat.dtype), original)
        masked[chosen] = replaced.masked_fill(fate < replace_with_mask, mask_id)
        labels[chosen] = original
    return MaskedTokens(masked.view(input_ids.shape), labels.view(input_ids.shape))
