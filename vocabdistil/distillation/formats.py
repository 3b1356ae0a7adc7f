"""Files of text in the formats in which text is kept: what a file is is told by how it begins, then by its name."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..core.errors import VocabdistilError, utf8
from ..core.options import ROW_COLUMNS

__all__ = ["COLUMN", "as_row", "read_examples", "rows_of"]

# What holds the text, where there are rows.
COLUMN = "text"
# Bytes that tell what a file is, and of a compressed file that are unpacked at once.
_HEAD, _BLOCK = 1 << 12, 1 << 16
_ROWS = 1024
_PARQUET = b"PAR1"
# Names of files each of whose lines is a row, whatever the first one is.
_OF_ROWS = (".jsonl", ".ndjson", ".json")
_PACKED_NAMES = (".gz", ".zst")
# UTF-32 first: its mark begins with that of UTF-16.
_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# What is taken for text by mistake.
_BINARY = {
    b"PK\x03\x04": "a zip archive",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"%PDF-": "a PDF",
    b"ARROW1": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow stream",
    _PARQUET: "compressed Parquet",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "an array of numpy",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}


class _Zstd(io.RawIOBase):
    """What a file compressed by zstd holds.

    The readers that packages bring take a file that ends too early for a shorter one.
    """

    def __init__(self, path: Path, make: Callable[[], Any], error: type[Exception]) -> None:
        self._make, self._error = make, error
        self._file, self._engine, self._left, self._ready = open(path, "rb"), self._make(), b"", b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._left or self._file.read(_BLOCK)
            if not block:
                if not self._engine.eof:
                    raise EOFError("it ends too early")
                return 0
            if self._engine.eof:
                self._engine = self._make()
            try:
                self._ready = self._engine.decompress(block)
            except self._error as error:
                raise EOFError(str(error)) from None
            self._left = self._engine.unused_data
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _zstd(path: Path) -> tuple[Callable[[], Any], type[Exception]]:
    """What makes an object that unpacks one frame, and the error that it raises."""
    try:
        from compression.zstd import ZstdDecompressor, ZstdError  # from Python 3.14 on

        return ZstdDecompressor, ZstdError
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError:
        problem = f"{path} is compressed by zstd, for which a package is missing: pip install zstandard"
        raise VocabdistilError.of("text", problem) from None
    return lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError


# A frame that holds text, and those to be skipped, with which pzstd begins.
_ZSTD = (b"\x28\xb5\x2f\xfd", *(bytes([kind]) + b"\x2a\x4d\x18" for kind in range(0x50, 0x60)))
_PACKED: dict[bytes, Callable[[Path], BinaryIO]] = {
    b"\x1f\x8b": lambda path: cast(BinaryIO, gzip.open(path, "rb")),
    **dict.fromkeys(_ZSTD, lambda path: io.BufferedReader(_Zstd(path, *_zstd(path)))),
}


def _start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(8)


def _unpacked(path: Path) -> BinaryIO:
    start = _start(path)
    openers = (opener for mark, opener in _PACKED.items() if start.startswith(mark))
    return next(openers, lambda path: open(path, "rb"))(path)


def read_examples(path: Path, unit: str, rows: bool = False) -> Iterator[str]:
    """The training examples of a file, in order, stripped, never empty; read as far as they are asked for.

    Args:
        path: plain text, UTF-8 or, with a byte order mark, UTF-16; JSON lines, each an object with a string ``"text"``;
            either of them compressed by gzip or zstd; or Parquet with a column ``"text"``.
        unit: of plain text: ``"line"`` or ``"paragraph"``, lines joined by a space until a blank one.
        rows: examples are JSON objects: of JSON lines also such as have a prompt with its completion, or messages.

    Raises:
        VocabdistilError: it cannot be read, is damaged or of another kind, or needs a package that is not there.
    """
    try:
        if _start(path).startswith(_PARQUET):
            yield from _wrapped(_of_rows(_parquet(path), path, "row"), rows)
            return
        with _unpacked(path) as file:
            encoding = _encoding(file.read(_HEAD), path)
        with _unpacked(path) as file:
            lines: Iterator[tuple[int, str]] = enumerate(_lines(file, encoding, path), 1)
            first = next(((number, line) for number, line in lines if line.strip()), None)
            if first is None:
                return
            lines = chain([first], lines)
            if _named_rows(path) or _text_in(first[1]) is not None:
                filled = ((number, line) for number, line in lines if line.strip())
                yield from _whole_rows(filled, path) if rows else _of_rows(filled, path, "line")
            else:
                yield from _wrapped(_plain((line for _, line in lines), unit), rows)
    except (EOFError, zlib.error) as error:
        raise VocabdistilError.of("text", f"{path} is damaged: {error}") from None
    except OSError as error:
        # Of damage there is no number of the system's.
        problem = f"cannot read {path}: {error.strerror}" if error.strerror else f"{path} is damaged: {error}"
        raise VocabdistilError.of("text", problem) from None


def _wrapped(texts: Iterator[str], rows: bool) -> Iterator[str]:
    return (as_row({COLUMN: text}) or "" for text in texts) if rows else texts


def as_row(row: Any) -> str | None:
    """What a causal model is trained on of a mapping, as JSON without the other columns; None where there is nothing.
    """
    kept = {name: row[name] for name in ROW_COLUMNS if row.get(name) is not None} if isinstance(row, Mapping) else {}
    return json.dumps(kept, ensure_ascii=False) if kept.keys() & {COLUMN, "messages", "completion"} else None


def _whole_rows(lines: Iterable[tuple[int, str]], path: Path) -> Iterator[str]:
    for number, line in lines:
        try:
            row = as_row(json.loads(line))
        except (ValueError, RecursionError):
            row = None
        if row is None:
            expected = f"a JSON object with {', '.join(map(repr, ROW_COLUMNS[:2]))}, or a prompt and its completion"
            raise VocabdistilError.of("text", f"{path}:{number}: expected {expected}, got {line.strip()[:60]}")
        if not utf8(row):
            raise VocabdistilError.of("text", f"{path}, line {number}: expected text that UTF-8 can hold")
        yield row


def _encoding(head: bytes, path: Path) -> str:
    """The encoding, from how the text begins.

    Raises:
        VocabdistilError: it is no text.
    """
    marked = next((name for mark, name in _ENCODINGS.items() if head.startswith(mark)), None)
    if marked is not None:
        return marked
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
        legible = b"\0" not in head
    except UnicodeDecodeError:
        legible = False
    kinds = _BINARY | dict.fromkeys(_PACKED, "compressed twice")
    kind = next((kind for mark, kind in kinds.items() if head.startswith(mark)), None)
    if not legible and kind is not None:
        raise VocabdistilError.of("text", f"{path} is {kind}, no text")
    if b"\0" in head:
        where = f"a zero byte at offset {head.index(0)}"
        raise VocabdistilError.of("text", f"{path} is binary ({where}), or UTF-16 without a byte order mark")
    return "UTF-8"


def _lines(file: BinaryIO, encoding: str, path: Path) -> Iterator[str]:
    """Up to every line feed, decoded."""
    offset = 0
    try:
        if encoding != "UTF-8":
            yield from io.TextIOWrapper(file, encoding, newline="\n")
            return
        for data in file:
            yield data.decode() if offset else data.decode().removeprefix("\ufeff")
            offset += len(data)
    except UnicodeDecodeError as error:
        problem = f"byte 0x{error.object[error.start]:02x} at offset {offset + error.start}"
        # Elsewhere the offset is that in a block.
        problem = problem if encoding == "UTF-8" else error.reason
        raise VocabdistilError.of("text", f"{path} is not {encoding}: {problem}") from None


def _plain(lines: Iterable[str], unit: str) -> Iterator[str]:
    # A line feed ends a line in any case; str knows other ends of lines too.
    stripped = (part.strip() for line in lines for part in line.splitlines())
    if unit == "line":
        yield from filter(None, stripped)
        return
    paragraph: list[str] = []
    for line in chain(stripped, [""]):
        if line:
            paragraph.append(line)
        elif paragraph:
            yield " ".join(paragraph)
            paragraph = []


def _named_rows(path: Path) -> bool:
    name = path.name.lower()
    for packed in _PACKED_NAMES:
        name = name.removesuffix(packed)
    return name.endswith(_OF_ROWS)


def _text_in(line: str) -> str | None:
    """The text of a row of JSON; None if it is something else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    text = row.get(COLUMN) if isinstance(row, dict) else None
    return text if isinstance(text, str) else None


def _of_rows(rows: Iterable[tuple[int, Any]], path: Path, kind: str) -> Iterator[str]:
    """The texts of numbered rows: lines of JSON, or values of a column."""
    for number, row in rows:
        text = _text_in(row) if kind == "line" else row
        if not isinstance(text, str):
            place, expected = f"{path}:{number}", f'a JSON object with a string "{COLUMN}"'
            if kind == "row":
                place, expected = f"{path}, row {number}", f"a string in column {COLUMN!r}"
            raise VocabdistilError.of("text", f"{place}: expected {expected}, got {str(row).strip()[:60]}")
        if not utf8(text):
            raise VocabdistilError.of("text", f"{path}, {kind} {number}: expected text that UTF-8 can hold")
        if text := text.strip():
            yield text


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of the column with the text, numbered."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        problem = f"{path} is Parquet, for which a package is missing: pip install pyarrow"
        raise VocabdistilError.of("text", problem) from None
    try:
        with parquet.ParquetFile(path, buffer_size=_BLOCK) as file:
            names = file.schema_arrow.names
            if COLUMN not in names:
                listed = ", ".join(names)
                raise VocabdistilError.of("text", f"{path}: expected a column {COLUMN!r}, got {listed or 'none'}")
            number = 0
            for batch in file.iter_batches(_ROWS, columns=[COLUMN]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield number, value
    except pa.ArrowException as error:
        raise VocabdistilError.of("text", f"{path} is damaged: {error}") from None


def rows_of(data: Any) -> Iterator[tuple[int, Any]] | None:
    """Of a data set of ``datasets``, in memory or streamed, the numbered values of the column with the text, without
    the others, which may be pictures; None if it is something else.

    Raises:
        VocabdistilError: it has no such column.
    """
    if not all(hasattr(data, name) for name in ("column_names", "select_columns", "iter")) or not data.column_names:
        return None
    if COLUMN not in data.column_names:
        listed = ", ".join(map(str, data.column_names))
        raise VocabdistilError.of("text", f"expected a data set with a column {COLUMN!r}, got {listed}")
    batches = data.select_columns([COLUMN]).iter(_ROWS)
    return enumerate(chain.from_iterable(batch[COLUMN] for batch in batches))
