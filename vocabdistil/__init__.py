"""Distil a transformer into one with a different, smaller vocabulary."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import loyalty, reference
from ._backends import backends
from .align import AlignedBatch, Coverage, align, boundary_pairs, match_pairs
from .coverage import CoverageReport, coverage
from .ops import contrastive, linear_matched_kl, matched_kl, remapped_kl, span_kl, span_loss, span_mean
from .remap import RemapOutput, RemapTable
from .spans import SpanPairs
from .vocab import MatchedVocab

if TYPE_CHECKING:
    from .cache import AlignedDataset, cache_aligned
    from .collator import AlignmentBatch, AlignmentCollator
    from .data import DistillCollator
    from .picture import AlignmentPicture, show_alignment
    from .pretraining import TeacherConfig, train_teacher
    from .trainer import DistillModel, DistillTrainer, LossWeights, Objective
    from .training import DistillConfig, DistillResult, distill

__version__ = "0.1.0"

# Loaded on first use: transformers' trainer takes seconds to import, and the losses do not need it.
_LAZY = {
    "AlignedDataset": "cache",
    "AlignmentBatch": "collator",
    "AlignmentCollator": "collator",
    "AlignmentPicture": "picture",
    "DistillCollator": "data",
    "DistillConfig": "training",
    "DistillModel": "trainer",
    "DistillResult": "training",
    "DistillTrainer": "trainer",
    "LossWeights": "trainer",
    "Objective": "trainer",
    "TeacherConfig": "pretraining",
    "cache_aligned": "cache",
    "distill": "training",
    "show_alignment": "picture",
    "train_teacher": "pretraining",
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
    "RemapOutput",
    "RemapTable",
    "SpanPairs",
    "TeacherConfig",
    "align",
    "backends",
    "boundary_pairs",
    "cache_aligned",
    "contrastive",
    "coverage",
    "distill",
    "linear_matched_kl",
    "loyalty",
    "match_pairs",
    "matched_kl",
    "reference",
    "remapped_kl",
    "show_alignment",
    "span_kl",
    "span_loss",
    "span_mean",
    "train_teacher",
]
