"""MSE between the similarities that two models see among the same texts."""

from __future__ import annotations

from torch import Tensor

from vocabdistil.core import checks
from vocabdistil.reference._common import linear, unit_rows, upcast


def similarity_loss(student: Tensor, teacher: Tensor, *, backend: str | None = None) -> Tensor:
    """Mean squared difference of the cosines among the vectors of a batch; widths may differ, nothing is projected.

    With ``s_i`` and ``t_i`` the rows of both sides and each norm at least 1e-8::

        L = sum_{i, j} (cos(s_i, s_j) - cos(t_i, t_j))^2 / B^2

    over all ``B^2`` pairs, those of a row with itself (0) included. No gradient reaches the teacher.

    Sources: similarity-preserving distillation, Tung & Mori, arXiv 1907.09682: there the products of rows as they
    are, each row of their matrix then divided by its norm; here the cosines themselves, which are what embeddings are
    used for and do not depend on the rest of the batch. Relational distillation, Park et al.,
    arXiv 1904.05068: there distances, divided by their mean, and the angles of triples, under a Huber loss; here the
    angles of pairs at the origin.

    Args:
        student: ``[B, D_s]``, say the pooled vectors of B texts.
        teacher: ``[B, D_t]``, on the device of the student.
        backend: None or ``"reference"``.

    Returns:
        A scalar, 0 without rows; float64 for float64 inputs, else float32.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: wrong shapes or devices.
    """
    checks.check_reference_backend(backend)
    check_similarity(student, teacher)
    s, t = unit_rows(upcast(student)), unit_rows(upcast(teacher.detach()))
    return (linear(s, s) - linear(t, t)).square().sum() / max(len(s) ** 2, 1)


def check_similarity(student: Tensor, teacher: Tensor) -> None:
    checks.check_float(student, "student", dims=(2,))
    checks.check_float(teacher, "teacher", dims=(2,))
    checks.check_sides(student, "student", teacher, "teacher")
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"teacher: expected {student.shape[0]} rows as student, got {teacher.shape[0]}")
