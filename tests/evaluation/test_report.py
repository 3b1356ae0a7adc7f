"""What is printed: that it says what its words mean, and has one word for one thing."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from vocabdistil.alignment.coverage import coverage
from vocabdistil.core.options import METHODS
from vocabdistil.evaluation import report

_MODELS = {
    side: {"parameters": 1000, "vocab": 10, "mb": 1.0, "seconds": 0.1, "tokens": 5} for side in ("teacher", "student")
} | {"time_batch": 2, "time_length": 8, "threads": 1}


def shown(*tables) -> str:
    console = Console(file=io.StringIO(), width=300)
    console.print(*tables)
    return " ".join(console.file.getvalue().split())


@pytest.mark.parametrize("methods", [METHODS, ("boundary",)])
def test_every_alignment_is_explained(methods, teacher_folder, demo_lines):
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    found = coverage(demo_lines[:20], tokenizer, tokenizer, methods)
    printed = shown(report.coverage_tables(("a", "b"), (tokenizer, tokenizer), found)[1])
    assert [method for method in METHODS if f"{method} pairs " in printed] == list(methods)


def test_rows_without_anything_are_left_out(teacher_folder, demo_lines):
    """Of one tokenizer with itself every token is in a pair."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    found = coverage(demo_lines[:20], tokenizer, tokenizer)
    labels = list(report.coverage_tables(("a", "b"), (tokenizer, tokenizer), found)[1].columns[0].cells)
    assert "span pairs" in labels and not any("left out" in label for label in labels)
    found.methods["match"] = replace(found.methods["match"], teacher_examples=(("the", 3),))
    labels = list(report.coverage_tables(("a", "b"), (tokenizer, tokenizer), found)[1].columns[0].cells)
    assert [label for label in labels if "left out" in label] == ["teacher tokens left out"]


@pytest.mark.parametrize("count", [3, 99, 100])
def test_few_pairs_are_warned_of(count):
    row = {"spearman": 0.5, "pearson": 0.5, "relative": 1.0, "seconds": 1.0, "loyalty": None}
    task = {"kind": "pairs", "name": "x.csv", "size": {"pairs": count}, "results": [row]}
    (table,) = report.task_tables({"tasks": [task], "models": [{"name": "m", "parameters": 1}], "threads": 1})
    printed = shown(table)
    assert "CPU s: " in printed and ("take 100 or more" in printed) == (count < 100)


def test_a_figure_has_one_name():
    row = {"pearson": 0.1, "spearman": 0.2, "cosine": 0.3}
    metrics = {
        "before": row, "after": row, "baselines": {"x": row | {"parameters": 3, "spearman": 0.9}}, "share": 1.0,
        "teacher_pseudo_perplexity": [None], "models": _MODELS, "held_out_texts": 5, "steps": 20,
    }  # fmt: skip
    (warning,) = [line for line in report.warnings(metrics) if "follows" in line]
    printed = [
        shown(*report.result_tables(metrics)), shown(report.loyalty_table({"x": row}, "5 texts")), warning,
        *report.baseline_lines({"x": row}, row),
    ]  # fmt: skip
    assert all("regression loyalty" in line for line in printed)
    assert not any("agreement" in line or "embeddings:" in line for line in printed)


@pytest.mark.parametrize(("count", "said"), [(1, "1 step"), (0, "0 steps"), (1200, "1,200 steps")])
def test_one_is_no_plural(count, said):
    assert report.many(count, "step") == said
