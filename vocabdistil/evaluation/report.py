"""Tables for the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from rich.text import Text

from ..alignment.families import backend_of
from ..alignment.picture import readable
from ..core.errors import printable, spell
from ..core.names import display_names

if TYPE_CHECKING:
    from ..alignment.coverage import Coverage, CoverageReport

__all__ = [
    "ENOUGH_PAIRS",
    "FEW_STEPS",
    "NEXT_TOKENS",
    "baseline_lines",
    "bench_table",
    "checkup_line",
    "coverage_tables",
    "draft_line",
    "few_pairs_line",
    "held_out_rows",
    "loyalty_table",
    "many",
    "next_line",
    "no_steps_line",
    "mixed_line",
    "next_tokens_table",
    "plan_line",
    "result_tables",
    "size_table",
    "start_line",
    "warnings",
    "task_tables",
    "whitened_line",
    "whitening_line",
]

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
    ("dev", "dev pairs, Spearman", "higher"),
)

# What a task's rows hold: scores, and loyalty to the first model.
_CORRELATIONS = {"spearman": "Spearman", "pearson": "Pearson"}
_TASKS = {
    "pairs": (_CORRELATIONS, _CORRELATIONS),
    "labels": ({"accuracy": "accuracy", "macro_f1": "macro\nF1"}, {"label": "label", "probability": "probability"}),
}
_LONGEST_NAME = 28
# What the figure is, wherever it stands.
_REGRESSION = "regression loyalty: how the cosines of all texts with each other, most of them unrelated, agree with the"
# What each alignment pairs.
_ALIGNMENTS = {
    "boundary": "the shortest spans over the same text",
    "word": "whole words",
    "match": "equal tokens",
    "reduce": "tokens of the teacher and the student's that spell them, which is what the student reads",
}
# What :func:`vocabdistil.evaluation.next_tokens.compare_decoders` finds.
NEXT_TOKENS = (
    ("agreement", "same most probable next token", "{:.1%}"),
    ("next_token_kl", "KL from the teacher, nats", "{:.4f}"),
    ("kept_probability", "what the teacher gives to the student's tokens", "{:.1%}"),
)
# Over so many steps the rate rises at least: fewer teach nothing.
FEW_STEPS = 10
# Pairs with scores that are enough to choose by: the standard error of what they say is then below 0.1.
ENOUGH_PAIRS = 100


def held_out_rows(metrics: dict[str, Any]) -> list[tuple[str, ...]]:
    """Label, before, after, each baseline and which is better, of what was measured."""
    rows, baselines = [], metrics.get("baselines", {}).values()
    for key, label, better in _HELD_OUT:
        if key in metrics["after"] and key in metrics["before"]:
            known = [v for v in metrics["teacher_pseudo_perplexity"] if v is not None]
            if key == "pseudo_perplexity" and known:
                label += f" (teacher {', '.join(map(_number, known))})"
            found = (metrics["before"], metrics["after"], *baselines)
            rows.append((label, *(_number(row[key]) if key in row else "-" for row in found), better))
    return rows


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 100 else f"{value:,.0f}"


def many(count: int, noun: str) -> str:
    """``1 step``, ``2 steps``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _share(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}%}"


def coverage_tables(names: tuple[str, str], tokenizers: tuple[Any, Any], report: CoverageReport) -> list[Table]:
    """The vocabularies and their text, and a column for every alignment; names and tokenizers of both sides."""
    title = f"{' and '.join(display_names(names))} ({report.texts:,} texts)"
    vocabularies = Table(title=_verbatim(title), title_justify="left")
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
    rows: tuple[tuple[str, Callable[[Coverage], str | Text]], ...] = (
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
        cells = [show(found) for found in report.methods.values()]
        if any(map(len, cells)):
            alignments.add_row(label, *cells)
    about = [f"{method} pairs {_ALIGNMENTS[method]}" for method in report.methods]
    if report.reduce_equals_own is not None:
        about.append(f"reduce segments {report.reduce_equals_own:.1%} of the texts as the student does")
        if _lowers(tokenizers[1], "student") and not _lowers(tokenizers[0], "teacher"):
            about[-1] += ", and keeps the teacher's upper case, which the student's tokenizer lowers"
    _explain(alignments, *about)
    return [vocabularies, alignments]


def _lowers(tokenizer: Any, name: str) -> bool:
    """Whether a tokenizer makes upper case lower."""
    normalizer = backend_of(tokenizer, name).normalizer
    return normalizer is not None and "A" not in normalizer.normalize_str("A")


def _explain(table: Table, *lines: str) -> None:
    """Says below a table what is in it."""
    table.caption, table.caption_justify = "\n".join(lines), "left"


def _verbatim(text: str) -> Text:
    """A name from outside as it is: on no console markup, nor control characters."""
    return Text(printable(text))


def _examples(examples: Sequence[tuple[str, int]], tokenizer: Any) -> Text:
    return _verbatim("\n".join(f"{readable(tokenizer, token)} {count:,}" for token, count in examples[:5]))


def loyalty_table(found: dict[str, dict[str, float]], texts: str) -> Table:
    """A row for every student: how far it agrees with the teacher on these texts."""
    table = Table(title=f"Loyalty ({texts})", title_justify="left")
    columns = {
        "pearson": "regression\nloyalty:\nPearson", "spearman": "Spearman", "cosine": "cosine of\nthe vectors",
        "label": "masked\nwords:\nlabel", "probability": "probability",
        "pseudo_perplexity": "pseudo-perplexity\n(teacher)",
    }  # fmt: skip
    columns = {key: title for key, title in columns.items() if any(key in row for row in found.values())}
    table.add_column("student")
    for title in columns.values():
        table.add_column(title, justify="right")
    if "spearman" in columns:
        _explain(table, f"{_REGRESSION} teacher's; see also evaluate")
    for name, row in zip(display_names(list(found)), found.values(), strict=True):
        cells = [f"{row[key]:.4f}" if key in row else "-" for key in columns]
        if "teacher_pseudo_perplexity" in row:
            cells[-1] += f" ({row['teacher_pseudo_perplexity']:.4f})"
        table.add_row(_verbatim(name), *cells)
    return table


def next_tokens_table(found: dict[str, float], texts: str) -> Table:
    """How a decoder follows its teacher on these texts, and what both are worth on them."""
    table = Table(title=f"Next tokens ({texts})", title_justify="left")
    for column in ("", "teacher", "student"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("bits per byte", _number(found["teacher_bits_per_byte"]), _number(found["bits_per_byte"]))
    for key, label, form in NEXT_TOKENS:
        if key in found:
            table.add_row(label, "", form.format(found[key]))
    _explain(table, f"compared at {found['places']:,} ends of tokens that both have read, over the tokens of both")
    return table


def bench_table(rows: list[dict[str, Any]], batch: int, length: int) -> Table:
    """A row for every model; the first is the yardstick."""
    title = f"CPU, batch {batch}, <= {length} tokens, {many(torch.get_num_threads(), 'thread')}"
    table = Table(title=title, title_justify="left")
    for column in ("model", "parameters, M", "vocabulary", "MB", "tokens", "s", "faster"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, row in zip(display_names([row["model"] for row in rows]), rows, strict=True):
        table.add_row(
            _verbatim(name),
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['vocab']:,}",
            f"{row['mb']:.1f}",
            f"{row['tokens']:,}",
            f"{row['seconds']:.4f}",
            f"{rows[0]['seconds'] / row['seconds']:.1f}x",
        )
    return table


def _figure(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else f"{value:{form}}"


def task_tables(found: dict[str, Any]) -> list[Table]:
    """A table for every task, a row for every model, of what :func:`vocabdistil.evaluate` found."""
    tables = []
    for task in found["tasks"]:
        (columns, loyalty), size = _TASKS[task["kind"]], task["size"]
        if task["kind"] == "pairs":
            about = many(size["pairs"], "pair")
        else:
            about = f"{size['classes']} classes, probes of {size['train']:,} texts tested on {size['test']:,}"
        table = Table(title=_verbatim(f"{task['name']} ({about}; threads: {found['threads']})"), title_justify="left")
        # The figures' heads give way first: a name must be told from the others.
        longest = max(len(model["name"]) for model in found["models"])
        table.add_column("model", overflow="fold", min_width=min(longest, _LONGEST_NAME))
        heads = [*columns.values(), "of the\nfirst", *(f"loyalty:\n{title}" for title in loyalty.values()), "CPU s"]
        for head in ("parameters,\nM", *heads):
            table.add_column(head, justify="right")
        for model, row in zip(found["models"], task["results"], strict=True):
            table.add_row(
                _verbatim(model["name"]),
                f"{model['parameters'] / 1e6:.2f}",
                *(_figure(row[key]) for key in columns),
                _figure(row["relative"], ".1%"),
                *(_figure((row["loyalty"] or {}).get(key)) for key in loyalty),
                f"{row['seconds']:.2f}",
            )
        _explain(table, *_about_task(task, len(found["models"])))
        tables.append(table)
    return tables


def _about_task(task: dict[str, Any], models: int) -> Iterator[str]:
    """What must be known to read its table."""
    yield "CPU s: what the model takes to read all texts, tokenizing among it"
    if models > 1:
        yield "loyalty: how far it agrees with the first model, right or wrong"
    if task["kind"] == "pairs" and task["size"]["pairs"] < ENOUGH_PAIRS:
        yield few_pairs_line(task["size"]["pairs"])


def few_pairs_line(pairs: int) -> str:
    """That there are too few pairs to go by."""
    return f"Caution: the score of {many(pairs, 'pair')} is largely chance; take {ENOUGH_PAIRS} or more"


def start_line(tokens: dict[str, dict[str, float]]) -> str:
    """What the student's tokens start from, as :meth:`vocabdistil.models.start.Start.summary` counted it."""
    names = {
        "shared": "as the teacher's", "role": "as those of their role", "composed": "as means of the teacher's pieces",
        "none": "as noise",
    }  # fmt: skip
    shares = tokens.get("text", {})
    parts = [
        f"{tokens['tokens'][kind]:,} {name}" + (f" ({shares[kind]:.1%} of the text)" if kind in shares else "")
        for kind, name in names.items()
        if tokens["tokens"][kind]
    ]
    return f"Tokens start: {', '.join(parts)}"


def draft_line(draft: dict[str, Any], texts: int) -> str:
    """What a draft head can predict."""
    return (
        f"The draft head predicts {draft['tokens']:,} of {draft['target_tokens']:,} tokens, {draft['mb']:.1f} of "
        f"{draft['target_mb']:.1f} MB: {draft['covered']:.2%} of the tokens of {many(texts, 'held-out text')}"
    )


def plan_line(steps: int, texts: int, available: int, seconds: float) -> str:
    """What training will be, before its first step."""
    rounds = steps * texts / available
    minutes = steps * seconds / 60
    about = f"{minutes:.0f} min" if minutes >= 1.5 else f"{steps * seconds:.0f} s"
    batches = f"{many(steps, 'step')} of {many(texts, 'text')}"
    return f"Training: {batches} ({rounds:.2g} times {available:,} texts), about {about}"


def whole_line(whiten: float) -> str:
    """That there is a shorter way: training two teachers' students of this kind made none of them better."""
    told = f" with {spell('whiten', whiten)}" if whiten else ""
    return (
        "All of the teacher's layers are kept: where it was measured, such a student gained nothing from training, and "
        f"trim{told} makes it in a minute"
    )


def mixed_line(share: float) -> str:
    """How far the weights went back towards the start."""
    return f"The student keeps {share:.0%} of the way from its start to the trained weights"


def lengths_line(lengths: Sequence[int], whole: float) -> str:
    """How much of each row a teacher and a student that are decoders read, where nobody said it."""
    asked = f"{spell('max_length')} and {spell('student_max_length')} change it"
    return f"Read are {lengths[0]} teacher and {lengths[1]} student tokens of a row, {whole:.0%} of rows whole; {asked}"


def bits_line(teacher: float, student: float, texts: int) -> str:
    """What teacher and student are worth before training."""
    return f"Held-out bits per byte ({many(texts, 'text')}): teacher {teacher:.4f}, student {student:.4f}"


def no_steps_line(minutes: float, gone: float, seconds: float) -> str:
    """That a budget is too short to learn anything in, and nothing is trained."""
    return (
        f"Nothing is trained: {gone / 60:,.1f} of {minutes:g} minutes are gone, and what comes after training leaves "
        f"no room for {FEW_STEPS} steps; a hundred would take {100 * seconds / 60:,.1f} more"
    )


def next_line(teacher: str, student: str) -> str:
    """What to do with a student."""
    command = f"vocabdistil evaluate --model {shlex.join([teacher, student])} --pairs FILE"
    return (
        f"Next: its README.md has the code that loads it; {command} says what it is worth on pairs of sentences with "
        "scores"
    )


def checkup_line(step: int, row: dict[str, float]) -> str:
    """What was seen at a checkpoint."""
    score = f", dev pairs {row['dev']:.4f} (Spearman)" if "dev" in row else ""
    return f"step {step}: held-out loss {row['loss']:.4f}{score}"


def whitened_line(whitened: dict[str, float]) -> str:
    """That the student's vectors will not be comparable with its teacher's as they were."""
    names = ", ".join(display_names(list(whitened)))
    return (
        f"The vectors of {names} are whitened on the text: the student's mostly rank texts of that kind better, but "
        f"are not to be mixed with those of the teacher as it was; for that take {spell('whiten', 0)}"
    )


def whitening_line(what: str, scores: Sequence[float | None], kept: bool) -> str:
    """Which start is kept: from a whitened teacher, and if there was time from one that is not.

    Args:
        what: has the scores.
    """
    line = f"On the dev pairs the {what} {_figure(scores[0])} (Spearman) if the teacher is whitened"
    if len(scores) == 1:
        return f"{line}; there is no time to see whether it is better if not"
    return f"{line}, {_figure(scores[1])} if not: it is {'' if kept else 'not '}whitened"


def baseline_lines(baselines: dict[str, dict[str, float]], before: dict[str, float]) -> list[str]:
    """What the student must beat, and where it starts from."""
    lines = [f"To beat: {name}: {_agreement(row)}" for name, row in baselines.items()]
    return [*lines, f"The student starts from: {_agreement(before)}"]


def _agreement(row: dict[str, float]) -> str:
    score = f", dev pairs {row['dev']:.4f}" if "dev" in row else ""
    return f"regression loyalty {row['spearman']:.4f} (Spearman){score}"


def warnings(metrics: dict[str, Any]) -> list[str]:
    """What a user should know before using the student: figures that got worse, or that were no better without."""
    found = []
    for key, label, better in _HELD_OUT:
        if key in metrics["before"] and key in metrics["after"]:
            before, after = metrics["before"][key], metrics["after"][key]
            worse = after < before if better == "higher" else after > before
            if worse and _number(after) != _number(before):
                found.append(f"{label} got worse: {_number(before)} before training, {_number(after)} after")
    if metrics["share"] == 0:
        why = "training did not help" if metrics["steps"] else "there was no time to train"
        what = "more text or a lower rate" if metrics["steps"] >= FEW_STEPS else "more steps"
        found.append(f"{why}: the student is what it started from; try {what}")
    for name, row in metrics["baselines"].items():
        if row["spearman"] > metrics["after"]["spearman"] + 1e-4:  # not by rounding alone
            theirs, ours = _number(row["spearman"]), _number(metrics["after"]["spearman"])
            found.append(
                f"the {name} follows the teacher better: regression loyalty {theirs}, the student's {ours} (Spearman)"
            )
    models = metrics["models"]
    if models["student"]["seconds"] >= models["teacher"]["seconds"]:
        times = [f"{models[side]['seconds']:.3f} s" for side in ("student", "teacher")]
        found.append(f"the student is no faster than its teacher: {times[0]} and {times[1]} on the CPU")
    return found


def size_table(models: dict[str, Any]) -> Table:
    """Sizes and CPU time of teacher and student, as :func:`vocabdistil.evaluation.timing.compare_models` found them."""
    table = Table(title="Teacher and student", title_justify="left")
    for column in ("", "teacher", "student", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    teacher, student = models["teacher"], models["student"]
    for label, key, form in (
        ("parameters, M", "parameters", lambda v: f"{v / 1e6:.2f}"),
        ("vocabulary, tokens", "vocab", lambda v: f"{v:,}"),
        ("size, MB", "mb", lambda v: f"{v:.1f}"),
        (
            f"one pass on the CPU, s (batch {models['time_batch']}, <= {models['time_length']} tokens, "
            + many(models["threads"], "thread") + ")",
            "seconds",
            lambda v: f"{v:.3f}",
        ),
    ):
        table.add_row(label, form(teacher[key]), form(student[key]), f"{teacher[key] / student[key]:.1f}x")
    return table


def result_tables(metrics: dict[str, Any]) -> list[Table]:
    """Sizes of teacher and student, and the student on held-out text before and after training, beside what it must
    beat."""
    baselines = metrics["baselines"]
    title = f"Held-out text ({metrics['held_out_texts']} texts, by which no checkpoint was chosen)"
    changes = Table(title=title, title_justify="left")
    for column in ("", "untrained", "trained", *baselines, "better is"):
        changes.add_column(column, justify="left" if column in ("", "better is") else "right")
    for row in held_out_rows(metrics):
        changes.add_row(*row)
    sizes = [f"{row['parameters'] / 1e6:.2f}" for row in (metrics["models"]["student"], *baselines.values())]
    changes.add_row("parameters, M", sizes[0], *sizes, "")
    _explain(changes, f"{_REGRESSION} teacher's")
    return [size_table(metrics["models"]), changes]
