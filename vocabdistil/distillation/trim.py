"""A smaller vocabulary and a shorter body without any training: :func:`trim`."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..alignment.coverage import coverage
from ..alignment.remap import RemapTable
from ..alignment.vocab import MatchedVocab
from ..core.console import Reporter
from ..evaluation.bits_per_byte import need_start
from ..evaluation.next_tokens import compare_decoders
from ..evaluation.predictions import agreement
from ..evaluation.report import (
    coverage_tables,
    loyalty_table,
    many,
    next_line,
    next_tokens_table,
    size_table,
    start_line,
    whitened_line,
)
from ..evaluation.student import embedding_loyalty, pooled
from ..evaluation.timing import compare_models
from ..models.bodies import build_body
from ..models.named_tokens import named_ids
from ..models.whitening import set_last_layer, whiten
from .causal_rows import RenderedRows
from .draft_head import make_draft_head
from .folder import DistillResult, write_student
from .options import TrimConfig, configured
from .run_folder import RunFolder
from .student import Source, Student, load_sources, make_student, make_vocabulary, not_whitened
from .text import Digested, Prefixed, sample_text
from .text_store import watched

__all__ = ["trim"]

# Texts that layers are fitted to, and those of them of which coverage and loyalty are counted: enough for two digits,
# few enough for seconds.
_SAMPLE, _HELD = 2048, 256


def trim(config: TrimConfig | None = None, **options: Any) -> DistillResult:
    """Gives a teacher a smaller vocabulary, and fewer layers if asked for, without training it.

    The rows of the tokens that stay are copied; with all layers, a text whose tokens all stay gives the teacher's own
    hidden states. A decoder keeps its layers, and beside the tokens that the text needs those that are special, that
    its configurations name and that its chat template writes.

    Args:
        config: everything; or give the fields of :class:`TrimConfig` by name.

    Returns:
        The folder, and what ``metrics.json`` in it says: :class:`vocabdistil.evaluation.metrics.TrimMetrics`; of a
        draft head :class:`vocabdistil.evaluation.metrics.DraftMetrics`.

    Raises:
        VocabdistilError: bad input; nothing is left half-written.

    Example::

        import vocabdistil as vd
        vd.trim(teacher="intfloat/multilingual-e5-small", text=["russian.txt"], out="e5-ru", vocab_size=8000)
    """
    config = configured(TrimConfig, config, options)
    text: Iterable[str] = config.look()
    (source,) = load_sources(config)
    layers = config.kept_layers(source.teacher.model.config)
    if source.teacher.causal_lm is not None:
        need_start(source.teacher.tokenizer, "teacher")
        text = RenderedRows(text, source.teacher.tokenizer)
    not_whitened(config, [source], asked=True)
    folder = RunFolder.open(config.out, {}, None, config.overwrite)
    with folder.held():
        if config.draft:
            return make_draft_head(config, source, text, folder)
        return _run(config, source, layers, text, folder)


def _run(
    config: TrimConfig, source: Source, layers: list[int], text: Iterable[str], folder: RunFolder
) -> DistillResult:
    say, teacher = Reporter(config.quiet), source.teacher
    say.status("Reading the text")
    read = Digested(watched(text, config.quiet))
    sample = sample_text(Prefixed(read, teacher.prompt), config.seed)
    say.status("Making the student's vocabulary")
    causal = teacher.causal_lm is not None
    # A decoder must also write what it reads in pieces, and embeddings say nothing of that. Bits per byte of
    # held-out Russian, of a Llama of 1.1 M parameters trained on Russian and English: 1.385; with 4,000 / 2,500 / 1,500
    # of its 6,000 tokens, chosen by count alone: 1.424 / 1.574 / 1.774; also by their distance: 1.452 / 1.639 / 1.902.
    embedding = None if causal else teacher.embedding
    keep = named_ids(teacher) if causal else ()
    vocabulary = make_vocabulary(
        config.vocabulary, teacher.tokenizer, sample, config.vocab_size, config.family, source.prompts, embedding,
        keep=keep,
    )  # fmt: skip
    for note in vocabulary.notes:
        say.print(note)
    distinct = list(dict.fromkeys(sample))
    texts = random.Random(config.seed).sample(distinct, min(_SAMPLE, len(distinct)))
    held = texts[-_HELD:]
    fitted = texts[:-_HELD] if len(texts) >= 2 * _HELD else texts
    whitened = {}
    if config.whiten:
        say.status("Whitening the teacher's vectors")
        layer, explained = whiten(teacher, fitted, config.whiten, source.sentence, config.max_length)
        set_last_layer(teacher, layer)
        whitened[teacher.name] = round(explained, 4)
        say.print(whitened_line(whitened))
    if len(layers) < teacher.num_layers or config.dim or config.heads or config.ffn:
        say.status(f"Fitting {many(len(layers), 'layer')}")
    student = make_student(config, source, vocabulary, fitted, layers)
    say.print(start_line(student.report["tokens"]))
    table = RemapTable.from_tokenizers(teacher.tokenizer, student.tokenizer)
    report = coverage(held, teacher.tokenizer, student.tokenizer, table=table)
    say.print(*coverage_tables((teacher.name, os.fspath(config.out)), (teacher.tokenizer, student.tokenizer), report))
    metrics: dict[str, Any] = {
        "teacher": config.teacher,
        "command": "trim",
        "settings": config.settings(),
        "texts": read.seen,
        "text": read.digest,
        # Of the text that the vocabulary was made for: on other text a student agrees less.
        "compared_texts": len(held),
        "vocabulary": {"source": config.vocabulary, "notes": list(vocabulary.notes)},
        "whitened": whitened,
        "prompt": teacher.prompt,
        "sentence_transformers": source.sentence is not None,
        "architecture": student.architecture,
        "initialisation": student.report,
        "coverage": [report.as_dict()],
        **_compared(config, source, student, held),
        "models": compare_models(
            teacher, student.as_teacher(), held, batch=config.time_batch, length=config.time_length
        ),
    }
    parts = zip(("0_0", "bias"), student.projection or (), strict=False)
    projections = {name: part for name, part in parts if part is not None}
    out = write_student(folder, config, source, student, [table], metrics, projections)
    about = f"{many(len(held), 'text')} of those that the vocabulary was made for"
    about += ", to the whitened teacher" if whitened else ""
    say.print(size_table(metrics["models"]))
    if "next_tokens" in metrics:
        say.print(next_tokens_table(metrics["next_tokens"], about), f"The student is {folder.place}")
    else:
        say.print(loyalty_table(metrics["loyalty"], about))
        say.print(f"The student is {folder.place}", next_line(teacher.name, os.fspath(out)))
    return DistillResult(out, metrics)


def _compared(config: TrimConfig, source: Source, student: Student, texts: list[str]) -> dict[str, Any]:
    """How the student follows its teacher, as far as it applies to models of their kind."""
    if source.teacher.causal_lm is None:
        return {"loyalty": _loyalty(config, source, student, texts)}
    return {"next_tokens": compare_decoders(source.teacher, student.as_teacher(), texts, config.max_length)}


def _loyalty(
    config: TrimConfig, source: Source, student: Student, texts: list[str]
) -> dict[str, dict[str, float]]:
    """How the student's vectors and, with MLM heads, its guesses agree with the teacher's; and before layers were left
    out how those of all layers do."""
    teacher, found = source.teacher, {}
    matched = MatchedVocab.from_tokenizers(teacher.tokenizer, student.tokenizer)
    theirs = pooled(teacher, texts, config.max_length, source.sentence)

    def compare(made: Student) -> dict[str, float]:
        reader = made.as_teacher(prompt=teacher.prompt)
        ours = pooled(reader, texts, config.max_length, source.sentence)
        vectors = embedding_loyalty(ours, theirs, *(made.projection or ()))
        if teacher.masked_lm is None or not made.learns_words:
            return vectors
        lengths = min(config.max_length, teacher.max_positions), min(config.max_length, reader.max_positions)
        return vectors | agreement(teacher, reader, matched, texts, lengths, seed=config.seed)

    every = list(range(teacher.num_layers))
    if student.kept_layers != every or student.projection is not None:
        assert student.rows is not None
        whole = build_body(teacher, student.rows, student.tokenizer, every)
        found["all layers"] = compare(replace(student, model=whole, projection=None))
    found[many(len(student.kept_layers), "layer")] = compare(student)
    return found
