"""GOLD's loss: probabilities of aligned spans over both vocabularies, exact where tokens match, sorted where not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from vocabdistil.alignment.spans import SpanPairs, check_pairs, shifted_pairs
from vocabdistil.core import checks
from vocabdistil.core.checks import Matched
from vocabdistil.reference._common import reduce_pairs, upcast, valid_pairs
from vocabdistil.reference.matched_kl import matched_ids

__all__ = ["gold_loss"]

# The least probability whose logarithm is taken.
_LEAST = 1e-8


def gold_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_ids: Tensor,
    teacher_ids: Tensor,
    matched: Matched,
    pairs: SpanPairs,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    student_shift: int = 1,
    teacher_shift: int = 1,
    reduction: str = "batchmean",
) -> Tensor:
    """The hybrid loss of GOLD between distributions over two vocabularies, a sum of one part for the tokens that both
    have and one for the others.

    With ``p_i = softmax(z_i / T)`` at the row that predicts token ``x_i``, the span ``i .. j`` of a side has the row
    (not normalised: right for the token that came, a guess for others)::

        P[y] = p_i[y] * prod_{i < k <= j} p_k[x_k]

    Over the ``M`` matched tokens ``P_s`` and ``P_t`` are compared one by one, over the others in descending order, the
    shorter one filled up with 0::

        m     = log((1 - beta) P_s + beta P_t)
        exact = beta sum_y P_t (log P_t - m) + (1 - beta) sum_y P_s (log P_s - m)
        rest  = sum_k | sort(P_s)_k - sort(P_t)_k |
        loss  = M / V_t * exact + (1 - M / V_t) * rest

    Logarithms are of at least 1e-8. All logits and both sorted arrays are in memory: a baseline to compare with.

    Source: "Unlocking On-Policy Distillation for Any Model Family" (Patiño et al., 2025) and the trainer of TRL that
    goes with it, with its defaults; ``rest`` is ULD (Boizard et al., arXiv 2402.12030). There a text counts as much as
    any other, here a span does.

    Args:
        student_logits: ``[B, L_s, V_s]``; float32, float64, bfloat16 or float16.
        teacher_logits: ``[B, L_t, V_t]``; no gradient.
        student_ids, teacher_ids: int64 ``[B, L_s]``, ``[B, L_t]``: the tokens.
        matched: ``.student_ids`` and ``.teacher_ids``, ``[M]``.
        pairs: spans of tokens; with a shift of 1 row ``i`` predicts token ``i + 1``.
        beta: between 0 and 1.
        temperature: T > 0.
        reduction: ``"batchmean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``[P]`` for ``"none"``; float64 for float64 logits, else float32.

    Raises:
        TypeError, ValueError: arguments of a wrong type, shape, value or device.
    """
    checks.check_sides(student_logits, "student_logits", teacher_logits, "teacher_logits")
    checks.check_temperature(temperature)
    checks.check_beta(beta)
    checks.check_choice(reduction, "reduction", checks.REDUCTIONS)
    for name, logits, ids in (("student", student_logits, student_ids), ("teacher", teacher_logits, teacher_ids)):
        checks.check_float(logits, f"{name}_logits", dims=(3,))
        if ids.shape != logits.shape[:2]:
            raise ValueError(f"{name}_ids: expected shape {tuple(logits.shape[:2])}, got {tuple(ids.shape)}")
    checks.check_matched(matched, student_logits.shape[-1], teacher_logits.shape[-1])
    check_pairs(pairs, student_logits.flatten(0, 1), teacher_logits.flatten(0, 1))
    lengths = student_logits.shape[1], teacher_logits.shape[1]
    rows = shifted_pairs(pairs, lengths, (student_shift, teacher_shift))
    student = _merged(
        upcast(student_logits), student_ids, rows.student_start, rows.student_end, student_shift, temperature
    )
    teacher = _merged(
        upcast(teacher_logits.detach()), teacher_ids, rows.teacher_start, rows.teacher_end, teacher_shift, temperature
    )
    ids_s, ids_t = matched_ids(matched, student.device)
    share = len(ids_t) / max(teacher.shape[1], 1)
    exact = _divergence(student[:, ids_s], teacher[:, ids_t], beta)
    rest = _sorted_difference(_without(student, ids_s), _without(teacher, ids_t))
    loss = share * exact + (1 - share) * rest
    return reduce_pairs(loss, valid_pairs(rows), rows.num_nonempty, reduction, None)


def _merged(logits: Tensor, ids: Tensor, start: Tensor, end: Tensor, shift: int, temperature: float) -> Tensor:
    """``[P, V]``: the distribution of the first row of each span, times the probabilities of its other tokens."""
    log_p = torch.log_softmax(logits.flatten(0, 1) / temperature, -1)
    # The token that each row predicts; the last row of a text predicts none that is in a span.
    targets = ids.roll(-shift, 1).flatten()
    token = log_p.gather(1, targets[:, None])[:, 0].double()
    total = torch.cat([token.new_zeros(1), token.cumsum(0)])
    start, end = start.long(), end.long()
    first = start.clamp(max=max(len(log_p) - 1, 0))
    others = total[end] - total[torch.minimum(start + 1, end)]
    return log_p[first].exp() * others.exp().to(log_p.dtype)[:, None]


def _without(rows: Tensor, ids: Tensor) -> Tensor:
    keep = torch.ones(rows.shape[1], dtype=torch.bool, device=rows.device)
    keep[ids] = False
    return rows[:, keep]


def _divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    log_s, log_t = student.clamp_min(_LEAST).log(), teacher.clamp_min(_LEAST).log()
    mixed = ((1 - beta) * log_s.exp() + beta * log_t.exp()).log()
    return (beta * log_t.exp() * (log_t - mixed) + (1 - beta) * log_s.exp() * (log_s - mixed)).sum(-1)


def _sorted_difference(student: Tensor, teacher: Tensor) -> Tensor:
    if not student.shape[1] or not teacher.shape[1]:
        return student.new_zeros(len(student))
    width = max(student.shape[1], teacher.shape[1])
    sides = [pad(x.sort(-1, descending=True).values, (0, width - x.shape[1])) for x in (student, teacher)]
    return (sides[0] - sides[1]).abs().sum(-1)
