"""Distil a transformer into one with a different, smaller vocabulary."""

from . import reference
from ._backends import backends
from .ops import span_kl, span_loss, span_mean
from .spans import SpanPairs

__version__ = "0.1.0"

__all__ = ["SpanPairs", "backends", "reference", "span_kl", "span_loss", "span_mean"]
