"""Batches for causal models: rows as both sides read them, aligned where they are learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.values import INT32_MAX, integer
from .batch import AlignedBatch
from .collator import one_thread_in_workers
from .conversations import Rendered, rendered
from .families import TokenizerInfo
from .loading import tokenizer_of
from .methods import boundary_pairs, locate
from .spans import SpanPairs
from .surfaces import Known, known

__all__ = ["CausalCollator"]

_NO_LABEL = -100


@dataclass
class _Row:
    """A row on one side.

    Attributes:
        ids: int64 ``[L]``.
        start, end: int64 ``[L]``: which bytes of what is learned each token covers, counted through all of it, one more
            after each part for the token that ends it; both 0 where it covers none.
        label: bool ``[L]``: whether it is learned.
        inside: bool ``[L]``: whether it covers nothing but what is learned.
    """

    ids: np.ndarray
    start: np.ndarray
    end: np.ndarray
    label: np.ndarray
    inside: np.ndarray


class CausalCollator:
    """Makes batches for causal models of two tokenizers: for ``Trainer(data_collator=...)``.

    Rows are those of TRL's SFT: strings or mappings with ``"text"``; with ``"prompt"`` and ``"completion"``, strings or
    messages; or with ``"messages"``, to which the chat template of each side is applied. What is learned is the text,
    the completion, or what the assistant says, and the token that ends it: the end of the text, which is put behind it
    where the tokenizer does not, or the special token that the chat template has there. Ids and labels are those of
    TRL (of conversations with ``assistant_only_loss=True``), but that it also learns what a template writes behind the
    end of a completion. Templates differ between the sides, so that only what is learned is aligned, and where it ends.
    A token that is partly of something else is in no pair, and learned if it begins in what is learned, or in white
    space before what the assistant says.

    Args:
        teacher, student: ``transformers`` fast tokenizers, or names of models or folders that have one.
        max_length: tokens of each side at most, or those of (teacher, student): what is longer loses its end, and the
            pairs that it is in.
        packed: all texts of a batch in one row on each side, without padding: ``position_ids`` begin anew with each
            text, and there is no attention mask. Models of ``transformers`` from 4.53 on do not look across then.

    Returns (of a call on ``B`` rows):
        An :class:`AlignedBatch` with

        - ``input_ids``, ``labels``, ``attention_mask`` (``position_ids`` if packed): int64 ``[B, L_s]``, the student's;
          labels are not shifted, -100 where nothing is learned, as at the first token of each text;
        - ``teacher``: the same of the teacher without labels, ``[B, L_t]``;
        - ``pairs``: :class:`SpanPairs` over positions ``b * L + i`` of each side, of tokens and not of the rows that
          predict them: losses take them with ``student_shift=1, teacher_shift=1``. None begins with the first token of
          a text, which nothing predicts;
        - ``counts``: ``{"tokens": labels, "pairs": pairs}``, how many there are.

        Texts are padded behind on both sides, with any token where a tokenizer has none for it.

    Raises:
        TypeError, ValueError: tokenizers or settings that cannot work; of a call, rows that cannot.

    Example::

        collator = vd.CausalCollator("Qwen/Qwen2.5-7B", "meta-llama/Llama-3.2-1B", max_length=1024)
        batch = collator([{"prompt": "2 + 2 =", "completion": " 4"}])
    """

    def __init__(
        self, teacher: Any, student: Any, max_length: int | Sequence[int] = 1024, *, packed: bool = False
    ) -> None:
        self.teacher, self.student = tokenizer_of(teacher, "teacher"), tokenizer_of(student, "student")
        known(self.teacher, "teacher"), known(self.student, "student")
        both = max_length if isinstance(max_length, (tuple, list)) else (max_length, max_length)
        if len(both) != 2:
            raise ValueError(f"max_length: expected one length or those of teacher and student, got {len(both)}")
        self.max_length = [integer(length, "max_length") for length in both]
        if min(self.max_length) < 2:
            raise ValueError(f"max_length: expected at least 2, got {min(self.max_length)}")
        self.packed = packed

    def __call__(self, features: Sequence[Any]) -> AlignedBatch:
        if isinstance(features, (str, bytes, Mapping)) or not isinstance(features, Sized):
            raise TypeError(f"features: expected a list of rows, got {type(features).__name__}")
        if not len(features):
            raise ValueError("features: expected at least one, got none")
        one_thread_in_workers()
        teacher, student = self._read(features, "teacher"), self._read(features, "student")
        spans = _aligned(teacher, student, self.max_length)
        sides = []
        for rows, limit, name in zip((teacher, student), self.max_length, ("teacher", "student"), strict=True):
            lengths = [min(len(row.ids), limit) for row in rows]
            info = known(getattr(self, name), name).info
            sides.append(_packed(rows, lengths) if self.packed else _padded(rows, lengths, info.pad_id or 0))
        (taught, places_t), (read, places_s) = sides
        row = spans[:, 0]
        moved = [spans[:, 3] + places_s[row], spans[:, 4] + places_s[row]]
        moved += [spans[:, 1] + places_t[row], spans[:, 2] + places_t[row]]
        tokens = read["input_ids"].numel(), taught["input_ids"].numel()
        if max(tokens) > INT32_MAX:
            raise ValueError(f"features: expected at most {INT32_MAX} tokens, got {max(tokens)}")
        pairs = SpanPairs._trusted([torch.from_numpy(x.astype(np.int32)) for x in moved], len(spans), *tokens)
        del taught["labels"]
        counts = {"tokens": int((read["labels"] != _NO_LABEL).sum()), "pairs": len(pairs)}
        return AlignedBatch(**read, teacher=AlignedBatch(taught), pairs=pairs, counts=counts)

    def _read(self, features: Sequence[Any], side: str) -> list[_Row]:
        tokenizer = getattr(self, side)
        source = known(tokenizer, side)
        texts = [rendered(feature, tokenizer, side, f"features[{i}]") for i, feature in enumerate(features)]
        rows: dict[int, _Row] = {}
        for chat in (False, True):
            numbers = [i for i, text in enumerate(texts) if text.chat == chat]
            if numbers:
                located, tokens = locate([texts[i].text for i in numbers], source, side, None, False, not chat)
                lengths = tokens.attention_mask.sum(1).tolist()
                for b, i in enumerate(numbers):
                    start, end, _ = map(np.asarray, located.row(b))
                    ids = tokens.input_ids[b, : lengths[b]].numpy()
                    rows[i] = _row(texts[i], ids, start.astype(np.int64), end.astype(np.int64), source)
        return [rows[i] for i in range(len(texts))]


def _row(text: Rendered, ids: np.ndarray, start: np.ndarray, end: np.ndarray, source: Known) -> _Row:
    """
    Args:
        start, end: the bytes of the text that each token covers; -1 and anything where it covers none.
    """
    ending = None if text.chat else _end_of_text(source.info)
    if ending is not None and (not len(ids) or start[-1] >= 0 and ids[-1] != ending):
        ids, start, end = (np.append(x, value) for x, value in ((ids, ending), (start, -1), (end, -1)))
    somewhere = start >= 0
    end = np.where(somewhere, end, -1)
    row = _Row(ids, np.zeros_like(start), np.zeros_like(start), np.zeros(len(ids), bool), np.zeros(len(ids), bool))
    data = text.text.encode()
    before = 0  # bytes learned of the parts that are done, and one for the end of each
    for part in text.learned:
        first, last = (len(text.text[:at].encode()) for at in part)
        touched = somewhere & (start < last) & (end > first)
        row.start[touched] = before + np.maximum(start[touched], first) - first
        row.end[touched] = before + np.minimum(end[touched], last) - first
        begins = somewhere & (start >= first) & (start < last)
        row.label |= begins
        if text.chat:  # a template's space may stand in the first token of what the assistant says
            row.label |= somewhere & (start >= len(data[:first].rstrip())) & (start < first) & (end > first)
        row.inside |= begins & (end <= last)
        before += last - first + 1
        if (closing := _closing(text, last, ids, start, end, source)) is not None:
            at, after = closing
            row.start[at], row.end[at], row.inside[at] = before - 1, before, True
            row.label[after : at + 1] = True
    return row


def _end_of_text(info: TokenizerInfo) -> int | None:
    return info.roles.get("eos", info.roles.get("sep"))


def _closing(
    text: Rendered, last: int, ids: np.ndarray, start: np.ndarray, end: np.ndarray, source: Known
) -> tuple[int, int] | None:
    """The special token that ends what is learned up to byte ``last``, with nothing but white space between, and the
    first token after what is learned."""
    if text.chat:
        after = np.flatnonzero(start >= last)
    else:  # those that the tokenizer puts behind every text
        after = np.flatnonzero(start < 0)
        after = after[after > np.flatnonzero(start >= 0).max(initial=-1)]
        after = after if len(text.text[: text.learned[-1][1]].encode()) == last else after[:0]
    # White space may be unknown; and what is unknown may be the end, in one token as GPT-2 has it.
    ends = {source.info.roles.get("eos"), source.info.roles.get("sep")}
    special, data = set(source.info.special.values()) - ({source.info.unk_id} - ends), text.text.encode()
    for at in after:
        if int(ids[at]) in special:
            return int(at), int(after[0])
        if data[start[at] : end[at]].strip():
            break
    return None


def _aligned(teacher: list[_Row], student: list[_Row], limits: list[int]) -> np.ndarray:
    """int64 ``[P, 5]``: the row of each pair, and its spans in it, first the teacher's."""
    sides, widths = [], []
    for rows in (teacher, student):
        widths.append(max(len(row.ids) for row in rows))
        offsets = np.zeros((len(rows), widths[-1], 2), dtype=np.int64)
        for b, row in enumerate(rows):
            offsets[b, : len(row.ids), 0], offsets[b, : len(row.ids), 1] = row.start, row.end
        sides.append(torch.from_numpy(offsets))
    pairs = boundary_pairs(sides[0], sides[1])
    found = [pairs.teacher_start, pairs.teacher_end, pairs.student_start, pairs.student_end]
    spans = np.stack([x.numpy().astype(np.int64) for x in found], 1)
    spans = spans[(spans[:, 1] > spans[:, 0]) & (spans[:, 3] > spans[:, 2])]
    number = spans[:, 0] // max(widths[0], 1)
    keep = np.ones(len(spans), bool)
    for k, (rows, width, limit) in enumerate(zip((teacher, student), widths, limits, strict=True)):
        start, end = spans[:, 2 * k], spans[:, 2 * k + 1]
        outside = np.zeros((len(rows), width), dtype=np.int64)
        for b, row in enumerate(rows):
            outside[b, : len(row.ids)] = ~row.inside
        before = np.concatenate([[0], outside.ravel().cumsum()])
        keep &= before[end] == before[start]
        start -= number * width
        end -= number * width
        # What is cut off is in no pair, and the first token of a text is predicted by nothing.
        keep &= (end <= limit) & (start > 0)
    return np.column_stack([number, spans])[keep]


# Tensors of one side, and where each text begins among its tokens.
_Side = tuple[dict[str, Tensor], np.ndarray]


def _labels(row: _Row, length: int) -> np.ndarray:
    labels = np.where(row.label, row.ids, _NO_LABEL)[:length]
    labels[:1] = _NO_LABEL
    return labels


def _padded(rows: list[_Row], lengths: list[int], pad_id: int) -> _Side:
    width = max(lengths)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    labels = np.full((len(rows), width), _NO_LABEL, dtype=np.int64)
    for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[b, :length], labels[b, :length] = row.ids[:length], _labels(row, length)
    mask = np.arange(width) < np.asarray(lengths)[:, None]
    arrays = {"input_ids": ids, "attention_mask": mask.astype(np.int64), "labels": labels}
    return {name: torch.from_numpy(x) for name, x in arrays.items()}, np.arange(len(rows)) * width


def _packed(rows: list[_Row], lengths: list[int]) -> _Side:
    columns = [
        (row.ids[:length], np.arange(length), _labels(row, length)) for row, length in zip(rows, lengths, strict=True)
    ]
    joined = [torch.from_numpy(np.concatenate(parts))[None] for parts in zip(*columns, strict=True)]
    places = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return dict(zip(("input_ids", "position_ids", "labels"), joined, strict=True)), places
