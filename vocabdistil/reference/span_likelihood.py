"""How likely both sides find the text of a span, from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from vocabdistil.alignment.spans import SpanPairs, check_pairs, chosen_pairs
from vocabdistil.core import checks
from vocabdistil.reference._common import reduce_pairs, safe_log, span_of_token, span_pool, upcast


def span_likelihood(
    student_logits: Tensor,
    student_ids: Tensor,
    teacher_logits: Tensor,
    teacher_ids: Tensor,
    pairs: SpanPairs,
    *,
    temperature: float = 1.0,
    divergence: str = "kl",
    pair_weights: Tensor | None = None,
    student_shift: int = 1,
    teacher_shift: int = 1,
    reduction: str = "batchmean",
    backend: str | None = None,
) -> Tensor:
    """Divergence between the likelihoods that student and teacher give to the text of each span pair.

    Either side reads the text in its own tokens x. With row i of the logits about token i + 1, as in a causal model
    (``shift`` 1)::

        l_s(p) = sum_{k in student span p} log softmax(z_s[k - 1])[x_s[k]],   l_t(p) likewise
        q = exp(l_t / T),  r = exp(l_s / T)
        kl               l_p = q log(q / r) + (1 - q) log((1 - q) / (1 - r))
        total_variation  l_p = |q - r|

    These are the f-divergences between two outcomes, this text and any other: of all texts only this one has a
    likelihood on both sides. ``1 - q`` is formed of the logarithm, ``log(1 - exp(l))``, so both ends are exact; one
    under 1e-30 counts as 1e-30, so that no gradient is infinite. A term with q = 0 is 0.

    A span that holds the first token of a text is left out whole: nothing predicts that token, and the rest of the span
    is not the text of its pair. So is a pair with an empty span, or with weight 0. What is left out counts for nothing
    and its rows are not read. ``batchmean`` divides by the number of pairs whose spans are both neither empty nor at
    the beginning of a text, whatever their weight; none give 0. No gradient reaches the teacher.

    Source: Minixhofer, Vulić, Ponti, arXiv 2503.20083 (approximate likelihood matching, ALM): the binarised
    f-divergence between the likelihoods of chunks to the power of 1 / T, with f of KL by default. T = 100 is what
    their code (tokenkit, ``binarization_temp``) runs with. As T grows, T l_p nears
    ``|l_s| - |l_t| + |l_t| log(l_t / l_s)``: the loss is of the order of 1 / T, and unlikely spans count as much as
    likely ones. Their code takes the cross entropy, whose gradient is the same, and moves both logarithms by 1e-6
    where this is exact. Left to ``pair_weights``: their debiasing, a choice among spans.

    Args:
        student_logits: ``[B, L_s, V_s]``; ``[..., V_s]`` without a shift.
        teacher_logits: ``[B, L_t, V_t]``, on the student's device.
        student_ids, teacher_ids: int64 or int32, of the shape of the logits without the vocabulary: the tokens. Those
            in no span may be anything.
        pairs: aligned spans of tokens, over flattened positions ``b * L + i``.
        temperature: T > 0, finite.
        divergence: ``"kl"`` or ``"total_variation"``.
        pair_weights: ``[P]`` or None for 1.
        student_shift, teacher_shift: 1 where row i predicts token i + 1; 0 where it is about token i, as in a masked
            model (a pseudo-likelihood).
        reduction: ``"batchmean"``, ``"sum"`` or ``"none"``.
        backend: None or ``"reference"``.

    Returns:
        A scalar, or one loss per pair for ``"none"``; float64 for float64 inputs, else float32.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: wrong shapes, names, devices, temperature; ids outside the vocabulary in a span that counts (looked
            at only in host memory, outside compilation).
    """
    checks.check_reference_backend(backend)
    checks.check_columns(student_logits, "student_logits")
    checks.check_columns(teacher_logits, "teacher_logits")
    checks.check_sides(student_logits, "student_logits", teacher_logits, "teacher_logits")
    shifts = student_shift, teacher_shift
    pairs = likelihood_pairs(
        student_logits, teacher_logits, student_ids, teacher_ids, pairs, pair_weights, "logits", shifts, temperature,
        divergence, reduction,
    )  # fmt: skip
    return likelihood_loss(
        upcast(student_logits.flatten(0, -2)), upcast(teacher_logits.detach().flatten(0, -2)), student_ids, teacher_ids,
        pairs, pair_weights, shifts, temperature, divergence, reduction,
    )  # fmt: skip


def likelihood_loss(
    student: Tensor,
    teacher: Tensor,
    student_ids: Tensor,
    teacher_ids: Tensor,
    pairs: SpanPairs,
    pair_weights: Tensor | None,
    shifts: tuple[int, int],
    temperature: float,
    divergence: str,
    reduction: str,
) -> Tensor:
    """Logits ``[N_s, V_s]``, ``[N_t, V_t]`` and what `likelihood_pairs` gives -> the loss."""
    valid = counting_pairs(pairs, pair_weights)
    of_student = pairs.student_start, pairs.student_end, valid
    of_teacher = pairs.teacher_start, pairs.teacher_end, valid
    log_s = _span_log_probs(student, predicted(student_ids, shifts[0]), *of_student, "student_ids")
    log_t = _span_log_probs(teacher, predicted(teacher_ids, shifts[1]), *of_teacher, "teacher_ids")
    loss = binary_divergence(log_s, log_t, temperature, divergence)
    return reduce_pairs(loss, valid, pairs.num_nonempty, reduction, pair_weights)


def likelihood_pairs(
    student: Tensor,
    teacher: Tensor,
    student_ids: Tensor,
    teacher_ids: Tensor,
    pairs: SpanPairs,
    pair_weights: Tensor | None,
    name: str,
    shifts: tuple[int, int],
    temperature: float,
    divergence: str,
    reduction: str,
) -> SpanPairs:
    """The pairs at the rows that predict their tokens, all arguments but the logits' (or hidden states') checked."""
    check_pairs(pairs, student.flatten(0, -2), teacher.flatten(0, -2))
    shifted = chosen_pairs(pairs, None, pair_weights, student, teacher, name, shifts)
    for side, ids, rows in (("student", student_ids, student), ("teacher", teacher_ids, teacher)):
        checks.check_token_ids(ids, f"{side}_ids", rows, f"{side}_{name}")
    checks.check_temperature(temperature)
    checks.check_choice(divergence, "divergence", checks.LIKELIHOOD_DIVERGENCES)
    checks.check_choice(reduction, "reduction", checks.REDUCTIONS)
    return shifted if shifted is not None else pairs


def predicted(ids: Tensor, shift: int) -> Tensor:
    """``[N]``: the token that each row is about; of the last row of a text beside a shift one that no span asks for."""
    return ids.flatten().roll(-shift) if shift else ids.flatten()


def counting_pairs(pairs: SpanPairs, pair_weights: Tensor | None) -> Tensor:
    """``[P]`` bool: both spans non-empty, and a weight that is not 0 unless its own gradient is asked for."""
    valid = (pairs.student_end > pairs.student_start) & (pairs.teacher_end > pairs.teacher_start)
    return valid if pair_weights is None or pair_weights.requires_grad else valid & (pair_weights != 0)


def rows_of_pairs(start: Tensor, end: Tensor, valid: Tensor, num_rows: int) -> Tensor:
    """``[N]`` bool: the rows in the spans of valid pairs."""
    return torch.cat([valid, valid.new_zeros(1)])[span_of_token(start, end, num_rows)]


def _span_log_probs(rows: Tensor, ids: Tensor, start: Tensor, end: Tensor, valid: Tensor, name: str) -> Tensor:
    """Logits ``[N, V]`` and tokens ``[N]`` -> ``[P]``: the log-probability of each span's tokens; 0 if not valid."""
    needed = rows_of_pairs(start, end, valid, rows.shape[0])
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():
        checks.check_index_range(ids[needed], name, rows.shape[1])
    return span_pool(_token_log_probs(rows, ids, needed)[:, None], start, end, "sum")[:, 0]


def _token_log_probs(rows: Tensor, ids: Tensor, needed: Tensor) -> Tensor:
    """``log softmax(z)[id]`` of each row that is needed, else 0: ``-log(1 + sum_{j != id} exp(z_j - z_id))``, which
    near 0 has all its digits. -inf and no gradient for a row of -inf alone."""
    empty = (rows == float("-inf")).all(-1)
    alive = needed & ~empty
    rows = torch.where(alive[:, None], rows, 0.0)
    index = torch.where(alive, ids, 0)[:, None].long()
    others = rows.scatter(1, index, float("-inf"))
    # logsumexp by hand: torch's has a NaN gradient where all terms are -inf, as in a vocabulary of one.
    top = others.detach().amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    rest = top + safe_log((others - top).exp().sum(-1, keepdim=True))
    odds = (rest - rows.gather(1, index))[:, 0]
    log_p = -torch.logaddexp(torch.zeros_like(odds), odds)
    return torch.where(alive, log_p, torch.where(needed, float("-inf"), 0.0).to(log_p.dtype))


def _log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for x < 0."""
    near = x > -0.6931471805599453
    close = torch.where(near, x, -1.0).expm1().neg().log()
    return torch.where(near, close, torch.where(near, -1.0, x).exp().neg().log1p())


def binary_divergence(log_s: Tensor, log_t: Tensor, temperature: float, divergence: str) -> Tensor:
    """``[P]`` log-likelihoods, at most 0 -> ``[P]`` divergences in the wider of their dtypes; computed in float64 where
    the device has it, as what both sides differ by is little beside either."""
    dtype = torch.promote_types(log_s.dtype, log_t.dtype)
    wide = dtype if log_s.device.type == "mps" else torch.float64
    log_r, log_q = ((x.to(wide) / temperature).clamp(max=-1e-30) for x in (log_s, log_t))
    if divergence == "total_variation":
        below = log_q < log_r
        high, low = torch.where(below, log_r, log_q), torch.where(below, log_q, log_r)
        return (-high.exp() * torch.where(low < high, low - high, 0.0).expm1()).to(dtype)
    q = log_q.exp()
    ratio = torch.where(q > 0, log_q - log_r, 0.0)
    return (q * ratio - log_q.expm1() * (_log1mexp(log_q) - _log1mexp(log_r))).to(dtype)
