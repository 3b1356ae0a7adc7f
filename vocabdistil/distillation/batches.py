"""Batches: the collator of the main job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..alignment.collator import pad, restride, text_of, widen
from ..alignment.families import encode
from ..alignment.methods import align_texts, match_pairs, remapped
from ..alignment.remap import RemapTable
from ..alignment.spans import SpanPairs
from ..alignment.surfaces import known
from ..alignment.vocab import MatchedVocab
from .hiding import Hiding, counts_of

__all__ = ["DistillCollator", "TrainingCollator", "to_device"]

# Ids and mask of the student and of each teacher, and the pairs with each teacher.
_Sides = tuple[tuple[Tensor, Tensor], list[tuple[Tensor, Tensor]], list[SpanPairs]]


def _pad_id(tokenizer: Any) -> int:
    """What stands behind shorter texts; nobody reads it, so that a tokenizer without padding takes any token."""
    return tokenizer.pad_token_id or 0


class DistillCollator:
    """Texts -> one batch for the student and one for each teacher, with the spans that align them.

    The student reads every text as its own tokenizer does, and if there are remap tables, once more per teacher as
    ``reduce`` gives it.

    Args:
        teachers: their tokenizers.
        student: the student's tokenizer.
        tables: the remap table of each teacher; empty: no ``reduce`` rows.
        matched: the matched vocabulary of each teacher, to pair equal tokens of the own tokenization (``match``);
            empty: it is paired by text (``boundary``).
        max_length: teacher tokens kept of a text.
        student_max_length: student tokens kept (``reduce`` cuts at a teacher token, never inside one); a tokenizer with
            ``truncation_side="left"`` keeps the end.

    Returns (of a call on ``B`` texts, or mappings with the key ``"text"``):
        ``student_ids``, ``student_mask``: int64 ``[(T + 1) B, L_s]``: ``B`` rows for each of the ``T`` teachers'
        ``reduce`` ids, then ``B`` rows of the student's own tokenization; without tables these alone;
        ``teacher_ids``, ``teacher_mask``: lists of ``T`` int64 ``[B, L_t]``;
        ``reduce_pairs``, ``own_pairs``: lists of ``T`` :class:`SpanPairs`, positions counted within the block of
        ``B`` student rows that they belong to, ``L_s`` apart; the former is empty without tables.
    """

    def __init__(
        self,
        teachers: Sequence[Any],
        student: Any,
        tables: Sequence[RemapTable],
        matched: Sequence[MatchedVocab],
        max_length: int,
        student_max_length: int,
    ) -> None:
        self.teachers, self.student = list(teachers), student
        self.tables, self.matched = list(tables), list(matched)
        self.max_length, self.student_max_length = max_length, student_max_length

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        texts = [text_of(feature, "text", f"features[{i}]") for i, feature in enumerate(features)]
        sides = self._by_text(texts) if not self.matched else self._by_ids(texts)
        (own_ids, own_mask), teachers, own_pairs = sides
        student = known(self.student, "student")
        blocks = [
            remapped(table, ids, mask, self.student_max_length, (known(tokenizer, "teacher"), student))
            for table, tokenizer, (ids, mask) in zip(self.tables, self.teachers, teachers, strict=bool(self.tables))
        ]
        own_width, lengths = own_ids.shape[1], [ids.shape[1] for ids, _ in teachers]
        width = max(own_width, *(block.input_ids.shape[1] for block in blocks), 0)
        rows = [(block.input_ids, block.attention_mask) for block in blocks] + [(own_ids, own_mask)]
        size = len(texts)
        return {
            "student_ids": torch.cat([widen(ids, width, _pad_id(self.student)) for ids, _ in rows]),
            "student_mask": torch.cat([widen(mask.to(torch.int64), width, 0) for _, mask in rows]),
            "teacher_ids": [ids for ids, _ in teachers],
            "teacher_mask": [mask for _, mask in teachers],
            "reduce_pairs": [
                restride(block.pairs, size, (block.input_ids.shape[1], width), (length, length))
                for block, length in zip(blocks, lengths, strict=bool(blocks))
            ],
            "own_pairs": [
                restride(pairs, size, (own_width, width), (length, length))
                for pairs, length in zip(own_pairs, lengths, strict=True)
            ],
        }

    def _by_ids(self, texts: list[str]) -> _Sides:
        """Both sides encoded, equal tokens paired."""
        own = pad(encode(self.student, texts, "student", self.student_max_length), _pad_id(self.student))
        teachers = [
            pad(encode(tokenizer, texts, "teacher", self.max_length), _pad_id(tokenizer))
            for tokenizer in self.teachers
        ]
        pairs = [
            match_pairs(ids, own[0], matched, teacher_mask=mask, student_mask=own[1])
            for (ids, mask), matched in zip(teachers, self.matched, strict=True)
        ]
        return own, teachers, pairs

    def _by_text(self, texts: list[str]) -> _Sides:
        """Both sides encoded and paired by the text that their tokens cover."""
        lengths = self.max_length, self.student_max_length
        found = [
            align_texts(texts, tokenizer, self.student, "boundary", lengths, None, None) for tokenizer in self.teachers
        ]
        own = found[0][1]
        return (
            (own.input_ids, own.attention_mask),
            [(teacher.input_ids, teacher.attention_mask) for teacher, _, _, _ in found],
            [pairs for _, _, pairs, _ in found],
        )


class TrainingCollator:
    """:class:`DistillCollator`, and what is hidden in training: then nothing of it is left to be done on the device.

    Args:
        collator: gives the batch.
        hiding: of the objective, on the CPU.
        seed: of what is hidden, with the ``"number"`` of each text in the run.
    """

    def __init__(self, collator: DistillCollator, hiding: Hiding, seed: int) -> None:
        self.collator, self.hiding, self.seed = collator, hiding, seed

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.hiding(
            self.collator(features) | {"numbers": [feature["number"] for feature in features]}, self.seed
        )
        return batch | {"counts": {name: int(count) for name, count in counts_of(batch).items()}}


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    def move(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(move, value))
        return value.to(device) if hasattr(value, "to") else value

    return {key: move(value) for key, value in batch.items()}
