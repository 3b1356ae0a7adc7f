"""The student before any training: its vocabulary, its body, its start."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..alignment.spans import TEXT_POOLINGS
from ..core.errors import need
from ..core.options import names_of
from ..models.architectures import architecture_of, body_of, is_decoder
from ..models.bodies import build_body
from ..models.presets import Preset
from ..models.sentence import SentenceSettings, expected_prompt, read_sentence_settings
from ..models.shapes import keep_layers, shape_of
from ..models.shrinking import shrink
from ..models.start import plan_start
from ..models.students import build_student, initialise_from_teacher
from ..models.teachers import Teacher, load_teacher
from ..models.vocabularies import Vocabulary, count_tokens, vocabulary_from
from ..models.whitening import cannot_whiten, need_whitenable
from .options import LENGTH, VOCAB_SIZE, StudentOptions
from .text import sample_text

__all__ = [
    "Source",
    "Student",
    "known_prompts",
    "load_sources",
    "load_student",
    "make_student",
    "make_vocabulary",
    "not_whitened",
]

# How often each prompt is counted beside the text: more often than a word must be to become a token.
_PROMPT_COUNT = 1000


@dataclass
class Source:
    """A teacher and what its folder says of the use of its vectors.

    Attributes:
        teacher: the model, its tokenizer and its prompt.
        sentence: pooling, normalisation and prompts of a sentence-transformers folder, or None.
    """

    teacher: Teacher
    sentence: SentenceSettings | None

    @property
    def sentence_with_prompt(self) -> SentenceSettings | None:
        """The same, with the prompt of the run as the one that texts get if nobody says."""
        sentence, prompt = self.sentence, self.teacher.prompt
        if sentence is None or prompt == sentence.prompt:
            return sentence
        return replace(sentence, prompts={**sentence.prompts, "default": prompt}, default_prompt_name="default")

    @property
    def pooling(self) -> str:
        """How losses make a vector of a text: as the folder says, if in one of the ways that a span can."""
        named = self.sentence.pooling if self.sentence is not None else ()
        return named[0] if len(named) == 1 and named[0] in TEXT_POOLINGS else "mean"

    @property
    def prompts(self) -> list[str]:
        return known_prompts(self.teacher.prompt, self.sentence)


@dataclass
class Student:
    """A student that can be used or trained.

    Attributes:
        model: on the CPU, in evaluation mode, with an MLM head if it has one to learn or to keep.
        tokenizer: its own.
        kept_layers: the teacher's layers that its layers came from; empty for fresh ones.
        report: how it began: for ``metrics.json``.
        rows: of the teacher's matrices those that its tokens begin as, see :meth:`vocabdistil.models.start.Start.rows`;
            None for a checkpoint.
        projection: weight ``[D_t, D_s]`` and bias ``[D_t]`` or None, from its hidden states to the teacher's; None
            where they are equally wide or nothing is known yet.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    kept_layers: list[int]
    report: dict[str, Any]
    projection: tuple[Tensor, Tensor | None] | None = None
    rows: Callable[[Tensor], Tensor] | None = None

    @property
    def has_head(self) -> bool:
        """Whether there is an MLM head."""
        return self.model.base_model is not self.model and not is_decoder(self.model.config)

    @property
    def learns_words(self) -> bool:
        """Whether it can learn to guess hidden words: it has an MLM head, and a token to hide them with."""
        return self.has_head and self.tokenizer.mask_token_id is not None

    @property
    def architecture(self) -> dict[str, Any]:
        """The model's class and shape."""
        config, row = self.model.config, architecture_of(self.model.config)
        names = {name: field for name, field in row.fields._asdict().items() if field} if row else {}
        shape = {name: getattr(config, field, None) for name, field in names.items()}
        return {"class": type(self.model).__name__, **shape}

    def as_teacher(self, name: str = "student", prompt: str = "") -> Teacher:
        """The student as whatever looks at finished models sees it."""
        head = self.model if self.has_head else None
        causal_lm = self.model if is_decoder(self.model.config) else None
        return Teacher(name, body_of(self.model), self.tokenizer, head, prompt=prompt, causal_lm=causal_lm)


def known_prompts(prompt: str, sentence: SentenceSettings | None) -> list[str]:
    """Everything that may stand before a text."""
    known = sentence.prompts.values() if sentence is not None else ()
    return sorted({text for text in (prompt, *known) if text})


def load_sources(options: StudentOptions) -> list[Source]:
    """The teachers; all read the same prompt.

    Raises:
        VocabdistilError: a teacher cannot be loaded, or their folders say different prompts and none was asked for.
    """
    sources = []
    for name in names_of(options.teacher):
        sentence = read_sentence_settings(name)
        prompt = expected_prompt(options.prompt, sentence)
        folder = name if sentence is None else sentence.transformer_folder
        decoders = options.decoders and sentence is None  # one that makes vectors has no text to be compared on
        teacher = load_teacher(
            folder, prompt=prompt, trust_remote_code=options.trust_remote_code, decoders=decoders
        )
        teacher.name = name
        sources.append(Source(teacher, sentence))
    prompts = sorted({source.teacher.prompt for source in sources})
    need(len(prompts) == 1, "prompt", "one, as the teachers' folders say different ones", prompts)
    return sources


def not_whitened(options: StudentOptions, sources: Sequence[Source], asked: bool) -> dict[str, str]:
    """The teachers whose vectors were to be whitened and cannot be, by name, and why not.

    Args:
        asked: whether the user wants it, or it is done where it can be.

    Raises:
        VocabdistilError: it was asked for and cannot be.
    """
    if not options.whiten:
        return {}
    for source in sources if asked else ():
        need_whitenable(source.teacher, source.sentence)
    problems = {source.teacher.name: cannot_whiten(source.teacher, source.sentence) for source in sources}
    return {name: problem for name, problem in problems.items() if problem}


def make_vocabulary(
    source: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str] | None,
    vocab_size: int | None,
    family: str | None = None,
    prompts: Iterable[str] = (),
    embedding: Tensor | None = None,
    seed: int = 0,
    keep: Iterable[int] = (),
) -> Vocabulary:
    """The stage of the student's vocabulary.

    Args:
        source: ``train``, ``trim`` or a folder, see :func:`vocabdistil.models.vocabularies.vocabulary_from`.
        tokenizer: the teacher's.
        texts: as the models read them, with the prompt; read once, if needed at all, and of more than
            :data:`.text.COUNTED` a sample is counted.
        vocab_size: None: :data:`VOCAB_SIZE`, or what the folder has.
        prompts: what else may stand before a text: counted often enough for its tokens to be there.
        embedding: an encoder's input embeddings: those of its tokens that others can stand in for then make room.
        seed: of the sample.
        keep: ids of the teacher's tokens that stay in a trimmed vocabulary whatever the texts.
    """
    if texts is not None and source in ("train", "trim"):
        vocab_size = VOCAB_SIZE if vocab_size is None else vocab_size
        texts = chain(sample_text(texts, seed), *(repeat(prompt, _PROMPT_COUNT) for prompt in prompts))
    return vocabulary_from(source, tokenizer, texts, vocab_size, family, embedding, keep)


def make_student(
    options: StudentOptions,
    source: Source,
    vocabulary: Vocabulary,
    texts: Sequence[str],
    kept_layers: list[int],
    preset: Preset | None = None,
) -> Student:
    """The stage of the student's body and its start.

    Args:
        vocabulary: the student's.
        texts: some of the text, as the models read it: what layers are fitted to, and kinds of starts counted in.
        kept_layers: of the teacher, for a body of its own class.
        preset: a DistilBERT of this shape instead: the teacher's layers fitted to it, if there are enough of its kind
            and they are as wide at least; else what can be copied, and the rest fresh.
    """
    teacher, tokenizer = source.teacher, vocabulary.tokenizer
    start = plan_start(teacher.tokenizer, tokenizer, vocabulary.kept, options.seed)
    projection: tuple[Tensor, Tensor | None] | None = None
    keep: Sequence[int] = kept_layers
    report: dict[str, Any] = {}
    shape = options.dim, options.heads, options.ffn
    if preset is not None:
        kept_layers = _layers_for(preset, teacher) if options.fit else []
        shape = preset.dim, preset.heads, preset.ffn
    if options.fit and kept_layers and teacher.causal_lm is None:  # a decoder's layers stay as they are
        small = shrink(teacher, kept_layers, texts, *shape, options.max_length or LENGTH, quiet=options.quiet)
        teacher, keep = small.teacher, range(len(kept_layers))
        report["explained"] = [round(share, 4) for share in small.explained]
        if small.teacher.width != source.teacher.width:
            projection = small.weight, small.bias
    if preset is not None:
        fresh = build_student(preset, tokenizer, seed=options.seed)
        report |= initialise_from_teacher(fresh, teacher, start.rows)
        model: PreTrainedModel = fresh
    else:
        model = build_body(teacher, start.rows, tokenizer, keep)
    if kept_layers:
        report["copied_layers"] = kept_layers
    report |= {"tokens": start.summary(count_tokens(tokenizer, texts))}
    student = Student(model.eval(), tokenizer, kept_layers, report, projection, start.rows)
    tokenizer.model_max_length = min(tokenizer.model_max_length, student.as_teacher().max_positions)
    return student


def _layers_for(preset: Preset, teacher: Teacher) -> list[int]:
    """The teacher's layers that a preset is made of; none where they are of another kind, too few or too narrow."""
    row, config = teacher.architecture, teacher.model.config
    if row is None or not row.fittable or row.biased_heads:
        return []
    whole, wanted = (teacher.num_layers, *shape_of(config)), (preset.layers, preset.dim, preset.heads, preset.ffn)
    if any(most < value for value, most in zip(wanted, whole, strict=True)):
        return []
    return keep_layers(config, preset.layers)


def load_student(folder: str | os.PathLike, options: StudentOptions) -> Student:
    """A checkpoint to go on from, with its own tokenizer."""
    loaded = load_teacher(folder, "student", trust_remote_code=options.trust_remote_code)
    model = loaded.whole.requires_grad_(True)
    return Student(model, loaded.tokenizer, [], {"checkpoint": os.fspath(folder)})
