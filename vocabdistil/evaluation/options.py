"""What evaluations are told, checked before any work and without what takes long to import."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from ..core import options as kinds
from ..core.errors import need, need_whole, spell
from ..core.options import Files, Option, Place, Whole, check_options, names_of
from ..models.folders import look_at_model
from .chart import check_chart
from .tables import read_labels, read_scored

__all__ = ["BenchOptions", "EvaluateOptions", "LoyaltyOptions", "TimeBatch", "TimeLength", "check_timing"]

# Tokens of one timing: beyond these no memory is enough.
_MOST_TIMED = 2**20
TimeBatch = Annotated[int, Option(Whole(), "texts of the CPU timing")]
TimeLength = Annotated[int, Option(Whole(0, _MOST_TIMED), "tokens of each")]

_MODEL = Place("a folder or a model's name", metavar="DIR_OR_NAME")
_COMPARED = "models to compare; the first is the yardstick"
# Two special tokens and one that can be masked.
_LENGTH = Whole(2)


def check_timing(batch: int, length: int, name: str = "time_batch") -> None:
    """Raises VocabdistilError where there are more tokens than one timing may have; ``name`` is that of the batch."""
    need_whole(batch, name, most=_MOST_TIMED // length)


@dataclass
class EvaluateOptions:
    """What :func:`vocabdistil.evaluate` is told, by the same names."""

    models: Annotated[Any, Option(_MODEL, _COMPARED, "--model", several=True)]
    pairs: Annotated[
        Any,
        Option(Files(), "CSV with sentence, sentence, score: cosines are compared with the scores", several=True),
    ] = field(default_factory=list)
    labels: Annotated[
        Any,
        Option(Files(), "CSV with text, label: linear probes on the vectors, tested on a fifth", several=True),
    ] = field(default_factory=list)
    prompt: kinds.Prompt = None
    max_length: Annotated[int, Option(_LENGTH, "tokens of a text, fewer where a folder says so")] = 512
    seed: Annotated[int, Option(kinds.SEED, "of the split of labelled texts")] = 0
    picture: Annotated[
        str | os.PathLike | None,
        Option(Place("an .svg or .png file to write"), "draw score against parameters and time: .svg or .png"),
    ] = None
    threads: kinds.Threads = None
    trust_remote_code: kinds.TrustRemoteCode = False

    def __post_init__(self) -> None:
        self.models = names_of(self.models)
        need(bool(self.models), "models", "at least one", "none")
        need(bool(self.pairs or self.labels), "pairs", f"a file here or with {spell('labels')}", "neither")
        check_options(self)
        if self.picture is not None:
            check_chart(self.picture)

    def look(self) -> None:
        """Reads the tables and looks at folders by their names, before anything is loaded, which takes longer."""
        for file in names_of(self.pairs):
            read_scored(file, "pairs")
        for file in names_of(self.labels):
            read_labels(file, "labels")
        for name in self.models:
            look_at_model(name, "models", self.trust_remote_code)


@dataclass
class LoyaltyOptions:
    """What the command ``loyalty`` is told."""

    teacher: Annotated[str, Option(_MODEL, "the teacher")]
    student: Annotated[list[str], Option(_MODEL, "the students", several=True)]
    text: Annotated[
        Sequence[os.PathLike], Option(Files(), f"that none was trained on, {kinds.TEXT_FORMATS}", several=True)
    ]
    unit: kinds.Unit = "line"
    prompt: kinds.Prompt = None
    texts: Annotated[int, Option(_LENGTH, "at most so many")] = 512
    max_length: Annotated[int, Option(_LENGTH, "tokens of a text")] = 128
    seed: Annotated[int, Option(kinds.SEED, "of the choice of texts")] = 0
    json: kinds.Json = False

    def __post_init__(self) -> None:
        check_options(self)

    def look(self) -> None:
        """As :meth:`EvaluateOptions.look`."""
        for name, sources in (("teacher", [self.teacher]), ("student", self.student)):
            for source in sources:
                look_at_model(source, name)


@dataclass
class BenchOptions:
    """What the command ``bench`` is told."""

    models: Annotated[list[str], Option(_MODEL, _COMPARED, "models", several=True)]
    text: Annotated[Sequence[os.PathLike], Option(Files(), f"to read, {kinds.TEXT_FORMATS}", several=True)]
    batch: Annotated[int, Option(Whole(), "texts at once")] = 16
    length: Annotated[int, Option(Whole(2, _MOST_TIMED), "tokens of each")] = 512
    threads: kinds.Threads = None
    json: kinds.Json = False

    def __post_init__(self) -> None:
        check_options(self)
        check_timing(self.batch, self.length, "batch")

    def look(self) -> None:
        """As :meth:`EvaluateOptions.look`."""
        for name in self.models:
            look_at_model(name, "models", sentence=False)
