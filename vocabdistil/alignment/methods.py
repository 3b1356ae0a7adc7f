"""The alignments: which spans of two tokenizations of the same texts belong together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import native
from ..core.native import module as _native_module
from ..core.options import METHODS
from ..core.values import INT32_MAX, check_dense, check_kind, integer
from .families import check_room, encode, plain_settings, template_ends
from .remap import RemapOutput, RemapTable, _checked_batch, thread_count
from .spans import SpanPairs
from .surfaces import Known, known
from .vocab import MatchedVocab

__all__ = ["METHODS", "Tokens", "align_texts", "boundary_pairs", "match_pairs", "remapped"]

# Texts that are encoded at once: few at first, to see whether a tokenizer's offsets are needed.
_TRIAL, _CHUNK = 32, 1024
# The share of the text from which on it is cheaper to ask for offsets at once than to encode again: they make an
# encoding a quarter to a third dearer.
_WORTH_ASKING = 0.25

_FIELDS = ("input_ids", "attention_mask")


@dataclass(frozen=True, eq=False)
class Tokens(Mapping[str, Tensor]):
    """One side of an aligned batch, also as a mapping.

    Attributes:
        input_ids: int64 ``[B, L]``, padded to the longest sequence.
        attention_mask: int64 ``[B, L]``.
    """

    input_ids: Tensor
    attention_mask: Tensor

    def __getitem__(self, name: str) -> Tensor:
        if name not in _FIELDS:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(_FIELDS)

    def __len__(self) -> int:
        return len(_FIELDS)

    # By identity, as tensors are.
    __eq__ = object.__eq__
    __hash__ = object.__hash__


def match_pairs(
    teacher_ids: Tensor | np.ndarray | Sequence[Sequence[int]],
    student_ids: Tensor | np.ndarray | Sequence[Sequence[int]],
    matched: MatchedVocab,
    teacher_mask: Tensor | np.ndarray | Sequence[Sequence[int]] | None = None,
    student_mask: Tensor | np.ndarray | Sequence[Sequence[int]] | None = None,
) -> SpanPairs:
    """The ``match`` alignment of arXiv 2205.02340: equal tokens, taken greedily from left to right.

    For each teacher token in order, the first equal student token after the last one taken. Special tokens
    are tokens like any other; without masks, so is padding. An id outside the matched vocabulary equals
    nothing.

    Args:
        teacher_ids: ``[B, L_t]`` int64 or int32, a numpy array of integers, or a list of lists.
        student_ids: ``[B, L_s]``, the same.
        matched: which ids are the same token.
        teacher_mask, student_mask: bool or integers of the same shapes; tokens with 0 are left out.

    Returns:
        1:1 pairs over positions ``b * L_t + i`` and ``b * L_s + j``, on the device of ``teacher_ids``.

    Raises:
        TypeError: ids or masks of a wrong dtype.
        ValueError: wrong shapes, mixed devices, a batch whose positions do not fit 32 bits.
    """
    check_kind(matched, "matched", MatchedVocab)
    teacher, teacher_keep, device = _side(teacher_ids, teacher_mask, "teacher")
    student, student_keep, student_device = _side(student_ids, student_mask, "student")
    if student_device != device:
        raise ValueError(f"student_ids: expected device {device}, got {student_device}")
    batch, teacher_length = teacher.shape
    student_length = student.shape[1]
    if student.shape[0] != batch:
        raise ValueError(f"student_ids: expected {batch} sequences, got {student.shape[0]}")
    teacher_slots, student_slots = matched.slots()
    found = torch.empty(2, batch, min(teacher_length, student_length), dtype=torch.int32)
    counts = torch.empty(batch, dtype=torch.int64)
    args = _native_module().MatchArgs(
        teacher.data_ptr(),
        student.data_ptr(),
        0 if teacher_keep is None else teacher_keep.data_ptr(),
        0 if student_keep is None else student_keep.data_ptr(),
        (batch, teacher_length, student_length),
        (teacher_slots.data_ptr(), teacher_slots.numel()),
        (student_slots.data_ptr(), student_slots.numel()),
        len(matched),
        found.data_ptr(),
        counts.data_ptr(),
        thread_count(batch * (teacher_length + student_length)),
    )
    count = _native_module().align_match_plan(args)
    spans = torch.empty(4, count, dtype=torch.int32)
    _native_module().align_match_write(args, spans.data_ptr())
    return SpanPairs._trusted(
        spans.to(device).unbind(), count, batch * student_length, batch * teacher_length
    )


def boundary_pairs(
    teacher_offsets: Tensor,
    student_offsets: Tensor,
    teacher_mask: Tensor | None = None,
    student_mask: Tensor | None = None,
) -> SpanPairs:
    """The boundary alignment of token offsets that are ready: the finest common refinement.

    Both sides are cut at every position of the text where neither has a token that covers both what is
    before and what is after it; the tokens between two cuts are a pair, if there are some on either side.
    Tokens with an empty range (specials, padding) are in no pair. Linear in the number of tokens.

    Args:
        teacher_offsets: int64 or int32 ``[B, L_t, 2]``: the half-open range of each token in its text, in
            bytes or in characters, ascending.
        student_offsets: ``[B, L_s, 2]``, the same in the same unit.
        teacher_mask, student_mask: bool or integers ``[B, L_t]`` and ``[B, L_s]``; tokens with 0 are left
            out.

    Returns:
        M:N pairs over positions ``b * L_t + i`` and ``b * L_s + j``, on the device of ``teacher_offsets``.

    Raises:
        TypeError: offsets or masks of a wrong dtype.
        ValueError: wrong shapes, offsets or positions that do not fit 32 bits.
    """
    sides = []
    for name, offsets, mask in (
        ("teacher", teacher_offsets, teacher_mask),
        ("student", student_offsets, student_mask),
    ):
        if not isinstance(offsets, Tensor):
            raise TypeError(f"{name}_offsets: expected a tensor, got {type(offsets).__name__}")
        check_dense(offsets, f"{name}_offsets")
        if offsets.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}_offsets: expected int64 or int32, got {offsets.dtype}")
        if offsets.dim() != 3 or offsets.shape[2] != 2:
            raise ValueError(f"{name}_offsets: expected shape [batch, length, 2], got {tuple(offsets.shape)}")
        if offsets.shape[0] != teacher_offsets.shape[0]:
            raise ValueError(
                f"{name}_offsets: expected {teacher_offsets.shape[0]} sequences, got {offsets.shape[0]}"
            )
        _, mask = _checked_batch(offsets[..., 0], mask, f"{name}_offsets", f"{name}_mask")
        if offsets.numel() // 2 > INT32_MAX:
            raise ValueError(f"{name}_offsets: expected at most {INT32_MAX} tokens, got {tuple(offsets.shape)}")
        keep = None if mask is None else mask.cpu().ne(0).contiguous()
        sides.append((offsets.cpu().contiguous(), keep))
    batch = teacher_offsets.shape[0]
    spans = _native_module().align_offsets(
        *(
            (side.data_ptr(), side.element_size(), 0 if keep is None else keep.data_ptr(), side.shape[1])
            for side, keep in sides
        ),
        batch,
        thread_count(sum(side.numel() for side, _ in sides)),
    )
    if spans is None:
        for name, (side, _) in zip(("teacher", "student"), sides, strict=True):
            if side.numel() and (most := int(side.max())) > INT32_MAX:
                raise ValueError(f"{name}_offsets: expected offsets that fit 32 bits, got {most}")
    lengths = (side.shape[1] for side, _ in sides)
    return _pairs(spans, batch, *lengths).to(teacher_offsets.device)


def _side(ids: Any, mask: Any, name: str) -> tuple[Tensor, Tensor | None, torch.device]:
    ids, mask = _checked_batch(ids, mask, f"{name}_ids", f"{name}_mask")
    if ids.numel() > INT32_MAX:
        raise ValueError(f"{name}_ids: expected at most {INT32_MAX} tokens, got {tuple(ids.shape)}")
    keep = None if mask is None else mask.cpu().ne(0).contiguous()
    return ids.cpu().to(torch.int64).contiguous(), keep, ids.device


_INT64 = torch.empty(0, dtype=torch.int64)


def _empty(batch: int, length: int) -> Tensor:
    """Uninitialised int64 ``[batch, length]``: a batch of one long text among short ones is mostly padding, and fresh
    memory for it would cost more than the alignment."""
    return native.empty(_INT64, batch, length)


def _tokens(rows: list[list[int]], pad_id: int) -> Tokens:
    length = max(map(len, rows), default=0)
    input_ids, attention_mask = (_empty(len(rows), length) for _ in range(2))
    _native_module().align_pad(rows, length, pad_id, input_ids.data_ptr(), attention_mask.data_ptr())
    return Tokens(input_ids, attention_mask)


# Tokens of teacher and student at most.
Lengths = tuple["int | None", "int | None"]
# Both sides, the pairs, and the bytes of the texts: all of them and those in pairs.
Aligned = tuple[Tokens, Tokens, SpanPairs, "tuple[int, int] | None"]


def read_side(texts: list[str], source: Known, name: str, max_length: int | None) -> Tokens:
    """What one side makes of texts, without looking at where its tokens lie."""
    rows = encode(source.info.backend, texts, name, max_length, source.info.keeps_last)
    return _tokens(rows, source.info.pad_id or 0)


def _kinds(side: Known) -> list[tuple[int, int]]:
    """Ids of the special tokens that pair across tokenizers: 1 before a text, 2 after it."""
    roles = side.info.roles
    return [
        (roles[role], 1 if role in ("cls", "bos") else 2)
        for role in ("cls", "bos", "sep", "eos")
        if role in roles
    ]


def new_side(
    source: Known, rows: int, ends: tuple[int, int], limit: int = -1, at_spaces: bool = False, places: bytes = b""
) -> Any:
    """What the native code makes of so many texts by one tokenizer; nothing is read yet."""
    return _native_module().Side(
        source.surfaces.native, source.surfaces.folds.page, rows, ends, _kinds(source), limit,
        source.info.keeps_last, at_spaces, places, source.word_pattern if places else None,
    )  # fmt: skip


def locate(
    texts: list[str], source: Known, name: str, max_length: int | None, by_word: bool, template: bool = True
) -> tuple[Any, Tokens]:
    """The tokens of each text, and where they lie in it.

    Args:
        template: whether the tokenizer puts its special tokens around a text.

    The fast encoding tells no offsets, and mostly they are not needed: the tokens spell the text in one way
    only. Where they do not (unknown tokens and normalized text, unless there is one way still), the text is encoded
    again with offsets.
    """
    backend = source.info.backend
    check_room(backend, name, max_length)
    with plain_settings(backend):
        # Without a pre-tokenizer the words are what white space separates.
        at_spaces = by_word and backend.pre_tokenizer is None
        places = source.word_places if by_word else b""
        numbered = by_word and not at_spaces and not places
        side: Any = None

        first, last = 0, min(_TRIAL, len(texts))
        while side is None or first < last:
            whole = numbered or source.needs_offsets
            encode_batch = backend.encode_batch if whole else backend.encode_batch_fast
            encodings = encode_batch(texts[first:last], add_special_tokens=template)
            size = sum(map(len, texts[first:last]))
            threads = thread_count(size)
            if side is None:
                ends = template_ends(backend, encodings) if template else (0, 0)
                limit = -1 if max_length is None else max_length
                side = new_side(source, len(texts), ends, limit, at_spaces, places)
            missing = side.read(texts, range(first, last), encodings, numbered, True, whole, threads)
            if missing and not whole:
                encodings = backend.encode_batch([texts[b] for b in missing], add_special_tokens=template)
                side.read(texts, missing, encodings, numbered, False, True, threads)
            if first < last:
                source.needs_offsets = sum(map(len, map(texts.__getitem__, missing))) > _WORTH_ASKING * size
            del encodings  # not beside those of the next texts: they are large
            first, last = last, min(last + _CHUNK, len(texts))
    length = side.length()
    if len(texts) * length > INT32_MAX:
        raise ValueError(
            f"texts: expected at most {INT32_MAX} tokens of {name}, got {len(texts)} x {length}"
        )
    input_ids, attention_mask = (_empty(len(texts), length) for _ in range(2))
    side.write(length, source.info.pad_id or 0, input_ids.data_ptr(), attention_mask.data_ptr())
    return side, Tokens(input_ids, attention_mask)


def _align_boundary(
    texts: list[str],
    sources: tuple[Known, Known],
    limits: Lengths,
    table: RemapTable | None,
    matched: MatchedVocab | None,
    by_word: bool = False,
) -> Aligned:
    left_side, left = locate(texts, sources[0], "teacher", limits[0], by_word)
    right_side, right = locate(texts, sources[1], "student", limits[1], by_word)
    lengths = left.input_ids.shape[1], right.input_ids.shape[1]
    threads = thread_count(left.input_ids.numel() + right.input_ids.numel())
    pairs = _pairs(_native_module().align_sides(left_side, right_side, *lengths, threads), len(texts), *lengths)
    spans = pairs.teacher_start, pairs.teacher_end
    counted = left_side.bytes(texts, *(span.data_ptr() for span in spans), len(pairs), lengths[0])
    return left, right, pairs, counted


def _pairs(spans: bytearray, batch: int, teacher_length: int, student_length: int) -> SpanPairs:
    values = torch.frombuffer(spans, dtype=torch.int32) if spans else torch.empty(0, dtype=torch.int32)
    count = values.numel() // 4
    return SpanPairs._trusted(
        values.view(4, count).unbind(), count, batch * student_length, batch * teacher_length
    )


def _align_match(
    texts: list[str],
    sources: tuple[Known, Known],
    limits: Lengths,
    table: RemapTable | None,
    matched: MatchedVocab | None,
) -> Aligned:
    left = read_side(texts, sources[0], "teacher", limits[0])
    right = read_side(texts, sources[1], "student", limits[1])
    assert matched is not None
    pairs = match_pairs(left.input_ids, right.input_ids, matched, left.attention_mask, right.attention_mask)
    return left, right, pairs, None


def remapped(
    table: RemapTable, ids: Tensor, mask: Tensor, limit: int | None, sources: tuple[Known, Known]
) -> RemapOutput:
    """The teacher's rows as the student reads them, at most ``limit`` tokens long: of those that are too long, without
    the last tokens of the teacher or, as the student's tokenizer says, without the first ones of the text.

    Args:
        ids, mask: int64 ``[B, L_t]`` on the CPU.
        sources: teacher and student.
    """
    teacher, student = sources[0].info.backend, sources[1].info
    if limit is not None and student.keeps_last:
        lead, _ = template_ends(teacher, [])
        sizes = table.indptr.long().diff()[ids] * mask
        room = limit - sizes[:, :lead].sum(1, keepdim=True)
        fits = sizes.flip(1).cumsum(1).flip(1) <= room
        fits[:, :lead] = True
        mask = mask * fits
    return table.remap(ids, mask, limit)


def _align_reduce(
    texts: list[str],
    sources: tuple[Known, Known],
    limits: Lengths,
    table: RemapTable | None,
    matched: MatchedVocab | None,
) -> Aligned:
    left = read_side(texts, sources[0], "teacher", limits[0])
    assert table is not None
    out = remapped(table, left.input_ids, left.attention_mask, limits[1], sources)
    return left, Tokens(out.input_ids, out.attention_mask), out.pairs, None


_BY_NAME = (_align_boundary, functools.partial(_align_boundary, by_word=True), _align_match, _align_reduce)
_METHODS: dict[str, Callable[..., Aligned]] = dict(zip(METHODS, _BY_NAME, strict=True))


def check_method(method: str) -> None:
    """Raises ValueError unless ``method`` is an alignment."""
    if not isinstance(method, str) or method not in _METHODS:
        raise ValueError(f"method: expected one of {', '.join(map(repr, sorted(_METHODS)))}, got {method!r}")


def check_lengths(max_length: int | Sequence[int | None] | None) -> Lengths:
    """The lengths of teacher and student that ``max_length`` asks for.

    Raises:
        TypeError: neither an integer nor None, nor two of these.
        ValueError: not two, or a length below 1.
    """
    both = max_length if isinstance(max_length, (tuple, list)) else (max_length, max_length)
    if len(both) != 2:
        raise ValueError(f"max_length: expected one length or those of teacher and student, got {len(both)} of them")
    limits: list[int | None] = []
    for length in both:
        if length is not None:
            length = integer(length, "max_length")
            if length < 1:
                raise ValueError(f"max_length: expected at least 1, got {length}")
        # No batch has room for longer sequences, so a greater limit means the same.
        limits.append(None if length is None else min(length, INT32_MAX))
    return limits[0], limits[1]


def check_ready(table: RemapTable | None, matched: MatchedVocab | None) -> None:
    """Raises TypeError unless what an alignment is given, to not make it again, is that."""
    if table is not None:
        check_kind(table, "table", RemapTable)
    if matched is not None:
        check_kind(matched, "matched", MatchedVocab)


def ready(
    method: str, teacher: Any, student: Any, table: RemapTable | None, matched: MatchedVocab | None
) -> tuple[RemapTable | None, MatchedVocab | None]:
    """The table and the matched vocabulary, with the one that ``method`` needs made if it was not given."""
    if method == "reduce" and table is None:
        table = RemapTable.from_tokenizers(teacher, student)
    if method == "match" and matched is None:
        matched = MatchedVocab.from_tokenizers(teacher, student)
    return table, matched


def check_text(text: object, name: str) -> None:
    """Raises unless ``text`` is a string that UTF-8 can hold."""
    if not isinstance(text, str):
        raise TypeError(f"{name}: expected a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected text that UTF-8 can hold, got {error.reason}") from None


def is_split(text: object) -> bool:
    """Whether a text is given as its words."""
    return isinstance(text, (list, tuple)) and all(isinstance(word, str) for word in text)


def joined(text: Any) -> Any:
    """The words of a text with spaces between them; anything else as it is."""
    return " ".join(text) if is_split(text) else text


def align_texts(
    texts: Sequence[str | Sequence[str]],
    teacher: Any,
    student: Any,
    method: str,
    max_length: int | Sequence[int | None] | None,
    table: RemapTable | None,
    matched: MatchedVocab | None,
    sources: tuple[Known, Known] | None = None,
) -> Aligned:
    """:func:`align` without its coverage; ``sources``: both tokenizers as they are known, if they were looked up."""
    check_method(method)
    limits = check_lengths(max_length)
    check_ready(table, matched)
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
        raise TypeError(f"texts: expected a list of strings, got {type(texts).__name__}")
    whole = list(texts)
    if _native_module().align_bad_text(whole) >= 0:
        whole = list(map(joined, whole))
        if (bad := _native_module().align_bad_text(whole)) >= 0:
            check_text(whole[bad], f"texts[{bad}]")
    sources = sources or (known(teacher, "teacher"), known(student, "student"))
    return _METHODS[method](whole, sources, limits, *ready(method, teacher, student, table, matched))


