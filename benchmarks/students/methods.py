"""The ways to a student, all measured alike: :data:`METHODS`, and :func:`measure`."""

from __future__ import annotations

import importlib.util
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import vocabdistil as vd
from vocabdistil.distillation.job import MOST_HELD_OUT
from vocabdistil.distillation.text import read_text
from vocabdistil.distillation.text_store import split_text
from vocabdistil.evaluation.loyalty import regression
from vocabdistil.evaluation.student import load_embedder
from vocabdistil.evaluation.tasks import Pairs, pairs_score, read_pairs

MAX_LENGTH = 512
# Steps that are timed before the training, the first of which warm up, and texts that the teacher reads meanwhile.
_TIMED_STEPS, _WARM_UP, _TIMED_TEXTS = 22, 2, 256
# What vd.trim says of time is not needed here.
_CHEAP = {"time_batch": 8, "time_length": 128, "quiet": True}


@dataclass(frozen=True)
class Task:
    """What a method is told.

    Attributes:
        teachers: folders.
        prompt: of the first.
        text, dev: files.
        out: a folder that is empty.
    """

    teachers: Sequence[str]
    prompt: str
    text: Path
    dev: Path
    out: Path
    seed: int
    options: dict[str, Any]


@dataclass(frozen=True)
class Made:
    """What a method says of the student that it made.

    Attributes:
        score: Spearman's correlation on the dev pairs.
        start: the same before any training; None: nothing was trained.
        steps: of training.
        text_tokens: the student's tokens of a text for one of the teacher's.
    """

    parameters: int
    tokens: int
    score: float
    start: float | None = None
    steps: int | None = None
    text_tokens: float | None = None


def measure(folder: str | Path, pairs: Pairs, prompt: str) -> float:
    """Spearman's correlation of the human scores with the cosines of mean-pooled last hidden states."""
    return pairs_score(load_embedder(folder, prompt=prompt).model, pairs, MAX_LENGTH)["spearman"]


def _described(metrics: dict[str, Any]) -> dict[str, Any]:
    size, covered = metrics["models"]["student"], metrics["coverage"][0]
    share = covered["student_tokens"] / covered["teacher_tokens"]
    return {"parameters": size["parameters"], "tokens": size["vocab"], "text_tokens": share}


def _trimmed(task: Task, out: Path, **options: Any) -> vd.DistillResult:
    given = {"teacher": task.teachers[0], "text": [task.text], "prompt": task.prompt, "seed": task.seed}
    return vd.trim(out=out, **given, **_CHEAP, **options)


def trim(task: Task) -> Made:
    """No training."""
    result = _trimmed(task, task.out / "student", **task.options)
    return Made(score=measure(result.path, read_pairs(task.dev), task.prompt), **_described(result.metrics))


def distill(task: Task) -> Made:
    """``vd.distill``; ``weights`` in the options names every loss that counts. It never sees the dev pairs: it would
    choose by them what they are to judge."""
    options = dict(task.options)
    if "weights" in options:
        # What is not named would be the recipe's.
        weights = asdict(vd.LossWeights(**options["weights"]))
        options["weights"] = ",".join(f"{name}={value}" for name, value in weights.items())
    result = vd.distill(
        teacher=list(task.teachers), text=[task.text], prompt=task.prompt, seed=task.seed,
        out=task.out / "student", **_CHEAP, **options,
    )  # fmt: skip
    score = measure(result.path, read_pairs(task.dev), task.prompt)
    return Made(score=score, steps=result.metrics["steps"], **_described(result.metrics))


def model2vec(task: Task) -> Made:
    """Static vectors, a row for every token: of the teacher's whole vocabulary, or of what is left of it when it is
    trimmed to ``vocab_size``. Sentences are read without a prompt, as the package reads them."""
    from model2vec.distill import distill_from_model
    from transformers import AutoModel, AutoTokenizer

    folder, (name, *_) = task.out / "trimmed", task.teachers
    if "vocab_size" in task.options:
        name = str(_trimmed(task, folder, vocab_size=task.options["vocab_size"]).path)
    tokenizer, body = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name)
    static = distill_from_model(body, tokenizer, device="cpu", pca_dims=task.options["pca_dims"])
    pairs = read_pairs(task.dev)
    left, right = (
        torch.from_numpy(static.encode(side, use_multiprocessing=False)).double() for side in (pairs.left, pairs.right)
    )
    score = regression(torch.cosine_similarity(left, right), pairs.scores).spearman
    extra = 0 if static.weights is None else static.weights.size
    return Made(static.embedding.size + extra, len(static.tokens), float(score))


class _Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    @property
    def seconds_per_step(self) -> float:
        timed = self.ends[min(_WARM_UP, len(self.ends) - 2) :]
        return (timed[-1] - timed[0]) / (len(timed) - 1)


def steps_within(seconds: float, step: float, text: float, batch: int, texts: int) -> int:
    """How many steps fit into a time, at least one.

    Args:
        step: seconds of one.
        text: seconds that the teacher takes for a text, which it reads once.
        texts: how many there are.
    """
    once = seconds / (step + text * batch)
    steps = once if once * batch <= texts else (seconds - text * texts) / step
    return max(1, int(steps))


def pooled(task: Task) -> Made:
    """sentence-transformers' distillation: the trimmed student learns the teacher's vectors of texts, mean squared
    error."""
    from sentence_transformers import SentenceTransformer

    started, options = time.perf_counter(), dict(task.options)
    minutes, steps = options.pop("minutes", None), options.pop("steps", None)
    training = {name: options.pop(name) for name in ("lr", "batch_size", "warmup")}
    start = _trimmed(task, task.out / "trimmed", **options)
    pairs = read_pairs(task.dev)
    before = measure(start.path, pairs, task.prompt)
    texts = read_text([task.text])
    # As vd.distill holds out, so that both train on the same texts.
    split = split_text(texts, vd.DistillConfig.held_out, task.seed, most=MOST_HELD_OUT)
    train = [task.prompt + text for text in split.train]
    random.Random(task.seed).shuffle(train)
    teacher, student = (SentenceTransformer(str(name), device="cpu") for name in (task.teachers[0], start.path))
    for side in (teacher, student):
        # The prompt stands before the texts already.
        side.default_prompt_name = None

    def fit(count: int, vectors: Any, lr: float) -> _Clock:
        return _fit(student, train, vectors, count, task, training | {"lr": lr})

    if steps is None:
        sample = train[:_TIMED_TEXTS]
        begun = time.perf_counter()
        vectors = teacher.encode(sample, show_progress_bar=False)
        text = (time.perf_counter() - begun) / len(sample)
        # At a rate of 0 nothing is learned.
        step = fit(_TIMED_STEPS, vectors, 0.0).seconds_per_step
        left = minutes * 60 - (time.perf_counter() - started)
        steps = steps_within(left, step, text, training["batch_size"], len(train))
    read = train[: steps * training["batch_size"]]
    fit(steps, teacher.encode(read, show_progress_bar=False), training["lr"])
    student.save_pretrained(str(task.out / "student"), create_model_card=False)
    score = measure(task.out / "student", pairs, task.prompt)
    return Made(score=score, start=before, steps=steps, **_described(start.metrics))


def _fit(student: Any, texts: Sequence[str], vectors: Any, steps: int, task: Task, training: dict[str, Any]) -> _Clock:
    """Trains on as many texts as there are vectors."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.losses import MSELoss
    from transformers import PrinterCallback

    clock = _Clock()
    trainer = SentenceTransformerTrainer(
        model=student,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(task.out / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=training["batch_size"],
            learning_rate=training["lr"],
            warmup_steps=round(training["warmup"] * steps),
            weight_decay=0.01,
            seed=task.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
        ),
        train_dataset=Dataset.from_dict({"sentence": list(texts[: len(vectors)]), "label": vectors}),
        loss=MSELoss(student),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock


# Method -> function, and the packages without which its rows are left out.
METHODS: dict[str, tuple[Callable[[Task], Made], tuple[str, ...]]] = {
    "trim": (trim, ()),
    "distill": (distill, ()),
    "pooled": (pooled, ("sentence_transformers", "datasets")),
    # Its extra ``distill`` is what skeletoken comes with.
    "model2vec": (model2vec, ("model2vec", "skeletoken")),
}


def missing(method: str) -> list[str]:
    """The packages that a method needs and that are not here."""
    return [name for name in METHODS[method][1] if importlib.util.find_spec(name) is None]


def make(method: str, **given: Any) -> Made:
    """Runs a method in a folder that is removed afterwards; ``given``: what :class:`Task` has beside ``out``."""
    with tempfile.TemporaryDirectory() as out:
        return METHODS[method][0](Task(out=Path(out), **given))
