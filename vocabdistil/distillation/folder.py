"""The folder of a finished student: model, tokenizer, sentence-transformers settings, tables, figures, card."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..alignment.remap import RemapTable
from ..core.errors import printable
from ..core.options import names_of
from ..evaluation.card import model_card
from ..models.architectures import move
from ..models.folders import stated_licence
from ..models.sentence import write_sentence_settings
from ..models.vocabularies import save_tokenizer
from .command import command_of
from .options import StudentOptions
from .run_folder import RunFolder
from .student import Source, Student
from .text import files_of

__all__ = ["DistillResult", "write_card", "write_model", "write_student"]


@dataclass
class DistillResult:
    """What a job made: the student's folder and the contents of its ``metrics.json``."""

    path: Path
    metrics: dict[str, Any]


def write_student(
    folder: RunFolder,
    options: StudentOptions,
    source: Source,
    student: Student,
    tables: Sequence[RemapTable],
    metrics: dict[str, Any],
    projections: dict[str, Tensor] | None = None,
) -> Path:
    """The last stage: everything is written beside ``options.out`` and gets its name when it is whole.

    Args:
        folder: of the run; removed at the end.
        source: the first teacher.
        tables: the remap table of each teacher.
        metrics: for ``metrics.json`` and the model card; gets ``"files"``, those of the folder.
        projections: from the student's hidden states to each teacher's, ``[D_t, D_s]``, where they differ in width; and
            a ``bias``, ``[D_t]``, if there is one.

    Returns:
        ``options.out``.
    """
    final = write_model(folder, student.model, student.tokenizer)
    if source.sentence is not None:
        write_sentence_settings(source.sentence_with_prompt, final, *(student.projection or ()))
    for t, table in enumerate(tables):
        table.save(final / ("remap.vdrt" if t == 0 else f"remap_{t}.vdrt"))
    if projections:
        save_file(projections, final / "projection.safetensors")
    write_card(final, options, metrics, model_card, names_of(options.teacher))
    return folder.publish(final, metrics)


def write_model(folder: RunFolder, model: Any, tokenizer: Any) -> Path:
    """Begins the folder of a finished student: the model, its tokenizer and what its run logged.

    Returns:
        What :meth:`.run_folder.RunFolder.publish` is to be given.
    """
    final = folder.begin_result()
    move(model, "cpu").save_pretrained(final)
    save_tokenizer(tokenizer, final)
    for log in folder.path.glob("*.jsonl"):
        shutil.copy(log, final)
    return final


def write_card(
    final: Path, options: StudentOptions, metrics: dict[str, Any], card: Callable[..., str], sources: Sequence[str]
) -> None:
    """``README.md`` of a folder.

    Args:
        card: as :func:`.card.model_card`.
        sources: the models that the weights come from, whose licence is stated where ``options`` name none.
    """
    given = files_of(options.text)
    files = None if given is None else [os.fspath(path) for path in given]
    name = Path(options.out).resolve().name
    text = card(name, metrics, files, command_of(metrics["command"], options, files), stated_licence(sources))
    (final / "README.md").write_text(printable(text), encoding="utf-8")
