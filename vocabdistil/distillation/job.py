"""The whole job: :func:`distill` takes teachers and text, and writes a student."""

from __future__ import annotations

import contextlib
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

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
from ..core.errors import VocabdistilError, need, spell
from ..core.processes import Processes
from ..evaluation import report
from ..evaluation.loyalty import regression
from ..evaluation.predictions import choose_excerpts, pseudo_perplexity
from ..evaluation.student import embedding_loyalty, pooled
from ..evaluation.tasks import Pairs, pairs_score, read_pairs
from ..evaluation.timing import compare_models
from ..models.architectures import body_of, move
from ..models.shapes import keep_layers
from ..models.start import plan_start
from ..models.teachers import Teacher, give_attention_maps, load_tokenizer
from ..models.vocabularies import Vocabulary, count_tokens, save_tokenizer
from ..models.whitening import last_layer, set_last_layer, whiten
from ..reference.layers import LayerAssignment, layer_map
from .baselines import mean_of_embeddings, trimmed_teacher
from .batches import DistillCollator, TrainingCollator, to_device
from .cache_manifest import cache_folders
from .calibration import calibrate
from .folder import DistillResult, write_student
from .held_out import evaluate, held_out_loss
from .joint_run import Fitted, JointRun, device_of, look_together, open_together
from .mixing import SHARES, best_of, best_share, kept_share, mix, with_words_left_out
from .model import DistillModel
from .objective import Objective
from .options import MOST_READ, DistillConfig, configured
from .order import TrainingOrder
from .recipes import RECIPES, LossWeights
from .run_folder import Diverged, Interrupted
from .student import Source, Student, load_sources, load_student, make_student, make_vocabulary, not_whitened
from .teacher_cache import TeacherCache
from .text import GivenTexts, TextFiles, sample_text
from .text_store import TextSplit, TextStore, split_text, stored

if TYPE_CHECKING:
    from .options import ResolvedConfig
    from .runs import DistillTrainingArguments, SeededTrainer

__all__ = ["MOST_HELD_OUT", "Interrupted", "distill"]

_T = TypeVar("_T")
# Held-out texts: of which checkpoints and mixtures are chosen by, and of which figures are reported.
_CHOOSING_TEXTS, _REPORTED_TEXTS = 256, 512
MOST_HELD_OUT = _CHOOSING_TEXTS + _REPORTED_TEXTS
_CALIBRATION_TEXTS = 128
# What layers are fitted to and vectors whitened by, as far as they are needed.
_FITTED_TEXTS = 8192
_DIVERGED = "the training diverged, the student's losses are not finite; try a smaller one"


def distill(config: DistillConfig | None = None, **options: Any) -> DistillResult:
    """Distils a teacher into a student with a smaller vocabulary of its own, and writes the student to a folder.

    A teacher that is a decoder teaches the decoder in ``student``, whatever the vocabulary of that, see
    :class:`vocabdistil.CausalDistillTrainer`.

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
    if config.teaches_decoder:
        from .causal_job import distill_causal

        return distill_causal(config)
    run = _Run.begin(config, Processes.join(config.device))
    with contextlib.ExitStack() as stack:
        stack.enter_context(run.folder.held())
        run.read()
        student = run.start()
        for cache in run.open_caches():
            stack.enter_context(cache)
        return run.finish(student)


def _cache_folders(config: ResolvedConfig, teachers: Sequence[Teacher], mode: str) -> list[tuple[Path, Teacher]]:
    """A folder for each teacher, if there are to be any.

    Args:
        mode: where output distributions are compared.

    Raises:
        VocabdistilError: what is learned needs more of a teacher than its last hidden states of whole texts.
    """
    if config.cache_teacher is None:
        return []
    last = config.layer_map == "last" and not (config.weights.relations or config.weights.attention)
    hides = config.weights.logits > 0 and mode != "none"
    needed = f"losses of the last hidden states of whole texts, as of {spell('recipe', 'embedding')}"
    given = (spell("recipe", config.recipe), spell("layer_map", config.layer_map), spell("logits", mode))
    need(last and not hides, "cache_teacher", needed, ", ".join(given))
    return list(zip(cache_folders(config.cache_teacher, len(teachers)), teachers, strict=True))


def _finite(score: float) -> float:
    """A correlation, -1 where there is none: JSON has no NaN, and nothing is worse."""
    return score if math.isfinite(score) else -1.0


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
        raise VocabdistilError.of("logits", f"{mode} needs a teacher with an MLM head; without: {', '.join(headless)}")
    if mode != "none" and not head:
        raise VocabdistilError.of("logits", f"{mode} needs a student with an MLM head, such as a {spell('preset')}")
    left_out = (set() if head else {"mlm"}) | (set() if mode != "none" else {"logits"})
    if not any(value for name, value in asdict(weights).items() if name not in left_out):
        known = sorted(set(asdict(weights)) - left_out)
        problem = f"expected one above 0 of {', '.join(known)}: nothing else is learned here"
        raise VocabdistilError.of("weights", problem)
    return mode


def _resolve(
    config: DistillConfig, teachers: Sequence[Teacher], checkpoint: Student | None
) -> tuple[ResolvedConfig, bool]:
    """The options with everything said that a recipe says, and whether the student has an MLM head to train."""
    first = teachers[0]
    tokenizer = first.tokenizer
    if checkpoint is not None:
        tokenizer = checkpoint.tokenizer
    elif config.vocabulary not in ("train", "trim", None):
        tokenizer = load_tokenizer(config.vocabulary, "vocabulary", config.trust_remote_code)

    def has_head(config: DistillConfig) -> bool:
        if checkpoint is not None:
            return checkpoint.learns_words
        return (config.shape is not None or first.masked_lm is not None) and tokenizer.mask_token_id is not None

    resolved = config.resolved(has_head(config) and any(teacher.masked_lm is not None for teacher in teachers))
    return resolved, has_head(resolved)


@dataclass
class _Run(JointRun):
    """A run and what its stages have found so far; each stage is a method that reads what stands above it.

    Attributes:
        config, asked: the options with everything said that the recipe says, and as they were given.
        given: the text, to be read from where it is.
        sources: the teachers.
        unwhitened: of those of them that were to be whitened and cannot be, why not.
        kept_layers: of the first teacher; none where the student is of another kind.
        checkpoint: the student to go on from, if there is one.
        mode: where output distributions are compared.
        dev: pairs that the student is scored on at every checkpoint.
        cached: the teachers whose states are kept, and where; or none.
        texts, split: the text, every example with the prompt before it.
        last_layers: of the teachers that can be whitened, as they were.
        caches: of each teacher what it gave before; or none.
    """

    config: ResolvedConfig
    asked: DistillConfig
    given: TextFiles | GivenTexts
    sources: list[Source]
    unwhitened: dict[str, str]
    kept_layers: list[int]
    checkpoint: Student | None
    mode: str
    dev: Pairs | None
    cached: list[tuple[Path, Teacher]]
    texts: TextStore = field(init=False)
    split: TextSplit = field(init=False)
    last_layers: list[dict[str, Tensor]] = field(init=False)
    caches: list[TeacherCache] = field(init=False)

    @classmethod
    def begin(cls, asked: DistillConfig, processes: Processes) -> _Run:
        """Loads the teachers, and opens the folder of the run once all that can be checked has been, but for the text,
        which is read into that folder."""
        say = Reporter(asked.quiet or not processes.main)
        given = look_together(asked, processes)
        sources = load_sources(asked)
        first, teachers = sources[0].teacher, [source.teacher for source in sources]
        checkpoint = load_student(asked.student, asked) if asked.student is not None else None
        config, head = _resolve(asked, teachers, checkpoint)
        kept: list[int] = []
        if config.shape is None and config.student is None:
            kept = config.kept_layers(first.model.config, max(1, first.num_layers // 2))
        elif config.layer_map == "kept":
            raise VocabdistilError.of("layer_map", "kept needs a student with layers of its teacher")
        mode = _logits_mode(config, config.weights, teachers, head)
        dev = read_pairs(config.dev, "dev") if config.dev is not None else None
        cached = _cache_folders(config, teachers, mode)
        if config.other_arguments:
            from .runs import try_arguments  # brings transformers' trainer, which takes a while to import

            try_arguments(config.other_arguments, device_of(config, processes))
        unwhitened = not_whitened(config, sources, asked.whiten is not None)
        identity = {"logits": mode, **config.identity(), "prompt": first.prompt}
        folder = open_together(config, identity, processes)
        return cls(
            config, folder, say, processes, asked, given, sources, unwhitened, kept, checkpoint, mode, dev, cached
        )

    def read(self) -> None:
        """The text, what is held out of it, and what was made of it before."""
        config = self.config
        self.say.status("Reading the text")
        self.texts = self.lead(lambda: stored(self.given, self.folder, self.teachers[0].prompt, config.quiet))
        self.split = self.lead(lambda: split_text(self.texts, config.held_out, config.seed, most=MOST_HELD_OUT))
        most = MOST_READ // len(self.split.train)
        need(config.steps is not None or config.epochs <= most, "epochs", f"a number up to {most}", config.epochs)

    def open_caches(self) -> list[TeacherCache]:
        """Of what the teachers gave before, as they are now."""
        config, whitened = self.config, self.record["whitened"]
        about = f"{config.whiten} on {self.texts.digest}, at most {config.max_length} tokens, seed {config.seed}"
        self.set_whitened({})  # they are known by the weights of their files
        try:
            self.caches = [
                TeacherCache.open(folder, teacher, whitening=about if teacher.name in whitened else "none")
                for folder, teacher in self.cached
            ]
        finally:
            self.set_whitened(whitened)
        return self.caches

    @property
    def teachers(self) -> list[Teacher]:
        return [source.teacher for source in self.sources]

    def finish(self, student: Student) -> DistillResult:
        vocabularies = _Vocabularies.of(self.teachers, student)
        covered = self.lead(lambda: self.coverage(student, vocabularies))
        training = self.training(student, vocabularies)
        self.calibration(student, training)
        begun = self.lead(lambda: self.begun(student, training), send=False)
        steps = self.lead(lambda: self.plan(training))
        fitted = self.fit(student, training, steps)

        def result() -> DistillResult:
            mixed = self.mix(training, begun)
            if mixed:
                self.say.print(report.mixed_line(self.share(mixed)))
            after = self.evaluation(training) if steps else dict(self.record["before"])
            return self.write(student, vocabularies, covered, training, fitted, mixed, self.record["before"], after)

        return self.processes.lead(result)

    def start(self) -> Student:
        """The student before any training. The teachers' vectors are whitened first, where that is wanted; from here on
        they are what they give then."""
        if self.dev is not None and not self.chooses_by_dev:
            self.say.print(report.few_pairs_line(len(self.dev.scores)))
        self.last_layers = [last_layer(source.teacher) for source, _ in self.whitenable]
        student = self.lead(self._start)
        self.set_whitened(self.record["whitened"])
        return student

    def _start(self) -> Student:
        """:meth:`start`, in the first process."""
        ways = [self.record["whitened"]] if "whitened" in self.record else self._ways()
        vocabulary = self.vocabulary() if self.checkpoint is None else None
        students, scores = [], []
        for whitened in ways:
            began = self.say.seconds
            self.set_whitened(whitened)
            students.append(self.student(vocabulary, bool(whitened)))
            if len(ways) > 1:
                scores.append(self._start_score(students[-1]))
                if self._is_late(2 * self.say.seconds - began, 0.5):  # with another
                    break
        chosen = best_of(scores) if scores else 0
        if "whitened" not in self.record:
            finite = [score if math.isfinite(score) else None for score in scores]  # as JSON has them
            self.folder.store(whitened=ways[chosen], whitening_scores=finite)
        whitened, student = self.record["whitened"], students[chosen]
        if found := self.record["whitening_scores"]:
            what = "student starts from" if student.kept_layers else "teacher has"
            self.say.print(report.whitening_line(what, found, bool(whitened)))
        if whitened:
            self.say.print(report.whitened_line(whitened))
        for name, problem in self.unwhitened.items():
            self.say.print(f"{name} is not whitened: {problem}")
        if self.checkpoint is None:
            self._about(student)
        return student

    def _is_late(self, seconds: float, share: float = 1.0) -> bool:
        """Whether so many are more than a share of the time that the job may take."""
        return self.config.minutes is not None and seconds > share * 60 * self.config.minutes

    def _about(self, student: Student) -> None:
        """What is to be known of a student that was made."""
        config, whitened = self.config, self.record["whitened"]
        for teacher in self.teachers if config.logits != "none" and config.weights.logits else ():
            if teacher.masked_lm is None:
                note = f"no MLM head ({teacher.headless}); its output distributions are not learned"
                self.say.print(f"{teacher.name}: {note}")
        narrower = config.dim or config.heads or config.ffn
        whole = len(self.kept_layers) == self.teachers[0].num_layers and not narrower
        if whole and RECIPES[config.recipe].mixed and config.vocabulary == "trim":
            self.say.print(report.whole_line(config.whiten if whitened else 0))
        self.say.print(report.start_line(student.report["tokens"]))

    @property
    def whitenable(self) -> list[tuple[Source, Path]]:
        """The teachers that can be whitened where that is wanted, and where their new last layers are kept."""
        found = [source for source in self.sources if self.config.whiten and source.teacher.name not in self.unwhitened]
        return [(source, self.partial / f"whitened_{s}.safetensors") for s, source in enumerate(found)]

    def set_whitened(self, whitened: Mapping[str, float]) -> None:
        """Gives these teachers, by their names, their new last layers, and the others those that they had."""
        for (source, file), own in zip(self.whitenable, self.last_layers, strict=True):
            set_last_layer(source.teacher, load_file(file) if source.teacher.name in whitened else own)

    def _ways(self) -> list[dict[str, float]]:
        """Which teachers may be whitened, by their names with what their new last layers explain: all, or nobody where
        the dev pairs say so."""
        if not self.whitenable:
            return [{}]
        self.say.status("Whitening the teacher's vectors")
        config, texts, found = self.config, self.sample(_FITTED_TEXTS), {}
        for source, file in self.whitenable:
            layer, explained = whiten(source.teacher, texts, config.whiten, source.sentence, config.max_length)
            save_file(layer, file)
            found[source.teacher.name] = round(explained, 4)
        return [found, {}] if self.asked.whiten is None and self.chooses_by_dev else [found]

    def _start_score(self, student: Student) -> float:
        """On the dev pairs; of the first teacher, where the student has nothing of its layers."""
        if student.kept_layers:
            return self.dev_score(student.as_teacher(), student.projection)
        return self.dev_score(self.teachers[0])

    def student(self, vocabulary: Vocabulary | None, whitened: bool) -> Student:
        """Body and start.

        Args:
            vocabulary: None: of the checkpoint to go on from.
            whitened: whether its teacher is.
        """
        if vocabulary is None:
            assert self.checkpoint is not None
            return self.checkpoint
        config = self.config
        self.say.status(f"Making the student's body{' of the whitened teacher' if whitened else ''}")
        texts = self.sample(_FITTED_TEXTS)
        student = make_student(config, self.sources[0], vocabulary, texts, self.kept_layers, config.shape)
        if config.shape is not None and not config.weights.needs_head:
            # Nobody would have trained it.
            student.model = body_of(student.model)
        return student

    def vocabulary(self) -> Vocabulary:
        """The student's vocabulary; made once, and read again by a run that is resumed."""
        folder, ids = self.partial / "tokenizer", self.partial / "kept.safetensors"
        if "vocabulary" not in self.record:
            self.say.status("Making the student's vocabulary")
            config, source = self.config, self.sources[0]
            assert config.vocabulary is not None  # without a checkpoint the recipe says it
            made = make_vocabulary(
                config.vocabulary, source.teacher.tokenizer, self.texts, config.size, config.family, source.prompts,
                source.teacher.embedding, config.seed,
            )  # fmt: skip
            save_tokenizer(made.tokenizer, folder)
            if made.kept is not None:
                save_file({"kept": made.kept}, ids)
            self.folder.store(vocabulary={"source": config.vocabulary, "notes": list(made.notes)})
        self.say.print(*self.record["vocabulary"]["notes"])
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
            self.say.print(*report.coverage_tables((teacher.name, os.fspath(self.config.out)), tokenizers, found))
            reports.append(found.as_dict())
        return reports

    def training(self, student: Student, vocabularies: _Vocabularies) -> _Training:
        """The model to train, its objective and its batches."""
        config, teachers, tokenizer = self.config, self.teachers, student.tokenizer
        possible = student.learns_words or self.mode == "none"
        expected = f"a tokenizer with a mask_token for {spell('logits', self.mode)}"
        need(possible, "vocabulary", expected, config.vocabulary)
        masked = student.learns_words and config.weights.needs_head
        device = self.device
        reader = student.as_teacher()
        assignments = [self.assignments(student, teacher) for teacher in teachers]
        widths = [teacher.width for teacher in teachers]
        model = DistillModel(
            student.model, widths, assignments, config.seed, config.train_projection, student.projection
        ).to(device)
        for teacher in teachers:
            move(teacher.whole, device)
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
            for body in (body_of(student.model), *(teacher.model for teacher in teachers)):
                give_attention_maps(body)
        if masked:
            counts = self.lead(lambda: count_tokens(tokenizer, sample_text(self.split.train, config.seed)))
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
            raise VocabdistilError.of("layer_map", f"{error}") from None

    def calibration(self, student: Student, training: _Training) -> None:
        """Fits the projections and the scales of the losses, and evaluates the untrained student and what it must
        beat; all of it stored."""
        fitted = self.partial / "projections.safetensors"
        if "before" not in self.record:
            self.lead(lambda: self._calibrate(student, training, fitted))
        training.objective.scales = self.record["scales"]
        with torch.no_grad():
            for key, weight in (load_file(fitted) if fitted.exists() else {}).items():
                training.model.linears[key].weight.copy_(weight)

    def _calibrate(self, student: Student, training: _Training, fitted: Path) -> None:
        config, model, objective = self.config, training.model, training.objective
        self.say.status("Evaluating the untrained student")
        batch = to_device(training.collator(self.sample(_CALIBRATION_TEXTS)), training.device)
        objective.scales = calibrate(model, objective, batch)
        if len(model.projections):
            save_file(training.projections(), fitted)
        started = time.monotonic()
        before = self.evaluation(training, status=None)
        evaluated = time.monotonic()
        start = self.examine(training)
        examined = time.monotonic()
        before |= {name: start[name] for name in ("dev",) if name in start}
        perplexity = [
            pseudo_perplexity(teacher, training.excerpts, config.quiet)
            if teacher.masked_lm is not None and training.excerpts
            else None
            for teacher in self.teachers
        ]
        baselines = {} if self._is_late(self.say.seconds) else self.baselines(student, start)
        # No training changes these, and what stands behind it must not take longer than was planned.
        models = compare_models(
            self.teachers[0], student.as_teacher(), self.held_out, batch=config.time_batch, length=config.time_length
        )
        self.folder.store(
            scales=objective.scales,
            before=before,
            teacher_pseudo_perplexity=perplexity,
            baselines=baselines,
            models=models,
            start=start,
            evaluation_seconds=evaluated - started,
            checkup_seconds=examined - evaluated,
        )
        self.say.print(*report.baseline_lines(self.record["baselines"], before))

    def baselines(self, student: Student, start: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """What a student must beat to be worth its training: the teacher trimmed to its vocabulary and layers, if its
        architecture is known, and the mean of the teacher's input embeddings of its tokens; both as :func:`evaluate`
        measures embeddings.

        Args:
            start: what :meth:`examine` found of the student, which may be the trimmed teacher.
        """
        source, config = self.sources[0], self.config
        layers = min(student.as_teacher().num_layers, source.teacher.num_layers)
        found: dict[str, dict[str, float]] = {}
        theirs = pooled(source.teacher, self.held_out, config.max_length, source.sentence)

        def measure(model: Teacher, parameters: int, known: Mapping[str, float]) -> dict[str, float]:
            model.prompt = source.teacher.prompt
            ours = pooled(model, self.held_out, config.max_length, source.sentence)
            row = embedding_loyalty(ours, theirs) | {"parameters": parameters}
            if self.dev is None:
                return row
            return row | {"dev": known["dev"] if "dev" in known else self.dev_score(model)}

        rows = student.rows or plan_start(source.teacher.tokenizer, student.tokenizer, None, config.seed).rows
        # A teacher with code of its own cannot be trimmed.
        if source.teacher.architecture is not None:
            small, known = student.as_teacher(), start
            if not (student.kept_layers and config.fit) or student.projection is not None:
                kept = keep_layers(source.teacher.model.config, layers)
                texts = self.sample(_FITTED_TEXTS)
                small, known = trimmed_teacher(source.teacher, kept, rows, student.tokenizer, texts), {}
            found["trimmed teacher"] = measure(small, sum(p.numel() for p in small.whole.parameters()), known)
        static = mean_of_embeddings(source.teacher, rows, student.tokenizer)
        width = source.teacher.embedding.shape[1]
        found["mean of input embeddings"] = measure(static, len(student.tokenizer) * width, {})
        return found

    def plan(self, training: _Training) -> int:
        """How many steps; said before the first of them, with the time that they take."""
        config = self.config
        if "steps" not in self.record:
            texts = config.batch_size * config.accumulate * self.processes.size
            steps = config.steps or max(1, round(config.epochs * len(self.split.train) / texts))
            seconds = self.seconds_per_step(training) * config.accumulate
            if config.minutes is not None:
                steps = self.steps_within(60 * config.minutes, seconds)
                need(steps <= MOST_READ // texts, "minutes", "fewer", config.minutes)
            self.folder.store(steps=steps, seconds_per_step=seconds, texts_per_step=texts)
        steps, seconds, texts = (self.record[name] for name in ("steps", "seconds_per_step", "texts_per_step"))
        if steps:
            self.say.print(report.plan_line(steps, texts, len(self.split.train), seconds))
        else:
            assert config.minutes is not None
            self.say.print(report.no_steps_line(config.minutes, self.say.seconds, seconds))
        self.say.print(report.checkup_line(0, self.record["start"]))
        return steps

    def steps_within(self, most: float, seconds: float) -> int:
        """How many steps of so many seconds end in time; none where there would be too few to learn anything."""
        # What is to come after training takes as long as the same did before it.
        found = self.record
        after = found["evaluation_seconds"] + (len(SHARES) - 1) * found.get("score_seconds", 0.0)
        left = most - self.say.seconds - after - found["checkup_seconds"]
        steps = int(left / (seconds + found["checkup_seconds"] / self.config.save_every))
        return steps if steps >= report.FEW_STEPS else 0

    def seconds_per_step(self, training: _Training) -> float:
        size = self.config.batch_size
        count = 5 if self.config.minutes is None else 22
        order = TrainingOrder(self.split.train, size, count, self.config.seed)
        batches = ([order[i] for i in range(k * size, (k + 1) * size)] for k in range(count))

        def forward(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(training.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                return training.model(*args, **kwargs)

        def loss_of(batch: Sequence[Any]) -> Tensor:
            rows = to_device(training.collator(batch), training.device)
            return forward(step=partial(training.objective.loss, batch=rows, seed=self.config.seed))[0]

        training.model.train()
        from .runs import seconds_per_step  # brings transformers' trainer, which takes a while to import

        most = 5.0 if self.config.minutes is None else min(20.0, 3 * self.config.minutes)
        with torch.random.fork_rng():
            return seconds_per_step(loss_of, training.model, batches, most)

    def fit(self, student: Student, training: _Training, steps: int) -> Fitted:
        """Trains, and gives the student the weights of its best checkpoint."""
        config = self.config
        arguments = self.arguments(config.lr or self.rate(student), steps, training.device)

        def make(model: DistillModel, arguments: DistillTrainingArguments) -> SeededTrainer:
            from .trainer import DistillTrainer  # brings transformers' trainer, which takes a while to import

            steps, size = arguments.max_steps, self.record["texts_per_step"]
            return DistillTrainer(
                model=model,
                args=arguments,
                train_dataset=TrainingOrder(self.split.train, size, steps, config.seed),
                data_collator=TrainingCollator(training.collator, training.objective.hiding("cpu"), config.seed),
                objective=training.objective,
            )

        return self.train(
            training.model,
            arguments,
            make,
            lambda: self.examine(training),
            lambda step, row: self.say.print(report.checkup_line(step, row)),
            # Where it can be mixed with what was learned, no loss chooses between the two.
            start_counts="start_score" not in self.record,
        )

    def arguments(self, lr: float, steps: int, device: torch.device) -> DistillTrainingArguments:
        from .runs import training_arguments

        config, (batch_size, accumulate) = self.config, self.batches(self.config.batch_size)
        return training_arguments(
            self.partial,
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            seed=config.seed,
            warmup=config.warmup,
            least_warmup=report.FEW_STEPS if self.asked.warmup is None else 0,
            schedule=config.schedule,
            accumulate=accumulate,
            weight_decay=config.weight_decay,
            save_every=config.save_every,
            log_every=config.log_every,
            bf16=config.precision == "bf16",
            device=device,
            others=config.other_arguments,
        )

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
            raise Diverged.of("lr", _DIVERGED)
        if self.dev is not None:
            found["dev"] = self.dev_score(training.as_teacher(), training.projection)
        return found

    def dev_score(self, reader: Teacher, projection: tuple[Tensor | None, Tensor | None] | None = None) -> float:
        """Spearman's correlation on the dev pairs, of vectors as the student's folder will give them.

        Args:
            projection: stands behind the pooling, where the teacher's folder says how vectors are made.

        Returns:
            -1, the least, where there is none, as all vectors are alike.
        """
        assert self.dev is not None
        reader.prompt, settings = self.teachers[0].prompt, self.sources[0].sentence
        behind = projection if projection is not None and settings is not None else ()
        return _finite(pairs_score(reader, self.dev, self.config.max_length, settings, *behind)["spearman"])

    def begun(self, student: Student, training: _Training) -> _Begun | None:
        """The student before its training, if it may end between that and what training makes of it: then its score,
        on the dev pairs or of how well it tells held-out texts from nearly the same as the teacher does, is stored."""
        if not (RECIPES[self.config.recipe].mixed and student.kept_layers):
            return None
        if self.chooses_by_dev:
            known = self.record["start"]["dev"], self.record["checkup_seconds"]
            return self._begun(training, lambda: self.dev_score(training.as_teacher(), training.projection), known)
        source, most, prompt = self.sources[0], self.config.max_length, self.teachers[0].prompt
        pairs = with_words_left_out([text.removeprefix(prompt) for text in self.choosing], self.config.seed)
        if len(pairs[0]) < 3:
            return None
        self.say.status("Reading pairs of nearly the same texts")

        def similarities(reader: Teacher) -> Tensor:
            reader.prompt = prompt
            whole, less = (pooled(reader, [prompt + text for text in side], most, source.sentence) for side in pairs)
            return cosine_similarity(whole, less)

        theirs = similarities(source.teacher)

        return self._begun(training, lambda: _finite(float(regression(similarities(training.as_teacher()), theirs)[1])))

    def _begun(
        self, training: _Training, score: Callable[[], float], known: tuple[float, float] | None = None
    ) -> _Begun:
        """:meth:`begun`.

        Args:
            score: of the model as it then is.
            known: what that is of the start, and the seconds that it took.
        """
        training.model.eval()
        if "start_score" not in self.record:
            started = time.monotonic()
            value, seconds = known or (score(), time.monotonic() - started)
            self.folder.store(start_score=value, score_seconds=seconds)
        weights = {name: value.detach().cpu().clone() for name, value in training.model.state_dict().items()}
        return _Begun(weights, score)

    @property
    def chooses_by_dev(self) -> bool:
        """Whether there are dev pairs enough to choose by."""
        return self.dev is not None and len(self.dev.scores) >= report.ENOUGH_PAIRS

    def share(self, mixed: Mapping[float, float]) -> float:
        """Which share of the trained weights the student gets."""
        return best_share(mixed) if self.chooses_by_dev else kept_share(mixed)

    def mix(self, training: _Training, begun: _Begun | None) -> dict[float, float]:
        """Leaves the student with :meth:`share` of what it learned; returns the score of each, nothing where the
        trained weights are all that there is."""
        if begun is None or not self.record["steps"]:
            return {}
        self.say.status("Choosing between start and trained weights")
        training.model.eval()
        return mix(training.model, begun.weights, begun.score, self.record["start_score"], self.share)

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
            raise Diverged.of("lr", _DIVERGED)
        return found

    def write(
        self,
        student: Student,
        vocabularies: _Vocabularies,
        covered: list[dict[str, Any]],
        training: _Training,
        fitted: Fitted,
        mixed: dict[float, float],
        before: dict[str, Any],
        after: dict[str, Any],
    ) -> DistillResult:
        """Figures, folder, and what is said at the end."""
        config, first = self.config, self.teachers[0]
        best = fitted.checkups.best
        share = self.share(mixed) if mixed else float(best["step"] > 0)
        if self.dev is not None:
            # A mixture has been scored already at its ends, and everywhere if it was chosen so.
            known = {0.0: before.get("dev"), 1.0: best.get("dev")} | (mixed if self.chooses_by_dev else {})
            after["dev"] = (
                known[share] if share in known else self.dev_score(training.as_teacher(), training.projection)
            )
        metrics = {
            "teacher": [teacher.name for teacher in self.teachers],
            "command": "distill",
            "settings": config.settings(),
            "architecture": student.architecture,
            "vocabulary": self.record.get("vocabulary"),
            "recipe": config.recipe,
            "whitened": self.record["whitened"],
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
            "models": self.record["models"],
        }
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
        done = f"{report.many(fitted.steps, 'step')} in {fitted.seconds:.0f} s{which}. " if fitted.steps else ""
        self.say.print(f"{done}The student is {self.folder.place}", report.next_line(first.name, os.fspath(out)))
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

    def as_teacher(self) -> Teacher:
        return self.model.as_teacher(self.collator.student)

    @property
    def projection(self) -> tuple[Tensor | None, Tensor | None]:
        """To the first teacher's width, with its bias."""
        return self.model.projection(0), self.model.projection_bias(0)

    def projections(self) -> dict[str, Tensor]:
        return {key: linear.weight.detach().cpu().contiguous() for key, linear in self.model.linears.items()}
