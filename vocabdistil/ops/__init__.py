"""Fused losses as functions: each file holds one operation's schema, implementations, autograd and public name."""

from .attention_loss import attention_loss
from .contrastive import contrastive
from .linear_matched_kl import linear_matched_kl
from .linear_remapped_kl import linear_remapped_kl
from .linear_span_likelihood import linear_span_likelihood
from .matched_kl import matched_kl
from .pooled_loss import pooled_loss
from .relation_loss import relation_loss
from .remapped_kl import remapped_kl
from .similarity_loss import similarity_loss
from .span_likelihood import span_likelihood
from .span_loss import span_kl, span_loss
from .span_mean import span_mean

__all__ = [
    "attention_loss",
    "contrastive",
    "linear_matched_kl",
    "linear_remapped_kl",
    "linear_span_likelihood",
    "matched_kl",
    "pooled_loss",
    "relation_loss",
    "remapped_kl",
    "similarity_loss",
    "span_kl",
    "span_likelihood",
    "span_loss",
    "span_mean",
]
