"""The students that recipes are compared on, as data: who teaches them, how large they are, how long they may take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

# What every teacher expects before a text.
MINILM, E5 = "all-MiniLM-L6-v2", "multilingual-e5-small"
PROMPTS = {MINILM: "", E5: "query: "}


@dataclass(frozen=True)
class Student:
    """A student and what it is compared with.

    Attributes:
        teacher: whose vocabulary and body it starts with.
        language: of the text and of the pairs: ``en`` or ``ru``.
        size: what every method is told of its shape.
        minutes: how long a method that trains may take.
        static: kind -> options of model2vec that give the same vocabulary, or about as many parameters.
        second: another teacher, which a run of its own adds.
        preset: the body of that name has the same shape, and a run of its own is made with it.
    """

    teacher: str
    language: str
    size: dict[str, Any]
    minutes: float
    static: dict[str, dict[str, Any]] = field(default_factory=dict)
    second: str | None = None
    preset: str | None = None


def _size(tokens: int, layers: int, **more: int) -> dict[str, Any]:
    return {"vocabulary": "trim", "vocab_size": tokens, "layers": layers, **more}


def _static(tokens: int, whole: int | None = None) -> dict[str, dict[str, Any]]:
    """The student's own tokens at full width, and the teacher's whole vocabulary ``whole`` wide."""
    kinds = {"model2vec": {"vocab_size": tokens, "pca_dims": 384}}
    return kinds if whole is None else kinds | {"model2vec-whole": {"pca_dims": whole}}


STUDENTS: dict[str, Student] = {
    "minilm-1": Student(MINILM, "en", _size(5000, 1), 20, _static(5000, 128)),
    "minilm-3": Student(MINILM, "en", _size(5000, 3), 20, _static(5000, 256), second=E5),
    "minilm-6": Student(MINILM, "en", _size(5000, 6), 10, _static(5000, 384)),
    "minilm-3x264": Student(
        MINILM, "en", _size(5000, 3, dim=264, heads=12, ffn=792), 20, _static(5000, 120), preset="tiny-5k"
    ),
    # The teacher's whole vocabulary is no rival here: even 64 wide it would have 16 M parameters.
    "e5-12": Student(E5, "ru", _size(8000, 12), 10, _static(8000)),
    "e5-6": Student(E5, "ru", _size(8000, 6), 30, _static(8000)),
    "e5-en-3": Student(E5, "en", _size(5000, 3), 20, _static(5000), second=MINILM),
}
# Kind -> options of vd.distill beside the size: every student is made with each of them.
DISTILLED: dict[str, dict[str, Any]] = {"distill": {}}
# sentence-transformers' own example of distillation has this rate.
POOLED = {"lr": 1e-4, "batch_size": 32, "warmup": 0.05}
# Students that are trimmed only: what the vocabulary, the fit and the number of tokens are worth.
TRIMMED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "minilm-6/trim-train": (MINILM, "en", _size(5000, 6) | {"vocabulary": "train"}),
    "minilm-3/trim-train": (MINILM, "en", _size(5000, 3) | {"vocabulary": "train"}),
    "minilm-1/trim-train": (MINILM, "en", _size(5000, 1) | {"vocabulary": "train"}),
    "minilm-10k-6/trim": (MINILM, "en", _size(10000, 6)),
    "minilm-3/trim-copied": (MINILM, "en", _size(5000, 3) | {"fit": False}),
    "e5-12k-12/trim": (E5, "ru", _size(12000, 12)),
    "e5-12/trim-train": (E5, "ru", _size(8000, 12) | {"vocabulary": "train"}),
}
TRIMMED |= {
    f"{name}/trim-whitened": (student.teacher, student.language, student.size | {"whiten": 0.3})
    for name, student in STUDENTS.items()
}
# What one loss is worth, and some together, with the rest of the recipe.
ABLATION_STEPS = 100
ABLATION: dict[str, dict[str, Any]] = {
    "recipe": {},
    "kl": {"weights": {"kl": 1}},
    "kl+pooled": {"weights": {"kl": 1, "pooled": 1}},
    "kl+similarity": {"weights": {"kl": 1, "similarity": 10}},
    "pooled": {"weights": {"pooled": 1}},
    "similarity": {"weights": {"similarity": 10}},
    "cosine": {"weights": {"cosine": 1}},
    "mse": {"weights": {"mse": 1}},
    "kl+relations": {"weights": {"kl": 1, "relations": 1}},
    "unwhitened": {"whiten": 0.0},
    "kept": {"layer_map": "kept"},
    "vocabulary-train": {"vocabulary": "train"},
}
RATES: dict[str, dict[str, Any]] = {f"lr-{lr:g}": {"lr": lr} for lr in (1e-4, 2e-4, 5e-4, 1e-3)}
# Student -> what is tried on it: rates also where the body keeps all layers, as it takes another one.
ABLATED = {"minilm-3": ABLATION | RATES, "e5-6": ABLATION | RATES, "minilm-6": RATES}


@dataclass(frozen=True)
class Run:
    """One line of the table: a student made in one way.

    Attributes:
        name: ``student/kind``.
        method: a name of :data:`benchmarks.students.methods.METHODS`.
        teachers: the first gives the student its start.
        options: of the method, as JSON has them.
    """

    name: str
    method: str
    teachers: tuple[str, ...]
    language: str
    options: dict[str, Any]


def _budget(minutes: float | None, steps: int | None) -> dict[str, Any]:
    # A float, so that 20 and 20.0 are the same options.
    return {"minutes": float(minutes)} if steps is None and minutes is not None else {"steps": steps}


def comparison(minutes: float | None = None, steps: int | None = None) -> Iterator[Run]:
    """Every student with its baselines.

    Args:
        minutes, steps: how long a method that trains may take, if not what the table says.
    """
    for name, student in STUDENTS.items():
        teachers, budget = (student.teacher,), _budget(minutes or student.minutes, steps)
        yield Run(f"{name}/trim", "trim", teachers, student.language, student.size)
        for kind, options in student.static.items():
            yield Run(f"{name}/{kind}", "model2vec", teachers, student.language, options)
        yield Run(f"{name}/pooled", "pooled", teachers, student.language, student.size | POOLED | budget)
        for kind, options in DISTILLED.items():
            told = student.size | options | budget
            yield Run(f"{name}/{kind}", "distill", teachers, student.language, told)
            if student.second is not None:
                yield Run(f"{name}/{kind}-two", "distill", (*teachers, student.second), student.language, told)
        if student.preset is not None:
            named = {"vocabulary": "trim", "preset": student.preset}
            yield Run(f"{name}/preset", "distill", teachers, student.language, named | budget)
    for name, (teacher, language, options) in TRIMMED.items():
        yield Run(name, "trim", (teacher,), language, options)


def ablation(minutes: float | None = None, steps: int | None = None) -> Iterator[Run]:
    """The tables of losses and of learning rates, all with one budget: ``ABLATION_STEPS`` if nothing else is said."""
    budget = _budget(minutes, steps or (None if minutes else ABLATION_STEPS))
    for name, tried in ABLATED.items():
        student = STUDENTS[name]
        for kind, options in tried.items():
            told = student.size | options | budget
            yield Run(f"{name}-losses/{kind}", "distill", (student.teacher,), student.language, told)


def matches(name: str, pattern: str) -> bool:
    """Whether a name holds a pattern, in which ``*`` stands for anything."""
    return fnmatchcase(name, f"*{pattern}*")
