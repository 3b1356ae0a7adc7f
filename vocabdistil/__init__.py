"""Distil a transformer into one with a different, smaller vocabulary."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import reference
    from .alignment.align import align
    from .alignment.batch import AlignedBatch
    from .alignment.cache import AlignedDataset, cache_aligned
    from .alignment.causal import CausalCollator
    from .alignment.collator import AlignmentCollator
    from .alignment.coverage import Coverage, CoverageReport, coverage
    from .alignment.methods import boundary_pairs, match_pairs
    from .alignment.picture import AlignmentPicture, show_alignment
    from .alignment.remap import RemapOutput, RemapTable
    from .alignment.spans import SpanPairs, text_pairs
    from .alignment.vocab import MatchedVocab
    from .core.backends import backends
    from .distillation.batches import DistillCollator
    from .distillation.causal_trainer import CausalDistillTrainer
    from .distillation.folder import DistillResult
    from .distillation.job import distill
    from .distillation.model import DistillModel
    from .distillation.objective import Objective
    from .distillation.options import DistillConfig, TeacherConfig, TrimConfig
    from .distillation.pretraining import train_teacher
    from .distillation.recipes import CausalWeights, LossWeights, Recipe
    from .distillation.runs import DistillTrainingArguments
    from .distillation.trainer import DistillTrainer
    from .distillation.trim import trim
    from .evaluation import loyalty
    from .evaluation.bits_per_byte import bits_per_byte
    from .evaluation.tasks import evaluate
    from .models import students
    from .ops.attention_loss import attention_loss
    from .ops.contrastive import contrastive
    from .ops.linear_matched_kl import linear_matched_kl
    from .ops.linear_remapped_kl import linear_remapped_kl
    from .ops.linear_span_likelihood import linear_span_likelihood
    from .ops.matched_kl import matched_kl
    from .ops.pooled_loss import pooled_loss
    from .ops.relation_loss import relation_loss
    from .ops.remapped_kl import remapped_kl
    from .ops.similarity_loss import similarity_loss
    from .ops.span_likelihood import span_likelihood
    from .ops.span_loss import span_kl, span_loss
    from .ops.span_mean import span_mean

__version__ = "0.1.0"

# Loaded on first use: torch and transformers take seconds to import, and options and their help need neither.
_HOMES = {
    "AlignedBatch": "alignment.batch",
    "AlignedDataset": "alignment.cache",
    "AlignmentCollator": "alignment.collator",
    "AlignmentPicture": "alignment.picture",
    "CausalCollator": "alignment.causal",
    "CausalDistillTrainer": "distillation.causal_trainer",
    "CausalWeights": "distillation.recipes",
    "Coverage": "alignment.coverage",
    "CoverageReport": "alignment.coverage",
    "DistillCollator": "distillation.batches",
    "DistillConfig": "distillation.options",
    "DistillModel": "distillation.model",
    "DistillResult": "distillation.folder",
    "DistillTrainer": "distillation.trainer",
    "DistillTrainingArguments": "distillation.runs",
    "LossWeights": "distillation.recipes",
    "MatchedVocab": "alignment.vocab",
    "Objective": "distillation.objective",
    "Recipe": "distillation.recipes",
    "RemapOutput": "alignment.remap",
    "RemapTable": "alignment.remap",
    "SpanPairs": "alignment.spans",
    "TeacherConfig": "distillation.options",
    "TrimConfig": "distillation.options",
    "align": "alignment.align",
    "attention_loss": "ops.attention_loss",
    "backends": "core.backends",
    "bits_per_byte": "evaluation.bits_per_byte",
    "boundary_pairs": "alignment.methods",
    "cache_aligned": "alignment.cache",
    "contrastive": "ops.contrastive",
    "coverage": "alignment.coverage",
    "distill": "distillation.job",
    "evaluate": "evaluation.tasks",
    "linear_matched_kl": "ops.linear_matched_kl",
    "linear_remapped_kl": "ops.linear_remapped_kl",
    "linear_span_likelihood": "ops.linear_span_likelihood",
    "match_pairs": "alignment.methods",
    "matched_kl": "ops.matched_kl",
    "pooled_loss": "ops.pooled_loss",
    "relation_loss": "ops.relation_loss",
    "remapped_kl": "ops.remapped_kl",
    "show_alignment": "alignment.picture",
    "similarity_loss": "ops.similarity_loss",
    "span_kl": "ops.span_loss",
    "span_likelihood": "ops.span_likelihood",
    "span_loss": "ops.span_loss",
    "span_mean": "ops.span_mean",
    "text_pairs": "alignment.spans",
    "train_teacher": "distillation.pretraining",
    "trim": "distillation.trim",
}
_MODULES = {"loyalty": "evaluation.loyalty", "reference": "reference", "students": "models.students"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found: Any = import_module(f".{_MODULES[name]}", __name__)
    elif name in _HOMES:
        found = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})


__all__ = [
    "AlignedBatch",
    "AlignedDataset",
    "AlignmentCollator",
    "AlignmentPicture",
    "CausalCollator",
    "CausalDistillTrainer",
    "CausalWeights",
    "Coverage",
    "CoverageReport",
    "DistillCollator",
    "DistillConfig",
    "DistillModel",
    "DistillResult",
    "DistillTrainer",
    "DistillTrainingArguments",
    "LossWeights",
    "MatchedVocab",
    "Objective",
    "Recipe",
    "RemapOutput",
    "RemapTable",
    "SpanPairs",
    "TeacherConfig",
    "TrimConfig",
    "align",
    "attention_loss",
    "backends",
    "bits_per_byte",
    "boundary_pairs",
    "cache_aligned",
    "contrastive",
    "coverage",
    "distill",
    "evaluate",
    "linear_matched_kl",
    "linear_remapped_kl",
    "linear_span_likelihood",
    "loyalty",
    "match_pairs",
    "matched_kl",
    "pooled_loss",
    "reference",
    "relation_loss",
    "remapped_kl",
    "show_alignment",
    "similarity_loss",
    "span_kl",
    "span_likelihood",
    "span_loss",
    "span_mean",
    "students",
    "text_pairs",
    "train_teacher",
    "trim",
]
