"""Rows of results: where they were measured, the file they are kept in, and how people see them."""

from __future__ import annotations

import csv
import datetime
import functools
import io
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import vocabdistil as vd
from vocabdistil.core.files import whole_file

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "operation", "provider", "case", "mode", "dtype", "threads", "p20_ms", "p50_ms", "p80_ms", "bytes",
    "gb_s", "copy_fraction", "speedup_vs_reference", "speedup_vs_compile", "tokens_per_s", "launches",
    "peak_mb", "others", "float64_error", "error", "device", "name", "driver", "python", "torch", "triton", "commit",
    "date",
)  # fmt: skip
# Share of the CPUs that other processes may take before a figure counts as disturbed.
QUIET = 0.1
# How the error of a provider begins that cannot run here, which is no failure.
UNAVAILABLE = "unavailable:"


def _command(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


@functools.cache
def environment(device: str) -> dict[str, str]:
    """What a row says about where, with what and when it was measured."""
    own = (":!results", ":!students/results.csv")
    changed = _command("git", "status", "--porcelain", "--untracked-files=no", "--", ":/", *own)
    cuda = device == "cuda"
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    about = vd.backends()
    return {
        "device": device,
        "name": torch.cuda.get_device_name() if cuda else about["machine"]["cpu"],
        "driver": _command(*query) if cuda else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": about["versions"]["triton"] or "",
        "commit": _command("git", "rev-parse", "--short", "HEAD") + ("-dirty" if changed else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def cpu_seconds() -> tuple[float, float, float] | None:
    """CPU seconds that all processes used, that this one used, and that there were; None without /proc."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields]
    own = os.times()
    # The fourth and fifth are idle and waiting for input.
    return sum(ticks) - ticks[3] - ticks[4], own.user + own.system, sum(ticks)


def share_of_others(before: tuple[float, float, float] | None, after: tuple[float, float, float] | None) -> str:
    """Share of the machine's CPU time that went to other processes or guests between two readings."""
    if before is None or after is None or after[2] <= before[2]:
        return ""
    busy, own, total = (b - a for a, b in zip(before, after, strict=True))
    return f"{max(busy - own, 0.0) / total:.2f}"


def failed(row: dict[str, Any]) -> bool:
    """Ours, and either wrong or raising: what makes a run fail. A backend that is not here is no failure."""
    error = row["error"]
    return row["provider"].startswith("ours") and bool(error) and not error.startswith(UNAVAILABLE)


def default_path(device: torch.device) -> Path:
    if device.type == "cpu":
        return RESULTS / "cpu.csv"
    return RESULTS / f"cuda-{re.sub(r'[^0-9A-Za-z]+', '-', torch.cuda.get_device_name()).strip('-')}.csv"


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a results file.

    Raises:
        ValueError: the file has other columns than :data:`COLUMNS`.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}, got {reader.fieldnames}")
        return list(reader)


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Adds rows to a file; whoever reads it meanwhile finds the old file or the new one, never half of it."""
    old = read_rows(path) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*old, *rows])
    with whole_file(path) as file:
        file.write(text.getvalue().encode())


def print_rows(rows: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    first = rows[0]
    about = f"{first['operation']}  {first['case']}  {first['dtype']}  threads {first['threads']}"
    table = Table(title=about)
    shown = {
        "provider": "provider", "mode": "mode", "p20_ms": "p20 ms", "p50_ms": "p50 ms", "p80_ms": "p80 ms",
        "gb_s": "GB/s", "copy_fraction": "of copy", "speedup_vs_reference": "x reference",
        "speedup_vs_compile": "x compile", "tokens_per_s": "tokens/s", "launches": "launches",
        "peak_mb": "peak MB", "others": "others", "float64_error": "from float64", "error": "error",
    }  # fmt: skip
    shown = {key: title for key, title in shown.items() if any(row[key] != "" for row in rows)}
    for key, title in shown.items():
        table.add_column(title, justify="left" if key in ("provider", "mode", "error") else "right")
    for row in rows:
        table.add_row(*(str(row[key]) for key in shown))
    # Where nobody has set a width (a pipe, a log) a table of 80 columns would be cut.
    if console is None:
        console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)


# operation, case, mode: the rows of the README.
HEADLINES = (
    ("span_loss", "b8-l256-d768", "fwd+bwd"),
    ("span_loss", "b8-l256-d768-from264", "fwd+bwd"),
    ("span_loss", "b8-l256-d768-bf16", "fwd+bwd"),
    ("span_loss", "b4-l1024-d1024", "fwd+bwd"),
    ("span_loss", "b64-l512-d1024-bf16", "fwd+bwd"),
    ("span_loss", "b16-l2048-d4096-bf16", "fwd+bwd"),
    ("span_loss", "b32-l256-d768-from264-fp32", "fwd+bwd"),
    ("span_mean", "b8-l256-d768", "fwd+bwd"),
    ("matched_kl", "512-30522-5000-4500-renormalize", "fwd+bwd"),
    ("linear_matched_kl", "512-30522-5000-4500", "fwd+bwd"),
    ("remapped_kl", "64-30522-5000-logsumexp", "fwd+bwd"),
    ("relation_loss", "b8-l256-d768-from264-h12", "fwd+bwd"),
    ("contrastive", "2048-768", "fwd+bwd"),
    ("remap", "build-120000", "run"),
    ("remap", "ru-1000x512", "run"),
    ("align", "ru-1000-texts", "run"),
    ("align", "boundary-1000x512", "run"),
    ("align", "boundary-en-wordpiece_uncased-byte-level", "run"),
)


def disturbed(row: dict[str, str]) -> bool:
    """Other processes took so much of the CPU that neither the times nor their ratios mean anything."""
    return float(row["others"] or 0) > QUIET


def latest(rows: Iterable[dict[str, str]]) -> dict[tuple[str, ...], dict[str, dict[str, str]]]:
    """(operation, case, mode, threads) -> provider -> row, of the last undisturbed run that measured ours, or
    of the last one if all were disturbed."""
    groups: dict[tuple[str, ...], dict[str, dict[str, dict[str, str]]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("operation", "case", "mode", "threads"))
        groups.setdefault(key, {}).setdefault(row["date"], {})[row["provider"]] = row
    chosen = {}
    for key, runs in groups.items():
        own = [date for date, run in runs.items() if any(name.startswith("ours") for name in run)]
        calm = [date for date in own if not any(map(disturbed, runs[date].values()))]
        if own:
            chosen[key] = runs[max(calm or own)]
    return chosen


def _cell(run: dict[str, dict[str, str]], provider: str, column: str = "p50_ms") -> str:
    return run.get(provider, {}).get(column) or "-"


def figures(paths: Sequence[Path]) -> str:
    """The headline rows of these files as Markdown, one table per machine."""
    parts = []
    for path in paths:
        groups, lines, about, commits = latest(read_rows(path)), [], None, {}
        for headline in HEADLINES:
            for key, run in groups.items():
                if key[:3] != headline:
                    continue
                best = min(
                    (row for name, row in run.items() if name.startswith("ours") and row["p50_ms"]),
                    key=lambda row: float(row["p50_ms"]),
                    default=None,
                )
                if best is None:
                    continue
                about, commits[best["commit"]] = best, None
                baseline = next((_cell(run, name) for name in ("reference", "python") if name in run), "-")
                rate = f"{float(best['tokens_per_s']) / 1e6:.0f} M/s" if best["tokens_per_s"] else "-"
                cells = [
                    best["operation"], best["case"], best["mode"], best["threads"], baseline,
                    _cell(run, "compile"), best["p50_ms"], best["speedup_vs_reference"] or "-",
                    best["speedup_vs_compile"] or "-", best["copy_fraction"], rate,
                ]  # fmt: skip
                if disturbed(best):
                    cells[4:] = ["*"] * len(cells[4:])
                lines.append(f"| {' | '.join(cells)} |")
        if about is None:
            continue
        driver = f", driver {about['driver']}" if about["driver"] else ""
        where = f"{about['name']}{driver}, torch {about['torch']}, commit {', '.join(commits)}:"
        head = (
            "operation", "case", "mode", "threads", "reference ms", "compile ms", "ours ms", "x reference",
            "x compile", "of a copy", "tokens",
        )  # fmt: skip
        rule = f"|{' --- |' * 3}{' ---: |' * (len(head) - 3)}"
        parts.append("\n".join((where, "", f"| {' | '.join(head)} |", rule, *lines)))
        if any("*" in line for line in lines):
            parts.append(f"\\* left out: other processes took more than {QUIET:.0%} of the CPU meanwhile.")
    return "\n\n".join(parts)


def picture(path: Path, out: Path, mode: str = "fwd+bwd") -> None:
    """Draws time against pairs (hidden size 768) and against hidden size (the number of pairs with the most of them),
    from ``sweep-P-D`` cases.

    Raises:
        ValueError: the file holds no sweep.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points: dict[tuple[int, int], dict[str, float]] = {}
    busy, about = False, ""
    for (_, case, row_mode, _), run in latest(read_rows(path)).items():
        match = re.fullmatch(r"sweep-(\d+)-(\d+)", case)
        if not match or row_mode != mode:
            continue
        busy |= any(map(disturbed, run.values()))
        about = next(iter(run.values()))["name"]
        times = {name: float(row["p50_ms"]) for name, row in run.items() if row["p50_ms"]}
        for row in run.values():
            if row["gb_s"] and float(row["copy_fraction"]):
                times["bytes floor"] = float(row["p50_ms"]) * float(row["copy_fraction"])
        points[int(match[1]), int(match[2])] = times
    if not points:
        raise ValueError(f"{path}: expected rows of sweep-P-D cases in mode {mode}, found none")
    counts = [pairs for pairs, _ in points]
    count = max(set(counts), key=lambda n: (counts.count(n), n == 1000))
    panels = {
        "span pairs (hidden 768)": {pairs: t for (pairs, hidden), t in points.items() if hidden == 768},
        f"hidden size ({count} pairs)": {hidden: t for (pairs, hidden), t in points.items() if pairs == count},
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        for name in sorted({name for times in panel.values() for name in times}):
            style = {"color": "black", "linestyle": "--"} if name == "bytes floor" else {"marker": "o"}
            line = sorted((x, times[name]) for x, times in panel.items() if name in times)
            axis.plot(*zip(*line, strict=True), label=name, **style)
        axis.set(xscale="log", yscale="log", xlabel=title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"ms, {mode}")
    axes[0].legend()
    figure.suptitle(about + (": some points are disturbed by other processes" if busy else ""))
    figure.tight_layout()
    try:
        with whole_file(out) as file:
            figure.savefig(file, dpi=150, format=out.suffix[1:] or None)
    finally:
        pyplot.close(figure)
