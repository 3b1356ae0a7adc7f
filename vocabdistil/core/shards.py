"""Folders of Arrow files under a manifest: a shard is named there only after it is whole.

``manifest.json`` says what all rows were made with, and for each shard how many rows and bytes it has and its checksum.
Errors begin with the name of the argument that the folder came in.
"""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import VocabdistilError
from .files import make_folder, whole_file

__all__ = [
    "COUNT",
    "MANIFEST",
    "RECORD",
    "TEXT",
    "Fields",
    "check_folder",
    "digest",
    "is_count",
    "locked",
    "prepare",
    "pyarrow",
    "read_manifest",
    "read_shard",
    "remove_left_overs",
    "verify_shard",
    "write_manifest",
    "write_shard",
]

MANIFEST = "manifest.json"
# What each field of a manifest must be, in words and as a test.
Fields = dict[str, tuple[str, Callable[[Any], bool]]]


def is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and value >= least


COUNT = ("a number", is_count)
TEXT = ("a string", lambda value: isinstance(value, str))
RECORD: Fields = {"rows": ("a number of at least 1", lambda value: is_count(value, 1)), "bytes": COUNT, "crc32": COUNT}


def pyarrow(what: str) -> Any:
    """The package, which is not always there, for ``what`` needs it."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise ImportError(f"{what} needs pyarrow: pip install pyarrow") from None
    return pyarrow


def digest(*parts: Any) -> str:
    """128 bits, in hexadecimal, of bytes and of vectors of bytes."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        # The length keeps apart what is divided differently.
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def check_folder(folder: Path, name: str) -> None:
    """Raises VocabdistilError unless the folder is there with a manifest or nothing in it, or can be made."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise VocabdistilError.of(name, f"{there} is not a folder")
    known = there != folder or (folder / MANIFEST).exists()
    if not known and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise VocabdistilError.of(name, f"{folder} has other files and no {MANIFEST}; a new or empty one is needed")


def prepare(folder: Path, name: str) -> None:
    """Makes the folder, if :func:`check_folder` lets it."""
    check_folder(folder, name)
    make_folder(folder)


@contextmanager
def locked(folder: Path, quiet: bool = True) -> Iterator[None]:
    """One process at a time; the others wait, and say so unless ``quiet``."""
    from filelock import FileLock, Timeout

    lock = FileLock(str(folder / ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not quiet:
            from .console import print_line  # rich takes a while to import

            print_line(f"Waiting for another process that writes {folder}", sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def remove_left_overs(folder: Path, *prefixes: str) -> None:
    """What a process that was killed has not finished; for who holds the lock."""
    for prefix in (*prefixes, MANIFEST):
        for left_over in folder.glob(f".{prefix}*"):
            left_over.unlink()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    with whole_file(folder / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1).encode())


def read_manifest(folder: Path, name: str, holds: str, form: int, fields: Fields, record: Fields) -> dict[str, Any]:
    """The manifest, with every field what it must be.

    Args:
        holds: what a folder without a manifest lacks.
        form: the number of the format; the fields of others may be others.
        fields, record: those of the manifest, and of each of its shards.

    Raises:
        VocabdistilError: there is none, or it is damaged or of another format.
    """
    path = folder / MANIFEST

    def check(values: Any, where: str, wanted: Fields) -> None:
        if not isinstance(values, dict):
            raise VocabdistilError.of(name, f"{path} is damaged: {where}expected an object, got {values!r:.80}")
        for field, (expected, fits) in wanted.items():
            if field not in values:
                raise VocabdistilError.of(name, f"{path} is damaged: {where}{field}: expected {expected}, got nothing")
            if not fits(values[field]):
                raise VocabdistilError.of(
                    name,
                    f"{path} is damaged: {where}{field}: expected {expected}, got {values[field]!r:.80}"
                )

    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise VocabdistilError.of(name, f"{folder} holds no {holds} (no {MANIFEST})") from None
    except (OSError, ValueError, RecursionError) as error:
        raise VocabdistilError.of(name, f"{path} is damaged: {error}") from None
    check(manifest, "", {"format": COUNT})
    if manifest["format"] != form:
        raise VocabdistilError.of(name, f"{path}: format: expected {form}, got {manifest['format']}")
    check(manifest, "", {**fields, "shards": ("a list", lambda value: isinstance(value, list))})
    for k, shard in enumerate(manifest["shards"]):
        check(shard, f"shards[{k}]: ", record)
    return manifest


def write_shard(path: Path, batch: Any) -> dict[str, Any]:
    """Writes a record batch; returns its record for the manifest."""
    pa = pyarrow("an Arrow file")
    with whole_file(path) as file, pa.ipc.new_stream(file, batch.schema) as writer:
        writer.write_batch(batch)
    return {"rows": batch.num_rows, "bytes": path.stat().st_size, "crc32": _checksum(path)}


def verify_shard(path: Path, name: str, record: dict[str, Any], contents: bool = True) -> None:
    """Raises VocabdistilError unless the file has the size and, with ``contents``, the checksum of its record."""
    try:
        size = path.stat().st_size
    except OSError:
        raise VocabdistilError.of(name, f"{path} is missing") from None
    if size != record["bytes"]:
        raise VocabdistilError.of(name, f"{path} is damaged: expected {record['bytes']} bytes, got {size}")
    if contents and (found := _checksum(path)) != record["crc32"]:
        raise VocabdistilError.of(name, f"{path} is damaged: expected checksum {record['crc32']:08x}, got {found:08x}")


def read_shard(path: Path, name: str, record: dict[str, Any], columns: dict[str, Any]) -> list[Any]:
    """The columns, by name with their Arrow types, of a shard by memory map.

    Raises:
        VocabdistilError: it is no such file.
    """
    pa = pyarrow("an Arrow file")
    try:
        # The map outlives its file: as many shards as there are do not need as many open files.
        with pa.memory_map(str(path)) as source:
            batch = pa.ipc.open_stream(source).read_next_batch()
        batch.validate(full=True)
        found = [batch.column(column) for column in columns]
        if any(column.type != kind for column, kind in zip(found, columns.values(), strict=True)):
            raise ValueError("columns of other types")
        if batch.num_rows != record["rows"]:
            raise ValueError(f"expected {record['rows']} rows, got {batch.num_rows}")
    except (OSError, ValueError, KeyError, StopIteration, pa.ArrowException) as error:
        raise VocabdistilError.of(name, f"{path} is damaged: {error}") from None
    return found
