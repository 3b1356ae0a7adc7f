"""What a training step of a causal student computes: the losses of one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..alignment.remap import RemapTable
from ..alignment.spans import SpanPairs, at_least_one
from ..alignment.vocab import MatchedVocab
from ..models.causal import Readout
from ..ops import linear_matched_kl, linear_remapped_kl, linear_span_likelihood
from ..reference.gold import gold_loss
from .recipes import CausalWeights

__all__ = ["CausalObjective", "causal_inputs"]

# Logits of the cross-entropy that exist at a time: 64 MiB of float32.
_BUDGET = 1 << 24


def causal_inputs(side: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a model reads of one side of a batch of :class:`vocabdistil.CausalCollator`."""
    names = ("input_ids", "attention_mask", "position_ids")
    return {name: side[name] for name in names if name in side}


@dataclass
class CausalObjective:
    """The losses of one batch of :class:`vocabdistil.CausalCollator`.

    Attributes:
        weights: what each loss counts.
        matched: the tokens that both sides have, on the student's device.
        likelihood_temperature: tau of ``likelihood``: of the sums of log-probabilities of spans.
        temperature: of the distributions of ``matched``, ``remapped`` and ``gold``.
        unmatched: what ``matched`` does with other tokens, see :func:`vocabdistil.matched_kl`.
        table: for ``remapped``: a token of the teacher begins, for the student, with the first piece of its row.
    """

    weights: CausalWeights
    matched: MatchedVocab
    likelihood_temperature: float = 100.0
    temperature: float = 1.0
    unmatched: str = "renormalize"
    table: RemapTable | None = None

    def __post_init__(self) -> None:
        self._projection = None if self.table is None else self.table.projection_weights()

    @property
    def needs_teacher(self) -> bool:
        return any(value for name, value in asdict(self.weights).items() if name != "lm")

    def terms(
        self, student: Readout, teacher: Readout | None, batch: Mapping[str, Any], totals: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Each loss that counts, as the batch's part of that of its step.

        Args:
            teacher: None if nothing needs it.
            totals: ``tokens`` and ``pairs`` of the step: what the losses are means over.
        """
        weights, found = self.weights, {}
        if weights.lm:
            found["lm"] = _cross_entropy(student, batch["labels"]) / at_least_one(totals["tokens"])
        if teacher is None:
            return found
        pairs: SpanPairs = batch["pairs"]
        layers = student.hidden, student.weight, teacher.hidden, teacher.weight
        # Of all: rows predict the token after them, and the mean is taken over the step.
        common: dict[str, Any] = {"student_shift": 1, "teacher_shift": 1, "reduction": "sum"}
        biased = {"student_bias": student.bias, "teacher_bias": teacher.bias, **common}
        ids = batch["input_ids"], batch["teacher"]["input_ids"]
        if weights.likelihood:
            found["likelihood"] = linear_span_likelihood(
                *layers[:2], ids[0], *layers[2:], ids[1], pairs, temperature=self.likelihood_temperature, **biased
            )
        first = _first_tokens(pairs)
        if weights.matched:
            found["matched"] = linear_matched_kl(
                *layers, self.matched, pairs=first, temperature=self.temperature, unmatched=self.unmatched, **biased
            )
        if weights.remapped:
            assert self.table is not None
            found["remapped"] = linear_remapped_kl(
                *layers, self.table, pairs=first, entry_weights=self._projection, combine="logsumexp",
                temperature=self.temperature, **biased,
            )  # fmt: skip
        if weights.gold:
            logits = _logits(*student), _logits(*teacher)
            found["gold"] = gold_loss(*logits, *ids, self.matched, pairs, temperature=self.temperature, **common)
        count = at_least_one(totals["pairs"])
        return {name: value if name == "lm" else value / count for name, value in found.items()}

    def loss(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Their weighted sum."""
        return torch.stack([getattr(self.weights, name) * value for name, value in terms.items()]).sum()


def _first_tokens(pairs: SpanPairs) -> SpanPairs:
    """The first token of each span: both sides have read the same of what is learned when they predict it."""
    starts = pairs.student_start, pairs.teacher_start
    spans = (starts[0], starts[0] + 1, starts[1], starts[1] + 1)
    return SpanPairs._trusted(spans, len(pairs), pairs.student_tokens, pairs.teacher_tokens, pairs.padded)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In the dtype of the hidden states, as under autocast weights have another one."""
    return F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))


def _cross_entropy(student: Readout, labels: Tensor) -> Tensor:
    """The sum over labels of the cross-entropy of the row before each; no more logits than the budget exist at once."""
    hidden, wanted = student.hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    rows = max(1, _BUDGET // student.weight.shape[0])

    def part(hidden: Tensor, wanted: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = _logits(hidden, weight, bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, wanted, reduction="sum")

    if len(hidden) <= rows:
        return part(hidden, wanted, student.weight, student.bias)
    parts = [
        checkpoint(part, some, these, student.weight, student.bias, use_reentrant=False)
        for some, these in zip(hidden.split(rows), wanted.split(rows), strict=True)
    ]
    return torch.stack(parts).sum()
