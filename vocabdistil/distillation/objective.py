"""What a training step computes: the losses of one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..alignment.remap import RemapTable
from ..alignment.spans import at_least_one, text_pairs
from ..alignment.vocab import MatchedVocab
from ..models.teachers import Reading, Teacher
from ..ops import (
    attention_loss,
    linear_matched_kl,
    pooled_loss,
    relation_loss,
    remapped_kl,
    similarity_loss,
    span_loss,
    span_mean,
)
from .hiding import Hiding, counts_of
from .model import DistillModel
from .recipes import LossWeights
from .teacher_cache import TeacherCache

__all__ = ["Objective", "layers_of"]

# Logits over the teacher's vocabulary that exist at a time: 64 MiB of float32.
_REMAP_BUDGET = 1 << 24
# Into how many heads queries, keys and values are cut, at most, whatever the models have.
_RELATION_HEADS = 48


def layers_of(reading: Reading, numbers: Sequence[int]) -> list[Tensor]:
    """The hidden states of layers counted from 1, 0 the embedding; the last one where no other was read."""
    return [reading.layers[k if len(reading.layers) > 1 else -1] for k in numbers]


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
        mode: where output distributions are compared, one of ``recipes.LOGITS``: see :meth:`logits_loss`.
        tables, matched: one of each per teacher, read unless ``mode`` is ``"none"``.
        pooling: how texts become vectors: ``"mean"``, ``"cls"`` or ``"lasttoken"``.
        caches: of each teacher what it gave before; empty: all read every batch anew.
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
    pooling: str = "mean"
    caches: Sequence[TeacherCache] = ()

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

        Args:
            seed: of what is hidden; each text is drawn for by it and the text's number in ``batch["numbers"]``, or its
                place in the batch.

        Returns:
            ``batch`` with new ``student_ids`` and ``teacher_ids``, and besides
            ``labels``: int64 ``[(T + 1) B, L_s]``, the masked tokens of the own rows, -100 elsewhere;
            ``masked``: int64 ``[M]``, where they are among all; ``hidden_positions``: see :func:`positions_of`;
            ``hidden_pairs``: for each teacher the pairs of hidden tokens whose output distributions are compared, in
            the student's own rows for ``match`` and in the teacher's ``reduce`` rows else; or None.
            Where nothing is masked, the batch with ``labels`` None and no hidden pairs; and one with ``labels``, of
            which something has been hidden, as it is.
        """
        return batch if "labels" in batch else self.hiding()(batch, seed)

    def hiding(self, device: torch.device | str | None = None) -> Hiding:
        """What :meth:`mask` does, without the models.

        Args:
            device: of the batches; None: the student's.
        """
        learned = [self.predicts(t) for t in range(len(self.teachers))]
        masks = [self.teachers[t].tokenizer.mask_token_id if yes else None for t, yes in enumerate(learned)]
        slots = [self.matched[t].slots() if yes else None for t, yes in enumerate(learned)]
        chances = self.mask_probabilities
        if chances is not None and device is not None:
            chances = chances.to(device)
        return Hiding(chances, self.mask_id, self.mode, masks, slots)

    def student_wants(self, model: DistillModel) -> dict[str, Any]:
        """What the losses read of the student beside its hidden states: arguments of :class:`DistillModel`."""
        layers = sorted({group[-1].student[-1] for group in model.assignments})
        return {"projections": layers if self.weights.relations else (), "attentions": self.weights.attention > 0}

    def teach(self, model: DistillModel, batch: dict[str, Any], head: bool = False) -> list[Reading]:
        """What every teacher makes of the batch, in one pass each; with what its output layer reads if asked for."""
        found = []
        for t, teacher in enumerate(self.teachers):
            ids, mask, group = batch["teacher_ids"][t], batch["teacher_mask"][t], model.assignments[t]
            if self.caches:
                found.append(self.caches[t].read(ids, mask))
                continue
            found.append(
                teacher.read(
                    ids,
                    mask,
                    all_layers=any(a.teacher != (teacher.num_layers,) for a in group),
                    head=head and self.predicts(t),
                    projections=[group[-1].teacher[-1]] if self.weights.relations else (),
                    attentions=self.weights.attention > 0,
                )
            )
        return found

    def loss(
        self,
        model: DistillModel,
        batch: dict[str, Any],
        seed: int,
        forward: nn.Module | Callable[..., Any] | None = None,
        totals: Mapping[str, int | Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``sum_i weight_i * term_i`` of a batch, and the terms: those of :meth:`terms`, and MLM.

        Args:
            batch: as :class:`vocabdistil.DistillCollator` makes it, on the student's device; with ``labels`` it is one
                that :meth:`mask` returned.
            seed: of the masks.
            forward: what to call in the model's place, where something is wrapped around it.
            totals: of several batches that make one step the sums of what :func:`counts_of` counts. Each term is then
                the batch's part of the mean over the step, and these parts add up to it, whatever the step was cut
                into; but for ``similarity``, which compares the texts of one batch. None: of this batch alone.

        Raises:
            VocabdistilError: a teacher's hidden states are not finite.
        """
        batch = self.mask(batch, seed)
        if totals is not None:
            counts = batch["counts"] if "counts" in batch else counts_of(batch)
            shares = {name: count / at_least_one(totals[name]) for name, count in counts.items()}
            batch = {**batch, "shares": shares}
        taught = self.teach(model, batch, head=True)
        guesses = self.weights.mlm > 0 and batch["labels"] is not None
        guessed = {name: batch[name] for name in ("labels", "masked")} if guesses else {}
        run = model.read if forward is None else forward
        student, mlm = run(batch["student_ids"], batch["student_mask"], **guessed, **self.student_wants(model))
        terms = self.terms(model, student, taught, batch)
        if mlm is not None:
            terms["mlm"] = self.weights.mlm, self.weights.mlm * _share(batch, "labels") * mlm
        total = sum((value for _, value in terms.values()), student.last.new_zeros(()))
        return total, {name: value.detach() / weight for name, (weight, value) in terms.items()}

    def terms(
        self, model: DistillModel, reading: Reading, taught: list[Reading], batch: dict[str, Any]
    ) -> dict[str, tuple[float, Tensor]]:
        """What every loss of a batch but MLM counts, and the loss times that: a weight is a part of its loss
        (``scale``), so that backward meets upstream gradients of 1.

        Args:
            reading: the student's, of ``batch`` as :meth:`mask` returned it.
            taught: of :meth:`teach` with ``head``.
        """
        found: dict[str, tuple[float, Tensor]] = {}
        for name in ("kl", "cosine", "mse"):
            if weight := getattr(self.weights, name):
                weight /= 1 + bool(batch["reduce_pairs"])
                values = self.compare(model, reading, taught, batch, name, weight)
                found |= {f"{name}_{which}": (weight, value) for which, value in values.items()}
        for name in ("pooled", "similarity", "relations", "attention"):
            if weight := getattr(self.weights, name):
                found[name] = weight, getattr(self, name)(model, reading, taught, batch, weight)
        if any(pairs is not None for pairs in batch["hidden_pairs"]):
            weight = self.weights.logits
            found["logits_kl"] = weight, self.logits_loss(model, reading, taught, batch, weight)
        return found

    def logits_loss(
        self,
        model: DistillModel,
        student: Reading,
        taught: list[Reading],
        batch: dict[str, Any],
        weight: float = 1.0,
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
            student: of ``batch`` as :meth:`mask` returned it.
            taught: of :meth:`teach` with ``head``.
            weight: what the loss counts.

        Returns:
            The mean over teachers with an MLM head, by their weights.
        """
        size = batch["teacher_ids"][0].shape[0]
        total = student.last.new_zeros(())
        learned = zip(self.teacher_weights, batch["hidden_pairs"], strict=True)
        weight /= sum(share for share, pairs in learned if pairs is not None) or 1.0
        for t, (reading, pairs) in enumerate(zip(taught, batch["hidden_pairs"], strict=True)):
            if pairs is None:
                continue
            rows = slice(-size, None) if self.mode == "match" else slice(t * size, (t + 1) * size)
            positions, start, end = batch["hidden_positions"][t]
            ours = model.before_output(student.last[rows].flatten(0, 1)[positions])
            if self.mode != "match":
                ours = span_mean(ours, start, end)
            assert reading.head is not None
            theirs = reading.head.flatten(0, 1)[pairs.teacher_start.long()]
            match = self.mode == "match"
            count = len(batch["masked"]) if match else len(pairs)
            share = self.teacher_weights[t] * _share(batch, "labels" if match else f"hidden_{t}")
            total = total + self._output_kl(t, model, ours, theirs, weight * share / max(count, 1))
        return total

    def _output_kl(
        self, t: int, model: DistillModel, ours: Tensor, theirs: Tensor, scale: float | Tensor
    ) -> Tensor:
        """``[P, D_s]``, ``[P, D_t]``, what the output layers read -> ``scale`` times the KL, a sum over rows."""
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
                scale=scale,
            )

        def chunk_kl(ours: Tensor, theirs: Tensor) -> Tensor:
            z_s, z_t = F.linear(ours, student_weight, student_bias), F.linear(theirs, weight, bias)
            return remapped_kl(z_s, z_t, self.tables[t], temperature=self.temperature, reduction="sum", scale=scale)

        step = max(1, _REMAP_BUDGET // len(weight))
        if len(ours) > step:
            # Computed anew in backward: kept until then, the chunks would take what all rows at once do.
            chunk_kl = partial(checkpoint, chunk_kl, use_reentrant=False, preserve_rng_state=False)
        chunks = zip(ours.split(step), theirs.split(step), strict=True)
        return sum((chunk_kl(a, b) for a, b in chunks), ours.new_zeros(()))

    def compare(
        self,
        model: DistillModel,
        student: Reading,
        taught: list[Reading],
        batch: dict[str, Any],
        divergence: str,
        weight: float = 1.0,
    ) -> dict[str, Tensor]:
        """The divergence on the own tokenization (``own``) and, where the batch has its rows, under ``reduce``: means
        over assignments, then teachers, times ``weight``."""
        size = batch["teacher_ids"][0].shape[0]
        totals: dict[str, Tensor] = {}
        for t, reading in enumerate(taught):
            group = model.assignments[t]
            blocks = {"own": (slice(-size, None), batch["own_pairs"][t])}
            if batch["reduce_pairs"]:
                blocks["reduce"] = slice(t * size, (t + 1) * size), batch["reduce_pairs"][t]
            for i, assignment in enumerate(group):
                teacher_side = layers_of(reading, assignment.teacher)
                scale = self.scales[t][i]
                # The cosine has no scale of its own.
                share = weight * self.teacher_weights[t] / len(group) / (1.0 if divergence == "cosine" else scale**2)
                for which, (rows, pairs) in blocks.items():
                    loss = span_loss(
                        [x[rows] for x in layers_of(student, assignment.student)],
                        teacher_side,
                        pairs.to(student.last.device),
                        divergence=divergence,
                        temperature=self.temperature * scale,
                        weight=model.projection(t, i),
                        bias=model.projection_bias(t, i),
                        scale=share * _share(batch, f"{which}_{t}"),
                    )
                    totals[which] = totals.get(which, 0) + loss
        return totals

    def pooled(
        self, model: DistillModel, student: Reading, taught: list[Reading], batch: dict[str, Any], weight: float
    ) -> Tensor:
        """1 - cos of the vectors of texts, of the student's own tokenization: a mean over teachers."""
        size = batch["teacher_ids"][0].shape[0]
        total = student.last.new_zeros(())
        for t, reading in enumerate(taught):
            loss = pooled_loss(
                student.last[-size:],
                reading.last,
                batch["student_mask"][-size:],
                batch["teacher_mask"][t],
                pooling=self.pooling,
                weight=model.projection(t),
                bias=model.projection_bias(t),
                scale=weight * self.teacher_weights[t] * _share(batch, "texts"),
            )
            total = total + loss
        return total

    def similarity(
        self, model: DistillModel, student: Reading, taught: list[Reading], batch: dict[str, Any], weight: float
    ) -> Tensor:
        """Squared difference of the cosines of all pairs of texts; those of several teachers are averaged first, which
        their vectors do, scaled by the roots of their weights, one after the other."""
        size = batch["teacher_ids"][0].shape[0]
        ours = self._pool(student.last[-size:], batch["student_mask"][-size:])
        theirs = [
            F.normalize(self._pool(reading.last, mask), dim=-1) * share**0.5
            for reading, mask, share in zip(taught, batch["teacher_mask"], self.teacher_weights, strict=True)
        ]
        return weight * _share(batch, "texts") * similarity_loss(ours, torch.cat(theirs, dim=-1))

    def _pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """``[B, L, D]``, ``[B, L]`` -> ``[B, D]`` float32."""
        spans = text_pairs(mask, mask, self.pooling)
        return span_mean(hidden, spans.student_start, spans.student_end).float()

    def relations(
        self, model: DistillModel, student: Reading, taught: list[Reading], batch: dict[str, Any], weight: float
    ) -> Tensor:
        """KL between relations of the queries, keys and values of the last assignment's layers."""
        size = batch["teacher_ids"][0].shape[0]
        total = student.last.new_zeros(())
        for t, reading in enumerate(taught):
            last = model.assignments[t][-1]
            ours = [x[-size:] for x in student.projections[last.student[-1]]]
            theirs = list(reading.projections[last.teacher[-1]])
            width = math.gcd(*(x.shape[-1] for x in (*ours, *theirs)))
            heads = max(heads for heads in range(1, _RELATION_HEADS + 1) if width % heads == 0)
            scale = weight * self.teacher_weights[t] * _share(batch, f"own_{t}")
            pairs = batch["own_pairs"][t].to(student.last.device)
            total = total + relation_loss(ours, theirs, pairs, heads=heads, scale=scale)
        return total

    def attention(
        self, model: DistillModel, student: Reading, taught: list[Reading], batch: dict[str, Any], weight: float
    ) -> Tensor:
        """Squared difference of the attention maps averaged over spans and, within an assignment, over layers."""
        size = batch["teacher_ids"][0].shape[0]
        total = student.last.new_zeros(())
        for t, reading in enumerate(taught):
            group = model.assignments[t]
            pairs = batch["own_pairs"][t].to(student.last.device)
            assert student.attentions is not None and reading.attentions is not None
            for assignment in group:
                # Maps have no embedding layer.
                ours = [student.attentions[k - 1][-size:] for k in assignment.student if k]
                theirs = [reading.attentions[k - 1] for k in assignment.teacher if k]
                loss = attention_loss(ours, theirs, pairs, average_heads=ours[0].shape[1] != theirs[0].shape[1])
                share = weight * self.teacher_weights[t] / len(group) * _share(batch, f"attention_{t}")
                total = total + share * loss
        return total


def _share(batch: dict[str, Any], name: str) -> float | Tensor:
    """What part of a step's mean the batch's own mean is."""
    return batch["shares"][name] if "shares" in batch else 1.0
