"""The tokens that a draft head predicts, and the maps between their ids and its target's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..core.errors import need
from .rebuilding import special_strings, tokenizer_state

__all__ = ["draft_ids", "draft_maps"]


def draft_ids(tokenizer: Any, counts: Tensor, size: int, keep: Iterable[int] = ()) -> Tensor:
    """The tokens that a draft head predicts: special and added ones, those to ``keep``, and the most frequent others.

    Args:
        tokenizer: the target's fast tokenizer.
        counts: int64 ``[V]``, how often each id stands in a text.
        size: how many tokens; all that the tokenizer has if those are fewer. Of equal counts the smaller ids.
        keep: ids that are there whatever the counts.

    Returns:
        int64 ``[size]``, ascending.

    Raises:
        VocabdistilError: there is no room for those that must be there; the tokenizer is not fast.
    """
    always = {*special_strings(tokenizer, tokenizer_state(tokenizer)).values(), *keep}
    need(size >= len(always), "vocab_size", f"at least the {len(always)} special tokens and those of chats", size)
    times = counts.tolist()
    others = (i for i in tokenizer.get_vocab().values() if i not in always)
    ranked = sorted(others, key=lambda i: (-times[i], i))
    return torch.tensor(sorted(always.union(ranked[: size - len(always)])), dtype=torch.int64)


def draft_maps(ids: Tensor, target_size: int) -> tuple[Tensor, Tensor]:
    """The maps that speculative decoders read beside a draft head of EAGLE-3's kind (arXiv 2503.01840).

    Args:
        ids: int64 ``[N]``, the target's id of each draft id, ascending.
        target_size: V, rows of the target's output layer.

    Returns:
        ``d2t``, int64 ``[N]``: draft id ``i`` is the target's ``i + d2t[i]``; and ``t2d``, bool ``[V]``: which of the
        target's ids are among them.
    """
    inside = torch.zeros(target_size, dtype=torch.bool)
    inside[ids] = True
    return ids - torch.arange(len(ids)), inside
