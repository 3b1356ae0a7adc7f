"""Batches for training: texts, or rows of a cache, as both sides read them, padded and aligned."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Collection, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ..core.values import INT32_MAX, integer
from .batch import AlignedBatch
from .loading import tokenizer_of
from .masking import mask_tokens
from .methods import (
    Aligned,
    Tokens,
    align_texts,
    check_lengths,
    check_method,
    check_ready,
    is_split,
    joined,
    locate,
    ready,
)
from .remap import RemapTable
from .spans import SpanPairs
from .surfaces import known
from .vocab import MatchedVocab

__all__ = ["AlignmentCollator", "Rows", "one_thread_in_workers", "restride", "text_of", "widen"]

SPANS = ("teacher_start", "teacher_end", "student_start", "student_end")
# Of a batch.
_PARTS = ("teacher", "student", "pairs", "teacher_words", "student_words")


def one_thread_in_workers() -> None:
    """In a worker of a ``DataLoader``, keeps ``tokenizers`` from using threads.

    Workers are parallel already, and those that were forked lack the threads of their parent.
    """
    if get_worker_info() is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


def text_of(feature: Any, column: str, name: str) -> Any:
    """The text of a feature that is one, whole or in words, or, as the rows of data sets are, a mapping that has one.

    Raises:
        TypeError: it is neither.
        ValueError: it has two.
    """
    if isinstance(feature, str) or is_split(feature):
        return feature
    if isinstance(feature, Mapping) and "text_pair" in feature and column != "text_pair":
        raise ValueError(
            f"{name}: expected one text, got a 'text_pair' too: sequences of two texts cannot be aligned; make them "
            "one text or two features"
        )
    if isinstance(feature, Mapping):
        if column in feature:
            return feature[column]
        got = f"a mapping with the keys {', '.join(map(repr, feature)) or '(none)'}"
        hint = "; a Trainer drops columns unless remove_unused_columns=False"
    else:
        got, hint = type(feature).__name__, ""
    raise TypeError(f"{name}: expected a string or a mapping with {column!r}, got {got}{hint}")


def widen(x: Tensor, width: int, value: int) -> Tensor:
    """``[B, L]`` -> ``[B, width]``, padded on the right."""
    return torch.nn.functional.pad(x, (0, width - x.shape[1]), value=value)


def restride(pairs: SpanPairs, batch: int, student: tuple[int, int], teacher: tuple[int, int]) -> SpanPairs:
    """The same pairs where the rows of a side are ``new`` tokens long instead of ``old``: ``(old, new)`` of each."""
    # The student's span of a pair may be empty, and then lie at the end of its row: the teacher's tells the row.
    row = pairs.teacher_start // max(teacher[0], 1)
    moved = [
        position + row * (new - old)
        for side, (old, new) in (("student", student), ("teacher", teacher))
        for position in (getattr(pairs, f"{side}_start"), getattr(pairs, f"{side}_end"))
    ]
    return SpanPairs._trusted(moved, pairs.num_nonempty, batch * student[1], batch * teacher[1])


# What transformers calls labels.
_LABELS = {"label": "labels", "label_ids": "labels"}
_NO_LABEL = -100


def _column(values: list[Any], name: str) -> Any:
    """A column of the features as one tensor, if it can be: labels of different lengths are padded with -100."""
    if all(isinstance(value, (bool, int, float, np.number, np.bool_)) for value in values):
        floating = any(isinstance(value, (float, np.floating)) for value in values)
        return torch.tensor(values, dtype=torch.float32 if floating else torch.int64)
    try:
        tensors = [value if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value)) for value in values]
    except (TypeError, ValueError):
        return values
    if len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(tensors)
    if name == "labels" and all(tensor.dim() == 1 for tensor in tensors):
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=_NO_LABEL)
    return values


def _other_columns(features: Sequence[Any], own: Collection[str]) -> dict[str, Any]:
    """What features have beside what is aligned, column by column.

    Raises:
        ValueError: not the same columns in all of them, or names that a batch has already.
    """
    columns: dict[str, list[Any]] = {}
    for i, feature in enumerate(features):
        names = [name for name in feature if name not in own] if isinstance(feature, Mapping) else []
        renamed = [_LABELS.get(name, name) for name in names]
        if i and set(renamed) != columns.keys():
            expected = ", ".join(map(repr, columns)) or "none"
            got = ", ".join(map(repr, renamed)) or "none"
            raise ValueError(f"features[{i}]: expected the other columns of features[0] ({expected}), got {got}")
        for name, new in zip(names, renamed, strict=True):
            if new in _PARTS or renamed.count(new) > 1:
                raise ValueError(f"features[{i}]: expected columns that a batch does not have, got {name!r}")
            columns.setdefault(new, []).append(feature[name])
    return {name: _column(values, name) for name, values in columns.items()}


@dataclass
class Rows:
    """Aligned texts without padding.

    Attributes:
        teacher_ids, student_ids: int32, the tokens of all texts one after the other.
        spans: int32 ``[4, P]``, as :data:`SPANS`, the pairs of all texts: positions inside their text.
        teacher_lengths, student_lengths, pair_counts: int64 ``[B]``, how much of these each text has.
    """

    teacher_ids: np.ndarray
    student_ids: np.ndarray
    spans: np.ndarray
    teacher_lengths: np.ndarray
    student_lengths: np.ndarray
    pair_counts: np.ndarray

    @classmethod
    def of(cls, teacher: Tokens, student: Tokens, pairs: SpanPairs) -> Rows:
        """Takes the padding off a batch."""
        sides = {}
        for name, side in (("teacher", teacher), ("student", student)):
            keep = side.attention_mask.numpy() != 0
            sides[f"{name}_ids"] = side.input_ids.numpy()[keep].astype(np.int32)
            sides[f"{name}_lengths"] = keep.sum(1, dtype=np.int64)
        batch, teacher_width = teacher.input_ids.shape
        row = pairs.teacher_start.numpy() // max(teacher_width, 1)
        widths = {"teacher": teacher_width, "student": student.input_ids.shape[1]}
        spans = np.stack([getattr(pairs, name).numpy() - row * widths[name[:7]] for name in SPANS])
        return cls(**sides, spans=spans.astype(np.int32), pair_counts=np.bincount(row, minlength=batch))

    @classmethod
    def gather(cls, features: Sequence[Mapping[str, Any]]) -> Rows:
        """From rows of a cache.

        Raises:
            TypeError: a row whose values are not vectors of integers.
            ValueError: spans that do not fit their row.
        """

        def column(name: str) -> tuple[np.ndarray, np.ndarray]:
            arrays = []
            for i, feature in enumerate(features):
                if name not in feature:
                    raise TypeError(f"features[{i}]: expected a row of a cache, got one without {name!r}")
                array = np.asarray(feature[name])
                if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
                    raise TypeError(f"features[{i}][{name!r}]: expected a vector of integers, got {feature[name]!r}")
                arrays.append(array)
            sizes = np.array([array.size for array in arrays], dtype=np.int64)
            return np.concatenate(arrays).astype(np.int32), sizes

        (teacher_ids, teacher_lengths), (student_ids, student_lengths) = column("teacher_ids"), column("student_ids")
        spans, counts = zip(*map(column, SPANS), strict=True)
        for name, count in zip(SPANS, counts, strict=True):
            if not np.array_equal(count, counts[0]):
                i = int(np.flatnonzero(count != counts[0])[0])
                raise ValueError(f"features[{i}][{name!r}]: expected {counts[0][i]} spans, got {count[i]}")
        rows = cls(teacher_ids, student_ids, np.stack(spans), teacher_lengths, student_lengths, counts[0])
        rows.check()
        return rows

    def check(self) -> None:
        """Raises ValueError unless the spans of each side are ascending, disjoint and inside their text."""
        row = np.repeat(np.arange(len(self.pair_counts)), self.pair_counts)
        same = row[1:] == row[:-1]
        for side, (start, end), lengths in (
            ("teacher", self.spans[:2], self.teacher_lengths),
            ("student", self.spans[2:], self.student_lengths),
        ):
            bad = (start < 0) | (end < start) | (end > lengths[row])
            bad[1:] |= same & (start[1:] < end[:-1])
            if bad.any():
                p = int(np.flatnonzero(bad)[0])
                raise ValueError(
                    f"features[{row[p]}]: expected ascending spans in {lengths[row[p]]} tokens of the {side}, "
                    f"got [{start[p]}, {end[p]})"
                )

    def pad(self, pad_ids: tuple[int, int], multiple: int) -> Aligned:
        """Teacher, student and pairs of the padded batch."""
        sides, starts = [], {}
        row = np.repeat(np.arange(len(self.pair_counts)), self.pair_counts)
        for name, pad_id in zip(("teacher", "student"), pad_ids, strict=True):
            lengths = getattr(self, f"{name}_lengths")
            width = _round_up(int(lengths.max(initial=0)), multiple)
            mask = np.arange(width) < lengths[:, None]
            ids = np.full(mask.shape, pad_id, dtype=np.int64)
            ids[mask] = getattr(self, f"{name}_ids")
            sides.append(Tokens(torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))))
            starts[name] = (row * width).astype(np.int32)
        spans = dict(zip(SPANS, self.spans, strict=True))
        moved = {name: torch.from_numpy(value + starts[name[:7]]) for name, value in spans.items()}
        both = (self.spans[1] > self.spans[0]) & (self.spans[3] > self.spans[2])
        tokens = (sides[1].input_ids.numel(), sides[0].input_ids.numel())
        fields = (moved[name] for name in (*SPANS[2:], *SPANS[:2]))
        return sides[0], sides[1], SpanPairs._trusted(fields, int(both.sum()), *tokens), None


def _check_weights(weights: object, size: int) -> None:
    """``mask_weights``: floating ``[size]`` in host memory, none negative, not all 0."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"mask_weights: expected a tensor, got {type(weights).__name__}")
    if not weights.is_floating_point():
        raise TypeError(f"mask_weights: expected floating numbers, got {weights.dtype}")
    if weights.shape != (size,):
        raise ValueError(
            f"mask_weights: expected one weight for each of the student's {size} tokens, got shape "
            f"{tuple(weights.shape)}"
        )
    if weights.layout != torch.strided or weights.device.type != "cpu":
        raise ValueError(f"mask_weights: expected a dense tensor on the CPU, got {weights.layout} on {weights.device}")
    low, high = weights.min().item(), weights.max().item()
    # What is not a number is both the least and the greatest.
    if not (0 <= low and 0 < high < math.inf):
        raise ValueError(
            f"mask_weights: expected finite numbers of at least 0, one of them above 0, got {low} to {high}"
        )


def _round_up(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple


class AlignmentCollator:
    """Makes aligned batches of texts, or of rows of a cache: for ``DataLoader(collate_fn=...)`` and
    ``Trainer(data_collator=...)``.

    Args:
        teacher, student: ``transformers`` fast tokenizers or ``tokenizers.Tokenizer``, or names of models or folders
            that have one.
        method: ``"boundary"``, ``"word"``, ``"match"`` or ``"reduce"``, see :func:`align`.
        max_length: tokens of each side at most, special tokens included, or those of (teacher, student).
        pad_to_multiple_of: both sides are padded to the longest of their sequences, rounded up to a multiple of
            this; with ``max_length`` itself every batch has the same width.
        text_column: the key of the text in features that are mappings.
        mlm_probability: the share of the student's tokens to mask for masked language modelling; 0: none. It is drawn
            from torch's global generator, which a ``DataLoader`` seeds for each worker.
        mask_weights: float ``[V_s]``: how likely each of the student's tokens is to be masked, up to a factor
            (:func:`vocabdistil.reference.masking_probabilities`); None: all alike but special tokens.
        table, matched: the remap table (``reduce``) and the matched vocabulary (``match``), if there are some already.

    Returns (of a call on ``B`` features):
        An :class:`AlignedBatch` as that of :func:`align`, with

        - ``"teacher"``, ``"student"``, ``"pairs"``;
        - with ``mlm_probability`` ``"labels"``, among the student's too: int64 ``[B, L_s]``, the original ids where
          the inputs were masked, -100 elsewhere;
        - of texts in words ``"teacher_words"``, ``"student_words"``: int64 ``[B, L_t]`` and ``[B, L_s]``, which word
          each token is of, -1 where it is of none;
        - all other columns of the features, ``label`` and ``label_ids`` as ``"labels"``, before those of masked words:
          numbers and arrays of one shape as a tensor, labels of different lengths padded with -100, anything else as
          a list.

        ``batch.to(device)`` moves all of it.

    Features are strings, lists of words (which stand for the words with spaces between them), mappings with either in
    ``text_column`` (as the rows of ``datasets`` are, streamed or not), or rows of a cache (:func:`cache_aligned`),
    which are taken as they are: method and lengths are those of the cache.

    A ``Trainer`` needs ``remove_unused_columns=False``, and for a streamed data set
    ``accelerator_config={"dispatch_batches": False}``. It then moves the pairs to its device too, and trains and
    evaluates by its ``compute_loss``.

    Raises:
        TypeError, ValueError: a setting that cannot work, named with what was expected.

    Raises (of a call):
        TypeError: features that are none of these.
        ValueError: no features, a ``text_pair``, other columns than those of the first feature, or a row of a cache
            that does not fit the tokenizers.

    Example::

        collator = vd.AlignmentCollator(teacher_tokenizer, student_tokenizer, max_length=128)
        for batch in DataLoader(texts, batch_size=32, collate_fn=collator, num_workers=4):
            batch = batch.to("cuda")
            with torch.no_grad():
                taught = teacher(**batch["teacher"]).last_hidden_state
            hidden = student(**batch["student"]).last_hidden_state
            loss = vd.span_kl(hidden, taught, batch["pairs"], weight=projection)
    """

    teacher: Any
    student: Any
    method: str
    max_length: tuple[int | None, int | None]
    multiple: int
    text_column: str
    pad_ids: tuple[int, int]
    vocab_sizes: tuple[int, int]
    table: RemapTable | None
    matched: MatchedVocab | None
    mlm_probability: float
    mask_id: int
    mask_weights: Tensor | None

    def __init__(
        self,
        teacher: Any,
        student: Any,
        method: str = "boundary",
        max_length: int | Sequence[int | None] | None = None,
        *,
        pad_to_multiple_of: int | None = None,
        text_column: str = "text",
        mlm_probability: float = 0.0,
        mask_weights: Tensor | None = None,
        table: RemapTable | None = None,
        matched: MatchedVocab | None = None,
    ) -> None:
        check_method(method)
        check_ready(table, matched)
        if pad_to_multiple_of is not None:
            pad_to_multiple_of = integer(pad_to_multiple_of, "pad_to_multiple_of")
            if not 1 <= pad_to_multiple_of <= INT32_MAX:
                raise ValueError(
                    f"pad_to_multiple_of: expected a number from 1 to {INT32_MAX}, got {pad_to_multiple_of}"
                )
        if isinstance(mlm_probability, bool) or not isinstance(mlm_probability, numbers.Real):
            raise TypeError(f"mlm_probability: expected a number, got {type(mlm_probability).__name__}")
        if not 0 <= mlm_probability <= 1:
            raise ValueError(f"mlm_probability: expected a number from 0 to 1, got {mlm_probability}")
        if not isinstance(text_column, str):
            raise TypeError(f"text_column: expected a string, got {type(text_column).__name__}")
        teacher, student = tokenizer_of(teacher, "teacher"), tokenizer_of(student, "student")
        self.teacher, self.student, self.method = teacher, student, method
        self.max_length = check_lengths(max_length)
        self.multiple = pad_to_multiple_of or 1
        self.text_column = text_column
        infos = known(teacher, "teacher").info, known(student, "student").info
        self.pad_ids = infos[0].pad_id or 0, infos[1].pad_id or 0
        self.vocab_sizes = len(infos[0].tokens), len(infos[1].tokens)
        if mask_weights is not None:
            _check_weights(mask_weights, self.vocab_sizes[1])
        # Made once here and not for every batch.
        self.table, self.matched = ready(method, teacher, student, table, matched)
        self.mlm_probability = mlm_probability
        self.mask_id, self.mask_weights = -1, mask_weights
        if mlm_probability:
            if "mask" not in infos[1].roles:
                raise ValueError("student: expected a tokenizer with a mask token for mlm_probability, got none")
            self.mask_id = infos[1].roles["mask"]
            if mask_weights is None:
                mask_weights = torch.ones(self.vocab_sizes[1])
                mask_weights[list(infos[1].special.values())] = 0
                self.mask_weights = mask_weights

    def __call__(self, features: Sequence[Any]) -> AlignedBatch:
        if isinstance(features, (str, bytes, Mapping)) or not isinstance(features, Sized):
            raise TypeError(f"features: expected a list of texts or of rows, got {type(features).__name__}")
        if not len(features):
            raise ValueError("features: expected at least one, got none")
        words: dict[str, Tensor] = {}
        if all(isinstance(feature, Mapping) and "teacher_ids" in feature for feature in features):
            own = {"teacher_ids", "student_ids", *SPANS}
            teacher, student, pairs, _ = self._from_rows(features)
        else:
            own = {self.text_column}
            texts = [text_of(feature, self.text_column, f"features[{i}]") for i, feature in enumerate(features)]
            teacher, student, pairs = self._from_texts(texts)
            if any(map(is_split, texts)):
                words = self._words(texts, teacher, student, pairs)
        batch = AlignedBatch(
            teacher=AlignedBatch(teacher), student=AlignedBatch(student), pairs=pairs, **words
        )
        batch.update(_other_columns(features, own))
        if self.mask_weights is not None and self.mlm_probability:
            batch["student"]["input_ids"], labels = mask_tokens(
                student.input_ids,
                self.mask_weights,
                self.mask_id,
                attention_mask=student.attention_mask,
                mlm_probability=self.mlm_probability,
            )
            batch["student"]["labels"] = labels
            batch.setdefault("labels", labels)
        return batch

    def _from_texts(self, texts: list[str | Sequence[str]]) -> tuple[Tokens, Tokens, SpanPairs]:
        one_thread_in_workers()
        *sides, pairs, _ = align_texts(
            texts, self.teacher, self.student, self.method, self.max_length, self.table, self.matched
        )
        widths = [side.input_ids.shape[1] for side in sides]
        wider = [_round_up(width, self.multiple) for width in widths]
        if widths != wider:
            sides = [
                Tokens(widen(side.input_ids, width, pad_id), widen(side.attention_mask, width, 0))
                for side, width, pad_id in zip(sides, wider, self.pad_ids, strict=True)
            ]
            pairs = restride(pairs, len(texts), (widths[1], wider[1]), (widths[0], wider[0]))
        return sides[0], sides[1], pairs

    def _words(
        self, texts: list[str | Sequence[str]], teacher: Tokens, student: Tokens, pairs: SpanPairs
    ) -> dict[str, Tensor]:
        """Which of the given words each token is of."""
        found: dict[str, Tensor] = {}
        for name, side, limit in zip(("teacher", "student"), (teacher, student), self.max_length, strict=True):
            words = torch.full_like(side.input_ids, -1)
            if name == "student" and self.method == "reduce":  # its tokens are of those of the teacher
                of = found["teacher_words"].flatten()[pairs.teacher_start.long()]
                sizes = (pairs.student_end - pairs.student_start).long()
                at = torch.repeat_interleave(pairs.student_start - (sizes.cumsum(0) - sizes), sizes)
                words.view(-1)[at + torch.arange(len(at))] = of.repeat_interleave(sizes)
            else:
                whole = [joined(text) for text in texts]
                located, _ = locate(whole, known(getattr(self, name), name), name, limit, by_word=False)
                for b, text in enumerate(texts):
                    if not is_split(text):
                        continue
                    start, end, _ = map(np.asarray, located.row(b))
                    ends = np.cumsum([len(word.encode()) + 1 for word in text]) - 1
                    # A space before a word is a part of its first token.
                    first = np.searchsorted(ends, start, side="right")
                    words[b, : len(start)] = torch.from_numpy(np.where((start >= 0) & (start < end), first, -1))
            found[f"{name}_words"] = words
        return found

    def _from_rows(self, features: Sequence[Mapping[str, Any]]) -> Aligned:
        rows = Rows.gather(features)
        for name, size in zip(("teacher", "student"), self.vocab_sizes, strict=True):
            ids = getattr(rows, f"{name}_ids")
            if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < size:
                raise ValueError(
                    f"features: expected ids from 0 to {size - 1} of the {name}, "
                    f"got {int(ids.min())} to {int(ids.max())}; is this the cache of other tokenizers?"
                )
        return rows.pad(self.pad_ids, self.multiple)


def pad(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """``[B, L]`` ids and attention mask, padded on the right."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), value, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[b, : len(row)] = 1
    return ids, mask
