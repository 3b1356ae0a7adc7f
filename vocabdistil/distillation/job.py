"""The whole job: :func:`distill` takes teachers and text, and writes a student."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from ..alignment.coverage import coverage
from ..alignment.masking import masking_probabilities
from ..alignment.remap import RemapTable
from ..alignment.vocab import MatchedVocab
from ..core.console import Reporter
from ..core.errors import VocabdistilError, is_real, need, need_place, need_whole
from ..core.files import write_json
from ..evaluation import report
from ..evaluation.predictions import choose_excerpts, pseudo_perplexity
from ..evaluation.timing import compare_models
from ..models.students import PRESETS, Preset
from ..models.teachers import Teacher, load_tokenizer
from ..models.vocabularies import Vocabulary, count_tokens, save_tokenizer
from ..reference.layers import layer_map
from .batches import DistillCollator, to_device
from .folder import write_student
from .held_out import evaluate
from .objective import LOGITS, DistillModel, LossWeights, Objective, calibrate
from .options import MOST_READ, StudentOptions, check_run_options, configured
from .runs import (
    RUN_FILE,
    Interrupted,
    TrainingOrder,
    fit,
    keep_inputs,
    last_checkpoint,
    open_partial,
    training_arguments,
)
from .student import Source, Student, load_sources, load_student, make_student, make_vocabulary
from .text import TextSplit, open_text, split_text
from .trainer import DistillTrainer

__all__ = ["DistillConfig", "DistillResult", "Interrupted", "distill"]

_MAX_EVAL_TEXTS = 512
_CALIBRATION_TEXTS = 128
# What layers are fitted to.
_FITTED_TEXTS = 2048
# Peak learning rates: of a body with copied layers, which must not be shaken out of what they know, and of a fresh one.
_LR_COPIED, _LR_FRESH = 1e-4, 5e-4


@dataclass
class DistillConfig(StudentOptions):
    """Everything that :func:`distill` needs to know: :class:`StudentOptions`, and of the training:

    Attributes:
        layers: None: half of the teacher's.
        vocab_size: None: the preset's, else 8,000.
        preset: a DistilBERT instead of the teacher's own kind of body: ``base small tiny tiny-5k``, or a
            :class:`vocabdistil.models.students.Preset`.
        student: the folder of a checkpoint to go on from instead, with its own vocabulary.
        steps, epochs: how long; ``steps`` wins.
        batch_size: texts per step.
        student_max_length: student tokens of each; None: twice ``max_length``, at most what it can read.
        lr, warmup, weight_decay: AdamW's peak rate (None: 1e-4 where layers are copied, else 5e-4), the share of steps
            in which it rises, decay.
        temperature: of the span KL and of the output distributions.
        weights: a :class:`LossWeights` or its text form.
        logits: where the student learns the output distributions of teachers with an MLM head: ``match reduce
            reduce-map none``, see :meth:`vocabdistil.Objective.logits_loss`; None: ``match`` if student and a teacher
            have a head.
        teacher_weights: what each teacher counts; None: alike.
        layer_map: which teacher layers teach which student layers: ``last skip average average_all``.
        train_projection: let the map from the student's width to the teacher's change; else it stays the scaled
            isometry that :func:`vocabdistil.distillation.objective.calibrate` fits.
        held_out: the share of texts kept for evaluation.
        device, precision: ``"auto" "cpu" "cuda"``; ``"fp32" "bf16"`` (autocast).
        save_every, log_every: steps between checkpoints and between progress lines.
        resume: continue from ``out + ".partial"``, which holds the run while it lasts.
    """

    preset: str | Preset | None = None
    student: str | None = None
    steps: int | None = None
    epochs: float = 3.0
    batch_size: int = 32
    student_max_length: int | None = None
    lr: float | None = None
    warmup: float = 0.05
    weight_decay: float = 0.01
    temperature: float = 2.0
    weights: LossWeights | str = field(default_factory=LossWeights)
    logits: str | None = None
    teacher_weights: Sequence[float] | None = None
    layer_map: str = "last"
    train_projection: bool = False
    held_out: float = 0.05
    device: str = "auto"
    precision: str = "fp32"
    save_every: int = 500
    log_every: int = 50
    resume: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.weights, str):
            self.weights = LossWeights.parse(self.weights)
        super().__post_init__()

    def check(self) -> None:
        super().check()
        check_run_options(self)
        known = self.preset is None or isinstance(self.preset, Preset) or self.preset in list(PRESETS)
        need(known, "preset", " or ".join(PRESETS), repr(self.preset))
        if (shape := self.shape) is not None:
            for name, value in asdict(shape).items():
                need_whole(value, f"preset: {name}")
            need(shape.dim % shape.heads == 0, "preset: heads", f"a divisor of dim ({shape.dim})", shape.heads)
        if self.student is not None:
            need_place(self.student, "student", "a folder or a model's name")
        ways = [name for name in ("preset", "student") if getattr(self, name) is not None]
        need(len(ways) < 2, "student", "none with --preset", self.student)
        for name in ("layers", "keep_layers", "dim", "heads", "ffn"):
            value = getattr(self, name)
            need(value is None or not ways, name, f"none with --{' or --'.join(ways)}", value)
        for name, usual in (("vocabulary", "train"), ("vocab_size", None), ("family", None)):
            value = getattr(self, name)
            need(self.student is None or value == usual, name, "none with --student, which has its own", value)
        if self.student_max_length is not None:
            need_whole(self.student_max_length, "student_max_length", above=2)
        need(is_real(self.epochs) and 0 < self.epochs < float("inf"), "epochs", "a number above 0", self.epochs)
        # Beyond these float32 has neither its square nor the square's inverse.
        heat = self.temperature
        need(is_real(heat) and 1e-18 < heat < 1e18, "temperature", "a number above 0, from 1e-18 to 1e18", heat)
        need(is_real(self.warmup) and 0 <= self.warmup < 1, "warmup", "a share from 0 to below 1", self.warmup)
        decay = self.weight_decay
        need(is_real(decay) and 0 <= decay < float("inf"), "weight_decay", "a number of at least 0", decay)
        need(self.precision in ("fp32", "bf16"), "precision", "fp32 or bf16", repr(self.precision))
        need(self.device in ("auto", "cpu", "cuda"), "device", "auto, cpu or cuda", repr(self.device))
        maps = ("last", "skip", "average", "average_all")
        need(self.layer_map in maps, "layer_map", "last, skip, average or average_all", repr(self.layer_map))
        need(self.logits is None or self.logits in LOGITS, "logits", ", ".join(LOGITS), repr(self.logits))
        given = isinstance(self.weights, LossWeights)
        need(given, "weights", "LossWeights or their text form", type(self.weights).__name__)
        values = asdict(self.weights).values()
        need(
            all(is_real(v) and 0 <= v < float("inf") for v in values) and any(values),
            "weights",
            "numbers of at least 0, one above",
            self.weights,
        )
        if self.teacher_weights is not None:
            shares = self.teacher_weights
            listed = isinstance(shares, (list, tuple)) and len(shares) == len(self.teacher)
            need(
                listed and all(is_real(share) and 0 < share < float("inf") for share in shares),
                "teacher_weights",
                "one number above 0 per teacher",
                shares,
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise VocabdistilError("--device: cuda was asked for, but torch sees no CUDA device")

    @property
    def shape(self) -> Preset | None:
        """The preset, if there is one."""
        return PRESETS[self.preset] if isinstance(self.preset, str) else self.preset

    @property
    def size(self) -> int | None:
        """Tokens of the student's vocabulary, if something says how many."""
        if self.vocab_size is None and self.shape is not None and self.vocabulary in ("train", "trim"):
            return self.shape.vocab_size
        return self.vocab_size

    def identity(self) -> dict[str, Any]:
        """What must not change between an interrupted run and its continuation."""
        free = {"out", "resume", "overwrite", "quiet", "threads", "save_every", "log_every"}
        free |= {"time_batch", "time_length", "language", "license"}
        free |= {"logits", "prompt"}  # what these mean depends on the teachers
        return {name: value for name, value in self.settings().items() if name not in free}


@dataclass
class DistillResult:
    """What a job made: the student's folder and the contents of its ``metrics.json``."""

    path: Path
    metrics: dict[str, Any]


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
    config = configured(DistillConfig, config, options)
    run = _Run.begin(config)
    try:
        return run.finish()
    except BaseException as error:
        # Bad input, a learning rate that diverges among it, stays bad: resuming would end the same way.
        hopeless = isinstance(error, VocabdistilError) or last_checkpoint(run.partial) is None
        if hopeless and not isinstance(error, Interrupted):
            shutil.rmtree(run.partial, ignore_errors=True)
        raise


def _logits_mode(config: DistillConfig, teachers: Sequence[Teacher], head: bool) -> str:
    """``config.logits``, or what it is by default.

    Args:
        head: whether the student has an MLM head.

    Raises:
        VocabdistilError: it cannot be done, or leaves nothing to learn.
    """
    headless = [f"{teacher.name} ({teacher.headless})" for teacher in teachers if teacher.masked_lm is None]
    mode = config.logits or ("match" if head and len(headless) < len(teachers) else "none")
    if mode != "none" and len(headless) == len(teachers):
        raise VocabdistilError(f"--logits: {mode} needs a teacher with an MLM head; without: {', '.join(headless)}")
    if mode != "none" and not head:
        raise VocabdistilError(f"--logits: {mode} needs a student with an MLM head, such as a --preset")
    learned = {"kl", "cosine", "mse"} | ({"mlm"} if head else set()) | ({"logits"} if mode != "none" else set())
    if not any(value for name, value in asdict(config.weights).items() if name in learned):
        raise VocabdistilError(
            f"--weights: expected one above 0 of {', '.join(sorted(learned))}: nothing else is learned here"
        )
    return mode


@dataclass
class _Run:
    """A run and what its stages have found so far; each stage is a method that reads what stands above it.

    Attributes:
        texts, split: the text, every example with the prompt before it.
        kept_layers: of the first teacher; none where the student is of another kind.
        checkpoint: the student to go on from, if there is one.
        mode: where output distributions are compared.
        partial, record: the folder of the run, and what its stages stored there.
    """

    config: DistillConfig
    texts: list[str]
    split: TextSplit
    sources: list[Source]
    kept_layers: list[int]
    checkpoint: Student | None
    mode: str
    partial: Path
    record: dict[str, Any]
    say: Reporter

    @classmethod
    def begin(cls, config: DistillConfig) -> _Run:
        """Reads the text, loads the teachers, and opens the folder of the run once all that can be checked has been."""
        text = open_text(config.text, config.unit)
        texts = list(text)
        split = split_text(texts, config.held_out, config.seed)
        most = MOST_READ // len(split.train)
        need(config.steps is not None or config.epochs <= most, "epochs", f"a number up to {most}", config.epochs)
        sources = load_sources(config)
        first = sources[0].teacher
        kept: list[int] = []
        if config.shape is None and config.student is None:
            kept = config.kept_layers(first, max(1, first.num_layers // 2))
        checkpoint = load_student(config.student, config) if config.student is not None else None
        if checkpoint is not None:
            head = checkpoint.learns_words
        else:
            head = config.shape is not None or first.masked_lm is not None
            tokenizer = first.tokenizer
            if config.vocabulary not in ("train", "trim"):
                tokenizer = load_tokenizer(config.vocabulary, "--vocabulary", config.trust_remote_code)
            head = head and tokenizer.mask_token_id is not None
        mode = _logits_mode(config, [source.teacher for source in sources], head)
        keep_inputs(Path(config.out), [*config.inputs(text), *([config.student] if config.student else [])])
        identity = {"logits": mode, **config.identity(), "prompt": first.prompt, "text": split.digest}
        partial, record = open_partial(Path(config.out), identity, config.resume, config.overwrite)
        texts = [first.prompt + text for text in texts]
        train, held_out = ([first.prompt + text for text in part] for part in (split.train, split.held_out))
        split = TextSplit(train, held_out, split.digest)
        say = Reporter(config.quiet)
        return cls(config, texts, split, sources, kept, checkpoint, mode, partial, record, say)

    @property
    def teachers(self) -> list[Teacher]:
        return [source.teacher for source in self.sources]

    def finish(self) -> DistillResult:
        student = self.student()
        vocabularies = _Vocabularies.of(self.teachers, student)
        covered = self.coverage(student, vocabularies)
        training = self.training(student, vocabularies)
        before = self.calibration(training)
        trainer, seconds = self.fit(student, training)
        after = self.evaluation(training)
        return self.write(student, vocabularies, covered, training, trainer, seconds, before, after)

    def student(self) -> Student:
        """Vocabulary, body and start."""
        config = self.config
        if self.checkpoint is not None:
            return self.checkpoint
        for teacher in self.teachers if config.logits != "none" else ():
            if teacher.masked_lm is None:
                note = f"no MLM head ({teacher.headless}); its output distributions are not learned"
                self.say.print(f"{teacher.name}: {note}")
        vocabulary = self.vocabulary()
        for note in vocabulary.notes:
            self.say.print(note)
        texts = self.sample(_FITTED_TEXTS)
        student = make_student(config, self.sources[0], vocabulary, texts, self.kept_layers, config.shape)
        self.say.print(report.start_line(student.report["tokens"]))
        return student

    def vocabulary(self) -> Vocabulary:
        """The student's vocabulary; made once, and read again by a run that is resumed."""
        folder, ids = self.partial / "tokenizer", self.partial / "kept.safetensors"
        if "vocabulary" not in self.record:
            self.say.status("Making the student's vocabulary")
            config, source = self.config, self.sources[0]
            made = make_vocabulary(
                config.vocabulary, source.teacher.tokenizer, self.texts, config.size, config.family, source.prompts
            )
            save_tokenizer(made.tokenizer, folder)
            if made.kept is not None:
                save_file({"kept": made.kept}, ids)
            self.store(vocabulary={"source": config.vocabulary, "notes": list(made.notes)})
        found, kept = self.record["vocabulary"], load_file(ids)["kept"] if ids.exists() else None
        return Vocabulary(AutoTokenizer.from_pretrained(folder), found["source"], kept, tuple(found["notes"]))

    def store(self, **found: Any) -> None:
        """What a later stage, or a run that is resumed, needs of this one."""
        self.record |= found
        write_json(self.partial / RUN_FILE, self.record)

    @property
    def held_out(self) -> list[str]:
        return self.split.held_out[:_MAX_EVAL_TEXTS]

    def sample(self, count: int) -> list[str]:
        """Some of the texts to train on."""
        texts = self.split.train
        return random.Random(self.config.seed).sample(texts, min(count, len(texts)))

    def coverage(self, student: Student, vocabularies: _Vocabularies) -> list[dict[str, Any]]:
        """How the vocabularies correspond on held-out text."""
        reports = []
        for teacher, table, matched in zip(self.teachers, vocabularies.tables, vocabularies.matched, strict=True):
            tokenizers = (teacher.tokenizer, student.tokenizer)
            found = coverage(self.held_out, *tokenizers, ("match", "reduce"), table=table, matched=matched)
            self.say.print(*report.coverage_tables((teacher.name, self.config.out), tokenizers, found))
            reports.append(found.as_dict())
        return reports

    def training(self, student: Student, vocabularies: _Vocabularies) -> _Training:
        """The model to train, its objective and its batches.

        With an MLM head and a MASK: masked, ``reduce`` rows beside the own tokenization, equal tokens paired (arXiv
        2205.02340). Without: the student's own tokenization as it stands, paired by the text.
        """
        config, teachers, tokenizer = self.config, self.teachers, student.tokenizer
        masked = student.learns_words or self.mode == "none"
        need(masked, "vocabulary", f"a tokenizer with a mask_token for --logits {self.mode}", config.vocabulary)
        wanted = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        device = torch.device(wanted)
        reader = student.as_teacher()
        try:
            assignments = [layer_map(config.layer_map, reader.num_layers, teacher.num_layers) for teacher in teachers]
        except ValueError as error:
            raise VocabdistilError(f"--layer-map: {error}") from None
        widths = [teacher.width for teacher in teachers]
        model = DistillModel(student.model, widths, assignments, config.seed, config.train_projection).to(device)
        for teacher in teachers:
            teacher.whole.to(device)
        shares = config.teacher_weights or [1.0] * len(teachers)
        objective = Objective(
            teachers,
            config.weights,
            [share / sum(shares) for share in shares],
            self.record.get("scales", []),
            config.temperature,
            mode=self.mode,
            tables=vocabularies.tables,
            matched=[matched.to(device) for matched in vocabularies.matched],
        )
        if student.learns_words:
            counts = count_tokens(tokenizer, self.split.train)
            objective.mask_probabilities = masking_probabilities(counts, tokenizer.all_special_ids).to(device)
            objective.mask_id = tokenizer.mask_token_id
        max_length = min([config.max_length, *(teacher.max_positions for teacher in teachers)])
        student_max_length = min(config.student_max_length or 2 * max_length, reader.max_positions)
        collator = DistillCollator(
            [teacher.tokenizer for teacher in teachers],
            tokenizer,
            vocabularies.tables if student.learns_words else [],
            vocabularies.matched if student.learns_words else [],
            max_length,
            student_max_length,
        )
        excerpts = []
        if student.learns_words:
            tokenizers = [*(teacher.tokenizer for teacher in teachers), tokenizer]
            excerpts = choose_excerpts(
                self.split.held_out, tokenizers, min(max_length, student_max_length), config.seed
            )
        return _Training(model, objective, collator, excerpts, device)

    def calibration(self, training: _Training) -> dict[str, Any]:
        """Fits the projections and the scales of the losses, and evaluates the untrained student; all of it stored."""
        model, objective = training.model, training.objective
        fitted = self.partial / "projections.safetensors"
        if "before" not in self.record:
            self.say.status("Evaluating the untrained student")
            batch = to_device(training.collator(self.sample(_CALIBRATION_TEXTS)), training.device)
            objective.scales = calibrate(model, objective, batch)
            if len(model.projections):
                save_file(training.projections(), fitted)
            before = self.evaluation(training, status=None)
            perplexity = [
                pseudo_perplexity(teacher, training.excerpts)
                if teacher.masked_lm is not None and training.excerpts
                else None
                for teacher in self.teachers
            ]
            self.store(scales=objective.scales, before=before, teacher_pseudo_perplexity=perplexity)
        elif fitted.exists():
            for key, weight in load_file(fitted).items():
                with torch.no_grad():
                    model.projections[key].weight.copy_(weight)
        return self.record["before"]

    @property
    def steps(self) -> int:
        config = self.config
        return config.steps or max(1, round(config.epochs * len(self.split.train) / config.batch_size))

    def fit(self, student: Student, training: _Training) -> tuple[DistillTrainer, float]:
        """Trains; returns the trainer and how many seconds it took."""
        config = self.config
        known = self.checkpoint is not None or student.report.get("copied_layers")
        lr = config.lr or (_LR_COPIED if known else _LR_FRESH)
        trainer = DistillTrainer(
            model=training.model,
            args=training_arguments(
                self.partial,
                steps=self.steps,
                batch_size=config.batch_size,
                lr=lr,
                seed=config.seed,
                warmup=config.warmup,
                weight_decay=config.weight_decay,
                save_every=config.save_every,
                log_every=config.log_every,
                bf16=config.precision == "bf16",
                device=training.device,
            ),
            train_dataset=TrainingOrder(self.split.train, config.batch_size, self.steps, config.seed),
            data_collator=training.collator,
            objective=training.objective,
            sequential=True,
        )
        return trainer, fit(trainer, self.say, last_checkpoint(self.partial) if config.resume else None)

    def evaluation(self, training: _Training, status: str | None = "Evaluating the student") -> dict[str, Any]:
        """The student on held-out text.

        Raises:
            VocabdistilError: its figures are not finite.
        """
        if status:
            self.say.status(status)
        training.model.eval()
        found = evaluate(
            training.model, training.objective, training.collator, self.held_out, training.excerpts,
            self.config.batch_size, self.config.seed,
        )  # fmt: skip
        if not all(math.isfinite(value) for value in found.values()):
            raise VocabdistilError(
                "--lr: the training diverged, the student's losses are not finite; try a smaller one"
            )
        return found

    def write(
        self,
        student: Student,
        vocabularies: _Vocabularies,
        covered: list[dict[str, Any]],
        training: _Training,
        trainer: DistillTrainer,
        seconds: float,
        before: dict[str, Any],
        after: dict[str, Any],
    ) -> DistillResult:
        """Figures, folder, and what is said at the end."""
        config, first = self.config, self.teachers[0]
        reader = student.as_teacher()
        metrics = {
            "teacher": [teacher.name for teacher in self.teachers],
            "command": "distill",
            "settings": config.settings(),
            "architecture": student.architecture,
            "vocabulary": self.record.get("vocabulary"),
            "steps": self.steps,
            "train_texts": len(self.split.train),
            "held_out_texts": len(self.held_out),
            "max_length": training.collator.max_length,
            "seed": config.seed,
            "initialisation": student.report,
            "prompt": first.prompt,
            "sentence_transformers": self.sources[0].sentence is not None,
            "logits": training.objective.mode,
            "teacher_scales": training.objective.scales,
            "coverage": covered,
            "before": before,
            "after": after,
            "teacher_pseudo_perplexity": self.record["teacher_pseudo_perplexity"],
            "train_seconds": round(seconds, 1),
            "models": compare_models(
                first, reader, self.held_out, batch=config.time_batch, length=config.time_length
            ),
        }
        with open(self.partial / "training_log.jsonl", "w", encoding="utf-8") as file:
            for entry in trainer.state.log_history:
                file.write(json.dumps(entry) + "\n")
        projections = training.projections()
        if (weight := training.model.projection(0)) is not None:
            student.projection = weight.detach().cpu(), None
        out = write_student(
            self.partial, config, self.sources[0], student, vocabularies.tables, metrics, projections
        )
        self.say.print(*report.result_tables(metrics))
        self.say.print(f"{self.steps} steps in {seconds:.0f} s. The student is in {out}")
        return DistillResult(out, metrics)


@dataclass
class _Vocabularies:
    """How each teacher's vocabulary corresponds to the student's."""

    tables: list[RemapTable]
    matched: list[MatchedVocab]

    @classmethod
    def of(cls, teachers: Sequence[Teacher], student: Student) -> _Vocabularies:
        return cls(
            [RemapTable.from_tokenizers(teacher.tokenizer, student.tokenizer) for teacher in teachers],
            [MatchedVocab.from_tokenizers(teacher.tokenizer, student.tokenizer) for teacher in teachers],
        )


@dataclass
class _Training:
    """What is trained, by what, on what."""

    model: DistillModel
    objective: Objective
    collator: DistillCollator
    excerpts: list[str]
    device: torch.device

    def projections(self) -> dict[str, Tensor]:
        return {key: linear.weight.detach().cpu().contiguous() for key, linear in self.model.projections.items()}
