"""What a training step computes: the student with its projections, the losses, the trainer, the evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DistilBertForMaskedLM

from .data import DistillCollator
from .errors import VocabdistilError
from .loyalty import mean_over_tokens, pairwise_cosine, regression
from .ops import span_loss, span_mean
from .reference.layers import LayerAssignment
from .reference.mlm import mask_tokens, mlm_loss
from .runs import SeededTrainer, mix_seed
from .teachers import Teacher

__all__ = ["DistillModel", "DistillTrainer", "LossWeights", "Objective", "calibrate", "evaluate", "to_device"]


@dataclass
class LossWeights:
    """What each loss counts; ``mse`` is summed over features, ``cosine`` is 1 - cos (both of the span means)."""

    kl: float = 2.0
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
        student: the model that will be saved.
        teacher_widths: hidden widths of the teachers.
        assignments: for each teacher, which of its layers teach which of the student's.
        seed: of the projections, orthonormal until :func:`calibrate` fits them.
        train_projections: else they stay as fitted.
    """

    def __init__(
        self,
        student: DistilBertForMaskedLM,
        teacher_widths: Sequence[int],
        assignments: Sequence[Sequence[LayerAssignment]],
        seed: int = 0,
        train_projections: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self.assignments = [list(group) for group in assignments]
        self.projections = nn.ModuleDict()
        width = student.config.dim
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
    def all_layers(self) -> bool:
        last = self.student.config.n_layers
        return any(a.student != (last,) for group in self.assignments for a in group)

    def _head(self, hidden: Tensor) -> Tensor:
        student = self.student
        hidden = student.activation(student.vocab_transform(hidden))
        return student.vocab_projector(student.vocab_layer_norm(hidden))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Hidden states ``[B, L, D_s]`` by layer (0: the embedding) and the loss on ``labels`` (-100: no target)."""
        out = self.student.distilbert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_hidden_states=self.all_layers,
            return_dict=True,
        )
        last = out.last_hidden_state
        # Without the other layers, their places stay empty: assignments count layers from the embedding up.
        layers = list(out.hidden_states) if self.all_layers else [None] * self.student.config.n_layers + [last]
        return layers, None if labels is None else mlm_loss(last, labels, self._head)


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
        mask_probabilities: ``[V_s]``, by id.
        mask_id: the student's MASK.
    """

    teachers: list[Teacher]
    weights: LossWeights
    teacher_weights: list[float]
    scales: list[list[float]]
    temperature: float
    mask_probabilities: Tensor
    mask_id: int

    def mask(self, batch: dict[str, Any], seed: int) -> tuple[Tensor, Tensor]:
        """The student's inputs with the own tokenization masked, and the labels; ``reduce`` rows stay whole."""
        ids, size = batch["student_ids"], batch["teacher_ids"][0].shape[0]
        generator = torch.Generator(ids.device).manual_seed(seed)
        masked = mask_tokens(
            ids[-size:],
            self.mask_probabilities,
            self.mask_id,
            attention_mask=batch["student_mask"][-size:],
            generator=generator,
        )
        labels = torch.full_like(ids, -100)
        labels[-size:] = masked.labels
        return torch.cat([ids[:-size], masked.input_ids]), labels

    def teach(self, model: DistillModel, batch: dict[str, Any]) -> list[list[Tensor]]:
        """Hidden states of every teacher."""
        return [
            teacher.hidden_states(ids, mask, all_layers=any(a.teacher != (teacher.num_layers,) for a in group))
            for teacher, ids, mask, group in zip(
                self.teachers, batch["teacher_ids"], batch["teacher_mask"], model.assignments, strict=True
            )
        ]

    def compare(
        self,
        model: DistillModel,
        hidden: list[Tensor],
        taught: list[list[Tensor]],
        batch: dict[str, Any],
        divergence: str,
    ) -> tuple[Tensor, Tensor]:
        """The divergence under ``reduce`` and on the own tokenization: means over assignments, then teachers."""
        size = batch["teacher_ids"][0].shape[0]
        totals = [hidden[-1].new_zeros(()), hidden[-1].new_zeros(())]
        for t, layers in enumerate(taught):
            group = model.assignments[t]
            for i, assignment in enumerate(group):
                teacher_side = _teacher_side(layers, assignment)
                scale = self.scales[t][i]
                # The cosine has no scale of its own.
                share = self.teacher_weights[t] / len(group) / (1.0 if divergence == "cosine" else scale**2)
                for which, (rows, pairs) in enumerate(
                    (
                        (slice(t * size, (t + 1) * size), batch["reduce_pairs"][t]),
                        (slice(len(taught) * size, None), batch["own_pairs"][t]),
                    )
                ):
                    loss = span_loss(
                        [hidden[k][rows] for k in assignment.student],
                        teacher_side,
                        pairs.to(hidden[-1].device),
                        divergence=divergence,
                        temperature=self.temperature * scale,
                        weight=model.projection(t, i),
                    )
                    totals[which] = totals[which] + share * loss
        return totals[0], totals[1]


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
    for t, layers in enumerate(taught):
        pairs, rows = batch["reduce_pairs"][t], slice(t * size, (t + 1) * size)
        scales.append([])
        for i, assignment in enumerate(model.assignments[t]):
            teacher = means(_teacher_side(layers, assignment), pairs.teacher_start, pairs.teacher_end)
            scales[t].append(max(float(teacher.var(1, correction=0).mean().sqrt()), 1e-6))
            if (weight := model.projection(t, i)) is not None:
                student = means([hidden[k][rows] for k in assignment.student], pairs.student_start, pairs.student_end)
                weight.copy_(_isometry(student, teacher))
    model.train(training)
    return scales


class DistillTrainer(SeededTrainer):
    """Trains a :class:`DistillModel` on batches of a :class:`DistillCollator` by an :class:`Objective`.

    ``loss = sum_d weight_d * (d_reduce + d_own) / 2 + weight_mlm * MLM``, ``d`` the span divergences with a weight.
    """

    def __init__(self, *args: Any, objective: Objective, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any):
        objective, plain = self.objective, self.accelerator.unwrap_model(model)
        weights = objective.weights
        try:
            taught = objective.teach(plain, inputs)
        except VocabdistilError as error:
            raise VocabdistilError(f"{error} at step {self.state.global_step + 1}") from None
        ids, labels = objective.mask(inputs, self.step_seed)
        hidden, mlm = model(ids, inputs["student_mask"], labels if weights.mlm else None)
        terms = {}
        loss = hidden[-1].new_zeros(())
        for name in ("kl", "cosine", "mse"):
            if weight := getattr(weights, name):
                reduce, own = objective.compare(plain, hidden, taught, inputs, name)
                terms[f"{name}_reduce"], terms[f"{name}_own"] = reduce, own
                loss = loss + weight * (reduce + own) / 2
        if mlm is not None:
            terms["mlm"] = mlm
            loss = loss + weights.mlm * mlm
        self.note(terms)
        return (loss, {"terms": terms}) if return_outputs else loss


@torch.no_grad()
def evaluate(
    model: DistillModel,
    objective: Objective,
    collator: DistillCollator,
    texts: Sequence[str],
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """Losses and loyalty on held-out texts; dropout off, masks the same on every call with the same seed.

    Returns:
        ``kl_reduce``, ``kl_own`` (unmasked student inputs), ``mlm``, and of the embeddings pooled over tokens (the
        student's from its own tokenization): ``cosine`` (mean cosine between student, projected, and first teacher)
        and ``pearson``, ``spearman`` (regression loyalty of the cosine similarities of all pairs of texts; no
        projection takes part in these).
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}

    def add(name: str, value: Tensor, count: int) -> None:
        sums[name] = sums.get(name, 0.0) + float(value) * count
        counts[name] = counts.get(name, 0) + count

    ours, theirs = [], []
    for b, start in enumerate(range(0, len(texts), batch_size)):
        batch = to_device(collator(texts[start : start + batch_size]), device)
        size = batch["teacher_ids"][0].shape[0]
        taught = objective.teach(model, batch)
        hidden, _ = model(batch["student_ids"], batch["student_mask"])
        reduce, own = objective.compare(model, hidden, taught, batch, "kl")
        add("kl_reduce", reduce, sum(p.num_nonempty for p in batch["reduce_pairs"]))
        add("kl_own", own, sum(p.num_nonempty for p in batch["own_pairs"]))
        ids, labels = objective.mask(batch, mix_seed(seed, b))
        _, mlm = model(ids[-size:], batch["student_mask"][-size:], labels[-size:])
        add("mlm", mlm, int((labels != -100).sum()))
        ours.append(mean_over_tokens(hidden[-1][-size:], batch["student_mask"][-size:]).float().cpu())
        theirs.append(mean_over_tokens(taught[0][-1], batch["teacher_mask"][0]).float().cpu())
    model.train(training)
    student, teacher = torch.cat(ours), torch.cat(theirs)
    projection = model.projection(0)
    projected = student if projection is None else student @ projection.detach().float().cpu().T
    pearson, spearman = regression(pairwise_cosine(student), pairwise_cosine(teacher))
    return {
        **{name: value / max(counts[name], 1) for name, value in sums.items()},
        "cosine": float(nn.functional.cosine_similarity(projected, teacher).mean()),
        "pearson": float(pearson),
        "spearman": float(spearman),
    }


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    def move(value: Any) -> Any:
        return [move(v) for v in value] if isinstance(value, list) else value.to(device)

    return {key: move(value) for key, value in batch.items()}
