"""What a training step computes: the student with its projections, and the losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..alignment.masking import mask_tokens
from ..alignment.remap import RemapTable
from ..alignment.spans import SpanPairs
from ..alignment.vocab import MatchedVocab
from ..core.errors import VocabdistilError
from ..models.teachers import Reading, Teacher, head_input, model_inputs
from ..ops import linear_matched_kl, remapped_kl, span_loss, span_mean
from ..reference.layers import LayerAssignment
from ..reference.mlm import mlm_loss

__all__ = [
    "LOGITS",
    "DistillModel",
    "LossWeights",
    "Objective",
    "calibrate",
]

LOGITS = ("match", "reduce", "reduce-map", "none")
# The share of the teacher's tokens with several pieces that are hidden, as many as the student's own.
_HIDDEN = 0.15
# Logits over the teacher's vocabulary that exist at a time: 64 MiB of float32.
_REMAP_BUDGET = 1 << 24


@dataclass
class LossWeights:
    """What each loss counts: ``kl`` is the span KL, ``logits`` the KL of the output distributions, ``mse`` is summed
    over features, ``cosine`` is 1 - cos (both of the span means).

    arXiv 2205.02340 weighs its KL 2.0 and MLM 0.5. The span KL keeps the 2.0, so that runs with and without output
    distributions differ in these alone; these count as much as MLM, at the same masked tokens. More helps where the
    vocabularies share most words; where most words of the student's are split, MLM suffers from it.
    """

    kl: float = 2.0
    logits: float = 0.5
    mlm: float = 0.5
    cosine: float = 0.0
    mse: float = 0.0

    @classmethod
    def parse(cls, text: str) -> LossWeights:
        """From ``"kl=2,mlm=0.5"``; what is not named keeps its default."""
        weights = cls()
        names = [f.name for f in fields(cls)]
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = part.partition("=")
            if name not in names:
                raise VocabdistilError(f"--weights: unknown loss {name!r}; expected {', '.join(names)}")
            try:
                number = float(value)
            except ValueError:
                raise VocabdistilError(f"--weights: {name}: expected a number, got {value!r}") from None
            setattr(weights, name, number)
        return weights


class DistillModel(nn.Module):
    """The student, and a projection to the teacher's width for every teacher and layer assignment.

    Args:
        student: the model that will be saved, of any architecture, with or without an MLM head.
        teacher_widths: hidden widths of the teachers.
        assignments: for each teacher, which of its layers teach which of the student's.
        seed: of the projections, orthonormal until :func:`calibrate` fits them.
        train_projections: else they stay as fitted.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher_widths: Sequence[int],
        assignments: Sequence[Sequence[LayerAssignment]],
        seed: int = 0,
        train_projections: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self.assignments = [list(group) for group in assignments]
        self.projections = nn.ModuleDict()
        width = student.config.hidden_size
        generator = torch.Generator().manual_seed(seed)
        for t, (teacher_width, group) in enumerate(zip(teacher_widths, self.assignments, strict=True)):
            if teacher_width == width:
                continue
            for i in range(len(group)):
                linear = nn.Linear(width, teacher_width, bias=False)
                nn.init.orthogonal_(linear.weight, generator=generator)
                self.projections[f"{t}_{i}"] = linear.requires_grad_(train_projections)

    def projection(self, teacher: int, assignment: int = -1) -> Tensor | None:
        """``[D_t, D_s]``, or None where the widths are equal."""
        key = f"{teacher}_{assignment % len(self.assignments[teacher])}"
        return self.projections[key].weight if key in self.projections else None

    @property
    def num_layers(self) -> int:
        return self.student.config.num_hidden_layers

    @property
    def has_head(self) -> bool:
        """Whether there is an MLM head to train."""
        return self.student.base_model is not self.student

    @property
    def all_layers(self) -> bool:
        return any(a.student != (self.num_layers,) for group in self.assignments for a in group)

    @property
    def output_layer(self) -> tuple[Tensor, Tensor | None]:
        """Weight ``[V_s, E]`` and bias ``[V_s]`` or None."""
        layer = self.student.get_output_embeddings()
        return layer.weight, getattr(layer, "bias", None)

    def before_output(self, hidden: Tensor) -> Tensor:
        """``[..., D_s]`` last hidden states -> ``[..., E]``, what the output layer reads."""
        return head_input(self.student, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., D_s]`` last hidden states -> ``[..., V_s]``."""
        return F.linear(self.before_output(hidden), *self.output_layer)

    def as_teacher(self, tokenizer: PreTrainedTokenizerBase) -> Teacher:
        """The student as whatever looks at finished models sees it."""
        return Teacher("student", self.student.base_model, tokenizer, self.student if self.has_head else None)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Hidden states ``[B, L, D_s]`` by layer (0: the embedding) and the loss on ``labels`` (-100: no target)."""
        inputs = model_inputs(self.student.base_model, input_ids, attention_mask)
        out = self.student.base_model(**inputs, output_hidden_states=self.all_layers)
        last = out.last_hidden_state
        # Without the other layers, their places stay empty: assignments count layers from the embedding up.
        layers = list(out.hidden_states) if self.all_layers else [None] * self.num_layers + [last]
        return layers, None if labels is None else mlm_loss(last, labels, self.logits)


@dataclass
class Objective:
    """The losses of one batch: what is compared, and what each comparison counts.

    Attributes:
        teachers: frozen, on the student's device.
        weights, temperature: see :class:`DistillConfig`.
        teacher_weights: sum to 1.
        scales: for each teacher and assignment the standard deviation of the teacher's features, as
            :func:`calibrate` measured it. Temperatures are multiples of it and losses are divided by its square, as if
            the teacher's features had standard deviation 1: weights then mean the same for every teacher.
        mask_probabilities: ``[V_s]``, by id; None: nothing is masked, as for a student without an MLM head.
        mask_id: the student's MASK; None with ``mask_probabilities``.
        mode: where output distributions are compared, one of ``LOGITS``: see :meth:`logits_loss`.
        tables, matched: one of each per teacher, read unless ``mode`` is ``"none"``.
    """

    teachers: list[Teacher]
    weights: LossWeights
    teacher_weights: list[float]
    scales: list[list[float]]
    temperature: float
    mask_probabilities: Tensor | None = None
    mask_id: int | None = None
    mode: str = "none"
    tables: Sequence[RemapTable] = ()
    matched: Sequence[MatchedVocab] = ()

    def predicts(self, t: int) -> bool:
        """Whether teacher ``t``'s output distributions are learned."""
        return self.mode != "none" and self.weights.logits > 0 and self.teachers[t].masked_lm is not None

    def mask(self, batch: dict[str, Any], seed: int) -> dict[str, Any]:
        """The batch with hidden tokens: what the student and the teachers read in training.

        The student's own tokenization is masked for MLM. A teacher whose output distributions are learned must
        guess too, as one that sees a word has no more to say than which one it is: it reads MASK where a matched
        token of the student's has become MASK, and for ``reduce`` and ``reduce-map`` also in the place of 15% of
        its tokens with several pieces; in the ``reduce`` rows the pieces of its hidden tokens are MASK as well. For
        any other teacher these rows stay whole.

        Returns:
            ``batch`` with new ``student_ids`` and ``teacher_ids``, and besides
            ``labels``: int64 ``[(T + 1) B, L_s]``, the masked tokens of the own rows, -100 elsewhere;
            ``hidden_pairs``: for each teacher the pairs of hidden tokens whose output distributions are compared, in
            the student's own rows for ``match`` and in the teacher's ``reduce`` rows else; or None.
            Where nothing is masked, the batch with ``labels`` None and no hidden pairs.
        """
        if self.mask_probabilities is None:
            return {**batch, "labels": None, "hidden_pairs": [None] * len(self.teachers)}
        ids, size = batch["student_ids"].clone(), batch["teacher_ids"][0].shape[0]
        generator = torch.Generator(ids.device).manual_seed(seed)
        masked = mask_tokens(
            ids[-size:],
            self.mask_probabilities,
            self.mask_id,
            attention_mask=batch["student_mask"][-size:],
            generator=generator,
        )
        ids[-size:] = masked.input_ids
        labels = torch.full_like(ids, -100)
        labels[-size:] = masked.labels
        became_mask = ((masked.labels != -100) & (masked.input_ids == self.mask_id)).flatten()
        teacher_ids, hidden_pairs = [], []
        for t, seen in enumerate(batch["teacher_ids"]):
            pairs = None
            if self.predicts(t):
                seen = seen.clone()
                rows = ids[t * size : (t + 1) * size]
                pairs = self._hide(t, seen, rows, became_mask, batch, generator)
            teacher_ids.append(seen)
            hidden_pairs.append(pairs)
        return {
            **batch, "student_ids": ids, "labels": labels, "teacher_ids": teacher_ids, "hidden_pairs": hidden_pairs
        }  # fmt: skip

    def _hide(
        self,
        t: int,
        teacher_ids: Tensor,
        reduce_ids: Tensor,
        became_mask: Tensor,
        batch: dict[str, Any],
        generator: torch.Generator,
    ) -> SpanPairs:
        """Hides tokens of teacher ``t`` in both ids, in place; returns the pairs to compare."""
        own, reduce = (batch[key][t].to(teacher_ids.device) for key in ("own_pairs", "reduce_pairs"))
        own_hidden = became_mask[own.student_start.long()]
        hidden = torch.zeros(teacher_ids.numel(), dtype=torch.bool, device=teacher_ids.device)
        hidden[own.teacher_start[own_hidden].long()] = True
        if self.mode != "match":
            several = reduce.student_end - reduce.student_start > 1
            drawn = torch.rand(len(reduce), generator=generator, device=hidden.device) < _HIDDEN
            hidden[reduce.teacher_start[several & drawn].long()] = True
        teacher_ids.masked_fill_(hidden.view_as(teacher_ids), self.teachers[t].tokenizer.mask_token_id)
        reduced = _choose(reduce, hidden[reduce.teacher_start.long()])
        reduce_ids.view(-1)[_positions(reduced)[0]] = self.mask_id
        return _choose(own, own_hidden) if self.mode == "match" else reduced

    def teach(self, model: DistillModel, batch: dict[str, Any], head: bool = False) -> list[Reading]:
        """What every teacher makes of the batch, in one pass each; with what its output layer reads if asked for."""
        return [
            teacher.read(
                ids,
                mask,
                all_layers=any(a.teacher != (teacher.num_layers,) for a in model.assignments[t]),
                head=head and self.predicts(t),
            )
            for t, (teacher, ids, mask) in enumerate(
                zip(self.teachers, batch["teacher_ids"], batch["teacher_mask"], strict=True)
            )
        ]

    def logits_loss(
        self, model: DistillModel, hidden: list[Tensor], taught: list[Reading], batch: dict[str, Any]
    ) -> Tensor:
        """KL of the student's output distributions from the teachers' at the tokens that are hidden from both.

        * ``match``: KL over the matched vocabulary, at the 1:1 aligned tokens of the student's own tokenization;
        * ``reduce``: the same under ``reduce``, the student's logits averaged over a token's pieces;
        * ``reduce-map``: there too, over the teacher's vocabulary, onto which the student's logits are mapped.

        ``reduce`` and ``reduce-map`` average over these tokens. ``match`` averages over all masked tokens of the own
        tokenization, as MLM does, and those that no token of the teacher's equals add nothing: the fewer are aligned,
        the less they count, as the others have only their label to learn from.

        Source: arXiv 2205.02340. Only hidden tokens go through the output layers. The first two never hold their
        logits; the last holds the student's of these tokens, and the teacher's for as many of them at a time as take
        64 MiB.

        Args:
            hidden: the student's layers, of ``batch`` as :meth:`mask` returned it.
            taught: of :meth:`teach` with ``head``.

        Returns:
            The mean over teachers with an MLM head, by their weights.
        """
        size = batch["teacher_ids"][0].shape[0]
        total, shares = hidden[-1].new_zeros(()), 0.0
        for t, (reading, pairs) in enumerate(zip(taught, batch["hidden_pairs"], strict=True)):
            if pairs is None:
                continue
            block = len(taught) if self.mode == "match" else t
            positions, start, end = _positions(pairs)
            ours = model.before_output(hidden[-1][block * size : (block + 1) * size].flatten(0, 1)[positions])
            if self.mode != "match":
                ours = span_mean(ours, start, end)
            theirs = reading.head.flatten(0, 1)[pairs.teacher_start.long()]
            count = int((batch["labels"] != -100).sum()) if self.mode == "match" else len(pairs)
            total = total + self.teacher_weights[t] / max(count, 1) * self._output_kl(t, model, ours, theirs)
            shares += self.teacher_weights[t]
        return total / shares if shares else total

    def _output_kl(self, t: int, model: DistillModel, ours: Tensor, theirs: Tensor) -> Tensor:
        """``[P, D_s]``, ``[P, D_t]``, what the output layers read -> the KL, a sum over rows."""
        (student_weight, student_bias), (weight, bias) = model.output_layer, self.teachers[t].output_layer
        if self.mode != "reduce-map":
            return linear_matched_kl(
                ours,
                student_weight,
                theirs,
                weight,
                self.matched[t],
                student_bias=student_bias,
                teacher_bias=bias,
                temperature=self.temperature,
                reduction="sum",
            )

        def chunk_kl(ours: Tensor, theirs: Tensor) -> Tensor:
            z_s, z_t = F.linear(ours, student_weight, student_bias), F.linear(theirs, weight, bias)
            return remapped_kl(z_s, z_t, self.tables[t], temperature=self.temperature, reduction="sum")

        step = max(1, _REMAP_BUDGET // len(weight))
        if len(ours) > step:
            # Computed anew in backward: kept until then, the chunks would take what all rows at once do.
            chunk_kl = partial(checkpoint, chunk_kl, use_reentrant=False, preserve_rng_state=False)
        return sum(chunk_kl(a, b) for a, b in zip(ours.split(step), theirs.split(step), strict=True))

    def compare(
        self,
        model: DistillModel,
        hidden: list[Tensor],
        taught: list[Reading],
        batch: dict[str, Any],
        divergence: str,
    ) -> dict[str, Tensor]:
        """The divergence on the own tokenization (``own``) and, where the batch has its rows, under ``reduce``: means
        over assignments, then teachers."""
        size = batch["teacher_ids"][0].shape[0]
        totals: dict[str, Tensor] = {}
        for t, reading in enumerate(taught):
            group = model.assignments[t]
            blocks = {"own": (slice(-size, None), batch["own_pairs"][t])}
            if batch["reduce_pairs"]:
                blocks["reduce"] = slice(t * size, (t + 1) * size), batch["reduce_pairs"][t]
            for i, assignment in enumerate(group):
                teacher_side = _teacher_side(reading.layers, assignment)
                scale = self.scales[t][i]
                # The cosine has no scale of its own.
                share = self.teacher_weights[t] / len(group) / (1.0 if divergence == "cosine" else scale**2)
                for which, (rows, pairs) in blocks.items():
                    loss = span_loss(
                        [hidden[k][rows] for k in assignment.student],
                        teacher_side,
                        pairs.to(hidden[-1].device),
                        divergence=divergence,
                        temperature=self.temperature * scale,
                        weight=model.projection(t, i),
                    )
                    totals[which] = totals.get(which, 0) + share * loss
        return totals


def _choose(pairs: SpanPairs, chosen: Tensor) -> SpanPairs:
    """The pairs with True in ``chosen [P]``."""
    fields = (pairs.student_start, pairs.student_end, pairs.teacher_start, pairs.teacher_end)
    return SpanPairs(*(x[chosen] for x in fields))


def _positions(pairs: SpanPairs) -> tuple[Tensor, Tensor, Tensor]:
    """The positions ``[N]`` in the student's spans one after the other, and where each span then starts and ends."""
    lengths = pairs.student_end - pairs.student_start
    end = lengths.cumsum(0, dtype=torch.int32)
    start = end - lengths
    positions = torch.repeat_interleave(pairs.student_start - start, lengths)
    return (positions + torch.arange(len(positions), device=positions.device)).long(), start, end


def _teacher_side(layers: list[Tensor], assignment: LayerAssignment) -> list[Tensor]:
    return [layers[k if len(layers) > 1 else -1] for k in assignment.teacher]


def _isometry(student: Tensor, teacher: Tensor) -> Tensor:
    """``[P, D_s]``, ``[P, D_t]`` -> ``[D_t, D_s]``: a rotation into the teacher's leading principal axes, scaled."""
    axes = torch.linalg.eigh(teacher.T @ teacher).eigenvectors[:, -min(student.shape[1], teacher.shape[1]) :]
    u, fit, v = torch.linalg.svd((teacher @ axes).T @ student, full_matrices=False)
    # Least squares would shrink the image of a student that explains little yet; equal norms would be too large for
    # one that never explains all. The geometric mean of the two scales lies between.
    norms = student.norm(), (teacher @ axes).norm()
    scale = (fit.sum() / norms[0] ** 2 * norms[1] / norms[0]).sqrt()
    return axes @ u @ v * scale


@torch.no_grad()
def calibrate(model: DistillModel, objective: Objective, batch: dict[str, Any]) -> list[list[float]]:
    """Fits the projections to one batch: scaled isometries onto the leading principal axes of the teacher's span
    means, turned so that the student's come nearest to them (orthogonal Procrustes).

    As an isometry keeps angles, what the student learns shows in its own space, which is what its users see; a free
    linear map would learn part of it in the student's place. Orthogonal projections for distillation: Miles et al.,
    arXiv 2403.06213.

    Args:
        batch: as :class:`DistillCollator` makes it.

    Returns:
        ``Objective.scales``.
    """
    training = model.training
    model.eval()
    hidden, _ = model(batch["student_ids"], batch["student_mask"])
    taught, size = objective.teach(model, batch), batch["teacher_ids"][0].shape[0]

    def means(layers: list[Tensor], start: Tensor, end: Tensor) -> Tensor:
        return torch.stack([span_mean(x, start, end) for x in layers]).mean(0).double()

    scales: list[list[float]] = []
    for t, reading in enumerate(taught):
        if batch["reduce_pairs"]:
            pairs, rows = batch["reduce_pairs"][t], slice(t * size, (t + 1) * size)
        else:
            pairs, rows = batch["own_pairs"][t], slice(-size, None)
        scales.append([])
        for i, assignment in enumerate(model.assignments[t]):
            teacher = means(_teacher_side(reading.layers, assignment), pairs.teacher_start, pairs.teacher_end)
            scales[t].append(max(float(teacher.var(1, correction=0).mean().sqrt()), 1e-6))
            if (weight := model.projection(t, i)) is not None:
                student = means([hidden[k][rows] for k in assignment.student], pairs.student_start, pairs.student_end)
                weight.copy_(_isometry(student, teacher))
    model.train(training)
    return scales
