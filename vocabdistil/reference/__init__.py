"""Plain PyTorch versions of every operation: the formulas, and the ground truth that the kernels are tested
against.

Every loss takes float32, float64, bfloat16 or float16; half types are computed and returned in float32.
"""

from __future__ import annotations

from vocabdistil.alignment.masking import MaskedTokens, mask_tokens, masking_probabilities
from vocabdistil.reference.attention_loss import attention_loss, attention_mse
from vocabdistil.reference.contrastive import contrastive
from vocabdistil.reference.distilbert import DistilBertLoss, distilbert
from vocabdistil.reference.gold import gold_loss
from vocabdistil.reference.layers import LayerAssignment, layer_map, layer_mean
from vocabdistil.reference.linear_matched_kl import linear_matched_kl
from vocabdistil.reference.linear_remapped_kl import linear_remapped_kl
from vocabdistil.reference.linear_span_likelihood import linear_span_likelihood
from vocabdistil.reference.matched_kl import matched_kl
from vocabdistil.reference.mlm import mlm_loss
from vocabdistil.reference.multi_teacher import average_losses, ensemble_distribution
from vocabdistil.reference.pooled_loss import pooled_loss
from vocabdistil.reference.relation_loss import relation_loss
from vocabdistil.reference.remapped_kl import remapped_kl
from vocabdistil.reference.similarity_loss import similarity_loss
from vocabdistil.reference.span_likelihood import span_likelihood
from vocabdistil.reference.span_loss import span_kl, span_loss
from vocabdistil.reference.span_mean import span_mean

__all__ = [
    "DistilBertLoss",
    "LayerAssignment",
    "MaskedTokens",
    "attention_loss",
    "attention_mse",
    "average_losses",
    "contrastive",
    "distilbert",
    "ensemble_distribution",
    "gold_loss",
    "layer_map",
    "layer_mean",
    "linear_matched_kl",
    "linear_remapped_kl",
    "linear_span_likelihood",
    "mask_tokens",
    "masking_probabilities",
    "matched_kl",
    "mlm_loss",
    "pooled_loss",
    "relation_loss",
    "remapped_kl",
    "similarity_loss",
    "span_kl",
    "span_likelihood",
    "span_loss",
    "span_mean",
]
