"""What models are worth on tasks: pairs of sentences with scores, and texts with labels."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.names import display_names
from ..core.progress import counting
from ..models.sentence import SentenceSettings
from ..models.teachers import Teacher
from .chart import draw_chart
from .loyalty import label, probability, regression
from .options import EvaluateOptions
from .student import Embedder, embed, load_embedder
from .tables import Labels, read_labels, read_scored
from .timing import describe_model

__all__ = [
    "Labels",
    "Pairs",
    "evaluate",
    "pairs_score",
    "pairs_scores",
    "probe_scores",
    "read_labels",
    "read_pairs",
    "split_labels",
]

_TEST_SHARE = 0.2
_WARM_UP_TEXTS = 8


@dataclass(frozen=True)
class Pairs:
    """Pairs of sentences, and how alike each is said to be.

    Attributes:
        name: the file.
        left, right: the sentences, ``n`` of each.
        scores: float64 ``[n]``, on any scale.
    """

    name: str
    left: list[str]
    right: list[str]
    scores: Tensor


def read_pairs(path: str | os.PathLike, argument: str = "pairs") -> Pairs:
    """Reads a CSV file with the columns sentence, sentence, score.

    A first line whose third column is no number is a header.

    Args:
        argument: what an error names.

    Raises:
        VocabdistilError: as :func:`.tables.read_scored`.
    """
    left, right, scores = read_scored(path, argument)
    return Pairs(os.fspath(path), left, right, torch.tensor(scores, dtype=torch.float64))


def split_labels(labels: Sequence[str], seed: int) -> tuple[list[int], list[int]]:
    """Which texts a probe is trained on, and which it is tested on: of each class a fifth, at least one, drawn with
    ``seed``.

    Args:
        labels: at least 2 of each class.

    Returns:
        Ascending places in ``labels``.
    """
    drawn: set[int] = set()
    generator = random.Random(seed)
    for name in sorted(set(labels)):
        places = [i for i, other in enumerate(labels) if other == name]
        drawn |= set(generator.sample(places, max(1, round(_TEST_SHARE * len(places)))))
    return [i for i in range(len(labels)) if i not in drawn], sorted(drawn)


def _cosines(
    model: Teacher,
    pairs: Pairs,
    max_length: int,
    settings: SentenceSettings | None,
    projection: Tensor | None = None,
    bias: Tensor | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Float64 ``[n]``."""
    texts = [*pairs.left, *pairs.right]
    vectors = embed(model, texts, max_length, settings, projection, bias, advance).double()
    left, right = vectors.chunk(2)
    return F.cosine_similarity(left, right)


def _correlations(scores: Tensor, truth: Tensor) -> dict[str, float]:
    pearson, spearman = regression(scores, truth)
    return {"spearman": float(spearman), "pearson": float(pearson)}


def pairs_score(
    model: Teacher,
    pairs: Pairs,
    max_length: int,
    settings: SentenceSettings | None = None,
    projection: Tensor | None = None,
    bias: Tensor | None = None,
) -> dict[str, float]:
    """How the cosines of a model's vectors agree with the scores of pairs: light enough for every checkpoint.

    Args:
        model: where it is, in evaluation mode; its prompt is put before every sentence.
        max_length: tokens of a sentence at most.
        settings: how it makes vectors; None: the mean of its last hidden states.
        projection, bias: ``[D_t, D_s]``, ``[D_t]``, if ``settings`` are those of a wider teacher.

    Returns:
        ``spearman`` and ``pearson``; NaN where all cosines are the same.
    """
    return _correlations(_cosines(model, pairs, max_length, settings, projection, bias), pairs.scores)


def _timed(model: Embedder, texts: Sequence[str], run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What ``run`` gives, and its seconds; the first texts are read before, as a model's first call takes longer."""
    embed(model.model, texts[:_WARM_UP_TEXTS], 16, model.settings)
    start = time.perf_counter()
    return run(), round(time.perf_counter() - start, 4)


def _finite(value: float) -> float | None:
    """A figure as JSON has it."""
    return value if math.isfinite(value) else None


def _row(model: Embedder, scores: dict[str, float], loyalty: dict[str, float] | None, seconds: float) -> dict[str, Any]:
    return {
        "model": model.model.name,
        **{name: _finite(value) for name, value in scores.items()},
        "seconds": seconds,
        "loyalty": None if loyalty is None else {name: _finite(value) for name, value in loyalty.items()},
    }


def _with_relative(rows: list[dict[str, Any]], score: str) -> list[dict[str, Any]]:
    """With every score beside the first model's, where that is above 0."""
    first = rows[0][score]
    for row in rows:
        row["relative"] = row[score] / first if first and first > 0 and row[score] is not None else None
    return rows


def pairs_scores(models: Sequence[Embedder], pairs: Pairs, max_length: int, quiet: bool = True) -> list[dict[str, Any]]:
    """A row for every model: ``model``, ``spearman``, ``pearson``, ``seconds``, ``loyalty`` and ``relative``.

    ``seconds`` is what reading all sentences took, tokenizing among it. ``loyalty`` (None for the first model) is the
    regression loyalty (arXiv 2112.12650), ``spearman`` and ``pearson`` of a model's cosines with those of the first;
    ``relative`` is Spearman's correlation divided by the first model's. What is undefined is None.

    Args:
        models: the first is the yardstick.
        max_length: tokens of a sentence at most, fewer where a folder says so.
        quiet: show no progress.
    """
    rows: list[dict[str, Any]] = []
    first: Tensor | None = None
    with counting(f"Texts of {Path(pairs.name).name}", 2 * len(pairs.left) * len(models), quiet) as advance:
        for model in models:
            score = partial(_cosines, model.model, pairs, max_length, model.settings, advance=advance)
            cosines, seconds = _timed(model, pairs.left, score)
            loyalty = None if first is None else _correlations(cosines, first)
            first = cosines if first is None else first
            rows.append(_row(model, _correlations(cosines, pairs.scores), loyalty, seconds))
    return _with_relative(rows, "spearman")


def _probe(vectors: Tensor, labels: Labels, train: list[int], test: list[int]) -> tuple[Tensor, dict[str, float]]:
    """Log-probabilities ``[m, C]`` of the test part, the classes in order of their names; accuracy and macro F1."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # Standardised, so that the penalty weighs the same for every model: lengths of vectors differ between models, and
    # those of plain encoders share a large part, beside which at length 1 little of what differs would be left.
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    truth = [labels.labels[i] for i in test]
    values = vectors.double().numpy()
    probe.fit(values[train], [labels.labels[i] for i in train])
    guesses = probe.predict(values[test])
    scores = {
        "accuracy": sum(map(str.__eq__, guesses.tolist(), truth)) / len(truth),
        "macro_f1": float(f1_score(truth, guesses, average="macro", zero_division=0)),
    }
    return torch.from_numpy(probe.predict_proba(values[test])).log(), scores


def probe_scores(
    models: Sequence[Embedder], labels: Labels, max_length: int, seed: int = 0, quiet: bool = True
) -> list[dict[str, Any]]:
    """A row for every model: ``model``, ``accuracy``, ``macro_f1``, ``seconds``, ``loyalty`` and ``relative``.

    A linear probe (logistic regression with the penalty ``|w|^2 / 2``) on each model's own frozen vectors, standardised
    by the mean and deviation of the part that it is trained on; figures are of the other part, see
    :func:`split_labels`. ``loyalty`` (None for the first model) is the label and the probability loyalty
    (arXiv 2109.03228), ``label`` and ``probability``, of a model's probe to the first model's; ``relative`` is the
    accuracy divided by the first model's; ``seconds`` is what reading all texts took, tokenizing among it.

    Args:
        models: the first is the yardstick.
        max_length: tokens of a text at most, fewer where a folder says so.
        seed: of the split.
        quiet: show no progress.
    """
    train, test = split_labels(labels.labels, seed)
    rows: list[dict[str, Any]] = []
    first: Tensor | None = None
    with counting(f"Texts of {Path(labels.name).name}", len(labels.texts) * len(models), quiet) as advance:
        for model in models:
            read = partial(embed, model.model, labels.texts, max_length, model.settings, advance=advance)
            vectors, seconds = _timed(model, labels.texts, read)
            guessed, scores = _probe(vectors, labels, train, test)
            loyalty = None
            if first is not None:
                loyalty = {"label": float(label(guessed, first)), "probability": float(probability(guessed, first))}
            first = guessed if first is None else first
            rows.append(_row(model, scores, loyalty, seconds))
    return _with_relative(rows, "accuracy")


def _several(value: Any) -> list[Any]:
    """One thing or several, as a list."""
    single = isinstance(value, (str, os.PathLike, Pairs, Labels)) or not isinstance(value, Iterable)
    return [value] if single else list(value)


def _describe(model: Embedder, shown: str) -> dict[str, Any]:
    size = describe_model(model.model.model, len(model.model.tokenizer))
    modules = model.settings.modules if model.settings is not None else ()
    more = [weight for module in modules for weight in module.weights.values()]
    return {
        "model": model.model.name,
        "name": shown,
        "parameters": size["parameters"] + sum(weight.numel() for weight in more),
        "vocab": size["vocab"],
        "prompt": model.model.prompt,
        "pooling": list(model.settings.pooling) if model.settings is not None else ["mean"],
    }


def evaluate(
    models: str | os.PathLike | Sequence[str | os.PathLike],
    pairs: str | os.PathLike | Pairs | Sequence[str | os.PathLike | Pairs] = (),
    labels: str | os.PathLike | Labels | Sequence[str | os.PathLike | Labels] = (),
    *,
    prompt: str | None = None,
    max_length: int = 512,
    seed: int = 0,
    picture: str | os.PathLike | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    quiet: bool = True,
) -> dict[str, Any]:
    """What models are worth on tasks, on the CPU, beside the first of them.

    A sentence-transformers folder makes vectors as it says (prompt, pooling, Dense modules, most tokens of a text), any
    other model the mean of its last hidden states.

    Args:
        models: folders or names on the Hugging Face Hub; the first is the yardstick.
        pairs: CSV files (sentence, sentence, score) or :class:`Pairs`, see :func:`read_pairs`.
        labels: CSV files (text, label) or :class:`Labels`, see :func:`read_labels`.
        prompt: what stands before every text; None: what each folder says, or nothing.
        max_length: tokens of a text at most, fewer where a folder or a model allows fewer.
        seed: of the split of labelled texts.
        picture: an ``.svg`` or ``.png`` file to write: score against parameters and against CPU time.
        threads: of torch on the CPU; None: leave it.
        trust_remote_code: run code that comes with a model.
        quiet: show no progress.

    Returns:
        What JSON can hold. ``models``: of each ``model`` (as it was given), ``name`` (shorter), ``parameters`` (of the
        body, without an MLM head, and of Dense modules), ``vocab``, ``prompt`` and ``pooling``. ``tasks``: of each
        ``kind`` (``"pairs"`` or ``"labels"``), ``file``, ``name`` (shorter), ``score`` (which figure of the results
        ``relative`` is of), ``size`` (``pairs``; or ``train``, ``test`` and ``classes``) and ``results``, what
        :func:`pairs_scores` or :func:`probe_scores` gives, a row for every model in their order. And ``max_length``,
        ``seed`` and ``threads``.

    Raises:
        VocabdistilError: an option, a file or a model that cannot be; before any work.
    """
    pairs, labels = _several(pairs), _several(labels)
    options = EvaluateOptions(models, pairs, labels, prompt, max_length, seed, picture, threads, trust_remote_code)
    given = [item if isinstance(item, Pairs) else read_pairs(item) for item in pairs]
    classed = [item if isinstance(item, Labels) else read_labels(item) for item in labels]
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = [load_embedder(name, "models", prompt, trust_remote_code) for name in options.models]
    files = iter(display_names([*(task.name for task in given), *(task.name for task in classed)]))
    shown = display_names([model.model.name for model in loaded])
    found = []
    for task in given:
        about = {"kind": "pairs", "file": task.name, "name": next(files), "score": "spearman"}
        size, results = {"pairs": len(task.left)}, pairs_scores(loaded, task, max_length, quiet)
        found.append({**about, "size": size, "results": results})
    for texts in classed:
        train, test = split_labels(texts.labels, seed)
        size = {"train": len(train), "test": len(test), "classes": len(set(texts.labels))}
        about = {"kind": "labels", "file": texts.name, "name": next(files), "score": "accuracy"}
        found.append({**about, "size": size, "results": probe_scores(loaded, texts, max_length, seed, quiet)})
    report = {
        "models": [_describe(*row) for row in zip(loaded, shown, strict=True)],
        "tasks": found,
        "max_length": max_length,
        "seed": seed,
        "threads": torch.get_num_threads(),
    }
    if picture is not None:
        draw_chart(report, picture)
    return report
