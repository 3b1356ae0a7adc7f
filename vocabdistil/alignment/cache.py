"""Tokenized and aligned texts on disk: written shard by shard, read by memory map.

A folder holds ``manifest.json`` and ``shard-00000.arrow``, ... Each shard is an Arrow stream of one record batch with
the list<int32> columns ``teacher_ids student_ids teacher_start teacher_end student_start student_end``: the tokens of a
text, special tokens included, and its span pairs as positions inside the text. All shards but the last have the same
number of rows. The manifest names what the rows were made with, and for each shard its size, its checksum and a digest
of its texts; a shard is named there only after it is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..core.errors import VocabdistilError
from ..core.progress import counting
from ..core.shards import (
    MANIFEST,
    RECORD,
    TEXT,
    Fields,
    digest,
    is_count,
    locked,
    prepare,
    pyarrow,
    read_manifest,
    read_shard,
    remove_left_overs,
    verify_shard,
    write_manifest,
    write_shard,
)
from ..core.values import INT32_MAX
from .collator import SPANS, Rows, one_thread_in_workers, text_of
from .families import plain_settings
from .loading import tokenizer_of
from .methods import METHODS, align_texts, check_lengths, check_method, check_ready, check_text, joined, ready
from .remap import RemapTable
from .surfaces import known
from .vocab import MatchedVocab

__all__ = ["AlignedDataset", "cache_aligned", "tokenizer_digest"]

# To be raised when files or alignments change.
_FORMAT = 1
_COLUMNS = ("teacher_ids", "student_ids", *SPANS)
# Texts that are aligned at once.
_CHUNK = 512
_WHAT = "a cache of aligned texts"


def tokenizer_digest(tokenizer: Any, name: str) -> str:
    """Changes with everything that changes what a tokenizer makes of a text."""
    info = known(tokenizer, name).info
    with plain_settings(info.backend):
        try:
            state = info.backend.to_str()
        except Exception as error:
            raise ValueError(f"{name}: expected a tokenizer that can be saved, got one that cannot: {error}") from None
    return digest(state.encode(), json.dumps(info.roles, sort_keys=True).encode())


def _tensors_digest(*tensors: torch.Tensor) -> str:
    return digest(*(tensor.cpu().contiguous().numpy().tobytes() for tensor in tensors))


class _Shards(Dataset):
    """Item ``(k, texts)``: writes shard ``k`` and gives its record for the manifest."""

    def __init__(self, folder: Path, arguments: tuple) -> None:
        self.folder, self.arguments = folder, arguments

    def __getitem__(self, item: tuple[int, list[str]]) -> dict[str, Any]:
        k, texts = item
        one_thread_in_workers()
        pa = pyarrow(_WHAT)
        chunks = []
        for start in range(0, len(texts), _CHUNK):
            teacher, student, pairs, _ = align_texts(texts[start : start + _CHUNK], *self.arguments)
            chunks.append(Rows.of(teacher, student, pairs))

        def joined(name: str) -> np.ndarray:
            return np.concatenate([getattr(chunk, name) for chunk in chunks], axis=-1)

        columns = [_lists(pa, joined(f"{side}_ids"), joined(f"{side}_lengths")) for side in ("teacher", "student")]
        columns += [_lists(pa, span, joined("pair_counts")) for span in joined("spans")]
        batch = pa.record_batch(columns, names=list(_COLUMNS))
        record = write_shard(self.folder / _shard_name(k), batch)
        return {**record, "texts": digest(*(text.encode() for text in texts))}


def _lists(pa: Any, values: np.ndarray, lengths: np.ndarray) -> Any:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if offsets[-1] > INT32_MAX:
        raise ValueError(f"shard_size: expected at most {INT32_MAX} tokens in a shard, got {offsets[-1]}")
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


def _texts(source: Any, column: str) -> Iterator[str]:
    # Other columns of a data set need not be decoded.
    if hasattr(source, "select_columns"):
        names = getattr(source, "column_names", None)
        source = source.select_columns([column]) if names is None or column in names else source
    for i, feature in enumerate(source):
        text = joined(text_of(feature, column, f"texts[{i}]"))
        check_text(text, f"texts[{i}]")
        yield text


def _shards(texts: Iterator[str], size: int, first: int) -> Iterator[tuple[int, list[str]]]:
    """The numbers and the texts of the shards from ``first`` on."""
    for k in count(first):
        if not (batch := list(islice(texts, size))):
            return
        yield k, batch


def cache_aligned(
    texts: Iterable[Any],
    teacher: Any,
    student: Any,
    folder: str | os.PathLike[str],
    *,
    method: str = "boundary",
    max_length: int | Sequence[int | None] | None = None,
    text_column: str = "text",
    shard_size: int = 16384,
    num_proc: int = 0,
    table: RemapTable | None = None,
    matched: MatchedVocab | None = None,
    quiet: bool = False,
) -> AlignedDataset:
    """Tokenizes and aligns texts once, into a folder that training reads again and again.

    It can be stopped at any time, killed too: the same call continues after the last whole shard. On a folder that is
    finished it only checks that it holds what was asked for, which reads texts and shards once;
    :class:`AlignedDataset` opens it without texts. Processes that call it for one folder at the same time wait for the
    first.

    Args:
        texts: strings, lists of words, or mappings with either in ``text_column``: a list, a data set of ``datasets``
            (streamed or not), any iterable that gives the same texts in the same order every time. It is read once, in
            order, a few shards ahead at most.
        teacher, student: ``transformers`` fast tokenizers or ``tokenizers.Tokenizer``, or names of models or folders
            that have one.
        folder: where to write; made if it is not there.
        method, max_length: as in :func:`align`.
        text_column: the key of the text in mappings.
        shard_size: texts in a shard: what is lost when it is stopped, and held in memory by each process.
        num_proc: processes that tokenize and align; 0: this one.
        table, matched: the remap table and the matched vocabulary, if there are some already.
        quiet: show no progress.

    Returns:
        The data set: item ``i`` is text ``i``, for :class:`AlignmentCollator` to make batches of.

    Raises:
        ImportError: ``pyarrow`` is missing.
        TypeError, ValueError: texts, tokenizers or settings that cannot work.
        VocabdistilError: the folder was made with other settings, tokenizers or texts, or is damaged, or is not one
            of these.

    Example::

        rows = vd.cache_aligned(corpus, teacher_tokenizer, student_tokenizer, "aligned", max_length=128, num_proc=8)
        collator = vd.AlignmentCollator(teacher_tokenizer, student_tokenizer)
        loader = DataLoader(rows, batch_size=32, shuffle=True, collate_fn=collator)
    """
    pyarrow(_WHAT)
    check_method(method)
    limits = check_lengths(max_length)
    check_ready(table, matched)
    teacher, student = tokenizer_of(teacher, "teacher"), tokenizer_of(student, "student")
    for name, value, least in (("shard_size", shard_size, 1), ("num_proc", num_proc, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if isinstance(texts, (str, bytes, Mapping)) or not isinstance(texts, Iterable):
        raise TypeError(f"texts: expected strings or mappings with {text_column!r}, got {type(texts).__name__}")
    settings = {
        "format": _FORMAT,
        "method": method,
        "max_length": list(limits),
        "shard_size": shard_size,
        "teacher": tokenizer_digest(teacher, "teacher"),
        "student": tokenizer_digest(student, "student"),
        "table": None if table is None else _tensors_digest(table.indptr, table.ids),
        "matched": None if matched is None else _tensors_digest(matched.teacher_ids, matched.student_ids),
    }
    table, matched = ready(method, teacher, student, table, matched)
    folder = Path(folder)
    prepare(folder, "folder")
    arguments = teacher, student, method, limits, table, matched
    total = len(texts) if isinstance(texts, Sized) else None
    with locked(folder, quiet), counting("Aligning texts", total, quiet) as advance:
        _fill(folder, settings, _texts(texts, text_column), arguments, num_proc, advance)
    return AlignedDataset(folder, verify=False)


def _fill(
    folder: Path, settings: dict[str, Any], texts: Iterator[str], arguments: tuple, num_proc: int, advance: Any
) -> None:
    """Writes what is not there yet, and checks what is."""
    remove_left_overs(folder, "shard-")
    manifest = {**settings, "complete": False, "shards": []}
    if (folder / MANIFEST).exists():
        manifest = _read_manifest(folder)
        for name, value in settings.items():
            if manifest.get(name) != value:
                what = f"{name}'s tokenizer" if name in ("teacher", "student") else name
                readable = name in ("method", "max_length", "shard_size")
                values = f" ({manifest.get(name)}, now {value})" if readable else ""
                raise VocabdistilError(
                    f"folder: {folder} was made with another {what}{values}; take another folder or remove it"
                )
    shards, first = manifest["shards"], 0
    for k, record in enumerate(shards):
        batch = list(islice(texts, record["rows"]))
        if digest(*(text.encode() for text in batch)) != record["texts"]:
            raise VocabdistilError(
                f"folder: {folder} was made of other texts: they differ among the texts {first} to "
                f"{first + record['rows'] - 1}; take another folder or remove it"
            )
        verify_shard(folder / _shard_name(k), "folder", record)
        first += record["rows"]
        advance(record["rows"])
    # A shorter shard was the last one, even if the job was stopped before it noted that.
    ended = manifest["complete"] or (shards and shards[-1]["rows"] < settings["shard_size"])
    if ended and next(texts, None) is not None:
        raise VocabdistilError(
            f"folder: {folder} was made of the first {first} of these texts; take another folder or remove it"
        )
    if manifest["complete"]:
        return
    write_manifest(folder, manifest)
    # Items are asked for with their texts, so that one process reads these, and come back in order.
    order: Any = _shards(texts, settings["shard_size"], len(shards))
    for record in DataLoader(_Shards(folder, arguments), sampler=order, batch_size=None, num_workers=num_proc):
        shards.append(record)
        write_manifest(folder, manifest)
        advance(record["rows"])
    manifest["complete"] = True
    write_manifest(folder, manifest)


def _shard_name(k: int) -> str:
    return f"shard-{k:05d}.arrow"


_FIELDS: Fields = {
    "method": (" or ".join(map(repr, METHODS)), lambda value: isinstance(value, str) and value in METHODS),
    "max_length": (
        "two numbers of at least 1, or null",
        lambda value: isinstance(value, list) and len(value) == 2 and all(x is None or is_count(x, 1) for x in value),
    ),
    "shard_size": ("a number of at least 1", lambda value: is_count(value, 1)),
    "teacher": TEXT,
    "student": TEXT,
    "table": ("a string or null", lambda value: value is None or isinstance(value, str)),
    "matched": ("a string or null", lambda value: value is None or isinstance(value, str)),
    "complete": ("true or false", lambda value: isinstance(value, bool)),
}


def _read_manifest(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder, "folder", "aligned texts", _FORMAT, _FIELDS, {**RECORD, "texts": TEXT})
    records, size = manifest["shards"], manifest["shard_size"]
    for k, record in enumerate(records):
        # A row is found by its number and the size of a shard; the last shard may be shorter.
        if record["rows"] > size or (record["rows"] < size and k < len(records) - 1):
            raise VocabdistilError(
                f"folder: {folder / MANIFEST} is damaged: shards[{k}]: rows: expected {size}, as shard_size, "
                f"got {record['rows']}"
            )
    return manifest


class AlignedDataset(Dataset):
    """What :func:`cache_aligned` wrote, opened by memory map: for a ``DataLoader`` or a ``Trainer``.

    Args:
        folder: a finished one.
        verify: read every shard once to compare its checksum; else only sizes are compared.

    Item ``i`` is a ``dict`` of int32 vectors (read-only numpy arrays): ``teacher_ids``, ``student_ids``, and of its P
    span pairs ``teacher_start``, ``teacher_end``, ``student_start``, ``student_end`` ``[P]``, positions inside the
    text. Reading one takes the same time wherever it lies. The data set is small to pickle: workers open the files
    again.

    Attributes:
        folder: the folder.
        method, max_length: what the rows were made with; ``max_length`` of (teacher, student).

    Raises:
        ImportError: ``pyarrow`` is missing.
        VocabdistilError: no such folder, one that is not finished, or a damaged one.
    """

    def __init__(self, folder: str | os.PathLike[str], verify: bool = True) -> None:
        pyarrow(_WHAT)
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder)
        self._records, self._shard_size = manifest["shards"], manifest["shard_size"]
        self.method: str = manifest["method"]
        self.max_length: tuple[int | None, int | None] = tuple(manifest["max_length"])
        if not manifest["complete"]:
            done = sum(record["rows"] for record in self._records)
            raise VocabdistilError(
                f"folder: {self.folder} is not finished ({done} texts so far); cache_aligned continues it"
            )
        for k, record in enumerate(self._records):
            verify_shard(self.folder / _shard_name(k), "folder", record, verify)
        self._length = sum(record["rows"] for record in self._records)
        self._open: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"AlignedDataset({str(self.folder)!r}, {len(self)} texts, method={self.method!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        i = int(i)
        if not -len(self) <= i < len(self):
            raise IndexError(f"expected an index from {-len(self)} to {len(self) - 1}, got {i}")
        k, row = divmod(i % len(self), self._shard_size)
        if k not in self._open:
            self._open[k] = self._read(k)
        return {
            name: values[offsets[row] : offsets[row + 1]]
            for name, (offsets, values) in zip(_COLUMNS, self._open[k], strict=True)
        }

    def _read(self, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        pa = pyarrow(_WHAT)
        kinds = dict.fromkeys(_COLUMNS, pa.list_(pa.int32()))
        columns = read_shard(self.folder / _shard_name(k), "folder", self._records[k], kinds)
        return [(column.offsets.to_numpy(), column.values.to_numpy()) for column in columns]
