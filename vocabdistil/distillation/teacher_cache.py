"""What a teacher makes of texts, on disk: computed once, for every epoch, student and run that reads the same texts.

A folder holds ``manifest.json`` and shards ``hidden-00000.arrow``, ``pooled-00001.arrow``, ...: Arrow streams of one
record batch with the columns ``digest``, 128 bits of a text's token ids, and ``states``, the float16 vectors of the
text: of each of its tokens, or one, their mean. The manifest names the teacher.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..alignment.cache import tokenizer_digest
from ..alignment.spans import check_mask, text_spans
from ..core.errors import VocabdistilError, need_place, spell
from ..core.shards import (
    MANIFEST,
    digest,
    is_count,
    locked,
    prepare,
    pyarrow,
    read_shard,
    remove_left_overs,
    verify_shard,
    write_manifest,
    write_shard,
)
from ..models.teachers import Reading, Teacher
from ..ops import span_mean
from .cache_manifest import FORMAT, KINDS, NAME, PINNED, look_at_cache, read_cache_manifest, told_of

__all__ = ["TeacherCache"]

# What a shard holds of vectors, at most, unless a single text has more: what is lost when a job is killed.
SHARD_BYTES = 64 << 20
_KEY = "S16"
# What the last hidden states do not depend on: where a model was, what wrote it, which head it is part of.
_NOT_OF_THE_BODY = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype")


class _Index:
    """Digests in order, and the shard and row of each: 24 bytes per text."""

    def __init__(self) -> None:
        self.keys, self.places = np.empty(0, dtype=_KEY), np.empty(0, dtype=np.int64)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """``[n]`` digests -> ``[n]`` int64 ``shard << 32 | row``, -1 for those that are not there."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, self.places[at], -1)

    def add(self, keys: np.ndarray, places: np.ndarray) -> None:
        """Of equal digests the first counts, and those that are there already."""
        keys, first = np.unique(keys, return_index=True)
        new = self.find(keys) < 0
        keys, places = keys[new], places[first[new]]
        at = np.searchsorted(self.keys, keys)
        self.keys, self.places = np.insert(self.keys, at, keys), np.insert(self.places, at, places)


class TeacherCache:
    """The last hidden states of a teacher, or the mean-pooled vectors of texts, remembered in a folder.

    A text is known by its attended token ids, so whatever stands beside it in a batch and however it is padded. What is
    returned is rounded to float16 the first time too: a first epoch and later ones are the same. A job that is killed
    loses the texts since its last shard. Processes may use one folder at a time; a text that several of them met first
    at the same time keeps the value of who wrote it first.

    Attributes:
        folder: where the states are.
        teacher: whose they are.
        what: ``"hidden"`` or ``"pooled"``; one folder may hold both.
        computed: texts that this object had the teacher read.
    """

    def __init__(self, folder: Path, teacher: Teacher, what: str, pinned: dict[str, Any], shard_bytes: int) -> None:
        self.folder, self.teacher, self.what, self.computed = folder, teacher, what, 0
        self._pinned, self._shard_bytes = pinned, shard_bytes
        self._records: list[dict[str, Any]] = []
        self._index = _Index()
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        # What is not in a shard yet, and its bytes.
        self._pending: dict[bytes, np.ndarray] = {}
        self._size = 0
        # Whether there is a manifest.
        self._made = False

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        teacher: Teacher,
        what: str = "hidden",
        shard_bytes: int = SHARD_BYTES,
        whitening: str = "none",
    ) -> TeacherCache:
        """Opens a folder, which is made, if it is not there, when something is to be written or a ``with`` begins.

        Args:
            folder: a cache of this teacher, an empty folder, or none yet.
            teacher: its weights are read once, to see that they are those of the folder.
            what: ``"hidden"``: the vectors of all tokens; ``"pooled"``: their mean.
            shard_bytes: bytes of vectors in a shard, and held in memory before it is written.
            whitening: on what the teacher will be whitened before it reads anything, and how far: what its weights will
                be depends on that, and in the last digits on the machine.

        Raises:
            ImportError: ``pyarrow`` is missing.
            ValueError: ``what`` or ``shard_bytes`` is something else.
            VocabdistilError: the folder holds the states of another teacher, is damaged, or is not one of these.
        """
        pyarrow(spell(NAME))
        need_place(folder, "cache_teacher", "a folder")
        if what not in KINDS:
            raise ValueError(f"what: expected one of {', '.join(map(repr, KINDS))}, got {what!r}")
        if not is_count(shard_bytes, 1):
            raise ValueError(f"shard_bytes: expected a number of at least 1, got {shard_bytes!r}")
        self = cls(Path(os.path.expanduser(folder)), teacher, what, _pinned(teacher, whitening), shard_bytes)
        if look_at_cache(self.folder):
            with told_of(self.folder):
                self._learn()
            self._made = True
        return self

    def __enter__(self) -> TeacherCache:
        self._make()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def known(self) -> int:
        """The texts that need no teacher."""
        return len(self._index.keys) + len(self._pending)

    def __repr__(self) -> str:
        return f"TeacherCache({str(self.folder)!r}, {self.known} texts, what={self.what!r})"

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Reading:
        """What the teacher makes of each text alone, the last layer only; texts that are new go through it, in one pass
        without autocast.

        Args:
            input_ids: int64 or int32 ``[B, L]`` on the teacher's device.
            attention_mask: bool or integers ``[B, L]``, 0 for padding on either side of a text.

        Returns:
            One layer in the teacher's dtype: ``[B, L, D]``, 0 at padding; of ``"pooled"`` ``[B, 1, D]``, 0 for a text
            without tokens.

        Raises:
            TypeError, ValueError: ids or a mask of a wrong dtype or shape, a mask with gaps.
            VocabdistilError: a state that is NaN or does not fit float16, a file that is damaged, a disk that is full.
        """
        texts, starts = _texts(input_ids, attention_mask)
        names = [hashlib.blake2b(text.tobytes(), digest_size=16).digest() for text in texts]
        places = self._index.find(np.array(names, dtype=_KEY))
        new = {
            name: text
            for name, text, place in zip(names, texts, places.tolist(), strict=True)
            if place < 0 and name not in self._pending and len(text)
        }
        rows = dict(zip(new, self._compute(list(new.values()), input_ids.device), strict=True)) if new else {}
        length = input_ids.shape[1] if self.what == "hidden" else 1
        states = np.zeros((len(texts), length, self.teacher.width), dtype=np.float16)
        for b, (name, text, place) in enumerate(zip(names, texts, places.tolist(), strict=True)):
            if not len(text):
                continue
            row = self._row(place) if place >= 0 else rows[name] if name in rows else self._pending[name]
            count = len(text) if self.what == "hidden" else 1
            if len(row) != count:
                raise VocabdistilError.of(
                    NAME,
                    f"{self.folder} is damaged: expected {count} vectors of a text, got {len(row)}"
                )
            start = starts[b] if self.what == "hidden" else 0
            states[b, start : start + count] = row
        for name, row in rows.items():
            self._remember(name, row)
        return Reading([torch.from_numpy(states).to(input_ids.device, self.teacher.model.dtype)])

    def flush(self) -> None:
        """Writes what is not on the disk yet.

        Raises:
            VocabdistilError: the disk is full, the folder gone or damaged.
        """
        if not self._pending:
            return
        self._make()
        with told_of(self.folder), locked(self.folder):
            remove_left_overs(self.folder, *(f"{kind}-" for kind in KINDS))
            manifest = self._learn()
            known = self._index.find(np.array(list(self._pending), dtype=_KEY)) >= 0
            rows = {name: row for (name, row), old in zip(self._pending.items(), known, strict=True) if not old}
            if rows:
                k = len(self._records)
                record = {"what": self.what, "tokens": sum(map(len, rows.values()))}
                record |= write_shard(self._path(k), self._batch(rows))
                manifest["shards"].append(record)
                write_manifest(self.folder, manifest)
                self._records.append(record)
                self._index.add(*_numbered([(k, np.array(list(rows), dtype=_KEY))]))
        self._pending, self._size = {}, 0

    def close(self) -> None:
        """Writes what is left, and closes the files."""
        try:
            self.flush()
        finally:
            self._open.clear()

    def _make(self) -> None:
        """The folder, with a manifest without shards, unless it was there."""
        if self._made:
            return
        with told_of(self.folder):
            prepare(self.folder, NAME)
            with locked(self.folder):
                if not (self.folder / MANIFEST).exists():
                    manifest = {"format": FORMAT, "name": self.teacher.name, **self._pinned, "shards": []}
                    write_manifest(self.folder, manifest)
                self._learn()
        self._made = True

    def _learn(self) -> dict[str, Any]:
        """Reads the manifest and the digests of the shards that are new in it."""
        manifest = read_cache_manifest(self.folder)
        for field in PINNED:
            if manifest[field] != self._pinned[field]:
                raise VocabdistilError.of(
                    NAME,
                    f"{self.folder} holds the states of another teacher ({manifest['name']}, of other "
                    f"{field}); take another folder or remove it"
                )
        old = len(self._records)
        if manifest["shards"][:old] != self._records:
            raise VocabdistilError.of(NAME, f"{self.folder} was made anew while it was open")
        self._records = list(manifest["shards"])
        keys = []
        for k, record in enumerate(self._records[old:], old):
            if record["what"] == self.what:
                verify_shard(self._path(k), NAME, record, contents=False)
                keys.append((k, self._columns(k)[0]))
        self._index.add(*_numbered(keys))
        return manifest

    def _path(self, k: int) -> Path:
        """Of a shard of this cache's kind; the number counts those of both."""
        return self.folder / f"{self.what}-{k:05d}.arrow"

    def _batch(self, rows: dict[bytes, np.ndarray]) -> Any:
        """A record batch of texts by their digests."""
        pa = pyarrow(spell(NAME))
        kinds = _columns(self.teacher.width)
        offsets = np.cumsum([0, *map(len, rows.values())]).astype(np.int32)
        values = pa.array(np.concatenate(list(rows.values())).ravel())
        vectors = pa.FixedSizeListArray.from_arrays(values, self.teacher.width)
        states = pa.ListArray.from_arrays(pa.array(offsets), vectors)
        return pa.record_batch([pa.array(list(rows), kinds["digest"]), states], names=list(kinds))

    def _columns(self, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Digests ``[n]``, offsets ``[n + 1]`` and vectors ``[tokens, D]`` of a shard, mapped."""
        path, record, width = self._path(k), self._records[k], self.teacher.width
        keys, states = read_shard(path, NAME, record, _columns(width))
        if keys.null_count or states.null_count or len(states.values) != record["tokens"]:
            raise VocabdistilError.of(NAME, f"{path} is damaged: expected {record['tokens']} vectors")
        names = np.frombuffer(keys.buffers()[1], dtype=_KEY, count=len(keys))
        return names, states.offsets.to_numpy(), states.values.values.to_numpy().reshape(-1, width)

    def _row(self, place: int) -> np.ndarray:
        """``[n, D]`` float16."""
        k, row = place >> 32, place & 0xFFFFFFFF
        if k not in self._open:
            # Once for each shard: a number that is wrong would be noticed by nobody.
            verify_shard(self._path(k), NAME, self._records[k])
            self._open[k] = self._columns(k)[1:]
        offsets, vectors = self._open[k]
        return vectors[offsets[row] : offsets[row + 1]]

    def _compute(self, texts: Sequence[np.ndarray], device: torch.device) -> list[np.ndarray]:
        """``[n, D]`` float16 of each text, one pass of the teacher over them all, padded on the right."""
        lengths = [len(text) for text in texts]
        ids = np.full((len(texts), max(lengths)), self.teacher.tokenizer.pad_token_id or 0)
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        ids[mask] = np.concatenate(texts)
        attended = torch.from_numpy(mask).to(device)
        with torch.autocast(device.type, enabled=False):
            read = self.teacher.read(torch.from_numpy(ids).to(device), attended.long())
            vectors = read.layers[-1][attended]
            if self.what == "pooled":
                end = torch.tensor(lengths, device=device).cumsum(0)
                vectors = span_mean(vectors, torch.nn.functional.pad(end[:-1], (1, 0)), end)
        half = vectors.half()
        if not bool(half.isfinite().all()):
            most = float(vectors.abs().max())
            raise VocabdistilError.of(
                NAME,
                f"{self.teacher.name} has hidden states up to {most:.6g}; float16, in which they are kept, "
                f"ends at {torch.finfo(torch.float16).max:.0f}"
            )
        self.computed += len(texts)
        counts = lengths if self.what == "hidden" else [1] * len(texts)
        return [part.numpy() for part in half.cpu().split(counts)]

    def _remember(self, name: bytes, row: np.ndarray) -> None:
        if self._pending and self._size + row.nbytes > self._shard_bytes:
            self.flush()
        # A copy: the others of its batch may be written before it.
        self._pending[name] = row.copy()
        self._size += row.nbytes


def _columns(width: int) -> dict[str, Any]:
    """The columns of a shard, and their types."""
    pa = pyarrow(spell(NAME))
    return {"digest": pa.binary(16), "states": pa.list_(pa.list_(pa.float16(), width))}


def _numbered(keys: Sequence[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The digests of shards, one after the other, and the places of their rows."""
    places = [(k << 32) + np.arange(len(names)) for k, names in keys]
    return (
        np.concatenate([np.empty(0, dtype=_KEY), *(names for _, names in keys)]),
        np.concatenate([np.empty(0, dtype=np.int64), *places]),
    )


def _texts(input_ids: Tensor, attention_mask: Tensor) -> tuple[list[np.ndarray], list[int]]:
    """The attended ids of each text, int64, and where they start in their row."""
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        kind = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"input_ids: expected a tensor of int64 or int32, got {kind}")
    check_mask(attention_mask, "attention_mask")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask: expected shape {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}")
    start, end = text_spans(attention_mask.cpu(), "attention_mask", "mean", look=True)
    flat, length = input_ids.cpu().flatten().numpy().astype("<i8", copy=False), input_ids.shape[1]
    spans = list(zip(start.tolist(), end.tolist(), strict=True))
    return [flat[i:j] for i, j in spans], [i - b * length for b, (i, _) in enumerate(spans)]


def _pinned(teacher: Teacher, whitening: str) -> dict[str, Any]:
    """What a folder holds the states of: a digest changes with all that changes a last hidden state."""
    weights: list[bytes] = []
    for name, tensor in sorted(teacher.model.state_dict().items()):
        if not name.startswith("pooler."):
            values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            weights.append(digest(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), values).encode())
    config = {k: v for k, v in teacher.model.config.to_diff_dict().items() if k not in _NOT_OF_THE_BODY}
    return {
        "weights": digest(*weights),
        "configuration": digest(json.dumps(config, sort_keys=True, default=str).encode()),
        "tokenizer": tokenizer_digest(teacher.tokenizer, "teacher"),
        "dtype": str(teacher.model.dtype).removeprefix("torch."),
        "whitening": whitening,
    }
