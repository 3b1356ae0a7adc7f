"""span_likelihood: public function, made of log_prob. Formula: ``reference/span_likelihood.py``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..alignment.spans import SpanPairs
from ..core import checks
from ..core.dispatch import resolve
from ..reference._common import reduce_pairs
from ..reference.span_likelihood import (
    binary_divergence,
    counting_pairs,
    likelihood_pairs,
    predicted,
    rows_of_pairs,
)
from ..reference.span_likelihood import span_likelihood as reference_span_likelihood
from .log_prob import log_prob
from .span_mean import pool_rows


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
    """How differently likely student and teacher find the text of each span (ALM, arXiv 2503.20083): of the sums
    ``l_s`` and ``l_t`` of its tokens' log-probabilities the divergence between ``exp(l_t / T)`` and ``exp(l_s / T)``,
    each against the rest; formulas in :func:`vocabdistil.reference.span_likelihood`.

    A span that holds the first token of a text, which nothing predicts, is left out whole, as is a pair with an empty
    span. Of other tokens than those of spans neither logits nor ids are read.

    Args:
        student_logits: ``[B, L_s, V_s]`` of a causal model: row i of a text predicts its token i + 1; float32, float64,
            bfloat16 or float16. ``[..., V_s]`` without a shift.
        teacher_logits: ``[B, L_t, V_t]``. It gets no gradient.
        student_ids, teacher_ids: int64 or int32 ``[B, L_s]``, ``[B, L_t]``: the tokens. Those in no span may be
            anything.
        pairs: aligned spans of tokens, over flattened positions ``b * L + i``, as :func:`align` or a collator makes
            them. Texts have to be padded behind.
        temperature: ``T > 0``. The paper's code takes 100, by which unlikely spans count as much as likely ones; the
            loss is then of the order of ``1 / T``.
        divergence: ``"kl"`` or ``"total_variation"``.
        pair_weights: ``[P]``, what each pair counts; may require gradients. The rows of a pair with weight 0 are not
            read.
        student_shift, teacher_shift: 1, or 0 for a side whose row i is about token i, as in a masked model.
        reduction: ``"batchmean"`` (divided by the number of pairs that are not left out), ``"sum"`` or ``"none"``
            (``[P]``).
        backend: ``"cpu"``, ``"triton"`` or ``"reference"``; None chooses by device.

    Returns:
        The loss, float32 (float64 if an input is float64): ``[]``, or ``[P]`` for ``reduction="none"``.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, value or device, named in the text; ids out of
            range in a span that counts (on a GPU, where nobody waits to see them, the loss is NaN).
    """
    checks.check_columns(student_logits, "student_logits")
    checks.check_columns(teacher_logits, "teacher_logits")
    checks.check_sides(student_logits, "student_logits", teacher_logits, "teacher_logits")
    shifts = student_shift, teacher_shift
    shifted = likelihood_pairs(
        student_logits, teacher_logits, student_ids, teacher_ids, pairs, pair_weights, "logits", shifts, temperature,
        divergence, reduction,
    )  # fmt: skip
    choice = resolve("span_likelihood", student_logits.device, backend)
    if choice == "reference":
        return reference_span_likelihood(
            student_logits, student_ids, teacher_logits, teacher_ids, pairs, temperature=temperature,
            divergence=divergence, pair_weights=pair_weights, student_shift=student_shift, teacher_shift=teacher_shift,
            reduction=reduction,
        )  # fmt: skip
    student, teacher = student_logits.flatten(0, -2), teacher_logits.detach().flatten(0, -2)
    return loss_of_tokens(
        lambda ids, needed: log_prob(student, ids, needed, "student", choice),
        lambda ids, needed: log_prob(teacher, ids, needed, "teacher", choice),
        student_ids, teacher_ids, shifted, pair_weights, shifts, temperature, divergence, reduction,
    )  # fmt: skip


LogProbs = Callable[[Tensor, Tensor], Tensor]


def loss_of_tokens(
    student: LogProbs, teacher: LogProbs, student_ids: Tensor, teacher_ids: Tensor, pairs: SpanPairs,
    pair_weights: Tensor | None, shifts: tuple[int, int], temperature: float, divergence: str, reduction: str,
) -> Tensor:  # fmt: skip
    """The loss from what gives the log-probabilities ``[N]`` of tokens ``[N]`` at the rows that are needed, bool
    ``[N]``."""
    valid = counting_pairs(pairs, pair_weights)

    def of_spans(log_probs: LogProbs, ids: Tensor, shift: int, start: Tensor, end: Tensor) -> Tensor:
        needed = rows_of_pairs(start, end, valid, ids.numel())
        return pool_rows(log_probs(predicted(ids, shift), needed)[:, None], start, end, "sum", None)[:, 0]

    log_s = of_spans(student, student_ids, shifts[0], pairs.student_start, pairs.student_end)
    log_t = of_spans(teacher, teacher_ids, shifts[1], pairs.teacher_start, pairs.teacher_end)
    loss = binary_divergence(log_s, log_t, temperature, divergence)
    return reduce_pairs(loss, valid, pairs.num_nonempty, reduction, pair_weights)
