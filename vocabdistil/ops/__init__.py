"""Fused losses as functions: each file holds one operation's schema, implementations, autograd and public name."""

from .matched_kl import matched_kl
from .span_loss import span_kl, span_loss
from .span_mean import span_mean

__all__ = ["matched_kl", "span_kl", "span_loss", "span_mean"]
