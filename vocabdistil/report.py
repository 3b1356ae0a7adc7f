"""What people see: progress, tables, CPU times, the model card."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn
from transformers import TrainerCallback

from ._tokenizers import backend_of, encode
from .data import pad
from .errors import VocabdistilError
from .loyalty import mean_over_tokens, pairwise_cosine, regression
from .picture import readable

if TYPE_CHECKING:
    from .align import Coverage
    from .coverage import CoverageReport
    from .teachers import Teacher
    from .training import DistillConfig

__all__ = [
    "Reporter",
    "bench_models",
    "compare_models",
    "coverage_tables",
    "cpu_time",
    "describe_model",
    "embedding_loyalty",
    "model_card",
    "timing_texts",
]

_LOSSES = ("kl_reduce", "kl_own", "cosine_reduce", "cosine_own", "mse_reduce", "mse_own", "logits_kl", "mlm")
_HELD_OUT = (
    ("kl_reduce", "span KL, reduce input", "lower"),
    ("kl_own", "span KL, own tokenization", "lower"),
    ("mlm", "MLM loss", "lower"),
    ("masked_accuracy", "masked-token accuracy", "higher"),
    ("pseudo_perplexity", "pseudo-perplexity per character", "lower"),
    ("logits_kl", "logits KL, same words masked", "lower"),
    ("label", "label loyalty, same words masked", "higher"),
    ("probability", "probability loyalty, same words masked", "higher"),
    ("cosine", "cosine of pooled embeddings", "higher"),
    ("pearson", "regression loyalty, Pearson", "higher"),
    ("spearman", "regression loyalty, Spearman", "higher"),
)


def _held_out_rows(metrics: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Label, before, after and which is better, of what was measured."""
    rows = []
    for key, label, better in _HELD_OUT:
        if key in metrics["after"]:
            known = [v for v in metrics["teacher_pseudo_perplexity"] if v is not None]
            if key == "pseudo_perplexity" and known:
                label += f" (teacher {', '.join(map(_number, known))})"
            rows.append((label, _number(metrics["before"][key]), _number(metrics["after"][key]), better))
    return rows


# ---------------------------------------------------------------- sizes and times


def describe_model(model: nn.Module, vocab_size: int) -> dict[str, int | float]:
    """``parameters`` (tied ones once), ``vocab`` (tokens), ``mb`` (10^6 bytes of the weights)."""
    parameters = {p.data_ptr(): p for p in model.parameters()}.values()
    return {
        "parameters": sum(p.numel() for p in parameters),
        "vocab": vocab_size,
        "mb": round(sum(p.numel() * p.element_size() for p in parameters) / 1e6, 2),
    }


def timing_texts(texts: Sequence[str], tokenizers: Sequence[Any], batch: int, length: int) -> list[str]:
    """``batch`` texts that every tokenizer reads in at most ``length`` tokens, as long as they can be.

    Texts are joined by spaces, from the first on and around again if there are too few, then cut at a word.
    """
    made, position = [], 0
    for _ in range(batch):
        words: list[str] = []
        # A word is a token at least, so this many are enough.
        while len(words) < length:
            words += texts[position % len(texts)].split()
            position += 1
        low, high = 1, min(len(words), length)
        while low < high:
            middle = (low + high + 1) // 2
            text = " ".join(words[:middle])
            fits = all(len(encode(tokenizer, [text], "tokenizer")[0]) <= length for tokenizer in tokenizers)
            low, high = (middle, high) if fits else (low, middle - 1)
        made.append(" ".join(words[:low]))
    return made


@torch.no_grad()
def cpu_time(model: nn.Module, tokenizer: Any, texts: Sequence[str], repeats: int = 3) -> dict[str, float | int]:
    """Seconds of one forward pass over ``texts`` as one batch, tokenizing left out: median, and the token count."""
    rows = encode(tokenizer, list(texts), "tokenizer")
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id or 0)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = torch.tensor(row)
        mask[b, : len(row)] = 1
    device = next(model.parameters()).device
    model.to("cpu").eval()
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        model(input_ids=ids, attention_mask=mask)
        seconds.append(time.perf_counter() - start)
    model.to(device)
    return {"seconds": round(statistics.median(seconds[1:]), 4), "tokens": int(mask.sum())}


def compare_models(
    teacher: Teacher, student: nn.Module, tokenizer: Any, texts: Sequence[str], batch: int, length: int
) -> dict[str, Any]:
    """Sizes of teacher and student, and the CPU time of their bodies on the same text, each with its own tokenizer."""
    length = min(length, teacher.max_positions, student.config.max_position_embeddings)
    texts = timing_texts(texts, [teacher.tokenizer, tokenizer], batch, length)
    rows = {
        "teacher": describe_model(teacher.whole, len(teacher.tokenizer))
        | cpu_time(teacher.model, teacher.tokenizer, texts),
        "student": describe_model(student, len(tokenizer)) | cpu_time(student.distilbert, tokenizer, texts),
    }
    return {
        **rows,
        "time_batch": batch,
        "time_length": length,
        "threads": torch.get_num_threads(),
        "compression": round(rows["teacher"]["mb"] / rows["student"]["mb"], 2),
        "speedup": round(rows["teacher"]["seconds"] / rows["student"]["seconds"], 2),
    }


def bench_models(models: Sequence[Teacher], texts: Sequence[str], batch: int, length: int) -> list[dict[str, Any]]:
    """One row per model: name, ``describe_model``, ``cpu_time`` on the same texts with its own tokenizer.

    Raises:
        VocabdistilError: a model cannot read ``length`` tokens.
    """
    for model in models:
        if model.max_positions < length:
            raise VocabdistilError(f"--length: {model.name} reads at most {model.max_positions} tokens, got {length}")
    texts = timing_texts(texts, [model.tokenizer for model in models], batch, length)
    return [
        {"model": model.name, **describe_model(model.model, len(model.tokenizer))}
        | cpu_time(model.model, model.tokenizer, texts)
        for model in models
    ]


@torch.no_grad()
def pooled(model: Teacher, texts: Sequence[str], max_length: int, batch: int = 32) -> torch.Tensor:
    """Mean last hidden state over the tokens of each text: ``[N, D]`` float32."""
    found = []
    for start in range(0, len(texts), batch):
        length = min(max_length, model.max_positions)
        rows = encode(model.tokenizer, list(texts[start : start + batch]), "tokenizer", length)
        ids, mask = pad(rows, model.tokenizer.pad_token_id)
        hidden = model.read(ids, mask).layers[0]
        found.append(mean_over_tokens(hidden, mask))
    return torch.cat(found)


def embedding_loyalty(teacher: Teacher, student: Teacher, texts: Sequence[str], max_length: int) -> dict[str, float]:
    """Regression loyalty of the cosine similarities of all pairs of texts: ``pearson`` and ``spearman``.

    Raises:
        VocabdistilError: fewer than three texts.
    """
    if len(texts) < 3:
        raise VocabdistilError(f"--text: expected at least 3 distinct texts, got {len(texts)}")
    ours, theirs = (pairwise_cosine(pooled(model, texts, max_length)) for model in (student, teacher))
    pearson, spearman = regression(ours, theirs)
    return {"pearson": float(pearson), "spearman": float(spearman)}


# ---------------------------------------------------------------- the terminal


class _ProgressCallback(TrainerCallback):
    """A bar with the losses on a terminal; elsewhere a line now and then; nothing if quiet."""

    def __init__(self, console: Console | None, steps: int, label: str) -> None:
        self.console, self.steps, self.label = console, steps, label
        self.bar: Progress | None = None
        self.every = max(1, steps // 20)
        self.last = 0

    def __enter__(self) -> _ProgressCallback:
        if self.console is not None and self.console.is_terminal:
            self.bar = Progress(
                TextColumn(self.label),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[losses]}"),
                console=self.console,
            )
            self.task = self.bar.add_task("", total=self.steps, losses="")
            self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        losses = "  ".join(f"{name} {logs[name]:.4g}" for name in _LOSSES if name in (logs or {}))
        if not losses or self.console is None:
            return
        if self.bar is not None:
            self.bar.update(self.task, losses=losses)
        elif state.global_step - self.last >= self.every or state.global_step == self.steps:
            self.last = state.global_step
            self.console.print(f"step {state.global_step}/{self.steps}  {losses}", highlight=False)


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 100 else f"{value:,.0f}"


def _share(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}%}"


def coverage_tables(names: tuple[str, str], tokenizers: tuple[Any, Any], report: CoverageReport) -> list[Table]:
    """The vocabularies and their text, and a column for every alignment; names and tokenizers of both sides."""
    title = f"{Path(names[0]).name} and {Path(names[1]).name} ({report.texts:,} texts)"
    vocabularies = Table(title=escape(title), title_justify="left")
    for column in ("", "teacher", "student"):
        vocabularies.add_column(column, justify="right" if column else "left")
    for label, *values in (
        ("vocabulary", f"{report.teacher_vocab:,}", f"{report.student_vocab:,}"),
        (
            "in both",
            *(f"{report.matched_vocab:,} ({report.matched_vocab / max(size, 1):.1%})"
              for size in (report.teacher_vocab, report.student_vocab)),
        ),
        ("tokens of the text", f"{report.teacher_tokens:,}", f"{report.student_tokens:,}"),
        (
            "of them in both vocabularies",
            _share(report.matched_tokens),
            _share(report.student_matched / max(report.student_tokens, 1)),
        ),
        ("of them unknown", _share(report.unk_rate_teacher, 3), _share(report.unk_rate_own, 3)),
    ):  # fmt: skip
        vocabularies.add_row(label, *values)
    alignments = Table(title="Alignments", title_justify="left")
    for column in ("", *report.methods):
        alignments.add_column(column, justify="right" if column else "left")
    rows: tuple[tuple[str, Callable[[Coverage], str]], ...] = (
        ("span pairs", lambda c: f"{c.pairs:,}"),
        ("of them 1:1", lambda c: _share(c.one_to_one)),
        ("teacher tokens in pairs", lambda c: _share(c.teacher_covered)),
        ("teacher tokens in 1:1 pairs", lambda c: _share(c.teacher_one_to_one)),
        ("student tokens in pairs", lambda c: _share(c.student_covered)),
        ("student tokens in 1:1 pairs", lambda c: _share(c.student_one_to_one)),
        ("teacher tokens in a pair", lambda c: f"{c.teacher_span:.3f}"),
        ("student tokens in a pair", lambda c: f"{c.student_span:.3f}"),
        ("text in pairs, bytes", lambda c: _share(c.covered_text)),
        ("student tokens unknown", lambda c: _share(c.student_unknown_rate, 3)),
        ("teacher tokens left out", lambda c: _examples(c.teacher_examples, tokenizers[0])),
        ("student tokens left out", lambda c: _examples(c.student_examples, tokenizers[1])),
    )
    for label, show in rows:
        alignments.add_row(label, *(show(found) for found in report.methods.values()))
    if report.reduce_equals_own is not None:
        alignments.caption = f"reduce segments {report.reduce_equals_own:.1%} of the texts as the student does"
        if _lowers(tokenizers[1], "student") and not _lowers(tokenizers[0], "teacher"):
            alignments.caption += ", and keeps the teacher's upper case, which the student's tokenizer lowers"
    return [vocabularies, alignments]


def _lowers(tokenizer: Any, name: str) -> bool:
    """Whether a tokenizer makes upper case lower."""
    normalizer = backend_of(tokenizer, name).normalizer
    return normalizer is not None and "A" not in normalizer.normalize_str("A")


def _examples(examples: Sequence[tuple[str, int]], tokenizer: Any) -> str:
    return "\n".join(f"{escape(readable(tokenizer, token))} {count:,}" for token, count in examples[:5])


class Reporter:
    """Prints to standard output unless quiet."""

    def __init__(self, quiet: bool = False) -> None:
        width = None if sys.stdout.isatty() else 110
        self.console = None if quiet else Console(width=width)

    def print(self, *objects: Any) -> None:
        if self.console is not None:
            self.console.print(*objects, highlight=False, soft_wrap=all(isinstance(o, str) for o in objects))

    def status(self, text: str) -> None:
        self.print(f"{text} ...")

    def progress(self, steps: int, label: str) -> _ProgressCallback:
        return _ProgressCallback(self.console, steps, label)

    def coverage(self, names: tuple[str, str], tokenizers: tuple[Any, Any], report: CoverageReport) -> None:
        for table in coverage_tables(names, tokenizers, report):
            self.print(table)

    def loyalty(self, found: dict[str, dict[str, float]], texts: int) -> None:
        table = Table(title=f"Loyalty ({texts} texts)", title_justify="left")
        columns = {
            "pearson": "embeddings: Pearson", "spearman": "Spearman", "label": "masked words: label",
            "probability": "probability", "pseudo_perplexity": "pseudo-perplexity (teacher)",
        }  # fmt: skip
        table.add_column("student")
        for title in columns.values():
            table.add_column(title, justify="right")
        for name, row in found.items():
            cells = [f"{row[key]:.4f}" if key in row else "-" for key in columns]
            if "teacher_pseudo_perplexity" in row:
                cells[-1] += f" ({row['teacher_pseudo_perplexity']:.4f})"
            table.add_row(Path(name).name, *cells)
        self.print(table)

    def bench(self, rows: list[dict[str, Any]], batch: int, length: int) -> None:
        title = f"CPU, batch {batch}, <= {length} tokens, {torch.get_num_threads()} threads"
        table = Table(title=title, title_justify="left")
        for column in ("model", "parameters, M", "vocabulary", "MB", "tokens", "s", "faster"):
            table.add_column(column, justify="left" if column == "model" else "right")
        for row in rows:
            table.add_row(
                Path(row["model"]).name,
                f"{row['parameters'] / 1e6:.2f}",
                f"{row['vocab']:,}",
                f"{row['mb']:.1f}",
                f"{row['tokens']:,}",
                f"{row['seconds']:.4f}",
                f"{rows[0]['seconds'] / row['seconds']:.1f}x",
            )
        self.print(table)

    def results(self, metrics: dict[str, Any], out: Path) -> None:
        models = metrics["models"]
        sizes = Table(title="Teacher and student", title_justify="left")
        for column in ("", "teacher", "student", "ratio"):
            sizes.add_column(column, justify="left" if not column else "right")
        teacher, student = models["teacher"], models["student"]
        for label, key, form in (
            ("parameters, M", "parameters", lambda v: f"{v / 1e6:.2f}"),
            ("vocabulary, tokens", "vocab", lambda v: f"{v:,}"),
            ("size, MB", "mb", lambda v: f"{v:.1f}"),
            (
                f"CPU s, batch {models['time_batch']}, <= {models['time_length']} tokens, {models['threads']} threads",
                "seconds",
                lambda v: f"{v:.3f}",
            ),
        ):
            sizes.add_row(label, form(teacher[key]), form(student[key]), f"{teacher[key] / student[key]:.1f}x")
        self.print(sizes)
        changes = Table(title=f"Held-out text ({metrics['held_out_texts']} texts)", title_justify="left")
        for column in ("", "untrained", "trained", "better is"):
            changes.add_column(column, justify="left" if column in ("", "better is") else "right")
        for row in _held_out_rows(metrics):
            changes.add_row(*row)
        self.print(changes)
        self.print(f"{metrics['steps']} steps in {metrics['train_seconds']:.0f} s. The student is in {out}")


# ---------------------------------------------------------------- the model card


def model_card(config: DistillConfig, metrics: dict[str, Any]) -> str:
    """``README.md`` of the student's folder."""
    teacher, student = metrics["models"]["teacher"], metrics["models"]["student"]
    names = ", ".join(f"`{Path(name).name}`" for name in metrics["teacher"])
    rows = "\n".join(f"| {' | '.join(row[:3])} |" for row in _held_out_rows(metrics))
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
tags: [distillation, vocabdistil]
---

# {Path(config.out).name}

A DistilBERT ({config.architecture.layers} layers, width {config.architecture.dim}) with \
{student["vocab"]:,} tokens, distilled by vocabdistil from {names} ({teacher["vocab"]:,} tokens).

| | parameters, M | vocabulary | MB | CPU s (batch {metrics["models"]["time_batch"]}, \
up to {metrics["models"]["time_length"]} tokens) |
| --- | --- | --- | --- | --- |
| teacher | {teacher["parameters"] / 1e6:.2f} | {teacher["vocab"]:,} | {teacher["mb"]:.1f} | {teacher["seconds"]:.3f} |
| student | {student["parameters"] / 1e6:.2f} | {student["vocab"]:,} | {student["mb"]:.1f} | {student["seconds"]:.3f} |

Held-out text ({metrics["held_out_texts"]} texts):

| | untrained | trained |
| --- | --- | --- |
{rows}

```python
from transformers import AutoModel, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{Path(config.out).name}")
model = AutoModel.from_pretrained("{Path(config.out).name}")
```

`projection.safetensors`, if there, maps the student's hidden states to the teacher's width (`[D_t, D_s]`);
`remap.vdrt` maps the teacher's tokens to the student's; `metrics.json` and `training_log.jsonl` have all figures.
"""
