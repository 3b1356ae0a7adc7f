"""What a run is told: the options of every way to a student, checked before any work and without what takes long to
import."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, cast

from ..alignment.loading import look_at_tokenizer
from ..core import options as kinds
from ..core.errors import VocabdistilError, is_real, need, need_place, need_text, need_whole, need_writable, spell
from ..core.options import METHODS, Choice, Files, Flag, Kind, Option, Place, Text, Whole, check_options, names_of
from ..evaluation.options import TimeBatch, TimeLength, check_timing
from ..evaluation.tables import read_scored
from ..models.architectures import is_decoder
from ..models.folders import look_at_model, peek_config, transformer_folder
from ..models.presets import PRESETS, Preset
from ..models.shapes import check_layers, keep_layers, narrow_shape
from .cache_manifest import cache_folders, look_at_cache
from .recipes import (
    CAUSAL_RECIPES,
    LAYER_MAPS,
    LOGITS,
    RECIPES,
    SCHEDULES,
    CausalWeights,
    LossWeights,
    Recipe,
    need_weights,
    parse_weights,
)
from .run_folder import check_out, look_at_run, need_makeable, partial_of
from .text import GivenTexts, TextFiles, TextSource, open_text

__all__ = [
    "LENGTH",
    "MOST_READ",
    "VOCAB_SIZE",
    "CoverageOptions",
    "DemoOptions",
    "DistillConfig",
    "StudentOptions",
    "TeacherConfig",
    "TrimConfig",
    "configured",
    "plain",
]

_Config = TypeVar("_Config")

# Tokens of a student, and of a text that an encoder reads, if nobody says.
VOCAB_SIZE, LENGTH = 8000, 128
# Texts of one step, texts of one run, weights of a model that is trained: beyond these no memory is enough.
_MOST_AT_ONCE, MOST_READ, _MOST_WEIGHTS = 2**16, 2**31, 2**33 - 1

# What several of the classes below have.
_Out = Annotated[str | os.PathLike, Option(Place("the name of a folder", metavar="DIR"), "folder to write")]
# Two special tokens and one that can be masked.
_MaxLength = Annotated[int, Option(Whole(2), "teacher tokens")]
_Overwrite = Annotated[bool, Option(Flag(), "replace what an earlier run wrote there")]
_Quiet = Annotated[bool, Option(Flag(), "print nothing but errors")]
_BATCH, _RATE = Whole(0, _MOST_AT_ONCE), kinds.Real()
_HeldOut = Annotated[float, Option(kinds.Real("a share between 0 and 1", high=1), "share to evaluate on")]
_SaveEvery = Annotated[int, Option(Whole(), "checkpoint every N steps")]
_LogEvery = Annotated[int, Option(Whole(), "log every N steps")]
_Resume = Annotated[bool, Option(Flag(), "continue an interrupted run")]
_LENGTH_HELP = "teacher tokens (default: 128; of a decoder what 95% of the rows have, at most 512)"
_MODEL = Place("a folder or a model's name", metavar="DIR_OR_NAME")
_ASK = "(default: the recipe's)"
_VOCABULARY = Place("train, trim or a folder", metavar="train|trim|DIR")
_VOCABULARY_HELP = (
    "train: new tokens in the teacher's family; trim: those of the teacher that the text needs; or a tokenizer's "
    "folder (default: trim, or the recipe's)"
)
_FAMILY_HELP = f"of new tokens: {kinds.listed(kinds.FAMILIES)} (default: the teacher's)"
_LAYERS_HELP = (
    "layers of the teacher to keep, evenly spaced, the last among them (default: all without training, else half)"
)
_FIT_HELP = "copy layers as they are; else, where some are left out, the others are fitted to the teacher on the text"
_WHITEN_HELP = (
    "take out of the vectors what all texts share, and even out their directions, from 0 (as the teacher's) to 1 "
    "(default: {})"
)
_Whiten = kinds.Real("a number from 0 to below 1", high=1, closed=True)
_RECIPE_HELP = (
    f"what is learned and how: {kinds.listed(list(RECIPES))} (default auto: masked where student and teacher have an "
    f"MLM head, else embedding); of a decoder: {kinds.listed(list(CAUSAL_RECIPES))} (default auto: the first)"
)
_DRAFT_HELP = (
    "of a decoder: a draft head instead of a student, its output layer for so many tokens, with the maps d2t and t2d"
)
_PRESET_HELP = "a DistilBERT instead of the teacher's own kind of body: " + kinds.listed(
    [f"{name} ({shape.layers} x {shape.dim}, {shape.vocab_size:,} tokens)" for name, shape in PRESETS.items()]
)
_WORST_HELP = (
    "draw the N texts that align worst, with the smallest share in 1:1 pairs, beside the first ones or those to show"
)
_WEIGHTS_HELP = (
    f"{', '.join(field.name for field in fields(LossWeights))}: what differs from the recipe's; logits and mlm need an "
    f"MLM head; of a decoder {', '.join(field.name for field in fields(CausalWeights))}"
)
_ARGUMENTS_HELP = (
    "more of transformers.TrainingArguments: report_to=tensorboard,gradient_checkpointing=true,fsdp=true ..."
)
# Training arguments with which a run computes the same: it may go on with others.
_HOW = {
    "activation_checkpointing", "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory",
    "dataloader_prefetch_factor", "ddp_timeout", "deepspeed", "fsdp", "fsdp_config", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "logging_dir", "report_to", "run_name",
}  # fmt: skip
# Options that mean nothing for decoders.
_OF_ENCODERS = (
    "whiten", "logits", "layer_map", "train_projection", "cache_teacher", "dev", "prompt", "teacher_weights",
)  # fmt: skip
_LOGITS_HELP = f"where output distributions are learned: {kinds.listed(LOGITS)} (default: match if possible)"


def _value_of(text: str) -> Any:
    """What a word means as a value: a number, true, false, null; or itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def configured(kind: type[_Config], config: _Config | None, options: dict[str, Any]) -> _Config:
    """The configuration of a job, given whole or by its fields; from here on torch has the threads that it asks for.

    Raises:
        TypeError: both.
    """
    if config is not None and options:
        raise TypeError(f"give a config or options of {kind.__name__}, not both")
    config = kind(**options) if config is None else config
    if config.threads:  # type: ignore[attr-defined]
        import torch  # takes seconds, and a config is checked before

        torch.set_num_threads(config.threads)  # type: ignore[attr-defined]
    return config


def _check_reading(config: Any) -> None:
    """What everything that reads text and writes a folder asks of its options."""
    check_options(config)
    # What is made first has a longer name.
    need_place(f"{config.out}.partial", "out", "the name of a folder")


def _check_steps(config: Any) -> None:
    """What every training run asks of its options."""
    if config.steps is not None:
        need_whole(config.steps, "steps", most=MOST_READ // (config.batch_size or 1))


def plain(value: Any) -> Any:
    """A value of an option as JSON has it."""
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)  # numpy has numbers of its own
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


@dataclass
class StudentOptions:
    """What there must be to know of a student before it is made.

    Attributes:
        teacher: a folder or a name, or a list of them: the student takes its vocabulary's rules, its body and its first
            weights from the first.
        text: files, see :class:`vocabdistil.distillation.text.TextFiles`; or texts: a list, a data set (in memory or
            streamed) or another iterable of strings, or of rows with a column ``"text"``. They are read once, as a
            stream; where there is training, into ``out + ".partial"``, which holds them while it lasts.
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
        whiten: how far the teacher's vectors are whitened on the text before anything is made of it, see
            :func:`vocabdistil.models.whitening.whiten`. The student's vectors then rank texts better, mostly, but lie
            in another space than the teacher's. None: not, or as the recipe says, for teachers that it can be done for;
            ``distill`` then leaves it where 100 or more pairs of ``dev`` rank better without.
        prompt: what the teacher expects before every text; None: what a sentence-transformers folder says, or nothing.
        trust_remote_code: run code that comes with a teacher.
        language, license: for the model card: codes of the languages, an identifier of the licence.
        max_length: tokens of a text that the teacher reads; None: 128, or of a decoder that is taught as many as 95% of
            the rows have, at most 512.
        unit: ``"line"`` or ``"paragraph"``, see :class:`vocabdistil.distillation.text.TextFiles`.
        seed: of everything random.
        threads: of torch on the CPU; None: leave it.
        time_batch, time_length: the batch and the length in tokens at which CPU time is measured.
        overwrite, quiet: replace ``out``, if it is empty or a run wrote all that is in it; print nothing.
    """

    teacher: Annotated[
        str | os.PathLike | Sequence[str | os.PathLike],
        Option(_MODEL, "the model to learn from; distill takes several", several=True),
    ]
    text: Annotated[TextSource, kinds.TEXT_FILES]
    out: _Out
    vocab_size: Annotated[int | None, Option(Whole(), "tokens of the student (default 8000, or the preset's)")] = None
    vocabulary: Annotated[str | os.PathLike | None, Option(_VOCABULARY, _VOCABULARY_HELP)] = "train"
    family: Annotated[str | None, Option(Choice(names=kinds.FAMILIES), _FAMILY_HELP)] = None
    layers: Annotated[int | None, Option(Whole(), _LAYERS_HELP)] = None
    keep_layers: Annotated[
        str | Sequence[int] | None, Option(Kind(metavar="I,J,..."), "which ones instead, from 0")
    ] = None
    dim: Annotated[int | None, Option(Whole(), "hidden width (default: the teacher's)")] = None
    heads: Annotated[int | None, Option(Whole(), "attention heads (default: the teacher's)")] = None
    ffn: Annotated[int | None, Option(Whole(), "width of the feed-forward layers (default: the teacher's)")] = None
    fit: Annotated[bool, Option(Flag(), _FIT_HELP)] = True
    whiten: Annotated[float | None, Option(_Whiten, _WHITEN_HELP.format("0"))] = None
    prompt: kinds.Prompt = None
    trust_remote_code: kinds.TrustRemoteCode = False
    language: Annotated[
        str | Sequence[str] | None, Option(Kind(metavar="CODE,..."), "for the model card, such as ru")
    ] = None
    license: Annotated[str | None, Option(Text(metavar="NAME"), "for the model card, such as mit")] = None
    max_length: Annotated[int | None, Option(Whole(2), _LENGTH_HELP)] = None
    unit: kinds.Unit = "line"
    seed: kinds.Seed = 0
    threads: kinds.Threads = None
    time_batch: TimeBatch = 8
    time_length: TimeLength = 128
    overwrite: _Overwrite = False
    quiet: _Quiet = False

    # Whether a teacher may be one.
    decoders: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.teacher, (self.out,), (self.vocabulary,) = (
            names_of(self.teacher), names_of([self.out]), names_of([self.vocabulary])
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
        _check_reading(self)
        alone = self.family is None or self.vocabulary == "train"
        need(alone, "family", f"none without {spell('vocabulary', 'train')}", self.family)
        if self.vocabulary not in ("train", "trim", None):
            asked = spell("vocabulary", os.fspath(self.vocabulary))
            need(self.vocab_size is None, "vocab_size", f"nothing beside {asked}", self.vocab_size)
        for name in ("dim", "heads", "ffn"):
            value = getattr(self, name)
            fitted = self.fit or value is None
            need(fitted, name, f"none with {spell('fit', False)}, as narrower layers are fitted", value)
        both = self.layers is not None and self.keep_layers is not None
        need(not both, "keep_layers", f"none where {spell('layers')} says how many", self.keep_layers)
        layers = self.keep_layers
        need(layers is None or isinstance(layers, str), "keep_layers", "layers with commas between them", layers)
        check_timing(self.time_batch, self.time_length)
        codes = self.language
        need(codes is None or isinstance(codes, (list, tuple)), "language", "codes such as en", codes)
        for code in codes or ():
            need_text(code, "language")

    def look(self) -> TextFiles | GivenTexts:
        """Looks at files and folders by their names, before anything is loaded, which takes longer; returns the text.

        Raises:
            VocabdistilError: ``out`` must not be written, or what is to be read is not there.
        """
        text = self.open_text()
        look_at_run(Path(self.out), self.overwrite, self.inputs(text), getattr(self, "resume", None))
        if isinstance(text, TextFiles):
            text.look()
        models, decoders = self.sources(), self.decoders
        for source in models.pop("vocabulary"):
            look_at_tokenizer(source, "vocabulary")
        found = {
            name: [
                look_at_model(source, name, self.trust_remote_code, name == "teacher", decoders)
                for source in sources
            ]
            for name, sources in models.items()
        }
        if found["teacher"][0] is not None:
            self.kept_layers(found["teacher"][0])
        return text

    @functools.cached_property
    def teaches_decoder(self) -> bool:
        """Whether the teacher is a decoder."""
        return self.decoders and is_decoder(peek_config(names_of(self.teacher)[0]))

    def open_text(self) -> TextFiles | GivenTexts:
        """The text, to be read; for a decoder rows, as JSON."""
        return open_text(self.text, self.unit, rows=self.teaches_decoder)

    def kept_layers(self, teacher: Any, default: int | None = None) -> list[int]:
        """Which of the teacher's layers the student keeps.

        Args:
            teacher: its configuration.
            default: how many, if nothing was said; None: all.

        Raises:
            VocabdistilError: the teacher has no such layers, or its architecture cannot take such a body.
        """
        if self.keep_layers is None:
            kept = keep_layers(teacher, self.layers or default)
        else:
            kept = keep_layers(teacher, named=str(self.keep_layers))
        check_layers(teacher, kept)
        narrow_shape(teacher, self.dim, self.heads, self.ffn)
        return kept

    def sources(self) -> dict[str, list[str]]:
        """The models and tokenizers that the run loads, by the options that name them."""
        named = self.vocabulary not in ("train", "trim", None)
        return {"teacher": names_of(self.teacher), "vocabulary": names_of(self.vocabulary) if named else []}

    def inputs(self, text: TextFiles | GivenTexts) -> list[str]:
        """The files and folders that the run reads, by their names."""
        files = [os.fspath(path) for path in text.paths] if isinstance(text, TextFiles) else []
        named = [name for names in self.sources().values() for name in names]
        return [name for name in (*named, *files) if os.path.exists(name)]

    def settings(self) -> dict[str, Any]:
        """The options by name as JSON values, without the text."""
        return {field.name: plain(getattr(self, field.name)) for field in fields(self) if field.name != "text"}


@dataclass
class TrimConfig(StudentOptions):
    """Everything that :func:`trim` needs to know: :class:`StudentOptions`, with ``vocabulary`` ``"trim"`` or a folder
    (``"train"`` works too), one teacher, and all of its layers unless fewer are asked for.

    The teacher may be a decoder, whose layers and special tokens all stay, and whose vocabulary is ``"trim"``. Its text
    may hold conversations, as in :class:`DistillConfig`; counted is what its chat template makes of them.

    Attributes:
        draft: of a decoder write a draft head instead of a student: the rows of its output layer for the
            ``vocab_size`` tokens that the text needs most, with the maps ``d2t`` and ``t2d`` between their ids and the
            teacher's, as speculative decoders read them.
    """

    vocabulary: Annotated[str | os.PathLike, Option(_VOCABULARY, _VOCABULARY_HELP)] = "trim"
    max_length: _MaxLength = LENGTH
    draft: Annotated[bool, Option(Flag(), _DRAFT_HELP)] = False

    decoders: ClassVar[bool] = True

    def check(self) -> None:
        super().check()
        need(len(names_of(self.teacher)) == 1, "teacher", "one", len(names_of(self.teacher)))

    def kept_layers(self, teacher: Any, default: int | None = None) -> list[int]:
        """As :meth:`StudentOptions.kept_layers`; of a decoder all, and nothing may be asked for that it cannot have."""
        if not is_decoder(teacher):
            need(not self.draft, "draft", "a decoder to make a draft head of", teacher.model_type)
            return super().kept_layers(teacher, default)
        for name in ("layers", "keep_layers", "dim", "heads", "ffn", "whiten"):
            value = getattr(self, name)
            need(not value, name, f"none for a decoder ({teacher.model_type}), of which all layers stay", value)
        quantized = getattr(teacher, "quantization_config", None) is not None
        need(not quantized, "teacher", "weights in floating point", "quantized ones")
        own = f"trim for a decoder ({teacher.model_type}), which keeps tokens of its own"
        need(self.vocabulary == "trim", "vocabulary", own, self.vocabulary)
        return keep_layers(teacher)


@dataclass
class DistillConfig(StudentOptions):
    """Everything that :func:`distill` needs to know: :class:`StudentOptions`, and of the training.

    The teacher may be a decoder; then ``student`` is one too, with a vocabulary of its own, ``text`` may hold
    conversations (JSON lines as :class:`vocabdistil.CausalCollator` reads them), and options of vocabularies, bodies,
    hidden states and vectors do not apply.

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
            time that the whole job may take, found by timing some first; none where these are fewer than 10.
        batch_size: texts per step.
        accumulate: batches whose gradients are added up before a step.
        student_max_length: student tokens of each; None: twice ``max_length``, at most what it can read; of a decoder
            without either as ``max_length``.
        lr, warmup, schedule, weight_decay: AdamW's peak rate (None: the recipe's for a body with copied layers, or for
            a fresh one), the share of steps in which it rises (None: the recipe's, but 10 steps at least), how it falls
            then (``linear cosine constant``), decay.
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
        training_arguments: fields of ``transformers.TrainingArguments`` that have no option here (``report_to``,
            ``gradient_checkpointing``, ``dataloader_num_workers``, ``fsdp`` ...): a mapping, or ``"NAME=VALUE,..."``.
        resume: continue from ``out + ".partial"``, which holds the run while it lasts.
    """

    recipe: Annotated[str, Option(Choice(names=("auto", *RECIPES, *CAUSAL_RECIPES)), _RECIPE_HELP)] = "auto"
    whiten: Annotated[
        float | None,
        Option(_Whiten, _WHITEN_HELP.format("the recipe's, where it can be done and 100 dev pairs are not against it")),
    ] = None
    vocabulary: Annotated[str | os.PathLike | None, Option(_VOCABULARY, _VOCABULARY_HELP)] = None
    preset: Annotated[str | Preset | None, Option(Kind(metavar="NAME"), _PRESET_HELP)] = None
    student: Annotated[
        str | os.PathLike | None, Option(_MODEL, "a checkpoint to go on from instead, with its own vocabulary")
    ] = None
    steps: Annotated[int | None, Option(Whole(), "how many (default: by epochs)")] = None
    epochs: Annotated[float, Option(_RATE, "passes over the text")] = 3.0
    minutes: Annotated[
        float | None, Option(kinds.Real(high=1e6), "as many steps as fit into so long a job, instead")
    ] = None
    batch_size: Annotated[int | None, Option(_BATCH, f"texts per step {_ASK}")] = None
    accumulate: Annotated[int, Option(_BATCH, "batches of one step")] = 1
    student_max_length: Annotated[
        int | None, Option(Whole(2), "student tokens (default: twice the teacher's, or measured)")
    ] = None
    lr: Annotated[float | None, Option(_RATE, f"peak learning rate {_ASK}")] = None
    warmup: Annotated[
        float | None,
        Option(kinds.Real("a share from 0 to below 1", high=1, closed=True), f"share of the steps {_ASK}"),
    ] = None
    schedule: Annotated[
        str | None, Option(Choice(names=SCHEDULES), f"after it: {kinds.listed(SCHEDULES)} {_ASK}")
    ] = None
    weight_decay: Annotated[float, Option(kinds.Real("a number of at least 0", closed=True), "of AdamW")] = 0.01
    # Beyond these float32 has neither its square nor the square's inverse.
    temperature: Annotated[
        float | None,
        Option(kinds.Real("a number above 0, from 1e-18 to 1e18", 1e-18, 1e18), f"of both kinds of KL {_ASK}"),
    ] = None
    weights: Annotated[LossWeights | CausalWeights | str, Option(Kind(metavar="NAME=X,..."), _WEIGHTS_HELP)] = ""
    logits: Annotated[str | None, Option(Choice(names=LOGITS), _LOGITS_HELP)] = None
    teacher_weights: Annotated[
        Sequence[float] | None, Option(kinds.Numbers(), "of the teachers (default: alike)")
    ] = None
    layer_map: Annotated[
        str | None, Option(Choice(names=LAYER_MAPS), f"which layers teach which: {kinds.listed(LAYER_MAPS)} {_ASK}")
    ] = None
    train_projection: Annotated[bool, Option(Flag(), "train the map to the teacher's width too")] = False
    cache_teacher: Annotated[
        str | os.PathLike | None,
        Option(Place("a folder", metavar="DIR"), "remember there what teachers made of texts, for other runs"),
    ] = None
    held_out: _HeldOut = 0.05
    dev: Annotated[
        str | os.PathLike | None,
        Option(Place("a CSV file"), "CSV of sentence, sentence, score: told at every checkpoint"),
    ] = None
    patience: Annotated[
        int | None, Option(Whole(), "stop after N checkpoints without a better held-out loss")
    ] = None
    device: Annotated[str, Option(Choice(names=("auto", "cpu", "cuda")), "auto, cpu or cuda")] = "auto"
    precision: Annotated[str, Option(Choice(names=("fp32", "bf16")), "fp32 or bf16")] = "fp32"
    save_every: _SaveEvery = 500
    log_every: _LogEvery = 50
    training_arguments: Annotated[
        Mapping[str, Any] | str, Option(Kind(metavar="NAME=VALUE,..."), _ARGUMENTS_HELP)
    ] = ""
    resume: _Resume = False

    decoders: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.weights, str):
            parse_weights(self.weights)
        self.other_arguments  # noqa: B018, for what it raises
        if self.vocabulary is None and self.family is not None:
            self.vocabulary = "train"
        super().__post_init__()

    def check(self) -> None:
        super().check()
        _check_steps(self)
        known = self.preset is None or isinstance(self.preset, Preset) or self.preset in list(PRESETS)
        need(known, "preset", kinds.listed(list(PRESETS)), repr(self.preset))
        if (shape := self.shape) is not None:
            for name, value in asdict(shape).items():
                need_whole(value, f"preset: {name}")
            need(shape.dim % shape.heads == 0, "preset: heads", f"a divisor of dim ({shape.dim})", shape.heads)
        ways = [name for name in ("preset", "student") if getattr(self, name) is not None]
        need(len(ways) < 2, "student", f"none with {spell('preset')}", self.student)
        for name in ("layers", "keep_layers", "dim", "heads", "ffn"):
            value = getattr(self, name)
            need(value is None or not ways, name, f"none with {' or '.join(map(spell, ways))}", value)
        for name in ("vocabulary", "vocab_size", "family"):
            value = getattr(self, name)
            own = f"none with {spell('student')}, which has its own"
            need(self.student is None or value is None, name, own, value)
        alone = self.minutes is None or self.steps is None
        need(alone, "minutes", f"none where {spell('steps')} says how long", self.minutes)
        given = isinstance(self.weights, (str, LossWeights, CausalWeights))
        need(given, "weights", "LossWeights or their text form", type(self.weights).__name__)
        recipes = CAUSAL_RECIPES if self.names_decoders else RECIPES
        self.recipe_weights(recipes.get(self.recipe, recipes["next-token" if self.names_decoders else "masked"]))
        if self.teacher_weights is not None:
            shares = self.teacher_weights
            listed = isinstance(shares, (list, tuple)) and len(shares) == len(names_of(self.teacher))
            need(
                listed and all(is_real(share) and 0 < share < float("inf") for share in shares),
                "teacher_weights",
                "one number above 0 per teacher",
                shares,
            )
        if self.device == "cuda":
            import torch  # takes seconds

            if not torch.cuda.is_available():
                raise VocabdistilError.of("device", "cuda was asked for, but torch sees no CUDA device")

    @property
    def other_arguments(self) -> dict[str, Any]:
        """``training_arguments`` by name.

        Raises:
            VocabdistilError: they are neither a mapping nor text that means one.
        """
        given, name = self.training_arguments, "training_arguments"
        if isinstance(given, Mapping):
            try:
                json.dumps(plain(given))
            except (TypeError, ValueError) as error:
                raise VocabdistilError.of(name, f"expected values that JSON has: {error}") from None
            return dict(given)
        need(isinstance(given, str), name, "a mapping, or NAME=VALUE with commas between them", type(given).__name__)
        parts = [part.partition("=") for part in given.split(",") if part.strip()]
        for field_name, sign, _ in parts:
            need(bool(field_name.strip() and sign), name, "NAME=VALUE with commas between them", field_name)
        return {field_name.strip(): _value_of(text.strip()) for field_name, _, text in parts}

    def _check_decoder(self) -> None:
        """Raises VocabdistilError for what a decoder cannot learn."""
        kind = "a decoder"
        need(self.student is not None, "student", f"the folder of a decoder, as the teacher is {kind}", "none")
        causal = self.recipe in ("auto", *CAUSAL_RECIPES)
        need(causal, "recipe", f"{kinds.listed(list(CAUSAL_RECIPES))}, as the teacher is {kind}", self.recipe)
        fine = self.names_decoders or not self.weights
        need(fine, "weights", f"{', '.join(f.name for f in fields(CausalWeights))} for {kind}", self.weights)
        need(len(names_of(self.teacher)) == 1, "teacher", "one, as it is a decoder", len(names_of(self.teacher)))
        for name in _OF_ENCODERS:
            value = getattr(self, name)
            need(not value, name, f"none for {kind}", value)

    @property
    def names_decoders(self) -> bool:
        """Whether recipe or weights are those of decoders."""
        weights = parse_weights(self.weights) if isinstance(self.weights, str) else self.weights
        return self.recipe in CAUSAL_RECIPES or isinstance(weights, CausalWeights)

    def kept_layers(self, teacher: Any, default: int | None = None) -> list[int]:
        """As :meth:`StudentOptions.kept_layers`; of a decoder all."""
        if not is_decoder(teacher):
            own = f"of an encoder ({teacher.model_type})"
            need(self.recipe not in CAUSAL_RECIPES, "recipe", f"one {own}", self.recipe)
            need(not self.names_decoders, "weights", f"those {own}", self.weights)
            return super().kept_layers(teacher, default)
        return keep_layers(teacher)

    def recipe_weights(self, recipe: Recipe) -> Any:
        """What each loss counts under a recipe.

        Raises:
            VocabdistilError: they are no numbers, or none is above 0.
        """
        kind: Any = type(recipe.weights)
        weights = kind.parse(self.weights, recipe.weights) if isinstance(self.weights, str) else self.weights
        need_weights(weights)
        return weights

    def resolved(self, head: bool) -> ResolvedConfig:
        """The same with everything said that was left to the recipe, but for the rate, which depends on the body.

        Args:
            head: whether the student has an MLM head and a teacher has one to learn from.
        """
        name = ("masked" if head else "embedding") if self.recipe == "auto" else self.recipe
        recipe, changes = RECIPES[name], dict[str, Any](recipe=name, max_length=self.max_length or LENGTH)
        for option in ("layer_map", "temperature", "warmup", "schedule", "batch_size", "whiten"):
            if getattr(self, option) is None:
                changes[option] = getattr(recipe, option)
        if self.student is None:
            body = (self.preset, self.layers, self.keep_layers, self.dim, self.heads, self.ffn)
            if all(value is None for value in body):
                changes["preset"] = recipe.preset
            if self.vocabulary is None:
                changes["vocabulary"] = recipe.vocabulary
        return cast("ResolvedConfig", replace(self, weights=self.recipe_weights(recipe), **changes))

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

    def look(self) -> TextFiles | GivenTexts:
        if self.teaches_decoder:
            self._check_decoder()
        if self.cache_teacher is not None and importlib.util.find_spec("pyarrow") is None:
            raise VocabdistilError.of("cache_teacher", "needs pyarrow; pip install vocabdistil[cache]")
        text = super().look()
        if self.dev is not None:
            read_scored(self.dev, "dev")
        if self.cache_teacher is not None:
            for folder in cache_folders(self.cache_teacher, len(names_of(self.teacher))):
                look_at_cache(folder)
        return text

    def sources(self) -> dict[str, list[str]]:
        return super().sources() | {"student": [] if self.student is None else [os.fspath(self.student)]}

    def inputs(self, text: TextFiles | GivenTexts) -> list[str]:
        others = (self.dev, self.cache_teacher)
        return [*super().inputs(text), *(os.fspath(name) for name in others if name)]

    def identity(self) -> dict[str, Any]:
        """What must not change between an interrupted run and its continuation."""
        free = {"out", "resume", "overwrite", "quiet", "threads", "log_every"}
        free |= {"language", "license"}
        free |= {"logits", "prompt"}  # what these mean depends on the teachers
        others = {name: plain(value) for name, value in self.other_arguments.items() if name not in _HOW}
        return {
            name: value for name, value in {**self.settings(), "training_arguments": others}.items() if name not in free
        }


if TYPE_CHECKING:

    class ResolvedConfig(DistillConfig):
        """What is known of the options once the recipe has said its part: see :meth:`DistillConfig.resolved`."""

        whiten: float
        max_length: int
        batch_size: int
        warmup: float
        schedule: str
        temperature: float
        weights: LossWeights
        layer_map: str


@dataclass
class TeacherConfig:
    """Everything that :func:`vocabdistil.train_teacher` needs to know.

    Attributes:
        text: files, see :class:`vocabdistil.distillation.text.TextFiles`.
        out: the folder to write; ``out + ".partial"`` holds the run while it lasts.
        vocab_size, layers, dim, heads: of the model; its feed-forward layer has ``4 * dim``.
        cased: keep upper case and accents.
        steps, batch_size, max_length (tokens of a text), lr: of the training.
        held_out, unit, seed, save_every, log_every, threads, resume, overwrite, quiet: as in
            :class:`vocabdistil.DistillConfig`.
    """

    text: Annotated[str | os.PathLike | Sequence[str | os.PathLike], kinds.TEXT_FILES]
    out: _Out
    vocab_size: Annotated[int, Option(Whole(), "tokens")] = 30000
    layers: Annotated[int, Option(Whole(), "transformer layers")] = 4
    dim: Annotated[int, Option(Whole(), "hidden width")] = 256
    heads: Annotated[int, Option(Whole(), "attention heads")] = 4
    cased: Annotated[bool, Option(Flag(), "keep upper case and accents")] = False
    steps: Annotated[int, Option(Whole(), "how many")] = 1000
    batch_size: Annotated[int, Option(_BATCH, "texts per step")] = 32
    max_length: _MaxLength = 128
    lr: Annotated[float, Option(_RATE, "peak learning rate")] = 5e-4
    held_out: _HeldOut = 0.05
    unit: kinds.Unit = "line"
    seed: kinds.Seed = 0
    save_every: _SaveEvery = 500
    log_every: _LogEvery = 50
    threads: kinds.Threads = None
    resume: _Resume = False
    overwrite: _Overwrite = False
    quiet: _Quiet = False

    def __post_init__(self) -> None:
        self.text, (self.out,) = names_of(self.text), names_of([self.out])
        _check_reading(self)
        _check_steps(self)
        weights = 12 * self.layers * self.dim**2 + self.max_length * self.dim
        need(weights <= _MOST_WEIGHTS, "dim", "layers and positions of fewer than 2^33 weights", f"{weights}")
        need(self.dim % self.heads == 0, "heads", f"a divisor of {spell('dim')} ({self.dim})", self.heads)

    def look(self) -> TextFiles:
        """As :meth:`StudentOptions.look`."""
        files = names_of(self.text)
        text = TextFiles(files, self.unit)
        look_at_run(Path(self.out), self.overwrite, files, self.resume)
        text.look()
        return text

    def identity(self) -> dict[str, Any]:
        """What must not change between an interrupted run and its continuation."""
        free = ("out", "resume", "overwrite", "quiet", "threads", "save_every", "log_every")
        return {k: v for k, v in asdict(self).items() if k not in free}


@dataclass
class DemoOptions:
    """Everything that :func:`vocabdistil.distillation.demo.demo` needs to know."""

    out: _Out = "vocabdistil-demo"
    seed: kinds.Seed = 0
    resume: _Resume = False
    overwrite: _Overwrite = False
    quiet: _Quiet = False

    def __post_init__(self) -> None:
        check_options(self)
        (self.out,) = names_of([self.out])

    @property
    def has_teacher(self) -> bool:
        """Whether the demo to resume has its teacher already."""
        return self.resume and Path(self.out, "teacher").exists()

    @property
    def began_student(self) -> bool:
        """Whether the demo to resume was in the middle of its student."""
        return self.resume and partial_of(Path(self.out, "student")).exists()

    def look(self) -> None:
        """As :meth:`StudentOptions.look`."""
        out = Path(self.out)
        need(out.is_dir() or not out.exists(), "out", "the name of a folder", f"{out}, which is a file")
        if not self.has_teacher:
            check_out(out / "teacher", self.overwrite, resume=self.resume)
        check_out(out / "student", self.overwrite, resume=self.began_student)
        need_makeable(out)


@dataclass
class CoverageOptions:
    """What the command ``coverage`` is told."""

    teacher: Annotated[str, Option(_MODEL, "the teacher's tokenizer")]
    student: Annotated[
        str | None, Option(_MODEL, "the student's (default: the one that distill would make of the text)")
    ] = None
    vocabulary: Annotated[str, Option(_VOCABULARY, _VOCABULARY_HELP)] = "train"
    vocab_size: Annotated[int | None, Option(Whole(), "tokens of the student (default 8000)")] = None
    family: Annotated[str | None, Option(Choice(names=kinds.FAMILIES), _FAMILY_HELP)] = None
    prompt: kinds.Prompt = None
    text: Annotated[
        Sequence[os.PathLike] | None, Option(Files(), f"to count on, {kinds.TEXT_FORMATS}", several=True)
    ] = None
    unit: kinds.Unit = "line"
    method: Annotated[
        list[str] | None,
        Option(Choice(names=METHODS), f"{kinds.listed(METHODS)} (default: all)", several=True),
    ] = None
    show: Annotated[
        list[str] | None, Option(Text(), "draw how these texts are aligned", several=True)
    ] = None
    worst: Annotated[int | None, Option(Whole(), _WORST_HELP)] = None
    html: Annotated[
        str | None,
        Option(Place("a file to write"), "write these pictures (default: of the first 20 texts) as HTML"),
    ] = None
    json: kinds.Json = False

    def __post_init__(self) -> None:
        check_options(self)
        need(bool(self.text or self.show), "text", f"a file, or {spell('show')} with a text", "neither")
        made = f"a tokenizer, or {spell('text')} to train one on"
        need(bool(self.text or self.student), "student", made, "neither")
        need(self.worst is None or bool(self.text), "worst", f"{spell('text')}, to find them in", "none")
        if self.html is not None:
            need_writable(self.html, "html", "a file to write")

    @property
    def methods(self) -> tuple[str, ...]:
        """Those asked for, or all."""
        return tuple(dict.fromkeys(self.method or METHODS))

    def look(self) -> None:
        """As :meth:`StudentOptions.look`."""
        if self.text:
            TextFiles(self.text, self.unit).look()
        look_at_tokenizer(transformer_folder(self.teacher), "teacher")
        if self.student is not None:
            look_at_tokenizer(self.student, "student")
        elif self.vocabulary not in ("train", "trim"):
            look_at_tokenizer(self.vocabulary, "vocabulary")
