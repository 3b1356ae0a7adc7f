"""span_likelihood: public function. Formula: ``reference/span_likelihood.py``."""

from __future__ import annotations

from torch import Tensor

from ..alignment.spans import SpanPairs
from ..reference.span_likelihood import span_likelihood as reference_span_likelihood


def span_likelihood(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_ids: Tensor,
    teacher_ids: Tensor,
    pairs: SpanPairs,
    *,
    temperature: float = 100.0,
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
        temperature: ``T > 0``, as in the paper's code 100; the loss is of the order of ``1 / T``.
        divergence: ``"kl"`` or ``"total_variation"``.
        pair_weights: ``[P]``, what each pair counts; may require gradients. The rows of a pair with weight 0 are not
            read.
        student_shift, teacher_shift: 1, or 0 for a side whose row i is about token i, as in a masked model.
        reduction: ``"batchmean"`` (divided by the number of pairs that are not left out), ``"sum"`` or ``"none"``
            (``[P]``).
        backend: ``"reference"``; None chooses by device.

    Returns:
        The loss, float32 (float64 if an input is float64): ``[]``, or ``[P]`` for ``reduction="none"``.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, value or device, named in the text; ids out of
            range in a span that counts.
    """
    return reference_span_likelihood(
        student_logits, teacher_logits, student_ids, teacher_ids, pairs, temperature=temperature, divergence=divergence,
        pair_weights=pair_weights, student_shift=student_shift, teacher_shift=teacher_shift, reduction=reduction,
        backend=backend,
    )  # fmt: skip
