"""A teacher whose vectors of texts are whitened in part, by its last layer, in closed form on a little text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ..core.errors import VocabdistilError, need, spell
from .architectures import architecture_of, layers_of
from .fitting import Tap, products, tapped, token_batches
from .sentence import SentenceSettings, lowered, pool, prompt_length
from .shapes import known_architecture
from .teachers import Teacher, model_inputs

__all__ = ["Whitened", "cannot_whiten", "last_layer", "need_whitenable", "set_last_layer", "whiten"]

# Tokens to count on: about two thousand sentences.
_TOKENS = 2**15
# How much of the mean vector is taken away. All of it, with a power of 0.5, is best on text of the kind that it was
# counted on (e5 on Russian STS-B dev: 0.840, of 0.823), and hurts on other text (counted on a novel: 0.801); most of
# it, with 0.25, does nearly as much (0.837) and no harm (0.822; e5 on English 0.872, of 0.872).
_CENTRED = 0.8
# Of the largest deviation: directions with less count as if they had so much.
_LEAST = 1e-2
_RIDGE = 1e-3
# The last map of the feed-forward part, and the norm behind it.
_NAMES = ("weight", "bias", "norm.weight", "norm.bias")


class Whitened(NamedTuple):
    """A last layer that whitens.

    Attributes:
        layer: its new tensors, for :func:`set_last_layer`.
        explained: share of the variance of the whitened hidden states that it explains.
    """

    layer: dict[str, Tensor]
    explained: float


def cannot_whiten(teacher: Teacher, settings: SentenceSettings | None = None) -> str:
    """Why a teacher's last layer cannot whiten; empty if it can."""
    row = architecture_of(teacher.model.config)
    if row is None or not row.fittable:
        return f"the layers of {teacher.model.config.model_type} are of another kind than BERT's"
    if teacher.masked_lm is not None:
        return "its MLM head reads its hidden states"
    if settings is not None and (later := [module.name for module in settings.modules if module.weights]):
        return f"{', '.join(later)} reads its vectors"
    return ""


def need_whitenable(teacher: Teacher, settings: SentenceSettings | None = None) -> None:
    """Raises VocabdistilError where :func:`cannot_whiten`."""
    if problem := cannot_whiten(teacher, settings):
        raise VocabdistilError.of("whiten", f"{teacher.name} cannot be whitened: {problem}")


def _parts(teacher: Teacher) -> tuple[nn.Module, nn.Linear, nn.LayerNorm]:
    """The norm before the feed-forward part, the last map of this, and the norm after it."""
    row = known_architecture(teacher.model.config)
    assert row.parts is not None
    layer = layers_of(teacher.model, row)[-1]
    ffn_out, ffn_norm = map(layer.get_submodule, (row.parts.ffn_out, row.parts.ffn_norm))
    return layer.get_submodule(row.parts.attention_norm), cast(nn.Linear, ffn_out), cast(nn.LayerNorm, ffn_norm)


class _Moments:
    """The mean and the covariance of rows, float64, from their sums."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, rows: Tensor) -> None:
        if not self.count:
            # Sums of what is nearly centred lose nothing.
            self._shift, width = rows.mean(0), rows.shape[1]
            self._sum, self._products = (torch.zeros(*size, dtype=torch.float64) for size in ((width,), (width, width)))
        rows = rows - self._shift
        self.count += len(rows)
        self._sum += rows.sum(0)
        self._products += products(rows)

    @property
    def mean(self) -> Tensor:
        return self._shift + self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        mean = self._sum / self.count
        return self._products / self.count - torch.outer(mean, mean)


def _map(vectors: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """``[D]`` and ``[D, D]``, float64: of a vector the first is taken away, then it goes through the second.

    The second is ``C^(-power / 2)`` of the covariance C of the vectors, up to a factor: symmetric, so that no direction
    becomes another.
    """
    vectors = vectors.double()
    mean = vectors.mean(0)
    centred = vectors - mean
    values, directions = torch.linalg.eigh(centred.T @ centred)
    deviations = (values.clamp(min=0) / values[-1]).sqrt().clamp(min=_LEAST)
    return _CENTRED * mean, (directions * deviations**-power) @ directions.T


@torch.no_grad()
def whiten(
    teacher: Teacher,
    texts: Sequence[str],
    power: float,
    settings: SentenceSettings | None = None,
    max_length: int = 128,
    tokens: int = _TOKENS,
) -> Whitened:
    """A last layer for a teacher, or any model, which makes its vectors of texts less alike.

    Vectors of texts often have most of their length in common, and vary far more in some directions than in others;
    their cosines then tell little of texts. Whitening takes the mean away and makes all directions vary alike: ``(v -
    mean) C^(-1/2)`` with their covariance C (Su et al., arXiv 2103.15316, equations 3 to 7, up to the rotation, which
    changes no cosine). Here it is done in part, ``(v - 0.8 mean) C^(-power/2)``, and by the model itself: as the mean
    over tokens passes through any affine map, the hidden states of all tokens are to be mapped so, and the feed-forward
    part of the last layer learns to write them, by least squares; the norm behind it gives all tokens the same length,
    the one they had on average.

    Args:
        texts: of the kind that will be compared, prompts included.
        power: from 0, nothing, to 1, directions that vary alike.
        settings: how vectors are pooled; None, or if in several ways at once: the mean of the tokens.
        max_length: tokens of a text that are read.
        tokens: how many are read in all.

    Raises:
        VocabdistilError: :func:`cannot_whiten`, or texts that are too few or all alike.
    """
    need_whitenable(teacher, settings)
    if settings is not None and len(settings.pooling) > 1:
        settings = None
    batches = token_batches(teacher, lowered(texts, settings), min(max_length, teacher.max_positions), tokens)
    leading = prompt_length(teacher.tokenizer, teacher.prompt, settings)
    attention_norm, ffn_out, ffn_norm = _parts(teacher)
    taps = [Tap(ffn_out, reads=True), Tap(attention_norm), Tap(ffn_norm)]
    moments, vectors = _Moments(), []
    for batch in batches:
        seen = tapped(partial(teacher.model, **model_inputs(teacher.model, *batch)), taps)
        vectors.append(pool(seen[-1], batch.mask, settings, leading).float())
        moments.add(torch.cat(seen, -1)[batch.mask == 1])
    several = sum(map(len, vectors)) > 1 and bool((torch.cat(vectors).std(0) > 0).any())
    need(several, "text", f"several different texts for {spell('whiten')}", "none" if not vectors else "too few")
    mean, matrix = _map(torch.cat(vectors), power)

    width, covariance = len(mean), moments.covariance
    reads = len(covariance) - 2 * width
    read_mean, middle_mean, last_mean = moments.mean.split([reads, width, width])
    read, crossed, others = covariance[:reads, :reads], covariance[:reads, reads:], covariance[reads:, reads:]
    spread = others[width:, width:]
    ridge = _RIDGE * read.diagonal().mean() * torch.eye(len(read), dtype=torch.float64)
    # What the feed-forward part can say of the middle and of the last hidden states, and what it cannot.
    said = torch.linalg.solve(read + ridge, crossed)
    unsaid = others - crossed.T @ said
    # The middle is added to whatever it writes: the scale of what is wanted at which this is least in the way.
    scale = float(unsaid[:width, :width].trace()) / max(1e-12, float((matrix @ unsaid[width:, :width]).trace()))
    wanted = torch.cat([-torch.eye(width, dtype=torch.float64), scale * matrix])
    weight = (said @ wanted).T
    bias = scale * (last_mean - mean) @ matrix - middle_mean - weight @ read_mean
    lost = (wanted.T @ unsaid @ wanted).trace() / (matrix @ spread @ matrix).trace() / scale**2
    length = ((spread.trace() + last_mean.square().sum()) / width).sqrt().float().repeat(width)
    tensors = weight.float().contiguous(), bias.float(), length, torch.zeros(width)
    return Whitened(dict(zip(_NAMES, tensors, strict=True)), 1 - float(lost))


def _tensors(teacher: Teacher) -> dict[str, Tensor]:
    _, ffn_out, norm = _parts(teacher)
    return dict(zip(_NAMES, (ffn_out.weight, ffn_out.bias, norm.weight, norm.bias), strict=True))


@torch.no_grad()
def last_layer(teacher: Teacher) -> dict[str, Tensor]:
    """What :func:`set_last_layer` would change, as it is: a copy."""
    return {name: tensor.clone() for name, tensor in _tensors(teacher).items()}


@torch.no_grad()
def set_last_layer(teacher: Teacher, layer: dict[str, Tensor]) -> None:
    """Gives a model the last layer that :func:`whiten` made for it, or that :func:`last_layer` copied, in place."""
    for name, tensor in _tensors(teacher).items():
        tensor.copy_(layer[name])
