"""The remap table: every teacher token as the student tokens that spell it."""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.dispatch import implementation, resolve
from ..core.files import whole_file
from ..core.native import module as _native_module
from ..core.values import INT32_MAX, check_dense, check_int32, int_array, int_vector, integer, kept
from .families import TokenizerInfo, pairs_by_role
from .spans import SpanPairs
from .surfaces import BYTES, Known, Speller, Words, ends_word, known, word_form

__all__ = ["RemapOutput", "RemapTable"]

_MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64)
_ABSENT = (0, 8, 0)
# Tokens that one more thread must have to be worth waking.
_TOKENS_PER_THREAD = 16384

_UNUSED = re.compile(r"\[unused[0-9]+\]")

_MAGIC = b"VDREMAP\0"
_VERSION = 1
# Little-endian: magic, version, reserved, V_t, V_s, nnz, unk_id, pad_id.
_HEADER = struct.Struct("<8sIIqqqqq")


def thread_count(tokens: int) -> int:
    return max(1, min(torch.get_num_threads(), tokens // _TOKENS_PER_THREAD))


@dataclass(frozen=True)
class RemapOutput:
    """A remapped batch.

    Attributes:
        input_ids: int64 ``[B, L_s]``, padded with the student's pad id to the longest sequence (on a GPU with
            ``max_length``: to that).
        attention_mask: int64 ``[B, L_s]``, 1 for tokens and 0 for padding.
        pairs: one pair per kept teacher token (there: per teacher token), over positions ``b * L_s + i`` and
            ``b * L_t + i``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pairs: SpanPairs


def _pad_ragged(rows: Sequence[Any], name: str, bools: bool = False) -> tuple[Tensor, Tensor]:
    """Lists of integers as int64 [B, longest] and the bool mask of what they hold."""
    arrays = [int_array(row, f"{name}[{b}]", bools=bools) for b, row in enumerate(rows)]
    sizes = np.array([array.size for array in arrays], dtype=np.int64)
    ids = np.zeros((len(arrays), int(sizes.max(initial=0))), dtype=np.int64)
    mask = np.arange(ids.shape[1]) < sizes[:, None]
    if arrays:
        ids[mask] = np.concatenate(arrays)
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _view(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), tensor.element_size(), tensor.stride(0)


def _unit_columns(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] <= 1 else tensor.contiguous()


def _from_block(block: Any, dtype: torch.dtype, count: int, offset: int) -> Tensor:
    """``count`` items of a native block, ``offset`` bytes into it.

    No two of them are views of one tensor: to autograd, a change of one in place is not a change of the others.
    """
    if not count:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(block, dtype=dtype, count=count, offset=offset)


def _as_int32(value: Any, name: str) -> Tensor:
    vector = int_vector(value, name)
    check_int32(vector, name)
    return vector.to("cpu", torch.int32).contiguous()


def _spells_every_byte(side: Known) -> bool:
    surfaces = side.surfaces
    single = {text for text, kind in zip(surfaces.texts, surfaces.kinds, strict=True) if kind == BYTES}
    return all(bytes([b]) in single for b in range(256))


def _role_rows(teacher: TokenizerInfo, student: TokenizerInfo, unknown: list[int]) -> dict[int, list[int]]:
    """Rows of the tokens that are not segmented: added tokens of either side, and special tokens."""
    rows: dict[int, list[int]] = {}
    if student.added:
        ids = teacher.ids()
        rows.update({ids[token]: [i] for token, i in student.added.items() if token in ids})
    for token, i in teacher.special.items():
        rows[i] = [student.special[token]] if token in student.special else unknown
    rows.update({i: [j] for i, j in reversed(pairs_by_role(teacher, student))})
    # The row rule sends these to UNK even where the student has the same one.
    return {i: row for i, row in rows.items() if not _UNUSED.fullmatch(teacher.tokens[i] or "")}


def _wordpiece_rows(
    tokens: list[str | None], prefix: str, student: TokenizerInfo, fixed: dict[int, list[int]]
) -> Any:
    return _native_module().remap_build(
        tokens,
        student.pieces,
        prefix,
        student.prefix,
        student.max_chars,
        student.unk_id,
        fixed,
        len(student.tokens),
    )


def _spelled_rows(source: Known, target: Known, fixed: dict[int, list[int]], unknown: list[int]) -> list[list[int]]:
    """Rows of any two tokenizers that are not both WordPiece."""
    surfaces = source.surfaces
    # A byte token may be marked as special: it stands for its byte all the same.
    rows = {i: row for i, row in fixed.items() if surfaces.kinds[i] != BYTES}
    forms = {i: word_form(source, i) for i in range(len(source.info.tokens)) if i not in rows}
    if target.info.kind != "WordPiece":
        speller = Speller(target)
        for i, form in forms.items():
            row = None if form is None else speller.spell(*form, ends_word(source, i))
            rows[i] = unknown if row is None else row
        return [rows[i] for i in range(len(rows))]

    words = Words(target)
    inside = "\0"  # no word of a text begins with it
    pieces: list[str | None] = []
    spans: dict[int, tuple[int, int]] = {}
    for i, form in forms.items():
        try:
            split = [(True, None)] if form is None else words.split(form[0], form[1].decode())
        except UnicodeDecodeError:
            split = [(True, None)]
        spans[i] = len(pieces), len(pieces) + len(split)
        pieces += [text if starts or text is None else inside + text for starts, text in split]
    index = _wordpiece_rows(pieces, inside, target.info, {})
    indptr, ids = np.empty(index.rows + 1, dtype=np.int32), np.empty(index.nnz, dtype=np.int32)
    index.copy_to(indptr.ctypes.data, ids.ctypes.data)
    flat, bounds = ids.tolist(), indptr.tolist()
    for i, (first, last) in spans.items():
        row = flat[bounds[first] : bounds[last]]
        rows[i] = unknown if unknown[0] in row else row
    return [rows[i] for i in range(len(rows))]


class RemapTable:
    """Teacher id -> list of student ids, in CSR form, with a native remap of batches (arXiv 2205.02340).

    Row ``t`` is ``ids[indptr[t]:indptr[t + 1]]``. The table is immutable: changing the tensors that it shows
    does not change what ``remap`` does and ``save`` writes. It may be used from several threads at once.

    Args:
        indptr: ``[V_t + 1]`` integers, ascending from 0 to ``len(ids)``.
        ids: ``[nnz]`` student ids.
        student_vocab_size: V_s; every id is below it.
        unk_id, pad_id: the student's tokens.

    Attributes:
        indptr: int32 ``[V_t + 1]``.
        ids: int32 ``[nnz]``.

    Raises:
        TypeError: values that are not integers.
        ValueError: rows that do not ascend, ids out of range.
    """

    def __init__(self, indptr: Any, ids: Any, *, student_vocab_size: int, unk_id: int, pad_id: int) -> None:
        indptr, ids = _as_int32(indptr, "indptr"), _as_int32(ids, "ids")
        student_vocab_size = integer(student_vocab_size, "student_vocab_size")
        unk_id, pad_id = integer(unk_id, "unk_id"), integer(pad_id, "pad_id")
        if not 0 < student_vocab_size <= INT32_MAX:
            raise ValueError(f"student_vocab_size: expected a number from 1 to {INT32_MAX}, got {student_vocab_size}")
        index = _native_module().remap_from_csr(
            indptr.data_ptr(), indptr.numel(), ids.data_ptr(), ids.numel(), student_vocab_size
        )
        self._setup(index, student_vocab_size, unk_id, pad_id)

    def _setup(self, index: Any, student_vocab_size: int, unk_id: int, pad_id: int) -> None:
        for name, value in (("unk_id", unk_id), ("pad_id", pad_id)):
            if not 0 <= value < student_vocab_size:
                raise ValueError(f"{name}: expected a student id in [0, {student_vocab_size}), got {value}")
        self._index = index
        self.student_vocab_size = int(student_vocab_size)
        self.unk_id = int(unk_id)
        self.pad_id = int(pad_id)
        self.indptr, self.ids = self._vectors()
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_tokenizers(cls, teacher: Any, student: Any) -> RemapTable:
        """The student's tokenization of every teacher token's own text, at the start of a word or inside one.

        Nothing is normalized: a row spells its token exactly, white space aside where the student drops it,
        or it is UNK alone. Special tokens map to the student's token of the same role, else to its special
        token of the same string, else to UNK. A string that is an added token of the student maps to it.
        Holes in the teacher's vocabulary map to UNK.

        WordPiece to WordPiece (arXiv 2205.02340):

        - Greedy longest match from the left, by characters.
        - A teacher token with the continuation prefix (``##``) is matched as a continuation from its first
          piece on.
        - A string with a character that cannot be covered, a string longer than the student's
          ``max_input_chars_per_word`` and ``[unusedN]`` map to UNK alone.

        Any other pair (byte-level BPE, SentencePiece BPE and Unigram, with and without byte fallback): the
        student's model on the bytes that the token stands for, the mark of a word's start (a space in the
        byte alphabet, ``▁``, no ``##``) in the student's spelling. Bytes that are no whole character
        become byte tokens where the student has them. A WordPiece student reads the words of its own
        pre-tokenizer, and white space alone is an empty row.

        Args:
            teacher, student: ``transformers`` fast tokenizers or ``tokenizers.Tokenizer``, or names of models or
                folders that have one. A student without a padding token is padded with id 0, which its attention
                mask hides; where it has no unknown token, its padding or else its end-of-text token stands in. Where
                it has none of these and spells every byte, rows that would be UNK are empty, and ``unk_id`` is the
                padding.

        Raises:
            TypeError: not a fast tokenizer.
            VocabdistilError: no such tokenizer.
            ValueError: a student without an unknown token, one to stand in, or all bytes.
        """
        source, target = known(teacher, "teacher"), known(student, "student")
        info = target.info
        unk_id = info.unk_id
        if unk_id is None and info.kind != "WordPiece":
            unk_id = next(
                (info.roles[role] for role in ("pad", "eos", "sep", "bos") if role in info.roles), None
            )
        unknown = [] if unk_id is None else [unk_id]
        if unk_id is None:
            if info.kind == "WordPiece" or not _spells_every_byte(target):
                raise ValueError(
                    "student: expected a tokenizer with an unknown token, or one that spells every byte, got neither "
                    "in its vocabulary"
                )
            unk_id = 0
        fixed = _role_rows(source.info, info, unknown)
        numbers = len(info.tokens), unk_id, info.pad_id or 0
        self = cls.__new__(cls)
        if source.info.kind == "WordPiece" and info.kind == "WordPiece":
            self._setup(_wordpiece_rows(source.info.tokens, source.info.prefix, info, fixed), *numbers)
            return self
        rows = _spelled_rows(source, target, fixed, unknown)
        indptr = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum([len(row) for row in rows], out=indptr[1:])
        ids = np.fromiter((i for row in rows for i in row), dtype=np.int32)
        self._setup(
            _native_module().remap_from_csr(
                indptr.ctypes.data, len(indptr), ids.ctypes.data, len(ids), len(info.tokens)
            ),
            *numbers,
        )
        return self

    def __len__(self) -> int:
        return self.indptr.numel() - 1

    def __repr__(self) -> str:
        return (
            f"RemapTable({len(self)} teacher tokens -> {self.student_vocab_size} student tokens, "
            f"{self.pieces_per_token:.2f} pieces per token)"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RemapTable):
            return NotImplemented
        return self._numbers() == other._numbers() and (
            torch.equal(self.indptr, other.indptr) and torch.equal(self.ids, other.ids)
        )

    __hash__ = None  # type: ignore[assignment]

    def _numbers(self) -> tuple[int, int, int]:
        return self.student_vocab_size, self.unk_id, self.pad_id

    def __reduce__(self) -> tuple:
        indptr, ids = self._vectors()
        return _restore, (indptr.numpy(), ids.numpy(), *self._numbers())

    def projection_weights(self, decay: float = 0.0) -> Tensor:
        """float64 ``[nnz]``: the ``entry_weights`` with which :func:`vocabdistil.remapped_kl` with
        ``combine="logsumexp"`` projects the student's probabilities to the teacher's tokens.

        Piece k of a row counts ``decay ** k``: with 0, the default, the first alone, which is what the student predicts
        where both begin a token. The weights of each student token are divided by their sum, so that its probability is
        shared out among the teacher's tokens that it is a piece of. That of a token whose weights are all 0, which is
        nowhere the first piece, counts nowhere: the loss does not tell whether the student expects such tokens.

        Raises:
            ValueError: ``decay`` outside [0, 1].
        """
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay <= 1:
            raise ValueError(f"decay: expected a number from 0 to 1, got {decay!r}")
        indptr, ids = (x.to(torch.int64) for x in self._vectors())
        begin = torch.repeat_interleave(indptr[:-1], indptr.diff())
        weights = float(decay) ** (torch.arange(ids.numel()) - begin).double()
        sums = weights.new_zeros(self.student_vocab_size).index_add_(0, ids, weights)[ids]
        return torch.where(sums > 0, weights / sums, 0.0)

    def rows(self, teacher_id: int) -> list[int]:
        """The student ids of one teacher token.

        Raises:
            TypeError: not an integer.
            ValueError: an id outside the table.
        """
        teacher_id = integer(teacher_id, "teacher_id")
        if not 0 <= teacher_id < len(self):
            raise ValueError(f"teacher_id: expected an id in [0, {len(self)}), got {teacher_id}")
        return self.ids[int(self.indptr[teacher_id]) : int(self.indptr[teacher_id + 1])].tolist()

    @property
    def pieces_per_token(self) -> float:
        """Mean number of student tokens per row, every teacher token counted once."""
        return self.ids.numel() / max(len(self), 1)

    @property
    def max_pieces(self) -> int:
        """The longest row."""
        return int(self.indptr.diff().max()) if len(self) else 0

    @property
    def unk_share(self) -> float:
        """Share of the rows that are UNK alone, holes and unused tokens included."""
        single = self.indptr.diff() == 1
        first = self.ids[self.indptr[:-1][single].long()]
        return int((first == self.unk_id).sum()) / max(len(self), 1)

    def remap(
        self,
        teacher_ids: Tensor | np.ndarray | Sequence[Sequence[int]],
        attention_mask: Tensor | np.ndarray | Sequence[Sequence[int]] | None = None,
        max_length: int | None = None,
        backend: str | None = None,
    ) -> RemapOutput:
        """Replaces every teacher token by its row.

        On a GPU the work is done there. Without ``max_length`` the host waits once, for the sizes of the
        result, which is the same as on a CPU. With it the host never waits, so that the result can be part of
        a CUDA graph, and the sizes are fixed: ``L_s`` is ``max_length``; there is one pair per teacher token,
        both its spans empty if the token was left out or cut off, which the losses pass over; and
        ``pairs.num_nonempty`` is a tensor. The table is copied to a GPU the first time.

        Args:
            teacher_ids: ``[B, L_t]`` int64 or int32 on any device, a numpy array of integers, or a list of lists (L_t:
                the longest).
                An id outside the table is an error; on a GPU with ``max_length``, where nobody waits to see
                it, it is the student's unknown token.
            attention_mask: ``[B, L_t]`` bool or integer; tokens with 0 are left out, wherever they stand, and
                their ids are not looked at.
            max_length: student tokens at most. A teacher token is never cut: the first one whose pieces do
                not fit ends its sequence.
            backend: ``"cpu"``, ``"cuda"``, ``"triton"``, ``"torch"`` or ``"reference"`` (both plain PyTorch); None
                chooses by device. All but ``"cpu"`` give what is said of a GPU.

        Returns:
            ``input_ids`` and ``attention_mask``, int64 ``[B, L_s]``, and one span pair per kept teacher
            token, all on the device of ``teacher_ids``.

        Raises:
            TypeError: ids or mask of a wrong dtype.
            ValueError: wrong shapes or devices, an id outside the table, ``max_length < 1``, a batch whose
                positions do not fit 32 bits, a backend that has no remap for the device.
            RuntimeError: a backend that cannot run here.
        """
        if max_length is not None:
            max_length = integer(max_length, "max_length")
            if max_length < 1:
                raise ValueError(f"max_length: expected at least 1, got {max_length}")
        ids, mask = _checked_batch(teacher_ids, attention_mask, "teacher_ids", "attention_mask")
        if ids.numel() > INT32_MAX:
            raise ValueError(f"teacher_ids: expected at most {INT32_MAX} tokens, got {tuple(ids.shape)}")
        # What the environment asks of the losses on a GPU is not meant for the batches that a CPU prepares.
        choice = "cpu" if ids.device.type == "cpu" and backend is None else resolve("remap", ids.device, backend)
        if choice == "cpu":
            return self._remap_natively(ids, mask, max_length)
        measure, remap = (implementation("remap", choice, name) for name in ("measure", "remap"))
        indptr, pieces = self._on(ids.device)
        source = ids, mask, indptr
        table = *source, pieces, self.unk_id, self.pad_id
        if max_length is not None:
            self._check_room(ids.shape[0], max_length)
            input_ids, out_mask, spans, nonempty = remap(*table, max_length)
            tokens = ids.shape[0] * max_length, ids.numel()
            return RemapOutput(input_ids, out_mask, SpanPairs._trusted(spans.unbind(), nonempty, *tokens))
        totals, measured = measure(*source)
        width, count, nonempty, outside = totals.tolist()
        if outside:
            b = int((((ids < 0) | (ids >= len(self))) & (mask is None or mask.ne(0))).any(1).nonzero()[0])
            self._raise_outside(ids, mask, b)
        self._check_room(ids.shape[0], width)
        input_ids, out_mask, spans, _ = remap(*table, width, measured, count)
        tokens = ids.shape[0] * width, ids.numel()
        return RemapOutput(input_ids, out_mask, SpanPairs._trusted(spans.unbind(), nonempty, *tokens))

    def _check_room(self, batch: int, width: int) -> None:
        if batch * width > INT32_MAX:
            raise ValueError(
                f"teacher_ids: expected at most {INT32_MAX} student tokens, got {batch} x {width}"
            )

    def _raise_outside(self, ids: Tensor, mask: Tensor | None, b: int) -> None:
        outside = (ids[b] < 0) | (ids[b] >= len(self))
        if mask is not None:
            outside &= mask[b] != 0
        at = int(outside.nonzero()[0])
        raise ValueError(
            f"teacher_ids: expected ids in [0, {len(self)}), got {int(ids[b, at])} at [{b}, {at}]"
        )

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``indptr`` and ``ids`` on a device, copied there once."""
        found = self._copies.get(device)
        if found is None:
            indptr, ids = self._vectors()
            found = self._copies[device] = indptr.to(device), ids.to(device)
        return found

    def _vectors(self) -> tuple[Tensor, Tensor]:
        """New ``indptr`` and ``ids``: those that the table shows, anybody can change."""
        indptr = kept(torch.empty(self._index.rows + 1, dtype=torch.int32))
        ids = kept(torch.empty(self._index.nnz, dtype=torch.int32))
        self._index.copy_to(indptr.data_ptr(), ids.data_ptr())
        return indptr, ids

    def _remap_natively(self, ids: Tensor, mask: Tensor | None, max_length: int | None) -> RemapOutput:
        batch, length = ids.shape
        threads = thread_count(batch * length)
        ids_view, mask_view = _view(ids), _ABSENT if mask is None else _view(mask)
        limit = -1 if max_length is None else min(max_length, INT32_MAX)
        bad_row, width, count, nonempty, block = _native_module().remap_run(
            self._index, ids_view, mask_view, batch, length, limit, self.pad_id, threads
        )
        if bad_row >= 0:
            self._raise_outside(ids, mask, bad_row)
        self._check_room(batch, width)
        tokens = batch * width
        input_ids, out_mask = (
            _from_block(block, torch.int64, tokens, 8 * k * tokens).view(batch, width) for k in range(2)
        )
        spans = (_from_block(block, torch.int32, count, 16 * tokens + 4 * k * count) for k in range(4))
        pairs = SpanPairs._trusted(spans, nonempty, tokens, batch * length)
        return RemapOutput(input_ids, out_mask, pairs)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table to a file, whole or not at all.

        Little-endian: 8 bytes ``VDREMAP\\0``, uint32 version (1), uint32 0, int64 V_t, V_s, nnz, unk_id,
        pad_id, int32 ``indptr`` [V_t + 1], int32 ``ids`` [nnz], uint32 CRC-32 of everything before it.
        """
        indptr, ids = self._vectors()
        sizes = indptr.numel() - 1, self.student_vocab_size, ids.numel()
        header = _HEADER.pack(_MAGIC, _VERSION, 0, *sizes, self.unk_id, self.pad_id)
        body = b"".join([header, *(side.numpy().astype("<i4").tobytes() for side in (indptr, ids))])
        with whole_file(path) as file:
            file.write(body)
            file.write(struct.pack("<I", zlib.crc32(body)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RemapTable:
        """Reads a file written by ``save``.

        Raises:
            OSError: the file cannot be read.
            ValueError: not such a file, another version, cut short or changed, or rows that do not fit.
        """
        data = Path(path).read_bytes()
        if data[: len(_MAGIC)] != _MAGIC:
            raise ValueError(f"{path}: expected a remap table, got a file that starts with {data[:8]!r}")
        if len(data) < _HEADER.size:
            raise ValueError(f"{path}: expected at least {_HEADER.size} bytes, got {len(data)}")
        _, version, _, rows, student_size, nnz, unk_id, pad_id = _HEADER.unpack_from(data)
        if version != _VERSION:
            raise ValueError(f"{path}: expected version {_VERSION}, got {version}")
        size = _HEADER.size + 4 * (rows + 1) + 4 * nnz + 4
        if rows < 0 or nnz < 0 or len(data) != size:
            raise ValueError(f"{path}: expected {size} bytes for {rows} rows and {nnz} ids, got {len(data)}")
        (checksum,) = struct.unpack_from("<I", data, size - 4)
        actual = zlib.crc32(memoryview(data)[:-4])
        if checksum != actual:
            raise ValueError(f"{path}: expected checksum {checksum:08x}, got {actual:08x}: file damaged")
        values = np.frombuffer(data, "<i4", rows + 1 + nnz, _HEADER.size).astype(np.int32)
        try:
            return _restore(values[: rows + 1], values[rows + 1 :], student_size, unk_id, pad_id)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _restore(indptr: np.ndarray, ids: np.ndarray, student_size: int, unk_id: int, pad_id: int) -> RemapTable:
    return RemapTable(
        torch.from_numpy(indptr),
        torch.from_numpy(ids),
        student_vocab_size=student_size,
        unk_id=unk_id,
        pad_id=pad_id,
    )


def _checked_batch(
    ids: Tensor | np.ndarray | Sequence[Sequence[int]],
    mask: Tensor | np.ndarray | Sequence[Sequence[int]] | None,
    ids_name: str,
    mask_name: str,
) -> tuple[Tensor, Tensor | None]:
    """Ids and mask as tensors ``[B, L]`` with adjacent columns, where they are."""
    if isinstance(mask, np.ndarray):
        mask = torch.tensor(int_array(mask, mask_name, dims=2, bools=True))
    if isinstance(mask, Tensor):
        check_dense(mask, mask_name)
    if isinstance(ids, (list, tuple)):
        ids, present = _pad_ragged(ids, ids_name)
        if isinstance(mask, (list, tuple)):
            mask, mask_present = _pad_ragged(mask, mask_name, bools=True)
            if not torch.equal(present, mask_present):
                raise ValueError(f"{mask_name}: expected one value per id, got lists of other lengths")
        if mask is None:
            mask = None if bool(present.all()) else present
        elif isinstance(mask, Tensor) and mask.shape == present.shape and mask.dtype in _MASK_DTYPES:
            mask = mask.ne(0) & present.to(mask.device)
    elif isinstance(ids, np.ndarray):
        ids = torch.tensor(int_array(ids, ids_name, dims=2))
    elif not isinstance(ids, Tensor):
        raise TypeError(f"{ids_name}: expected a tensor or a list of lists, got {type(ids).__name__}")
    check_dense(ids, ids_name)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{ids_name}: expected int64 or int32, got {ids.dtype}")
    if ids.dim() != 2:
        raise ValueError(f"{ids_name}: expected shape [batch, length], got {tuple(ids.shape)}")
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"{mask_name}: expected a tensor like {ids_name}, got {type(mask).__name__}")
        if mask.dtype not in _MASK_DTYPES:
            raise TypeError(f"{mask_name}: expected bool or integers, got {mask.dtype}")
        if mask.shape != ids.shape:
            raise ValueError(f"{mask_name}: expected shape {tuple(ids.shape)}, got {tuple(mask.shape)}")
        if mask.device != ids.device:
            raise ValueError(f"{mask_name}: expected device {ids.device}, got {mask.device}")
        mask = _unit_columns(mask)
    return _unit_columns(ids), mask
