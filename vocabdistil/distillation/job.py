"""The whole job: :func:`distill` takes teachers and text, and writes a student."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from ..alignment.coverage import coverage
from ..alignment.masking import masking_probabilities
from ..alignment.remap import RemapTable
from ..alignment.vocab import MatchedVocab
from ..core.console import Reporter
from ..core.errors import VocabdistilError, need
from ..core.files import write_json
from ..evaluation import report
from ..evaluation.predictions import choose_excerpts, pseudo_perplexity
from ..evaluation.timing import compare_models
from ..models.students import PRESETS, Preset, build_student, initialise_from_teacher, remap_rows
from ..models.teachers import Teacher, load_teacher
from ..models.vocabularies import count_tokens, save_tokenizer, train_vocabulary
from ..reference.layers import layer_map
from .batches import DistillCollator, to_device
from .held_out import evaluate
from .objective import LOGITS, DistillModel, LossWeights, Objective, calibrate
from .runs import (
    RUN_FILE,
    Interrupted,
    TrainingOrder,
    fit,
    keep_inputs,
    last_checkpoint,
    move_into_place,
    need_run_options,
    open_partial,
    training_arguments,
)
from .text import TextSplit, read_text, split_text
from .trainer import DistillTrainer

__all__ = ["DistillConfig", "DistillResult", "Interrupted", "distill"]

_MAX_EVAL_TEXTS = 512
_CALIBRATION_TEXTS = 128


# ---------------------------------------------------------------- configuration


@dataclass
class DistillConfig:
    """Everything that :func:`distill` needs to know.

    Attributes:
        teacher: a folder or a name, or a list of them: the student takes its tokenizer's rules and its first
            weights from the first, and learns from all.
        text: UTF-8 files.
        out: the folder to write; ``out + ".partial"`` holds the run while it lasts.
        preset: the student's architecture: ``base small tiny tiny-5k``, or a
            :class:`vocabdistil.models.students.Preset`.
        vocab_size: tokens of the student; None: the preset's.
        steps, epochs: how long; ``steps`` wins.
        batch_size, max_length: texts per step, teacher tokens of each.
        student_max_length: student tokens of each; None: twice ``max_length``, at most 512.
        lr, warmup, weight_decay: AdamW's peak rate, the share of steps in which it rises, decay.
        temperature: of the span KL and of the output distributions.
        weights: a :class:`LossWeights` or its text form.
        logits: where the student learns the output distributions of teachers with an MLM head: ``match reduce
            reduce-map none``, see :meth:`vocabdistil.Objective.logits_loss`; None: ``match`` if a teacher has a head.
        teacher_weights: what each teacher counts; None: alike.
        layer_map: which teacher layers teach which student layers: ``last skip average average_all``.
        train_projection: let the map from the student's width to the teacher's change; else it stays the scaled
            isometry that :func:`vocabdistil.distillation.objective.calibrate` fits.
        held_out: the share of texts kept for evaluation.
        unit: ``"line"`` or ``"paragraph"``, see :func:`vocabdistil.distillation.text.read_text`.
        seed: of the split, the weights, the order of texts, masks and dropout.
        device, precision: ``"auto" "cpu" "cuda"``; ``"fp32" "bf16"`` (autocast).
        save_every, log_every: steps between checkpoints and between progress lines.
        threads: of torch on the CPU; None: leave it.
        time_batch, time_length: the batch and the length in tokens at which CPU time is measured.
        resume, overwrite, quiet: continue from ``out + ".partial"``; replace ``out``; print nothing.
    """

    teacher: str | os.PathLike | Sequence[str | os.PathLike]
    text: str | os.PathLike | Sequence[str | os.PathLike]
    out: str | os.PathLike
    preset: str | Preset = "tiny-5k"
    vocab_size: int | None = None
    steps: int | None = None
    epochs: float = 3.0
    batch_size: int = 32
    max_length: int = 128
    student_max_length: int | None = None
    lr: float = 5e-4
    warmup: float = 0.05
    weight_decay: float = 0.01
    temperature: float = 2.0
    weights: LossWeights | str = field(default_factory=LossWeights)
    logits: str | None = None
    teacher_weights: Sequence[float] | None = None
    layer_map: str = "last"
    train_projection: bool = False
    held_out: float = 0.05
    unit: str = "line"
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    save_every: int = 500
    log_every: int = 50
    threads: int | None = None
    time_batch: int = 16
    time_length: int = 512
    resume: bool = False
    overwrite: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        def paths(value: Any) -> list[str]:
            return [os.fspath(value)] if isinstance(value, (str, os.PathLike)) else [os.fspath(v) for v in value]

        self.teacher, self.text, self.out = paths(self.teacher), paths(self.text), os.fspath(self.out)
        if isinstance(self.weights, str):
            self.weights = LossWeights.parse(self.weights)
        self._check()

    def _check(self) -> None:
        need_run_options(self)
        need(bool(self.teacher), "teacher", "at least one", "none")
        known = isinstance(self.preset, Preset) or self.preset in PRESETS
        need(known, "preset", " or ".join(PRESETS), repr(self.preset))
        for name in ("time_batch", "time_length"):
            need(getattr(self, name) > 0, name, "a number above 0", getattr(self, name))
        for name in ("vocab_size", "student_max_length"):
            value = getattr(self, name)
            need(value is None or value > 0, name, "a number above 0", value)
        for name in ("epochs", "temperature"):
            value = getattr(self, name)
            need(0 < value < float("inf"), name, "a number above 0", value)
        need(0 <= self.warmup < 1, "warmup", "a share from 0 to below 1", self.warmup)
        need(0 <= self.weight_decay < float("inf"), "weight_decay", "a number of at least 0", self.weight_decay)
        need(self.precision in ("fp32", "bf16"), "precision", "fp32 or bf16", repr(self.precision))
        need(self.device in ("auto", "cpu", "cuda"), "device", "auto, cpu or cuda", repr(self.device))
        need(
            self.layer_map in ("last", "skip", "average", "average_all"),
            "layer_map",
            "last, skip, average or average_all",
            repr(self.layer_map),
        )
        need(self.logits is None or self.logits in LOGITS, "logits", ", ".join(LOGITS), repr(self.logits))
        values = asdict(self.weights).values()
        need(
            all(0 <= v < float("inf") for v in values) and any(values),
            "weights",
            "numbers of at least 0, one above",
            self.weights,
        )
        if self.teacher_weights is not None:
            need(
                len(self.teacher_weights) == len(self.teacher) and min(self.teacher_weights) > 0,
                "teacher_weights",
                "one number above 0 per teacher",
                list(self.teacher_weights),
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise VocabdistilError("--device: cuda was asked for, but torch sees no CUDA device")

    @property
    def architecture(self) -> Preset:
        return self.preset if isinstance(self.preset, Preset) else PRESETS[self.preset]

    def identity(self) -> dict[str, Any]:
        """What must not change between an interrupted run and its continuation."""
        free = {"out", "resume", "overwrite", "quiet", "threads", "save_every", "log_every", "time_batch"}
        free |= {"time_length", "logits"}  # what ``logits`` means depends on the teachers
        return {k: v for k, v in asdict(self).items() if k not in free}


@dataclass
class DistillResult:
    """What :func:`distill` did: the student's folder and the contents of its ``metrics.json``."""

    path: Path
    metrics: dict[str, Any]


# ---------------------------------------------------------------- the main job



def distill(config: DistillConfig | None = None, **options: Any) -> DistillResult:
    """Distils a teacher into a student with a smaller vocabulary of its own, and writes the student to a folder.

    Args:
        config: everything; or give the fields of :class:`DistillConfig` by name.

    Returns:
        The folder, and what ``metrics.json`` in it says.

    Raises:
        VocabdistilError: bad input; nothing is left half-written.
        Interrupted: SIGINT or SIGTERM; a checkpoint has been saved.

    Example::

        import vocabdistil as vd
        result = vd.distill(teacher="bert-base-cased", text=["corpus.txt"], out="student", vocab_size=5000)
        result.metrics["after"]["cosine"]
    """
    if config is None:
        config = DistillConfig(**options)
    elif options:
        raise TypeError("distill: give a config or options, not both")
    if config.threads:
        torch.set_num_threads(config.threads)
    split = split_text(read_text(config.text, config.unit), config.held_out, config.seed)
    teachers = [load_teacher(source) for source in config.teacher]
    mode = _logits_mode(config, teachers)
    keep_inputs(Path(config.out), [*config.teacher, *config.text])
    identity = {"logits": mode, **config.identity(), "text": split.digest}
    partial, record = open_partial(Path(config.out), identity, config.resume, config.overwrite)
    try:
        return _run(config, mode, split, teachers, partial, record)
    except BaseException as error:
        if not isinstance(error, Interrupted) and last_checkpoint(partial) is None:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _logits_mode(config: DistillConfig, teachers: Sequence[Teacher]) -> str:
    """``config.logits``, or what it is by default.

    Raises:
        VocabdistilError: it cannot be done, or leaves nothing to learn.
    """
    headless = [f"{teacher.name} ({teacher.headless})" for teacher in teachers if teacher.masked_lm is None]
    mode = config.logits or ("none" if len(headless) == len(teachers) else "match")
    if mode != "none" and len(headless) == len(teachers):
        raise VocabdistilError(f"--logits: {mode} needs a teacher with an MLM head; without: {', '.join(headless)}")
    values = asdict(config.weights)
    if mode == "none" and not any(value for name, value in values.items() if name != "logits"):
        raise VocabdistilError("--weights: expected one above 0 besides logits, which --logits none leaves out")
    return mode


def _run(
    config: DistillConfig,
    mode: str,
    split: TextSplit,
    teachers: list[Teacher],
    partial: Path,
    record: dict[str, Any],
) -> DistillResult:
    out = Path(config.out)
    say = Reporter(config.quiet)
    if config.logits != "none":
        for teacher in teachers:
            if teacher.masked_lm is None:
                say.print(f"{teacher.name}: no MLM head ({teacher.headless}); its output distributions are not learned")
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    device = torch.device(wanted)
    preset = config.architecture
    first = teachers[0]
    max_length = min([config.max_length, *(teacher.max_positions for teacher in teachers)])
    student_max_length = min(config.student_max_length or 2 * max_length, 512)

    tokenizer_folder = partial / "tokenizer"
    if not (tokenizer_folder / "tokenizer_config.json").exists():
        say.status("Training the student's vocabulary")
        trained = train_vocabulary(first.tokenizer, split.train, config.vocab_size or preset.vocab_size)
        for note in trained.notes:
            say.print(note)
        trained.tokenizer.model_max_length = 512
        # DistilBERT has no token types; without this, plain transformers would pass it some.
        trained.tokenizer.model_input_names = ["input_ids", "attention_mask"]
        save_tokenizer(trained.tokenizer, tokenizer_folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tables = [RemapTable.from_tokenizers(teacher.tokenizer, tokenizer) for teacher in teachers]
    matched = [MatchedVocab.from_tokenizers(teacher.tokenizer, tokenizer) for teacher in teachers]

    reports = [
        coverage(split.held_out, teacher.tokenizer, tokenizer, ("match", "reduce"), table=table, matched=match)
        for teacher, table, match in zip(teachers, tables, matched, strict=True)
    ]
    for teacher, coverage_report in zip(teachers, reports, strict=True):
        names = (teacher.name, config.out)
        say.print(*report.coverage_tables(names, (teacher.tokenizer, tokenizer), coverage_report))

    student = build_student(preset, tokenizer, seed=config.seed)
    rows = remap_rows(tables[0], first.tokenizer, tokenizer, config.seed)
    start = initialise_from_teacher(student, first, rows)
    try:
        assignments = [layer_map(config.layer_map, preset.layers, teacher.num_layers) for teacher in teachers]
    except ValueError as error:
        raise VocabdistilError(f"--layer-map: {error}") from None
    widths = [teacher.width for teacher in teachers]
    model = DistillModel(student, widths, assignments, config.seed, config.train_projection).to(device)
    for teacher in teachers:
        teacher.whole.to(device)
    shares = config.teacher_weights or [1.0] * len(teachers)
    objective = Objective(
        teachers,
        config.weights,
        [share / sum(shares) for share in shares],
        record.get("scales", []),
        config.temperature,
        masking_probabilities(count_tokens(tokenizer, split.train), tokenizer.all_special_ids).to(device),
        tokenizer.mask_token_id,
        mode,
        tables,
        [match.to(device) for match in matched],
    )
    collator = DistillCollator(
        [teacher.tokenizer for teacher in teachers], tokenizer, tables, matched, max_length, student_max_length
    )
    held_out = split.held_out[:_MAX_EVAL_TEXTS]
    tokenizers = [*(teacher.tokenizer for teacher in teachers), tokenizer]
    excerpts = choose_excerpts(split.held_out, tokenizers, min(max_length, student_max_length), config.seed)
    if "before" not in record:
        say.status("Evaluating the untrained student")
        sample = collator(random.Random(config.seed).sample(split.train, min(_CALIBRATION_TEXTS, len(split.train))))
        record["scales"] = objective.scales = calibrate(model, objective, to_device(sample, device))
        record["before"] = evaluate(model, objective, collator, held_out, excerpts, config.batch_size, config.seed)
        record["teacher_pseudo_perplexity"] = [
            pseudo_perplexity(teacher, excerpts) if teacher.masked_lm is not None and excerpts else None
            for teacher in teachers
        ]
        write_json(partial / RUN_FILE, record)

    steps = config.steps or max(1, round(config.epochs * len(split.train) / config.batch_size))
    trainer = DistillTrainer(
        model=model,
        args=training_arguments(
            partial,
            steps=steps,
            batch_size=config.batch_size,
            lr=config.lr,
            seed=config.seed,
            warmup=config.warmup,
            weight_decay=config.weight_decay,
            save_every=config.save_every,
            log_every=config.log_every,
            bf16=config.precision == "bf16",
            device=device,
        ),
        train_dataset=TrainingOrder(split.train, config.batch_size, steps, config.seed),
        data_collator=collator,
        objective=objective,
        sequential=True,
    )
    seconds = fit(trainer, say, last_checkpoint(partial) if config.resume else None)
    say.status("Evaluating the student")
    model.eval()
    after = evaluate(model, objective, collator, held_out, excerpts, config.batch_size, config.seed)
    if not all(math.isfinite(value) for value in after.values()):
        raise VocabdistilError("--lr: the training diverged, the student's losses are not finite; try a smaller one")
    metrics = {
        "teacher": [teacher.name for teacher in teachers],
        "architecture": asdict(preset),
        "steps": steps,
        "train_texts": len(split.train),
        "held_out_texts": len(held_out),
        "max_length": max_length,
        "seed": config.seed,
        "initialisation": start,
        "logits": mode,
        "teacher_scales": objective.scales,
        "coverage": [r.as_dict() for r in reports],
        "before": record["before"],
        "after": after,
        "teacher_pseudo_perplexity": record["teacher_pseudo_perplexity"],
        "train_seconds": round(seconds, 1),
        "models": compare_models(
            first, student, tokenizer, held_out, batch=config.time_batch, length=config.time_length
        ),
    }
    final = partial / "final"
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir()
    student.to("cpu").save_pretrained(final)
    shutil.copytree(tokenizer_folder, final, dirs_exist_ok=True)
    for t, table in enumerate(tables):
        table.save(final / ("remap.vdrt" if t == 0 else f"remap_{t}.vdrt"))
    if len(model.projections):
        weights = {key: linear.weight.detach().cpu().contiguous() for key, linear in model.projections.items()}
        save_file(weights, final / "projection.safetensors")
    with open(final / "training_log.jsonl", "w", encoding="utf-8") as file:
        for entry in trainer.state.log_history:
            file.write(json.dumps(entry) + "\n")
    write_json(final / "metrics.json", metrics)
    (final / "README.md").write_text(report.model_card(out.name, metrics), encoding="utf-8")
    move_into_place(final, out)
    shutil.rmtree(partial)
    say.print(*report.result_tables(metrics))
    say.print(f"{steps} steps in {seconds:.0f} s. The student is in {out}")
    return DistillResult(out, metrics)
