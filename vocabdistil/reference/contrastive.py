"""InfoNCE between the averaged hidden states of aligned spans."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vocabdistil.alignment.spans import SpanPairs, check_pairs
from vocabdistil.core import checks
from vocabdistil.reference._common import linear, pool_pairs, projected, reduce_pairs, unit_rows, upcast


def contrastive(
    student: Tensor,
    teacher: Tensor,
    pairs: SpanPairs,
    *,
    temperature: float = 1.0,
    negatives: int = -1,
    side: str = "student",
    weight: Tensor | nn.Module | None = None,
    bias: Tensor | None = None,
    generator: torch.Generator | None = None,
    reduction: str = "batchmean",
    backend: str | None = None,
) -> Tensor:
    """Contrastive loss: the two sides of a pair are to be more alike than one of them and other pairs.

    With ``s_p = weight mean_s(p) + bias`` (``mean_s(p)`` without a weight), ``t_p = mean_t(p)``, ``sim`` the
    cosine (each norm at least 1e-8), and K other pairs n of the batch drawn without replacement for each p::

        side="student"  l_p = -log( e(t_p, s_p) / (e(t_p, s_p) + sum_n e(t_p, s_n)) )
        side="teacher"  l_p = -log( e(s_p, t_p) / (e(s_p, t_p) + sum_n e(s_p, t_n)) )

    with ``e(a, b) = exp(sim(a, b) / T)``. ``side`` says where the negatives are taken from; they are compared
    with the other side of pair p (a reading: our sources do not say what they are compared with). Pairs with
    an empty span have loss 0 and serve as no one's negative. A pair alone in its batch has loss 0. No
    gradient reaches the teacher.

    Source: Kolesnikova et al., arXiv 2205.02340 (contrastive loss on hidden states, K = 32 or 64);
    van den Oord et al., arXiv 1807.03748, equation 4.

    Args:
        student: ``[N_s, D_s]`` or ``[B, L_s, D_s]``.
        teacher: ``[N_t, D_t]`` or ``[B, L_t, D_t]``, on the student's device.
        pairs: P span pairs over the flattened positions.
        temperature: T > 0, finite.
        negatives: K >= 1, or -1 for all others; with fewer than K others, all of them.
        side: ``"student"`` or ``"teacher"``.
        weight, bias: ``[D_t, D_s]`` and ``[D_t]``, applied to the averaged student rows; or a module as
            ``weight``, as in :func:`span_loss`.
        generator: draws the negatives (on the device of the student); torch's global one by default.
        reduction: ``"batchmean"`` (mean over the pairs with both spans non-empty), ``"sum"`` or ``"none"``.
        backend: None or ``"reference"``.

    Returns:
        A scalar, or ``[P]`` for ``"none"``; float64 for float64 inputs, else float32.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: wrong shapes, names, devices, temperature, number of negatives, or pairs past the end of a
            side.
    """
    checks.check_reference_backend(backend)
    weight, bias = checks.as_projection(weight, bias)
    student_rows, teacher_rows = check_contrastive_arguments(
        student, teacher, pairs, temperature, negatives, side, weight, bias, reduction
    )
    student_rows, teacher_rows, valid = pool_pairs(upcast(student_rows), upcast(teacher_rows), pairs, "mean")
    if weight is not None:
        student_rows = projected(student_rows, weight, bias, teacher_rows.shape[1])
    anchor, other = (teacher_rows, student_rows) if side == "student" else (student_rows, teacher_rows)
    scores = linear(unit_rows(anchor), unit_rows(other)) / temperature
    count = pairs.num_nonempty
    # A count on a device is not looked at: where too few are valid, others are drawn and left out.
    others = (len(pairs) if isinstance(count, Tensor) else count) - 1
    chosen = _draw(scores, valid, negatives, others, generator)
    positive = scores.diagonal()
    # The positive is always a term of the sum, so a row of the masked scores is never all -inf.
    loss = scores.masked_fill(~chosen, float("-inf")).logsumexp(-1) - positive
    return reduce_pairs(loss, valid, pairs.num_nonempty, reduction)


def check_contrastive_arguments(
    student: Tensor,
    teacher: Tensor,
    pairs: SpanPairs,
    temperature: float,
    negatives: int,
    side: str,
    weight: Tensor | nn.Module | None,
    bias: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Returns both sides as rows ``[N, D]``, the teacher's detached."""
    checks.check_float(student, "student", dims=(2, 3))
    checks.check_float(teacher, "teacher", dims=(2, 3))
    checks.check_sides(student, "student", teacher, "teacher")
    student_rows, teacher_rows = student.flatten(0, -2), teacher.detach().flatten(0, -2)
    check_pairs(pairs, student_rows, teacher_rows)
    checks.check_projection(weight, bias, student, teacher)
    checks.check_temperature(temperature)
    checks.check_choice(side, "side", ("student", "teacher"))
    checks.check_choice(reduction, "reduction", checks.REDUCTIONS)
    if isinstance(negatives, bool) or not isinstance(negatives, int):
        raise TypeError(f"negatives: expected an integer, got {type(negatives).__name__}")
    if negatives != -1 and negatives < 1:
        raise ValueError(f"negatives: expected a number >= 1, or -1 for all, got {negatives}")
    return student_rows, teacher_rows


def _draw(
    scores: Tensor, valid: Tensor | None, negatives: int, others: int, generator: torch.Generator | None
) -> Tensor:
    """``[P, P]`` bool: the terms of each row's sum, its own pair and its negatives."""
    own = torch.eye(scores.shape[0], dtype=torch.bool, device=scores.device)
    allowed = ~own if valid is None else ~own & valid
    if negatives == -1 or negatives >= others:
        return allowed | own
    # The K largest of independent uniform keys are K columns drawn without replacement, for all rows at once.
    keys = torch.rand(scores.shape, generator=generator, device=scores.device).masked_fill(~allowed, -1.0)
    return own.scatter(1, keys.topk(negatives, dim=-1).indices, True) & (allowed | own)
