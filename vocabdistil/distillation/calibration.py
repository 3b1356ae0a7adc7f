"""Before the first step: projections to the teachers' widths, and the scales of their features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import span_mean
from .model import DistillModel
from .objective import Objective, layers_of

__all__ = ["calibrate"]


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
    arXiv 2403.06213. A projection that came with the start stays.

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
            teacher = means(layers_of(reading, assignment.teacher), pairs.teacher_start, pairs.teacher_end)
            scales[t].append(max(float(teacher.var(1, correction=0).mean().sqrt()), 1e-6))
            if (weight := model.projection(t, i)) is not None and not model.is_known(t, i):
                student = means(
                    [x[rows] for x in layers_of(hidden, assignment.student)], pairs.student_start, pairs.student_end
                )
                weight.copy_(_isometry(student, teacher))
    model.train(training)
    return scales
