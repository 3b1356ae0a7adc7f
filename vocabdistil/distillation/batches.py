"""Batches: the collator of the main job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..alignment.collator import pad, restride, text_of, widen
from ..alignment.families import encode
from ..alignment.methods import match_pairs
from ..alignment.remap import RemapTable
from ..alignment.vocab import MatchedVocab

__all__ = ["DistillCollator", "to_device"]


class DistillCollator:
    """Texts -> one batch for the student and one for each teacher, with the spans that align them.

    The student reads every text once per teacher as ``reduce`` gives it and once as its own tokenizer does.

    Args:
        teachers: their tokenizers.
        student: the student's tokenizer.
        tables, matched: one of each per teacher.
        max_length: teacher tokens kept of a text.
        student_max_length: student tokens kept (``reduce`` cuts at a teacher token, never inside one).

    Returns (of a call on ``B`` texts, or mappings with the key ``"text"``):
        ``student_ids``, ``student_mask``: int64 ``[(T + 1) B, L_s]``: ``B`` rows for each of the ``T`` teachers'
        ``reduce`` ids, then ``B`` rows of the student's own tokenization;
        ``teacher_ids``, ``teacher_mask``: lists of ``T`` int64 ``[B, L_t]``;
        ``reduce_pairs``, ``own_pairs``: lists of ``T`` :class:`SpanPairs`, positions counted within the block of
        ``B`` student rows that they belong to, ``L_s`` apart.
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
        own_ids, own_mask = pad(
            encode(self.student, texts, "student", self.student_max_length), self.student.pad_token_id
        )
        teacher_ids, teacher_mask = [], []
        blocks = []
        for tokenizer, table in zip(self.teachers, self.tables, strict=True):
            ids, mask = pad(encode(tokenizer, texts, "teacher", self.max_length), tokenizer.pad_token_id)
            teacher_ids.append(ids)
            teacher_mask.append(mask)
            blocks.append(table.remap(ids, mask, max_length=self.student_max_length))
        width = max(own_ids.shape[1], *(block.input_ids.shape[1] for block in blocks))
        rows = [(block.input_ids, block.attention_mask) for block in blocks] + [(own_ids, own_mask)]
        student_ids = torch.cat([widen(ids, width, self.student.pad_token_id) for ids, _ in rows])
        student_mask = torch.cat([widen(mask.to(torch.int64), width, 0) for _, mask in rows])
        own_ids, own_mask = student_ids[-len(texts) :], student_mask[-len(texts) :]
        return {
            "student_ids": student_ids,
            "student_mask": student_mask,
            "teacher_ids": teacher_ids,
            "teacher_mask": teacher_mask,
            "reduce_pairs": [
                restride(block.pairs, len(texts), (block.input_ids.shape[1], width), (ids.shape[1],) * 2)
                for block, ids in zip(blocks, teacher_ids, strict=True)
            ],
            "own_pairs": [
                match_pairs(ids, own_ids, matched, teacher_mask=mask, student_mask=own_mask)
                for ids, mask, matched in zip(teacher_ids, teacher_mask, self.matched, strict=True)
            ],
        }


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    def move(value: Any) -> Any:
        return [move(v) for v in value] if isinstance(value, list) else value.to(device)

    return {key: move(value) for key, value in batch.items()}
