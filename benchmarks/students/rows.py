"""Rows of students: the file they are kept in, and the table that is made of them."""

from __future__ import annotations

import csv
import io
import json
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results.csv"
COLUMNS = (
    "student", "teacher", "method", "options", "seed", "parameters", "tokens", "text_tokens", "score", "start",
    "teacher_score", "of_teacher", "minutes", "steps", "threads", "others", "device", "name", "driver", "python",
    "torch", "triton", "commit", "date",
)  # fmt: skip


def _line(values: Iterable[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def append(path: Path, row: dict[str, Any], columns: Sequence[str] = COLUMNS) -> None:
    """Adds a row, which is on the disk when this returns: in one piece, after whatever a killed run left behind."""
    line = _line(row[name] for name in columns)
    with open(path, "ab+") as file:
        if not file.tell():
            line = _line(columns) + line
        else:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, columns: Sequence[str] = COLUMNS) -> list[dict[str, str]]:
    """The whole rows of a file, none if there is no file.

    Raises:
        ValueError: it has other columns.
    """
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = [row for row in reader if None not in row and None not in row.values()]
    if tuple(reader.fieldnames or ()) != tuple(columns):
        raise ValueError(f"{path}: expected the columns {','.join(columns)}")
    return rows


def same(row: dict[str, Any]) -> tuple[str, ...]:
    """What two measurements of the same thing agree in."""
    return tuple(str(row[name]) for name in ("student", "options", "seed", "commit"))


def budget(options: dict[str, Any]) -> str:
    """How long a run was to take; empty: nothing was trained."""
    for name, unit in (("minutes", "min"), ("steps", "steps")):
        if options.get(name) is not None:
            return f"{options[name]:g} {unit}"
    return ""


def _mean(values: Sequence[float]) -> str:
    """Mean, and the standard deviation where there are several."""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def grouped(rows: Iterable[dict[str, str]]) -> dict[tuple[str, str], list[dict[str, str]]]:
    """(student, budget) -> its newest row of every seed; of other options than the newest row's none."""
    groups: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        seeds = groups.setdefault((row["student"], budget(json.loads(row["options"]))), {})
        if any(other["options"] != row["options"] for other in seeds.values()):
            seeds.clear()
        seeds[row["seed"]] = row
    return {key: list(seeds.values()) for key, seeds in groups.items()}


def report(rows: Iterable[dict[str, str]]) -> str:
    """Markdown: every student beside its baselines, the best first; mean and standard deviation over the seeds."""
    students: dict[str, list[tuple[float, list[str]]]] = {}
    mixed = []
    for (name, allowed), runs in grouped(rows).items():
        student, _, kind = name.partition("/")
        first = runs[0]
        if len({row["commit"] for row in runs}) > 1:
            mixed.append(name)
        scores = [float(row["score"]) for row in runs]
        starts = [float(row["start"]) for row in runs if row["start"]]
        share = statistics.fmean(float(row["of_teacher"]) for row in runs)
        cells = [
            kind, allowed, f"{int(first['parameters']) / 1e6:.1f}", first["tokens"], str(len(runs)), _mean(scores),
            f"{statistics.fmean(starts):.4f}" if starts else "", f"{share:.3f}",
        ]  # fmt: skip
        students.setdefault(f"{student}, {first['teacher'].partition(' + ')[0]}", []).append(
            (-statistics.fmean(scores), cells)
        )
    head = ("student", "method", "budget", "M parameters", "tokens", "seeds", "score", "start", "of the teacher's")
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * 3}{' ---: |' * (len(head) - 3)}"]
    for student, found in students.items():
        for i, (_, cells) in enumerate(sorted(found)):
            lines.append(f"| {' | '.join([student if i == 0 else '', *cells])} |")
    if mixed:
        lines += ["", f"Seeds of different commits: {', '.join(mixed)}."]
    return "\n".join(lines)
