"""The whole job: :func:`distill` takes teachers and text, and writes a student."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoTokenizer

from ..alignment.coverage import coverage
from ..alignment.masking import masking_probabilities
from ..alignment.remap import RemapTable
from ..alignment.vocab import MatchedVocab
from ..core.console import Reporter
from ..core.errors import VocabdistilError, is_real, need, need_place, need_whole
from ..evaluation import report
from ..evaluation.loyalty import regression
from ..evaluation.predictions import choose_excerpts, pseudo_perplexity
from ..evaluation.student import embedding_loyalty, pooled
from ..evaluation.tasks import Pairs, pairs_score, read_pairs
from ..evaluation.timing import compare_models
from ..models.bodies import keep_layers
from ..models.start import plan_start
from ..models.students import PRESETS, Preset
from ..models.teachers import Teacher, give_attention_maps, load_tokenizer
from ..models.vocabularies import Vocabulary, count_tokens, save_tokenizer
from ..reference.layers import LayerAssignment, layer_map
from .baselines import mean_of_embeddings, trimmed_teacher
from .batches import DistillCollator, to_device
from .calibration import calibrate
from .checkups import Checkups
from .folder import write_student
from .held_out import evaluate, held_out_loss
from .mixing import SHARES, best_share, mix, with_words_left_out
from .model import DistillModel
from .objective import LOGITS, Objective
from .options import MOST_READ, StudentOptions, check_run_options, configured
from .order import TrainingOrder
from .recipes import RECIPES, SCHEDULES, LossWeights, Recipe
from .run_folder import Diverged, Interrupted, RunFolder, check_out, checkpoint_step, last_checkpoint
from .runs import fit, seconds_per_step, training_arguments
from .student import Source, Student, load_sources, load_student, make_student, make_vocabulary
from .teacher_cache import TeacherCache
from .text import GivenTexts, TextFiles, TextSplit, open_text, split_text
from .trainer import DistillTrainer

__all__ = ["MOST_HELD_OUT", "DistillConfig", "DistillResult", "Interrupted", "distill"]

LAYER_MAPS = ("last", "skip", "average", "average_all", "kept")
# Held-out texts: of which checkpoints and mixtures are chosen by, and of which figures are reported.
_CHOOSING_TEXTS, _REPORTED_TEXTS = 256, 512
MOST_HELD_OUT = _CHOOSING_TEXTS + _REPORTED_TEXTS
_CALIBRATION_TEXTS = 128
# What layers are fitted to: four times what trim takes, which has no minutes to spend.
_FITTED_TEXTS, _FITTED_TOKENS = 8192, 2**16
_DIVERGED = "--lr: the training diverged, the student's losses are not finite; try a smaller one"


@dataclass
class DistillConfig(StudentOptions):
    """Everything that :func:`distill` needs to know: :class:`StudentOptions`, and of the training:

    Attributes:
        recipe: what is learned and how, a name of :data:`vocabdistil.distillation.recipes.RECIPES`: ``"auto"``:
            ``"masked"`` where the student has an MLM head and so has a teacher, else ``"embedding"``. It gives every
            option whose default is None here, unless something else is said of it.
        layers: None: half of the teacher's.
        vocabulary: None: the recipe's.
        vocab_size: None: the preset's, else 8,000.
        preset: a DistilBERT instead of the teacher's own kind of body: ``base small tiny tiny-5k``, or a
            :class:`vocabdistil.models.students.Preset`. None: the recipe's, if nothing else is said of the body.
        student: the folder of a checkpoint to go on from instead, with its own vocabulary.
        steps, epochs, minutes: how long; ``steps`` wins over ``epochs``. ``minutes``: as many steps as fit into the
            time that the whole job may take, found by timing some first.
        batch_size: texts per step.
        accumulate: batches whose gradients are added up before a step.
        student_max_length: student tokens of each; None: twice ``max_length``, at most what it can read.
        lr, warmup, schedule, weight_decay: AdamW's peak rate (None: the recipe's for a body with copied layers, or for
            a fresh one), the share of steps in which it rises, how it falls then (``linear cosine constant``), decay.
        temperature: of the span KL and of the output distributions.
        weights: a :class:`vocabdistil.LossWeights`, or in text form what differs from the recipe's.
        logits: where the student learns the output distributions of teachers with an MLM head: ``match reduce
            reduce-map none``, see :meth:`vocabdistil.Objective.logits_loss`; None: ``match`` if student and a teacher
            have a head.
        teacher_weights: what each teacher counts; None: alike.
        layer_map: which teacher layers teach which student layers: ``last skip average average_all``, or ``kept``: the
            one that each was copied from.
        train_projection: let the map from the student's width to the teacher's change; else it stays the scaled
            isometry that :func:`vocabdistil.distillation.calibration.calibrate` fits.
        cache_teacher: a folder that remembers what teachers made of texts, for later epochs, students and runs.
        held_out: the share of texts kept for evaluation, at most 768: a third of them to choose checkpoints by.
        dev: a CSV file of sentence, sentence, score: how the student ranks its pairs is told at every checkpoint.
        patience: stop after so many checkpoints without a better held-out loss; None: never.
        device, precision: ``"auto" "cpu" "cuda"``; ``"fp32" "bf16"`` (autocast).
        save_every, log_every: steps between checkpoints, each of them evaluated and the best kept, and between progress
            lines.
        resume: continue from ``out + ".partial"``, which holds the run while it lasts.
    """

    recipe: str = "auto"
    vocabulary: str | os.PathLike | None = None
    preset: str | Preset | None = None
    student: str | None = None
    steps: int | None = None
    epochs: float = 3.0
    minutes: float | None = None
    batch_size: int | None = None
    accumulate: int = 1
    student_max_length: int | None = None
    lr: float | None = None
    warmup: float | None = None
    schedule: str | None = None
    weight_decay: float = 0.01
    temperature: float | None = None
    weights: LossWeights | str = ""
    logits: str | None = None
    teacher_weights: Sequence[float] | None = None
    layer_map: str | None = None
    train_projection: bool = False
    cache_teacher: str | None = None
    held_out: float = 0.05
    dev: str | None = None
    patience: int | None = None
    device: str = "auto"
    precision: str = "fp32"
    save_every: int = 500
    log_every: int = 50
    resume: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.weights, str):
            LossWeights.parse(self.weights)
        if self.vocabulary is None and self.family is not None:
            self.vocabulary = "train"
        super().__post_init__()

    def check(self) -> None:
        super().check()
        check_run_options(self)
        need(self.recipe in ("auto", *RECIPES), "recipe", f"auto or {', '.join(RECIPES)}", repr(self.recipe))
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
        for name in ("vocabulary", "vocab_size", "family"):
            value = getattr(self, name)
            need(self.student is None or value is None, name, "none with --student, which has its own", value)
        if self.student_max_length is not None:
            need_whole(self.student_max_length, "student_max_length", above=2)
        need(is_real(self.epochs) and 0 < self.epochs < float("inf"), "epochs", "a number above 0", self.epochs)
        if self.minutes is not None:
            need(is_real(self.minutes) and 0 < self.minutes < 1e6, "minutes", "a number above 0", self.minutes)
            need(self.steps is None, "minutes", "none where --steps says how long", self.minutes)
        need_whole(self.accumulate, "accumulate", most=2**16)
        if self.patience is not None:
            need_whole(self.patience, "patience")
        for name, what in (("cache_teacher", "a folder"), ("dev", "a CSV file")):
            if getattr(self, name) is not None:
                need_place(getattr(self, name), name, what)
        # Beyond these float32 has neither its square nor the square's inverse.
        heat = self.temperature
        fine = heat is None or is_real(heat) and 1e-18 < heat < 1e18
        need(fine, "temperature", "a number above 0, from 1e-18 to 1e18", heat)
        rise = self.warmup
        need(rise is None or is_real(rise) and 0 <= rise < 1, "warmup", "a share from 0 to below 1", rise)
        known = self.schedule is None or self.schedule in SCHEDULES
        need(known, "schedule", " or ".join(SCHEDULES), repr(self.schedule))
        decay = self.weight_decay
        need(is_real(decay) and 0 <= decay < float("inf"), "weight_decay", "a number of at least 0", decay)
        need(self.precision in ("fp32", "bf16"), "precision", "fp32 or bf16", repr(self.precision))
        need(self.device in ("auto", "cpu", "cuda"), "device", "auto, cpu or cuda", repr(self.device))
        maps = self.layer_map is None or self.layer_map in LAYER_MAPS
        need(maps, "layer_map", ", ".join(LAYER_MAPS), repr(self.layer_map))
        need(self.logits is None or self.logits in LOGITS, "logits", ", ".join(LOGITS), repr(self.logits))
        given = isinstance(self.weights, (str, LossWeights))
        need(given, "weights", "LossWeights or their text form", type(self.weights).__name__)
        if given:
            self.recipe_weights(RECIPES.get(self.recipe, RECIPES["masked"]))
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

    def recipe_weights(self, recipe: Recipe) -> LossWeights:
        """What each loss counts under a recipe.

        Raises:
            VocabdistilError: they are no numbers, or none is above 0.
        """
        weights = LossWeights.parse(self.weights, recipe.weights) if isinstance(self.weights, str) else self.weights
        values = asdict(weights).values()
        fine = all(is_real(v) and 0 <= v < float("inf") for v in values) and any(values)
        need(fine, "weights", "numbers of at least 0, one above", weights)
        return weights

    def resolved(self, head: bool) -> DistillConfig:
        """The same with everything said that was left to the recipe, but for the rate, which depends on the body.

        Args:
            head: whether the student has an MLM head and a teacher has one to learn from.
        """
        name = ("masked" if head else "embedding") if self.recipe == "auto" else self.recipe
        recipe, changes = RECIPES[name], {"recipe": name}
        for option in ("layer_map", "temperature", "warmup", "schedule", "batch_size"):
            if getattr(self, option) is None:
                changes[option] = getattr(recipe, option)
        if self.student is None:
            body = (self.preset, self.layers, self.keep_layers, self.dim, self.heads, self.ffn)
            if all(value is None for value in body):
                changes["preset"] = recipe.preset
            if self.vocabulary is None:
                changes["vocabulary"] = recipe.vocabulary
        return replace(self, weights=self.recipe_weights(recipe), **changes)

    def cache_folders(self, teachers: Sequence[Teacher], mode: str) -> list[tuple[str, Teacher]]:
        """A folder for each teacher, if there are to be any.

        Args:
            mode: where output distributions are compared.

        Raises:
            VocabdistilError: what is learned needs more of a teacher than its last hidden states of whole texts.
        """
        if self.cache_teacher is None:
            return []
        last = self.layer_map == "last" and not (self.weights.relations or self.weights.attention)
        hides = self.weights.logits > 0 and mode != "none"
        needed = "losses of the last hidden states of whole texts, as of --recipe embedding"
        given = f"--recipe {self.recipe} --layer-map {self.layer_map} --logits {mode}"
        need(last and not hides, "cache_teacher", needed, given)
        several = len(teachers) > 1
        return [
            (os.path.join(self.cache_teacher, f"teacher-{t}") if several else self.cache_teacher, teacher)
            for t, teacher in enumerate(teachers)
        ]

    @property
    def shape(self) -> Preset | None:
        """The preset, if there is one."""
        return PRESETS[self.preset] if isinstance(self.preset, str) else self.preset

    @property
    def size(self) -> int | None:
        """Tokens of the student's vocabulary, if something says how many."""
        if self.vocab_size is None and self.shape is not None and self.vocabulary in ("train", "trim", None):
            return self.shape.vocab_size
        return self.vocab_size

    def inputs(self, text: TextFiles | GivenTexts) -> list[str]:
        others = (self.student, self.dev, self.cache_teacher)
        return [*super().inputs(text), *(os.fspath(name) for name in others if name)]

    def identity(self) -> dict[str, Any]:
        """What must not change between an interrupted run and its continuation."""
        free = {"out", "resume", "overwrite", "quiet", "threads", "log_every"}
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
        Interrupted: SIGINT, SIGTERM or SIGHUP; a checkpoint has been saved.

    Example::

        import vocabdistil as vd
        result = vd.distill(teacher="bert-base-cased", text=["corpus.txt"], out="student", vocab_size=5000)
        result.metrics["after"]["cosine"]
    """
    config = configured(DistillConfig, config, options)
    run = _Run.begin(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(run.folder.held())
        for cache in run.caches:
            stack.enter_context(cache)
        return run.finish()


def _logits_mode(config: DistillConfig, weights: LossWeights, teachers: Sequence[Teacher], head: bool) -> str:
    """``config.logits``, or what it is by default.

    Args:
        weights: of the recipe.
        head: whether the student has an MLM head.

    Raises:
        VocabdistilError: it cannot be done, or leaves nothing to learn.
    """
    headless = [f"{teacher.name} ({teacher.headless})" for teacher in teachers if teacher.masked_lm is None]
    possible = head and weights.logits > 0 and len(headless) < len(teachers)
    mode = config.logits or ("match" if possible else "none")
    if mode != "none" and len(headless) == len(teachers):
        raise VocabdistilError(f"--logits: {mode} needs a teacher with an MLM head; without: {', '.join(headless)}")
    if mode != "none" and not head:
        raise VocabdistilError(f"--logits: {mode} needs a student with an MLM head, such as a --preset")
    left_out = (set() if head else {"mlm"}) | (set() if mode != "none" else {"logits"})
    if not any(value for name, value in asdict(weights).items() if name not in left_out):
        known = sorted(set(asdict(weights)) - left_out)
        raise VocabdistilError(f"--weights: expected one above 0 of {', '.join(known)}: nothing else is learned here")
    return mode


def _resolve(
    config: DistillConfig, teachers: Sequence[Teacher], checkpoint: Student | None
) -> tuple[DistillConfig, bool]:
    """The options with everything said that a recipe says, and whether the student has an MLM head to train."""
    first = teachers[0]
    tokenizer = first.tokenizer
    if checkpoint is not None:
        tokenizer = checkpoint.tokenizer
    elif config.vocabulary not in ("train", "trim", None):
        tokenizer = load_tokenizer(config.vocabulary, "--vocabulary", config.trust_remote_code)

    def has_head(config: DistillConfig) -> bool:
        if checkpoint is not None:
            return checkpoint.learns_words
        return (config.shape is not None or first.masked_lm is not None) and tokenizer.mask_token_id is not None

    config = config.resolved(has_head(config) and any(teacher.masked_lm is not None for teacher in teachers))
    return config, has_head(config)


@dataclass
class _Fitted:
    """What training left beside the model.

    Attributes:
        log: what was logged, as transformers has it.
        checkups: what was seen at the checkpoints.
        seconds, lr, steps: how long it took, the peak rate, how many steps were done.
    """

    log: list[dict[str, Any]]
    checkups: Checkups
    seconds: float
    lr: float
    steps: int


@dataclass
class _Run:
    """A run and what its stages have found so far; each stage is a method that reads what stands above it.

    Attributes:
        asked, config: the options as they were given, and with everything said that the recipe says.
        texts, split: the text, every example with the prompt before it.
        kept_layers: of the first teacher; none where the student is of another kind.
        checkpoint: the student to go on from, if there is one.
        mode: where output distributions are compared.
        dev: pairs that the student is scored on at every checkpoint.
        caches: of each teacher what it gave before; or none.
        folder: of the run, with what its stages stored there.
        started: on the monotonic clock.
    """

    asked: DistillConfig
    config: DistillConfig
    texts: list[str]
    split: TextSplit
    sources: list[Source]
    kept_layers: list[int]
    checkpoint: Student | None
    mode: str
    dev: Pairs | None
    caches: list[TeacherCache]
    folder: RunFolder
    say: Reporter
    started: float

    @classmethod
    def begin(cls, config: DistillConfig) -> _Run:
        """Reads the text, loads the teachers, and opens the folder of the run once all that can be checked has been."""
        started = time.monotonic()
        text = open_text(config.text, config.unit)
        check_out(Path(config.out), config.overwrite, config.inputs(text))
        texts = list(text)
        split = split_text(texts, config.held_out, config.seed, most=MOST_HELD_OUT)
        sources = load_sources(config)
        first, teachers = sources[0].teacher, [source.teacher for source in sources]
        checkpoint = load_student(config.student, config) if config.student is not None else None
        asked, (config, head) = config, _resolve(config, teachers, checkpoint)
        most = MOST_READ // len(split.train)
        need(config.steps is not None or config.epochs <= most, "epochs", f"a number up to {most}", config.epochs)
        kept: list[int] = []
        if config.shape is None and config.student is None:
            kept = config.kept_layers(first, max(1, first.num_layers // 2))
        elif config.layer_map == "kept":
            raise VocabdistilError("--layer-map: kept needs a student with layers of its teacher")
        mode = _logits_mode(config, config.weights, teachers, head)
        dev = read_pairs(config.dev, "--dev") if config.dev is not None else None
        folders = config.cache_folders(teachers, mode)
        caches = [TeacherCache.open(folder, teacher) for folder, teacher in folders]
        identity = {"logits": mode, **config.identity(), "prompt": first.prompt, "text": split.digest}
        folder = RunFolder.open(config.out, identity, config.resume, config.overwrite)
        texts = [first.prompt + text for text in texts]
        train, held_out = ([first.prompt + text for text in part] for part in (split.train, split.held_out))
        split = TextSplit(train, held_out, split.digest)
        say = Reporter(config.quiet)
        return cls(
            asked, config, texts, split, sources, kept, checkpoint, mode, dev, caches, folder, say, started
        )

    @property
    def partial(self) -> Path:
        return self.folder.path

    @property
    def record(self) -> dict[str, Any]:
        return self.folder.record

    @property
    def teachers(self) -> list[Teacher]:
        return [source.teacher for source in self.sources]

    def finish(self) -> DistillResult:
        student = self.student()
        vocabularies = _Vocabularies.of(self.teachers, student)
        covered = self.coverage(student, vocabularies)
        training = self.training(student, vocabularies)
        before = self.calibration(student, training)
        begun = self.begun(student, training)
        steps = self.plan(training)
        fitted = self.fit(student, training, steps)
        mixed = self.mix(training, begun)
        after = self.evaluation(training)
        return self.write(student, vocabularies, covered, training, fitted, mixed, before, after)

    def student(self) -> Student:
        """Vocabulary, body and start."""
        config = self.config
        if self.checkpoint is not None:
            return self.checkpoint
        for teacher in self.teachers if config.logits != "none" and config.weights.logits else ():
            if teacher.masked_lm is None:
                note = f"no MLM head ({teacher.headless}); its output distributions are not learned"
                self.say.print(f"{teacher.name}: {note}")
        vocabulary = self.vocabulary()
        for note in vocabulary.notes:
            self.say.print(note)
        texts = self.sample(_FITTED_TEXTS)
        student = make_student(
            config, self.sources[0], vocabulary, texts, self.kept_layers, config.shape, _FITTED_TOKENS
        )
        if config.shape is not None and not config.weights.needs_head:
            # Nobody would have trained it.
            student.model = student.model.base_model
        self.say.print(report.start_line(student.report["tokens"]))
        return student

    def vocabulary(self) -> Vocabulary:
        """The student's vocabulary; made once, and read again by a run that is resumed."""
        folder, ids = self.partial / "tokenizer", self.partial / "kept.safetensors"
        if "vocabulary" not in self.record:
            self.say.status("Making the student's vocabulary")
            config, source = self.config, self.sources[0]
            made = make_vocabulary(
                config.vocabulary, source.teacher.tokenizer, self.texts, config.size, config.family, source.prompts,
                source.teacher.model.get_input_embeddings().weight,
            )  # fmt: skip
            save_tokenizer(made.tokenizer, folder)
            if made.kept is not None:
                save_file({"kept": made.kept}, ids)
            self.folder.store(vocabulary={"source": config.vocabulary, "notes": list(made.notes)})
        found, kept = self.record["vocabulary"], load_file(ids)["kept"] if ids.exists() else None
        return Vocabulary(AutoTokenizer.from_pretrained(folder), found["source"], kept, tuple(found["notes"]))

    @property
    def reduces(self) -> bool:
        """Whether the student also reads the teachers' ids through the remap tables."""
        return RECIPES[self.config.recipe].reduce or self.mode in ("reduce", "reduce-map")

    @property
    def held_out(self) -> list[str]:
        """What figures are reported of."""
        return self.split.held_out[self._chosen_by :]

    @property
    def choosing(self) -> list[str]:
        """What checkpoints and mixtures are chosen by: a third of the held-out texts, none of those reported of."""
        return self.split.held_out[: self._chosen_by]

    @property
    def _chosen_by(self) -> int:
        return max(3, len(self.split.held_out) // 3)

    def sample(self, count: int) -> list[str]:
        """Some of the texts to train on."""
        texts = self.split.train
        return random.Random(self.config.seed).sample(texts, min(count, len(texts)))

    def coverage(self, student: Student, vocabularies: _Vocabularies) -> list[dict[str, Any]]:
        """How the vocabularies correspond on held-out text."""
        methods = ("match", "reduce") if self.reduces else ("boundary",)
        reports = []
        for teacher, table, matched in zip(self.teachers, vocabularies.tables, vocabularies.matched, strict=True):
            tokenizers = (teacher.tokenizer, student.tokenizer)
            found = coverage(self.held_out, *tokenizers, methods, table=table, matched=matched)
            self.say.print(*report.coverage_tables((teacher.name, self.config.out), tokenizers, found))
            reports.append(found.as_dict())
        return reports

    def training(self, student: Student, vocabularies: _Vocabularies) -> _Training:
        """The model to train, its objective and its batches."""
        config, teachers, tokenizer = self.config, self.teachers, student.tokenizer
        possible = student.learns_words or self.mode == "none"
        need(possible, "vocabulary", f"a tokenizer with a mask_token for --logits {self.mode}", config.vocabulary)
        masked = student.learns_words and config.weights.needs_head
        wanted = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        device = torch.device(wanted)
        reader = student.as_teacher()
        assignments = [self.assignments(student, teacher) for teacher in teachers]
        widths = [teacher.width for teacher in teachers]
        model = DistillModel(
            student.model, widths, assignments, config.seed, config.train_projection, student.projection
        ).to(device)
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
            pooling=self.sources[0].pooling,
            caches=self.caches,
        )
        if objective.weights.attention:
            for body in (student.model.base_model, *(teacher.model for teacher in teachers)):
                give_attention_maps(body)
        if masked:
            counts = count_tokens(tokenizer, self.split.train)
            objective.mask_probabilities = masking_probabilities(counts, tokenizer.all_special_ids).to(device)
            objective.mask_id = tokenizer.mask_token_id
        max_length = min([config.max_length, *(teacher.max_positions for teacher in teachers)])
        student_max_length = min(config.student_max_length or 2 * max_length, reader.max_positions)
        collator = DistillCollator(
            [teacher.tokenizer for teacher in teachers],
            tokenizer,
            vocabularies.tables if self.reduces else [],
            vocabularies.matched if self.reduces else [],
            max_length,
            student_max_length,
        )
        excerpts = []
        if masked:
            tokenizers = [*(teacher.tokenizer for teacher in teachers), tokenizer]
            excerpts = choose_excerpts(
                self.split.held_out, tokenizers, min(max_length, student_max_length), config.seed
            )
        return _Training(model, objective, collator, excerpts, device)

    def assignments(self, student: Student, teacher: Teacher) -> list[LayerAssignment]:
        """Which layers of a teacher teach which of the student's."""
        kind, layers = self.config.layer_map, student.as_teacher().num_layers
        if kind == "kept":
            if teacher is not self.teachers[0]:
                return layer_map("last", layers, teacher.num_layers)
            origins = [(i + 1, kept + 1) for i, kept in enumerate(student.kept_layers)]
            return layer_map(origins, layers, teacher.num_layers)
        try:
            return layer_map(kind, layers, teacher.num_layers)
        except ValueError as error:
            raise VocabdistilError(f"--layer-map: {error}") from None

    def calibration(self, student: Student, training: _Training) -> dict[str, Any]:
        """Fits the projections and the scales of the losses, and evaluates the untrained student and what it must
        beat; all of it stored."""
        model, objective = training.model, training.objective
        fitted = self.partial / "projections.safetensors"
        if "before" not in self.record:
            started = time.monotonic()
            self.say.status("Evaluating the untrained student")
            batch = to_device(training.collator(self.sample(_CALIBRATION_TEXTS)), training.device)
            objective.scales = calibrate(model, objective, batch)
            if len(model.projections):
                save_file(training.projections(), fitted)
            before = self.evaluation(training, status=None)
            perplexity = [
                pseudo_perplexity(teacher, training.excerpts, self.config.quiet)
                if teacher.masked_lm is not None and training.excerpts
                else None
                for teacher in self.teachers
            ]
            baselines = self.baselines(student)
            between = time.monotonic()
            start = self.examine(training)
            before |= {name: start[name] for name in ("dev",) if name in start}
            self.folder.store(
                scales=objective.scales,
                before=before,
                teacher_pseudo_perplexity=perplexity,
                baselines=baselines,
                start=start,
                evaluation_seconds=between - started,
                checkup_seconds=time.monotonic() - between,
            )
            self.say.print(*report.baseline_lines(self.record["baselines"], before))
        else:
            objective.scales = self.record["scales"]
            for key, weight in (load_file(fitted) if fitted.exists() else {}).items():
                with torch.no_grad():
                    model.projections[key].weight.copy_(weight)
        return self.record["before"]

    def baselines(self, student: Student) -> dict[str, dict[str, float]]:
        """What a student must beat to be worth its training: the teacher trimmed to its vocabulary and layers, if its
        architecture is known, and the mean of the teacher's input embeddings of its tokens; both as :func:`evaluate`
        measures embeddings."""
        source, config = self.sources[0], self.config
        layers = min(student.as_teacher().num_layers, source.teacher.num_layers)
        found: dict[str, dict[str, float]] = {}
        theirs = pooled(source.teacher, self.held_out, config.max_length, source.sentence)

        def measure(model: Teacher, parameters: int) -> dict[str, float]:
            model.prompt = source.teacher.prompt
            ours = pooled(model, self.held_out, config.max_length, source.sentence)
            row = embedding_loyalty(ours, theirs) | {"parameters": parameters}
            return row | ({} if self.dev is None else {"dev": self.dev_score(model)})

        start = plan_start(source.teacher.tokenizer, student.tokenizer, None, config.seed)
        # A teacher with code of its own cannot be trimmed.
        if source.teacher.architecture is not None:
            small = student.as_teacher()
            if not student.kept_layers or student.projection is not None:
                kept = keep_layers(source.teacher, layers)
                texts = self.sample(_FITTED_TEXTS)
                small = trimmed_teacher(source.teacher, kept, start.rows, student.tokenizer, texts)
            found["trimmed teacher"] = measure(small, sum(p.numel() for p in small.model.parameters()))
        static = mean_of_embeddings(source.teacher, start.rows, student.tokenizer)
        width = source.teacher.model.get_input_embeddings().weight.shape[1]
        found["mean of input embeddings"] = measure(static, len(student.tokenizer) * width)
        return found

    def plan(self, training: _Training) -> int:
        """How many steps; said before the first of them, with the time that they take."""
        config = self.config
        if "steps" not in self.record:
            whole = round(config.epochs * len(self.split.train) / config.batch_size / config.accumulate)
            steps = config.steps or max(1, whole)
            seconds = self.seconds_per_step(training) * config.accumulate
            if config.minutes is not None:
                # What is still to come after training takes about as long as the same did before it.
                after = self.record["evaluation_seconds"] + (len(SHARES) - 1) * self.record.get("score_seconds", 0.0)
                left = config.minutes * 60 - (time.monotonic() - self.started) - after
                steps = max(1, int(left / (seconds + self.record["checkup_seconds"] / config.save_every)))
                need(steps <= MOST_READ // config.batch_size, "minutes", "fewer", config.minutes)
            self.folder.store(steps=steps, seconds_per_step=seconds)
        steps, seconds = self.record["steps"], self.record["seconds_per_step"]
        self.say.print(report.plan_line(steps, config.batch_size * config.accumulate, len(self.split.train), seconds))
        return steps

    def seconds_per_step(self, training: _Training) -> float:
        size = self.config.batch_size
        exact = self.config.minutes is not None
        count = 22 if exact else 5
        order = TrainingOrder(self.split.train, size, count, self.config.seed)
        batches = ([order[i] for i in range(k * size, (k + 1) * size)] for k in range(count))

        def forward(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(training.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                return training.model(*args, **kwargs)

        def loss_of(batch: Sequence[Any]) -> Tensor:
            rows = to_device(training.collator(batch), training.device)
            return training.objective.loss(training.model, rows, self.config.seed, forward)[0]

        training.model.train()
        with torch.random.fork_rng():
            return seconds_per_step(loss_of, training.model, batches, 20.0 if exact else 5.0)

    def fit(self, student: Student, training: _Training, steps: int) -> _Fitted:
        """Trains, and gives the student the weights of its best checkpoint."""
        config, lr = self.config, self.config.lr or self.rate(student)
        checkpoint = last_checkpoint(self.partial) if config.resume else None
        checkups = Checkups(
            self.partial,
            training.model,
            lambda: self.examine(training),
            config.save_every,
            config.patience,
            self.record["start"],
            checkpoint_step(checkpoint),
            lambda step, row: self.say.print(report.checkup_line(step, row)),
        )
        if checkups.ended_early:  # and was stopped before it was written
            steps = checkpoint_step(checkpoint)
        trainer = DistillTrainer(
            model=training.model,
            args=training_arguments(
                self.partial,
                steps=steps,
                batch_size=config.batch_size,
                lr=lr,
                seed=config.seed,
                warmup=config.warmup,
                schedule=config.schedule,
                accumulate=config.accumulate,
                weight_decay=config.weight_decay,
                save_every=config.save_every,
                log_every=config.log_every,
                bf16=config.precision == "bf16",
                device=training.device,
            ),
            train_dataset=TrainingOrder(
                self.split.train, config.batch_size, steps * config.accumulate, config.seed
            ),
            data_collator=training.collator,
            objective=training.objective,
            sequential=True,
        )
        trainer.add_callback(checkups)
        seconds = fit(trainer, self.say, checkpoint)
        checkups.restore()
        return _Fitted(trainer.state.log_history, checkups, seconds, lr, trainer.state.global_step)

    def rate(self, student: Student) -> float:
        """The recipe's peak learning rate for such a body."""
        recipe, layers = RECIPES[self.config.recipe], student.report.get("copied_layers", [])
        if self.checkpoint is not None or len(layers) == self.teachers[0].num_layers and student.projection is None:
            return recipe.lr_whole
        return recipe.lr_fewer if layers else recipe.lr_fresh

    def examine(self, training: _Training) -> dict[str, float]:
        """What is looked at at every checkpoint: the loss on held-out text, and the score on the dev pairs."""
        found = {
            "loss": held_out_loss(
                training.model, training.objective, training.collator, self.choosing, self.config.batch_size
            )
        }
        if not math.isfinite(found["loss"]):
            raise Diverged(_DIVERGED)
        if self.dev is not None:
            found["dev"] = self.dev_score(training.model.as_teacher(training.collator.student), training.model)
        return found

    def dev_score(self, reader: Teacher, model: DistillModel | None = None) -> float:
        """Spearman's correlation on the dev pairs, of vectors as the student's folder will give them.

        Args:
            model: whose projection stands behind the pooling, where the teacher's folder says how vectors are made.
        """
        reader.prompt, settings = self.teachers[0].prompt, self.sources[0].sentence
        projection = (model.projection(0), model.projection_bias(0)) if model is not None and settings else (None, None)
        return pairs_score(reader, self.dev, self.config.max_length, settings, *projection)["spearman"]

    def begun(self, student: Student, training: _Training) -> _Begun | None:
        """The student before its training, if it may end between that and what training makes of it: then how well it
        tells held-out texts from nearly the same, as the teacher does, is found out and stored."""
        if not (RECIPES[self.config.recipe].mixed and student.kept_layers):
            return None
        source, most, prompt = self.sources[0], self.config.max_length, self.teachers[0].prompt
        pairs = with_words_left_out([text.removeprefix(prompt) for text in self.choosing], self.config.seed)
        if len(pairs[0]) < 3:
            return None
        self.say.status("Reading pairs of nearly the same texts")

        def similarities(reader: Teacher) -> Tensor:
            reader.prompt = prompt
            vectors = (pooled(reader, [prompt + text for text in side], most, source.sentence) for side in pairs)
            return cosine_similarity(*vectors)

        theirs = similarities(source.teacher)

        def score() -> float:
            training.model.eval()
            ours = similarities(training.model.as_teacher(training.collator.student))
            return float(regression(ours, theirs)[1])

        if "start_score" not in self.record:
            started = time.monotonic()
            value = score()
            self.folder.store(start_score=value, score_seconds=time.monotonic() - started)
        weights = {name: value.detach().cpu().clone() for name, value in training.model.state_dict().items()}
        return _Begun(weights, score)

    def mix(self, training: _Training, begun: _Begun | None) -> dict[float, float]:
        """Leaves the student where it follows the teacher best; returns how well by the share of the trained weights,
        nothing where these are all that there is."""
        if begun is None:
            return {}
        self.say.status("Choosing between start and trained weights")
        return mix(training.model, begun.weights, begun.score, self.record["start_score"])

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
            self.config.batch_size, self.config.seed, self.config.quiet,
        )  # fmt: skip
        if not all(math.isfinite(value) for value in found.values()):
            raise Diverged(_DIVERGED)
        return found

    def write(
        self,
        student: Student,
        vocabularies: _Vocabularies,
        covered: list[dict[str, Any]],
        training: _Training,
        fitted: _Fitted,
        mixed: dict[float, float],
        before: dict[str, Any],
        after: dict[str, Any],
    ) -> DistillResult:
        """Figures, folder, and what is said at the end."""
        config, first = self.config, self.teachers[0]
        reader = student.as_teacher()
        best, share = fitted.checkups.best, best_share(mixed) if mixed else 1.0
        if self.dev is not None:
            # At its ends a mixture has been scored already.
            ends = {0.0: before.get("dev"), 1.0: best.get("dev")}
            reader = training.model.as_teacher(student.tokenizer)
            after["dev"] = ends[share] if share in ends else self.dev_score(reader, training.model)
        metrics = {
            "teacher": [teacher.name for teacher in self.teachers],
            "command": "distill",
            "settings": config.settings(),
            "architecture": student.architecture,
            "vocabulary": self.record.get("vocabulary"),
            "recipe": config.recipe,
            "steps": fitted.steps,
            "lr": fitted.lr,
            "best_step": best["step"],
            "checkups": fitted.checkups.rows,
            "mixed": {str(part): score for part, score in mixed.items()},
            "share": share,
            "baselines": self.record["baselines"],
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
            "train_seconds": round(fitted.seconds, 1),
            "models": compare_models(
                first, reader, self.held_out, batch=config.time_batch, length=config.time_length
            ),
        }
        with open(self.partial / "training_log.jsonl", "w", encoding="utf-8") as file:
            for entry in fitted.log:
                file.write(json.dumps(entry) + "\n")
        metrics["warnings"] = report.warnings(metrics)
        projections = training.projections()
        if (weight := training.model.projection(0)) is not None:
            bias = training.model.projection_bias(0)
            student.projection = weight.detach().cpu(), bias
            projections |= {} if bias is None else {"bias": bias.detach().cpu().contiguous()}
        out = write_student(
            self.folder, self.asked, self.sources[0], student, vocabularies.tables, metrics, projections
        )
        self.say.print(*report.result_tables(metrics))
        for warning in metrics["warnings"]:
            self.say.print(f"Warning: {warning}")
        which = "" if best["step"] == fitted.steps else f"; the best was step {best['step']}, which is kept"
        self.say.print(f"{fitted.steps} steps in {fitted.seconds:.0f} s{which}. The student is {self.folder.place}")
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
class _Begun:
    """The student before its training.

    Attributes:
        weights: of the whole model, by name.
        score: how well the model, as it then is, tells texts from nearly the same, as the teacher does.
    """

    weights: dict[str, Tensor]
    score: Callable[[], float]


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
