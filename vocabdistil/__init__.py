"""Distil a transformer into one with a different, smaller vocabulary."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import reference
from .alignment.align import AlignedBatch, align
from .alignment.coverage import Coverage, CoverageReport, coverage
from .alignment.methods import boundary_pairs, match_pairs
from .alignment.remap import RemapOutput, RemapTable
from .alignment.spans import SpanPairs, text_pairs
from .alignment.vocab import MatchedVocab
from .core.backends import backends
from .evaluation import loyalty
from .ops import (
    attention_loss,
    contrastive,
    linear_matched_kl,
    matched_kl,
    pooled_loss,
    relation_loss,
    remapped_kl,
    similarity_loss,
    span_kl,
    span_loss,
    span_mean,
)

if TYPE_CHECKING:
    from .alignment.cache import AlignedDataset, cache_aligned
    from .alignment.collator import AlignmentBatch, AlignmentCollator
    from .alignment.picture import AlignmentPicture, show_alignment
    from .distillation.batches import DistillCollator
    from .distillation.job import DistillConfig, DistillResult, distill
    from .distillation.model import DistillModel
    from .distillation.objective import Objective
    from .distillation.pretraining import TeacherConfig, train_teacher
    from .distillation.recipes import LossWeights, Recipe
    from .distillation.trainer import DistillTrainer
    from .distillation.trim import TrimConfig, trim
    from .evaluation.tasks import evaluate

__version__ = "0.1.0"

# Loaded on first use: transformers' trainer takes seconds to import, and the losses do not need it.
_LAZY = {
    "AlignedDataset": "alignment.cache",
    "AlignmentBatch": "alignment.collator",
    "AlignmentCollator": "alignment.collator",
    "AlignmentPicture": "alignment.picture",
    "DistillCollator": "distillation.batches",
    "DistillConfig": "distillation.job",
    "DistillModel": "distillation.model",
    "DistillResult": "distillation.job",
    "DistillTrainer": "distillation.trainer",
    "LossWeights": "distillation.recipes",
    "Objective": "distillation.objective",
    "Recipe": "distillation.recipes",
    "TeacherConfig": "distillation.pretraining",
    "cache_aligned": "alignment.cache",
    "distill": "distillation.job",
    "evaluate": "evaluation.tasks",
    "show_alignment": "alignment.picture",
    "train_teacher": "distillation.pretraining",
    "TrimConfig": "distillation.trim",
    "trim": "distillation.trim",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "AlignedBatch",
    "AlignedDataset",
    "AlignmentBatch",
    "AlignmentCollator",
    "AlignmentPicture",
    "Coverage",
    "CoverageReport",
    "DistillCollator",
    "DistillConfig",
    "DistillModel",
    "DistillResult",
    "DistillTrainer",
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
    "boundary_pairs",
    "cache_aligned",
    "contrastive",
    "coverage",
    "distill",
    "evaluate",
    "linear_matched_kl",
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
    "span_loss",
    "span_mean",
    "text_pairs",
    "train_teacher",
    "trim",
]
