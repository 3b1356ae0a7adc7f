"""Fused losses as functions: each file holds one operation's schema, implementations, autograd and public name."""

from .contrastive import contrastive
from .linear_matched_kl import linear_matched_kl
from .matched_kl import matched_kl
from .relation_loss import relation_loss
from .remapped_kl import remapped_kl
from .span_loss import span_kl, span_loss
from .span_mean import span_mean

__all__ = [
    "contrastive",
    "linear_matched_kl",
    "matched_kl",
    "relation_loss",
    "remapped_kl",
    "span_kl",
    "span_loss",
    "span_mean",
]
