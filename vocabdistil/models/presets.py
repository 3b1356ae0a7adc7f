"""Shapes of students, by name."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """A student architecture.

    Attributes:
        layers, dim, heads, ffn: transformer layers, hidden width, attention heads, width of the feed-forward layer.
        vocab_size: tokens, if the user does not say.
    """

    layers: int
    dim: int
    heads: int
    ffn: int
    vocab_size: int


# The architectures of distilrubert-{base,small,tiny-v1,tiny-5k} (model cards, arXiv 2205.02340).
PRESETS = {
    "base": Preset(6, 768, 12, 3072, 31000),
    "small": Preset(2, 768, 12, 3072, 31000),
    "tiny": Preset(3, 264, 12, 792, 31000),
    "tiny-5k": Preset(3, 264, 12, 792, 5000),
}
