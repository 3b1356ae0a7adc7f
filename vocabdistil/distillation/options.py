"""What a run is told: the options that every way to a student shares, checked before any work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from ..core.errors import need
from ..models.bodies import check_body, keep_layers
from ..models.shrinking import narrow_shape
from ..models.teachers import Teacher
from ..models.vocabularies import FAMILIES
from .text import TextSource

__all__ = ["StudentOptions", "check_run_options", "plain"]

# Longer strings are texts; asking the file system for them would be an error.
_LONGEST_NAME = 4096
# Tokens of a student, if nobody says.
VOCAB_SIZE = 8000


def check_run_options(config: Any) -> None:
    """What every training run asks of its options."""
    for name in ("batch_size", "save_every", "log_every"):
        need(getattr(config, name) > 0, name, "a number above 0", getattr(config, name))
    # Two special tokens and one that can be masked.
    need(config.max_length > 2, "max_length", "a number above 2", config.max_length)
    for name in ("steps", "threads"):
        value = getattr(config, name)
        need(value is None or value > 0, name, "a number above 0", value)
    need(config.lr is None or 0 < config.lr < float("inf"), "lr", "a number above 0", config.lr)
    need(0 < config.held_out < 1, "held_out", "a share between 0 and 1", config.held_out)
    need(config.unit in ("line", "paragraph"), "unit", "line or paragraph", repr(config.unit))
    need(0 <= config.seed < 2**32, "seed", "a number from 0 to 2^32 - 1", config.seed)


def plain(value: Any) -> Any:
    """A value of an option as JSON has it."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _names(value: Any) -> list[str]:
    if isinstance(value, (str, os.PathLike)):
        return [os.fspath(value)]
    return [os.fspath(item) for item in value]


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
            most frequent in the text; or a folder or a name: the tokenizer there.
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
        overwrite, quiet: replace ``out``; print nothing.
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
        self.teacher, self.out, self.vocabulary = _names(self.teacher), os.fspath(self.out), os.fspath(self.vocabulary)
        if isinstance(self.language, str):
            self.language = [code.strip() for code in self.language.split(",") if code.strip()]
        if isinstance(self.keep_layers, Sequence) and not isinstance(self.keep_layers, str):
            self.keep_layers = ",".join(map(str, self.keep_layers))
        if isinstance(self.text, (str, os.PathLike)):
            self.text = [self.text]
        self.check()

    def check(self) -> None:
        """Raises VocabdistilError for the first option that cannot be."""
        need(bool(self.teacher), "teacher", "at least one", "none")
        need(bool(self.vocabulary), "vocabulary", "train, trim or a folder", "nothing")
        need(self.family is None or self.family in FAMILIES, "family", " or ".join(FAMILIES), repr(self.family))
        need(
            self.family is None or self.vocabulary == "train", "family", "none without --vocabulary train", self.family
        )
        for name in ("vocab_size", "layers", "dim", "heads", "ffn", "threads"):
            value = getattr(self, name)
            need(value is None or value > 0, name, "a number above 0", value)
            need(value is None or value < 2**31, name, "a number that fits 31 bits", value)
        narrow = [name for name in ("dim", "heads", "ffn") if getattr(self, name) is not None]
        need(self.fit or not narrow, "no_fit", f"no --{' --'.join(narrow)}: narrower layers are fitted", "both")
        both = self.layers is not None and self.keep_layers is not None
        need(not both, "keep_layers", "none where --layers says how many", self.keep_layers)
        need(self.max_length > 2, "max_length", "a number above 2", self.max_length)
        need(self.unit in ("line", "paragraph"), "unit", "line or paragraph", repr(self.unit))
        need(0 <= self.seed < 2**32, "seed", "a number from 0 to 2^32 - 1", self.seed)
        for name in ("time_batch", "time_length"):
            need(getattr(self, name) > 0, name, "a number above 0", getattr(self, name))

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

    def inputs(self) -> list[str]:
        """The files and folders that the run reads, by their names."""
        given = self.text if isinstance(self.text, (list, tuple)) else []
        names = [*self.teacher, self.vocabulary, *(item for item in given if isinstance(item, (str, os.PathLike)))]
        return [os.fspath(name) for name in names if len(os.fspath(name)) < _LONGEST_NAME and Path(name).exists()]

    def settings(self) -> dict[str, Any]:
        """The options by name as JSON values, without the text."""
        return {field.name: plain(getattr(self, field.name)) for field in fields(self) if field.name != "text"}
