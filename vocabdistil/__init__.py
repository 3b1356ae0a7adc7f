"""Distil a transformer into one with a different, smaller vocabulary."""

from . import loyalty, reference
from ._backends import backends
from .align import AlignedBatch, align, boundary_pairs, match_pairs
from .ops import span_kl, span_loss, span_mean
from .remap import RemapOutput, RemapTable
from .spans import SpanPairs
from .vocab import MatchedVocab

__version__ = "0.1.0"

__all__ = [
    "AlignedBatch",
    "MatchedVocab",
    "RemapOutput",
    "RemapTable",
    "SpanPairs",
    "align",
    "backends",
    "boundary_pairs",
    "loyalty",
    "match_pairs",
    "reference",
    "span_kl",
    "span_loss",
    "span_mean",
]
