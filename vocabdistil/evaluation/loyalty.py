"""How closely a student follows its teacher on the same inputs.

Label and probability loyalty: Xu et al., arXiv 2109.03228. Regression loyalty: Avram et al., arXiv
2112.12650.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vocabdistil.core import checks

__all__ = ["RegressionLoyalty", "label", "mean_over_tokens", "pairwise_cosine", "probability", "regression"]


class RegressionLoyalty(NamedTuple):
    """Two correlations of the student's scores with the teacher's, float64 scalars."""

    pearson: Tensor
    spearman: Tensor


def label(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The share of samples whose label the student and the teacher agree on.

    ``mean_i [argmax z_s(i) = argmax z_t(i)]``: the student's accuracy with the teacher's labels as the truth.

    Args:
        student_logits, teacher_logits: ``[..., C]`` of one shape, logits or probabilities.

    Returns:
        A float64 scalar from 0 to 1.

    Raises:
        TypeError: no floating tensors.
        ValueError: shapes or devices that differ, no samples.
    """
    _check_logits(student_logits, teacher_logits)
    return (student_logits.argmax(-1) == teacher_logits.argmax(-1)).to(_double(student_logits)).mean()


@torch.no_grad()
def probability(student_logits: Tensor, teacher_logits: Tensor, base: float | None = None) -> Tensor:
    """``mean_i (1 - sqrt(JS(p_t, p_s)))``, p the softmax of the logits.

    ``JS = (KL(p_t || m) + KL(p_s || m)) / 2`` with ``m = (p_t + p_s) / 2``. With base 2 the range is [0, 1];
    with the natural logarithm (the default, as ``scipy.spatial.distance.jensenshannon``, which returns the
    square root already) the least value is ``1 - sqrt(log 2)``.

    Args:
        student_logits, teacher_logits: ``[..., C]`` of one shape.
        base: the base of the logarithm, > 1; None for the natural one.

    Returns:
        A float64 scalar, computed in float64.

    Raises:
        TypeError: no floating tensors, or a base that is no number.
        ValueError: shapes or devices that differ, no samples, a base <= 1.
    """
    _check_logits(student_logits, teacher_logits)
    if base is not None:
        if isinstance(base, bool) or not isinstance(base, (int, float)):
            raise TypeError(f"base: expected a number, got {type(base).__name__}")
        if not (math.isfinite(base) and base > 1):
            raise ValueError(f"base: expected a finite number > 1, got {base}")
    p_s, p_t = (torch.softmax(z.to(_double(z)), -1) for z in (student_logits, teacher_logits))
    m = (p_s + p_t) / 2
    js = (_relative_entropy(p_t, m) + _relative_entropy(p_s, m)) / 2
    if base is not None:
        js = js / math.log(base)
    # Rounding can leave a JS of -1e-17, whose root would be NaN.
    return (1 - js.clamp(min=0).sqrt()).mean()


@torch.no_grad()
def regression(student_scores: Tensor, teacher_scores: Tensor) -> RegressionLoyalty:
    """Pearson's and Spearman's correlation between the student's and the teacher's outputs.

    This is our reading of "regression loyalty": Avram et al., arXiv 2112.12650, name the measure, but its
    exact formula was not at hand. Spearman's is Pearson's correlation of the ranks, equal scores sharing
    their mean rank.

    Args:
        student_scores, teacher_scores: n >= 2 scores each, of one shape (``[n]``, ``[n, 1]``, ...).

    Returns:
        `RegressionLoyalty`; NaN where one side is constant or holds a NaN, as the correlation is undefined.

    Raises:
        TypeError: no floating tensors.
        ValueError: shapes or devices that differ, fewer than 2 scores.
    """
    _check_shapes(student_scores, teacher_scores, "student_scores", "teacher_scores")
    if student_scores.numel() < 2:
        raise ValueError(f"student_scores: expected at least 2 scores, got {student_scores.numel()}")
    s, t = (x.flatten().to(_double(x)) for x in (student_scores, teacher_scores))
    return RegressionLoyalty(_pearson(s, t), _pearson(_ranks(s), _ranks(t)))


def _double(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _check_shapes(student: Tensor, teacher: Tensor, student_name: str, teacher_name: str) -> None:
    checks.check_float(student, student_name)
    checks.check_float(teacher, teacher_name)
    if student.device != teacher.device:
        raise ValueError(
            f"{teacher_name}: expected device {student.device} as {student_name}, got {teacher.device}"
        )
    if student.shape != teacher.shape:
        raise ValueError(
            f"{teacher_name}: expected shape {tuple(student.shape)} as {student_name}, "
            f"got {tuple(teacher.shape)}"
        )


def _check_logits(student_logits: Tensor, teacher_logits: Tensor) -> None:
    _check_shapes(student_logits, teacher_logits, "student_logits", "teacher_logits")
    if student_logits.dim() < 1 or not student_logits.numel():
        raise ValueError(
            f"student_logits: expected shape [..., C] with at least one sample, "
            f"got {tuple(student_logits.shape)}"
        )


def _relative_entropy(p: Tensor, m: Tensor) -> Tensor:
    # The ratio is exactly 1 where p = m, so equal distributions have distance 0 and not the root of a
    # rounding error.
    ratio = p / torch.where(m > 0, m, 1.0)
    return torch.special.xlogy(p, ratio).sum(-1)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(), b - b.mean()
    norm_a, norm_b = torch.linalg.vector_norm(a), torch.linalg.vector_norm(b)
    # Divided one by one: the product of two small norms would underflow.
    return ((a / norm_a) @ (b / norm_b)).clamp(-1, 1)


def _ranks(x: Tensor) -> Tensor:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, group, size = torch.unique(x, return_inverse=True, return_counts=True)
    last = size.cumsum(0)
    ranks = (last - (size - 1) / 2)[group].to(x.dtype)
    return torch.where(x.isnan().any(), torch.nan, ranks)


def mean_over_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the attended tokens: ``[B, L, D]``, ``[B, L]`` -> ``[B, D]``."""
    mask = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


def pairwise_cosine(x: Tensor) -> Tensor:
    """Cosine similarities of all pairs of rows: ``[N, D]`` -> float64 ``[N (N - 1) / 2]``."""
    x = torch.nn.functional.normalize(x.double(), dim=-1)
    i, j = torch.triu_indices(len(x), len(x), 1)
    return (x @ x.T)[i, j]
