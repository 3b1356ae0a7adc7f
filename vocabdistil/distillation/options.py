"""What a run is told: the options that every way to a student shares, checked before any work."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ..core.errors import is_real, need, need_place, need_prompt, need_seed, need_threads, need_whole
from ..models.bodies import check_body, keep_layers
from ..models.shrinking import narrow_shape
from ..models.teachers import Teacher
from ..models.vocabularies import FAMILIES
from .text import GivenTexts, TextFiles, TextSource

__all__ = ["StudentOptions", "check_reading", "check_run_options", "check_timing", "configured", "plain"]

_Config = TypeVar("_Config")

# Tokens of a student, if nobody says.
VOCAB_SIZE = 8000
# Texts of one step, texts of one run, tokens of one timing: beyond these no memory is enough.
_MOST_AT_ONCE, MOST_READ, _MOST_TIMED = 2**16, 2**31, 2**20


def configured(kind: type[_Config], config: _Config | None, options: dict[str, Any]) -> _Config:
    """The configuration of a job, given whole or by its fields; from here on torch has the threads that it asks for.

    Raises:
        TypeError: both.
    """
    if config is not None and options:
        raise TypeError(f"give a config or options of {kind.__name__}, not both")
    config = kind(**options) if config is None else config
    if config.threads:  # type: ignore[attr-defined]
        torch.set_num_threads(config.threads)  # type: ignore[attr-defined]
    return config


def check_reading(config: Any) -> None:
    """What everything that reads text and writes a folder asks of its options."""
    need_place(config.out, "out", "the name of a folder")
    # What is made first has a longer name.
    need_place(f"{config.out}.partial", "out", "the name of a folder")
    # Two special tokens and one that can be masked.
    need_whole(config.max_length, "max_length", above=2)
    need_threads(config.threads)
    need(config.unit in ("line", "paragraph"), "unit", "line or paragraph", repr(config.unit))
    need_seed(config.seed)


def check_timing(batch: Any, length: Any, names: tuple[str, str] = ("time_batch", "time_length")) -> None:
    """What every timing asks of its batch and its length in tokens, by the names of these options."""
    need_whole(length, names[1], most=_MOST_TIMED)
    need_whole(batch, names[0], most=_MOST_TIMED // length)


def check_run_options(config: Any) -> None:
    """What every training run asks of its options."""
    check_reading(config)
    if config.batch_size is not None:
        need_whole(config.batch_size, "batch_size", most=_MOST_AT_ONCE)
    for name in ("save_every", "log_every"):
        need_whole(getattr(config, name), name)
    if config.steps is not None:
        need_whole(config.steps, "steps", most=MOST_READ // (config.batch_size or 1))
    lr = config.lr
    need(lr is None or is_real(lr) and 0 < lr < float("inf"), "lr", "a number above 0", lr)
    share = config.held_out
    need(is_real(share) and 0 < share < 1, "held_out", "a share between 0 and 1", share)


def plain(value: Any) -> Any:
    """A value of an option as JSON has it."""
    if isinstance(value, np.generic):
        return value.item()
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _names(value: Any) -> list[str]:
    """One name or several as a list; what is none stays for :meth:`StudentOptions.check` to tell."""
    several = isinstance(value, Iterable) and not isinstance(value, (str, os.PathLike, Mapping))
    return [os.fspath(item) if isinstance(item, os.PathLike) else item for item in (value if several else [value])]


@dataclass
class StudentOptions:
    """What there must be to know of a student before it is made.

    Attributes:
        teacher: a folder or a name, or a list of them: the student takes its vocabulary's rules, its body and its first
            weights from the first.
        text: UTF-8 files; or texts: a list, a data set or another iterable of strings, or of rows with a column
            ``"text"``.
        out: the folder to write.
        vocab_size: tokens of the student.
        vocabulary: ``"train"``: new tokens, in the teacher's family; ``"trim"``: those of the teacher's tokens that are
            most frequent in the text, and that no others can stand in for; or a folder or a name: the tokenizer there.
        family: of new tokens, if not the teacher's: ``"wordpiece" "byte-bpe" "bpe" "unigram"``.
        layers: how many of the teacher's layers the student keeps, evenly spaced, the last among them.
        keep_layers: which ones instead, counted from 0.
        dim, heads, ffn: a narrower body: hidden width, attention heads, width of the feed-forward layers.
        fit: where layers are left out or made narrower, those that stay are fitted to the teacher by least squares on
            some of the text (:func:`vocabdistil.models.shrinking.shrink`); else they are copied.
        prompt: what the teacher expects before every text; None: what a sentence-transformers folder says, or nothing.
        trust_remote_code: run code that comes with a teacher.
        language, license: for the model card: codes of the languages, an identifier of the licence.
        max_length: tokens of a text that the teacher reads.
        unit: ``"line"`` or ``"paragraph"``, see :class:`vocabdistil.distillation.text.TextFiles`.
        seed: of everything random.
        threads: of torch on the CPU; None: leave it.
        time_batch, time_length: the batch and the length in tokens at which CPU time is measured.
        overwrite, quiet: replace ``out``, if it is empty or a run wrote all that is in it; print nothing.
    """

    teacher: str | os.PathLike | Sequence[str | os.PathLike]
    text: TextSource
    out: str | os.PathLike
    vocab_size: int | None = None
    vocabulary: str | os.PathLike = "train"
    family: str | None = None
    layers: int | None = None
    keep_layers: str | Sequence[int] | None = None
    dim: int | None = None
    heads: int | None = None
    ffn: int | None = None
    fit: bool = True
    prompt: str | None = None
    trust_remote_code: bool = False
    language: str | Sequence[str] | None = None
    license: str | None = None
    max_length: int = 128
    unit: str = "line"
    seed: int = 0
    threads: int | None = None
    time_batch: int = 16
    time_length: int = 512
    overwrite: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        self.teacher, (self.out,), (self.vocabulary,) = (
            _names(self.teacher), _names([self.out]), _names([self.vocabulary])
        )  # fmt: skip
        if isinstance(self.language, str):
            self.language = [code.strip() for code in self.language.split(",") if code.strip()]
        if isinstance(self.keep_layers, Iterable) and not isinstance(self.keep_layers, str):
            self.keep_layers = ",".join(map(str, self.keep_layers))
        if isinstance(self.text, (str, os.PathLike)):
            need_place(self.text, "text", "a file")
            self.text = [Path(self.text)]
        self.check()

    def check(self) -> None:
        """Raises VocabdistilError for the first option that cannot be."""
        need(bool(self.teacher), "teacher", "at least one", "none")
        for teacher in self.teacher:
            need_place(teacher, "teacher", "a folder or a model's name")
        if self.vocabulary is not None:
            need_place(self.vocabulary, "vocabulary", "train, trim or a folder")
        need(self.family is None or self.family in FAMILIES, "family", " or ".join(FAMILIES), repr(self.family))
        need(
            self.family is None or self.vocabulary == "train", "family", "none without --vocabulary train", self.family
        )
        for name in ("vocab_size", "layers", "dim", "heads", "ffn"):
            if getattr(self, name) is not None:
                need_whole(getattr(self, name), name)
        narrow = [name for name in ("dim", "heads", "ffn") if getattr(self, name) is not None]
        need(self.fit or not narrow, "no_fit", f"no --{' --'.join(narrow)}: narrower layers are fitted", "both")
        both = self.layers is not None and self.keep_layers is not None
        need(not both, "keep_layers", "none where --layers says how many", self.keep_layers)
        layers = self.keep_layers
        need(layers is None or isinstance(layers, str), "keep_layers", "layers with commas between them", layers)
        need_prompt(self.prompt)
        check_reading(self)
        check_timing(self.time_batch, self.time_length)
        codes = self.language
        named = codes is None or isinstance(codes, (list, tuple)) and all(isinstance(code, str) for code in codes)
        need(named, "language", "codes such as en", codes)
        need(self.license is None or isinstance(self.license, str), "license", "a name such as mit", self.license)

    def kept_layers(self, teacher: Teacher, default: int) -> list[int]:
        """Which of the teacher's layers the student keeps.

        Args:
            default: how many, if nothing was said.

        Raises:
            VocabdistilError: the teacher has no such layers, or its architecture cannot take such a body.
        """
        if self.keep_layers is None:
            kept = keep_layers(teacher, self.layers or default)
        else:
            kept = keep_layers(teacher, named=self.keep_layers)
        check_body(teacher, kept)
        narrow_shape(teacher, self.dim, self.heads, self.ffn)
        return kept

    def inputs(self, text: TextFiles | GivenTexts) -> list[str]:
        """The files and folders that the run reads, by their names."""
        vocabulary = [] if self.vocabulary in ("train", "trim", None) else [self.vocabulary]
        files = [os.fspath(path) for path in text.paths] if isinstance(text, TextFiles) else []
        return [name for name in (*self.teacher, *vocabulary, *files) if os.path.exists(name)]

    def settings(self) -> dict[str, Any]:
        """The options by name as JSON values, without the text."""
        return {field.name: plain(getattr(self, field.name)) for field in fields(self) if field.name != "text"}
