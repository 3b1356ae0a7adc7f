"""Recipes: what a student learns, and how, each under a name.

A recipe gives every option of :class:`vocabdistil.DistillConfig` that its user leaves open. ``embedding`` and
``masked`` are ours; the others compute what their sources say.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import TypeVar

from ..core.errors import VocabdistilError, is_real, need

__all__ = [
    "CAUSAL_RECIPES",
    "LAYER_MAPS",
    "LOGITS",
    "RECIPES",
    "SCHEDULES",
    "CausalWeights",
    "LossWeights",
    "Recipe",
    "need_weights",
    "parse_weights",
]

_Kind = TypeVar("_Kind", bound="_Weights")

SCHEDULES = ("linear", "cosine", "constant")
LAYER_MAPS = ("last", "skip", "average", "average_all", "kept")
# Where output distributions are compared: see :meth:`vocabdistil.Objective.logits_loss`.
LOGITS = ("match", "reduce", "reduce-map", "none")


class _Weights:
    """What each loss counts, by name: what is common to such classes."""

    @classmethod
    def parse(cls: type[_Kind], text: str, base: _Kind | None = None) -> _Kind:
        """From ``"kl=2,mlm=0.5"``; what is not named stays as in ``base``, by default as the class has it."""
        found = {}
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = part.partition("=")
            if name not in names:
                raise VocabdistilError.of("weights", f"unknown loss {name!r}; expected {', '.join(names)}")
            try:
                found[name] = float(value)
            except ValueError:
                raise VocabdistilError.of("weights", f"{name}: expected a number, got {value!r}") from None
        return replace(base or cls(), **found)  # type: ignore[type-var]


@dataclass(frozen=True)
class LossWeights(_Weights):
    """What each loss counts; 0 leaves it out. The formulas stand in ``vocabdistil.reference``.

    Attributes:
        kl: span KL, times T^2, a mean over span pairs: :func:`vocabdistil.span_kl`.
        cosine, mse: 1 - cos of the span means, or their squared difference, summed over features:
            :func:`vocabdistil.span_loss`.
        pooled: 1 - cos of the vectors of texts: :func:`vocabdistil.pooled_loss`.
        similarity: squared difference of the cosines of all pairs of texts of a batch:
            :func:`vocabdistil.similarity_loss`.
        relations: KL between relations of queries, keys and values over span pairs: :func:`vocabdistil.relation_loss`.
        attention: squared difference of attention maps averaged over spans: :func:`vocabdistil.attention_loss`.
        logits: KL of the output distributions over the matched vocabulary at hidden words:
            :meth:`vocabdistil.Objective.logits_loss`.
        mlm: cross-entropy at the hidden words.
    """

    kl: float = 0.0
    cosine: float = 0.0
    mse: float = 0.0
    pooled: float = 0.0
    similarity: float = 0.0
    relations: float = 0.0
    attention: float = 0.0
    logits: float = 0.0
    mlm: float = 0.0

    @property
    def needs_head(self) -> bool:
        """Whether only an MLM head can learn all of it."""
        return self.logits > 0 or self.mlm > 0


@dataclass(frozen=True)
class CausalWeights(_Weights):
    """What each loss of a causal student counts; 0 leaves it out.

    Attributes:
        lm: cross-entropy of the next token, a mean over what is learned.
        likelihood: divergence of the likelihoods of span pairs, a mean over them:
            :func:`vocabdistil.linear_span_likelihood`.
        matched: KL of the distributions of the next token over the tokens that both sides have, where a pair begins on
            both, a mean over pairs: :func:`vocabdistil.linear_matched_kl`.
        remapped: KL of the distributions of the next token over all tokens of the teacher, to which the student's
            probabilities are projected, at the same places and a mean over the same pairs:
            :func:`vocabdistil.linear_remapped_kl`.
        gold: the loss of TRL's GOLD, which makes all logits: :func:`vocabdistil.reference.gold_loss`.
    """

    lm: float = 0.0
    likelihood: float = 0.0
    matched: float = 0.0
    remapped: float = 0.0
    gold: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """What is learned, from which rows, at which pace.

    Attributes:
        source: where it comes from.
        weights: of the losses.
        reduce: the student also reads the teacher's ids through the remap table, and equal tokens are paired
            (``match``); else it reads its own tokenization alone, paired by the text (``boundary``).
        layer_map: which teacher layers teach which student layers; ``"kept"``: each that was copied its own origin.
        temperature: of the span KL and the output distributions.
        lr_whole, lr_fewer, lr_fresh: peak learning rate of a body with all layers of the teacher, which must not be
            shaken out of what they know, of one with fewer or narrower ones, and of a fresh one.
        schedule, warmup: how the rate falls, and in which share of the steps it rises.
        batch_size: texts per step.
        vocabulary: where the student's comes from.
        preset: the student's body, if not the teacher's own kind.
        mixed: whether a body with copied layers ends between its start and what training made of it, see
            :func:`vocabdistil.distillation.mixing.mix`.
        whiten: how far the teacher's vectors are whitened first, see :func:`vocabdistil.models.whitening.whiten`.
    """

    source: str
    weights: LossWeights | CausalWeights
    reduce: bool = False
    layer_map: str = "last"
    temperature: float = 2.0
    lr_whole: float = 1e-4
    lr_fewer: float = 1e-4
    lr_fresh: float = 5e-4
    schedule: str = "linear"
    warmup: float = 0.05
    batch_size: int = 32
    vocabulary: str = "train"
    preset: str | None = None
    mixed: bool = False
    whiten: float = 0.0


# arXiv 2205.02340 weighs its KL 2.0 and MLM 0.5. The span KL keeps the 2.0, so that runs with and without output
# distributions differ in these alone; these count as much as MLM, at the same masked tokens. More helps where the
# vocabularies share most words; where most words of the student's are split, MLM suffers from it.
_PAPER = LossWeights(kl=2.0, logits=0.5, mlm=0.5)

RECIPES: dict[str, Recipe] = {
    "embedding": Recipe(
        "measured in benchmarks/students: vectors of texts or their similarities beside the spans add nothing",
        LossWeights(kl=1.0),
        lr_whole=2e-4,
        lr_fewer=5e-4,
        warmup=0.1,
        vocabulary="trim",
        mixed=True,
        whiten=0.3,
    ),
    "masked": Recipe(
        "teachers with an MLM head",
        LossWeights(kl=2.0, logits=0.5, mlm=0.5),
        vocabulary="trim",
    ),
    "paper": Recipe("arXiv 2205.02340", _PAPER, reduce=True),
    "tiny-5k": Recipe(
        "the model card of distilrubert-tiny-cased-conversational-5k",
        LossWeights(kl=2.0, mlm=0.5),
        reduce=True,
        preset="tiny-5k",
    ),
    # T = 2 and the weights 5 : 2 : 1 are those of the authors' BERT recipe.
    "distilbert": Recipe("arXiv 1910.01108", LossWeights(logits=5.0, mlm=2.0, cosine=1.0)),
    "base": Recipe(
        "the model card of distilrubert-base-cased-conversational",
        LossWeights(logits=2.0, mlm=0.5, cosine=1.0),
        layer_map="average",
        preset="base",
    ),
    "small": Recipe(
        "the model card of distilrubert-small-cased-conversational",
        LossWeights(logits=2.0, mlm=0.5, cosine=1.0, attention=1.0),
        layer_map="average",
        preset="small",
    ),
}

# Of students that are decoders; the first is what they learn by if nobody says, as benchmarks/decoders finds it best.
# All their layers are there.
CAUSAL_RECIPES: dict[str, Recipe] = {
    "next-token": Recipe(
        "the next token over the tokens that both have, beside the text",
        CausalWeights(lm=1.0, matched=1.0),
        temperature=1.0,
        lr_whole=5e-5,
        schedule="cosine",
        batch_size=16,
    ),
    "likelihood": Recipe(
        "arXiv 2503.20083, beside the text",
        CausalWeights(lm=1.0, likelihood=100.0),
        temperature=1.0,
        lr_whole=5e-5,
        schedule="cosine",
        batch_size=16,
    ),
}


def parse_weights(text: str) -> LossWeights | CausalWeights:
    """Weights of either kind of student, by the first loss that is named."""
    first = text.partition(",")[0].partition("=")[0].strip()
    kind = CausalWeights if first in {f.name for f in fields(CausalWeights)} else LossWeights
    return kind.parse(text)


def need_weights(weights: LossWeights | CausalWeights) -> None:
    """
    Raises:
        VocabdistilError: they are no numbers, or none is above 0.
    """
    values = asdict(weights)
    fine = all(is_real(v) and 0 <= v < float("inf") for v in values.values()) and any(values.values())
    given = ",".join(f"{name}={value}" for name, value in values.items())
    need(fine, "weights", "numbers of at least 0, one above", given)
