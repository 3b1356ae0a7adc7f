"""What is hidden from student and teachers in training, and how much of each kind a batch has to learn from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..alignment.masking import IGNORE, mask_tokens
from ..alignment.spans import SpanPairs
from ..core.errors import need
from ..core.seeds import mix_seed

__all__ = ["Hiding", "counts_of", "positions_of"]

# The share of the teacher's tokens with several pieces that are hidden, as many as the student's own.
_HIDDEN = 0.15


@dataclass
class Hiding:
    """Hides tokens of a batch. Every text is drawn for on its own, so that its masks are the same beside whatever other
    texts and in whichever process; it holds no model, and can go where batches are made.

    Attributes:
        probabilities: ``[V_s]``, by id; None: nothing is masked, as for a student without an MLM head.
        mask_id: the student's MASK; None with ``probabilities``.
        mode: where output distributions are compared, one of ``recipes.LOGITS``.
        teacher_masks: of each teacher its MASK, or None where its output distributions are not learned.
        slots: of each teacher the matched vocabulary's places of teacher ids and of student ids
            (:meth:`vocabdistil.MatchedVocab.slots`); read where a teacher has a MASK.
    """

    probabilities: Tensor | None
    mask_id: int | None
    mode: str
    teacher_masks: list[int | None]
    slots: list[tuple[Tensor, Tensor] | None]

    def __call__(self, batch: dict[str, Any], seed: int) -> dict[str, Any]:
        """See :meth:`vocabdistil.Objective.mask`."""
        if self.probabilities is None:
            nothing = [None] * len(self.teacher_masks)
            return {**batch, "labels": None, "hidden_pairs": nothing, "hidden_positions": nothing}
        need(self.mask_id is not None, "mask_id", "the student's MASK beside mask_probabilities", self.mask_id)
        assert self.mask_id is not None
        ids, size = batch["student_ids"].clone(), batch["teacher_ids"][0].shape[0]
        numbers = batch.get("numbers", range(size))
        draws = [torch.Generator(ids.device).manual_seed(mix_seed(seed, number)) for number in numbers]
        own, attended = ids[-size:], batch["student_mask"][-size:] != 0
        labels = torch.full_like(ids, IGNORE)
        for text, label, mask, draw in zip(own, labels[-size:], attended, draws, strict=True):
            text[mask], label[mask] = self._mask(text[mask], self.probabilities, self.mask_id, draw)
        became_mask = ((labels[-size:] != IGNORE) & (own == self.mask_id)).flatten()
        teacher_ids, hidden_pairs = [], []
        for t, seen in enumerate(batch["teacher_ids"]):
            pairs = None
            if self.teacher_masks[t] is not None:
                seen = seen.clone()
                rows = ids[t * size : (t + 1) * size]
                pairs = self._hide(t, seen, rows, became_mask, batch, draws)
            teacher_ids.append(seen)
            hidden_pairs.append(pairs)
        return {
            **batch,
            "student_ids": ids,
            "labels": labels,
            "masked": (labels.flatten() != IGNORE).nonzero()[:, 0],
            "teacher_ids": teacher_ids,
            "hidden_pairs": hidden_pairs,
            "hidden_positions": [None if pairs is None else positions_of(pairs) for pairs in hidden_pairs],
        }

    @staticmethod
    def _mask(ids: Tensor, probabilities: Tensor, mask_id: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """``[L]`` of a text without padding, which would change the draw -> what the student reads, and its labels."""
        # Of few tokens, rounded up, too many would be hidden, and rounded down none.
        count = math.floor(_HIDDEN * len(ids) + float(torch.rand((), generator=draw, device=ids.device)))
        share = max(count - 0.5, 0.0) / max(len(ids), 1)
        masked = mask_tokens(ids[None], probabilities, mask_id, mlm_probability=share, generator=draw)
        return masked.input_ids[0], masked.labels[0]

    def _hide(
        self,
        t: int,
        teacher_ids: Tensor,
        reduce_ids: Tensor,
        became_mask: Tensor,
        batch: dict[str, Any],
        draws: Sequence[torch.Generator],
    ) -> SpanPairs:
        """Hides tokens of teacher ``t`` in both ids, in place; returns the pairs to compare."""
        mask_id, teacher_mask = self.mask_id, self.teacher_masks[t]
        assert mask_id is not None and teacher_mask is not None
        own = self._equal(t, batch).to(teacher_ids.device)
        own_hidden = became_mask[own.student_start.long()]
        hidden = torch.zeros(teacher_ids.numel(), dtype=torch.bool, device=teacher_ids.device)
        hidden[own.teacher_start[own_hidden].long()] = True
        if batch["reduce_pairs"]:
            reduce = batch["reduce_pairs"][t].to(teacher_ids.device)
        if self.mode != "match":
            several = reduce.student_end - reduce.student_start > 1
            each = torch.bincount(reduce.teacher_start.long() // teacher_ids.shape[1], minlength=len(draws)).tolist()
            drawn = [
                torch.rand(count, generator=draw, device=hidden.device) < _HIDDEN
                for count, draw in zip(each, draws, strict=True)
            ]
            hidden[reduce.teacher_start[several & torch.cat(drawn)].long()] = True
        teacher_ids.masked_fill_(hidden.view_as(teacher_ids), teacher_mask)
        if batch["reduce_pairs"]:
            reduced = _choose(reduce, hidden[reduce.teacher_start.long()])
            reduce_ids.view(-1)[positions_of(reduced)[0]] = mask_id
        return _choose(own, own_hidden) if self.mode == "match" else reduced

    def _equal(self, t: int, batch: dict[str, Any]) -> SpanPairs:
        """Those pairs with teacher ``t`` of the own tokenization, before anything is hidden, that are one token on each
        side, the same one."""
        pairs, size = batch["own_pairs"][t], len(batch["teacher_ids"][t])
        single = (pairs.student_end - pairs.student_start == 1) & (pairs.teacher_end - pairs.teacher_start == 1)
        pairs = _choose(pairs, single)
        slots = self.slots[t]
        assert slots is not None
        teacher_slots, student_slots = slots
        theirs = _look_up(teacher_slots, batch["teacher_ids"][t], pairs.teacher_start)
        ours = _look_up(student_slots, batch["student_ids"][-size:], pairs.student_start)
        return _choose(pairs, (theirs == ours) & (ours >= 0))


def counts_of(batch: dict[str, Any]) -> dict[str, int | Tensor]:
    """Of how many things each loss of a batch, as :class:`Hiding` left it, is a mean: of ``texts``, of ``labels``, and
    with teacher t of the pairs ``own_t``, ``reduce_t``, ``hidden_t``, and of the places ``attention_t`` of maps between
    them. By these the losses of several batches make that of all their texts at once."""
    size = batch["teacher_ids"][0].shape[0]
    found: dict[str, int | Tensor] = {"texts": size}
    if batch["labels"] is not None:
        found["labels"] = len(batch["masked"])
    for t, pairs in enumerate(batch["own_pairs"]):
        found[f"own_{t}"] = pairs.num_nonempty
        full = (pairs.student_end > pairs.student_start) & (pairs.teacher_end > pairs.teacher_start)
        texts = pairs.teacher_start.long() // batch["teacher_ids"][t].shape[1]
        each = torch.zeros(size, dtype=torch.int64, device=texts.device).index_add_(0, texts, full.long())
        found[f"attention_{t}"] = each.square().sum()
    found |= {f"reduce_{t}": pairs.num_nonempty for t, pairs in enumerate(batch["reduce_pairs"])}
    found |= {f"hidden_{t}": len(pairs) for t, pairs in enumerate(batch["hidden_pairs"]) if pairs is not None}
    return found


def positions_of(pairs: SpanPairs) -> tuple[Tensor, Tensor, Tensor]:
    """The positions ``[N]`` in the student's spans one after the other, and where each span then starts and ends."""
    lengths = pairs.student_end - pairs.student_start
    end = lengths.cumsum(0, dtype=torch.int32)
    start = end - lengths
    positions = torch.repeat_interleave(pairs.student_start - start, lengths)
    return (positions + torch.arange(len(positions), device=positions.device)).long(), start, end


def _look_up(slots: Tensor, ids: Tensor, positions: Tensor) -> Tensor:
    """What ``slots [V]`` says of the ids at positions ``[P]``; -1 of ids beyond its end."""
    slots = F.pad(slots, (0, 1), value=-1).to(ids.device)
    found = slots[ids.flatten()[positions.to(ids.device).long()].clamp(max=len(slots) - 1)]
    return found.to(positions.device)


def _choose(pairs: SpanPairs, chosen: Tensor) -> SpanPairs:
    """The pairs with True in ``chosen [P]``."""
    fields = (pairs.student_start, pairs.student_end, pairs.teacher_start, pairs.teacher_end)
    return SpanPairs(*(x[chosen] for x in fields))
