"""CSV files of tasks, read and checked before torch is imported: pairs of sentences with scores, texts with labels."""

from __future__ import annotations

import csv
import io
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import VocabdistilError, need_file, spell

__all__ = ["Labels", "read_labels", "read_scored"]


@dataclass(frozen=True)
class Labels:
    """Texts, and the class of each.

    Attributes:
        name: the file.
        texts, labels: ``n`` of each.
    """

    name: str
    texts: list[str]
    labels: list[str]


def _csv_rows(path: str | os.PathLike, argument: str, columns: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """The rows of a CSV file, each with where it stands; lines with nothing on them are left out.

    Raises:
        VocabdistilError: no such file, no UTF-8, no CSV, or a row with another number of columns.
    """
    need_file(path, argument, "a CSV file")
    file = Path(path)
    try:
        data = file.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise VocabdistilError.of(argument, f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise VocabdistilError.of(argument, f"{file}:{line}: not UTF-8: byte 0x{byte:02x}") from None
    # A cell may go on over several lines: what names a row is where it starts.
    reader, line = csv.reader(io.StringIO(text, newline=""), strict=True), 1
    try:
        for row in reader:
            where, line = f"{spell(argument)}: {file}:{line}", reader.line_num + 1
            if row and len(row) != len(columns):
                expected = f"expected {len(columns)} columns ({', '.join(columns)})"
                raise VocabdistilError(f"{where}: {expected}, got {len(row)}")
            if row:
                yield where, row
    except csv.Error as error:
        raise VocabdistilError.of(argument, f"{file}:{line}: not CSV: {error}") from None


def _need_text(where: str, text: str) -> None:
    if not text.strip():
        raise VocabdistilError(f"{where}: expected text in every column, got {text!r}")


def _score(text: str) -> float | None:
    """None for what is no number."""
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


def read_scored(path: str | os.PathLike, argument: str = "pairs") -> tuple[list[str], list[str], list[float]]:
    """Reads a CSV file with the columns sentence, sentence, score.

    A first line whose third column is no number is a header.

    Args:
        argument: what an error names.

    Returns:
        The left and the right sentences, and the scores.

    Raises:
        VocabdistilError: no such file, no UTF-8, no CSV; a row with another number of columns, an empty sentence or
            a score that is no finite number; fewer than 3 rows, or scores that are all the same.
    """
    left: list[str] = []
    right: list[str] = []
    scores: list[float] = []
    for i, (where, (one, other, said)) in enumerate(_csv_rows(path, argument, ("sentence", "sentence", "score"))):
        score = _score(said)
        if i == 0 and score is None and said.strip():
            continue
        for text in (one, other):
            _need_text(where, text)
        if score is None or not math.isfinite(score):
            raise VocabdistilError(f"{where}: expected a finite number as the score, got {said!r}")
        left.append(one)
        right.append(other)
        scores.append(score)
    if len(scores) < 3:
        raise VocabdistilError.of(argument, f"{path}: expected at least 3 pairs, got {len(scores)}")
    if min(scores) == max(scores):
        raise VocabdistilError.of(argument, f"{path}: expected scores that differ, got {scores[0]:g} for every pair")
    return left, right, scores


def read_labels(path: str | os.PathLike, argument: str = "labels") -> Labels:
    """Reads a CSV file with the columns text, label.

    A first line that says ``text,label`` is a header. Labels are compared as they stand, without the white space
    around them.

    Args:
        argument: what an error names.

    Raises:
        VocabdistilError: no such file, no UTF-8, no CSV; a row with another number of columns or an empty one; fewer
            than 2 classes, or a class with a single text.
    """
    texts: list[str] = []
    labels: list[str] = []
    places: dict[str, str] = {}
    for i, (where, row) in enumerate(_csv_rows(path, argument, ("text", "label"))):
        if i == 0 and [cell.strip().lower() for cell in row] == ["text", "label"]:
            continue
        for cell in row:
            _need_text(where, cell)
        texts.append(row[0])
        labels.append(row[1].strip())
        places.setdefault(labels[-1], where)
    counts = Counter(labels)
    if len(counts) < 2:
        raise VocabdistilError.of(argument, f"{path}: expected at least 2 classes, got {len(counts)}")
    for name, count in counts.items():
        if count < 2:
            raise VocabdistilError(f"{places[name]}: expected at least 2 texts of every class, got 1 of {name!r}")
    return Labels(os.fspath(path), texts, labels)
