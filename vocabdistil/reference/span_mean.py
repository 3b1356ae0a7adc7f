"""Means (or sums) of the token vectors of spans."""

from __future__ import annotations

from torch import Tensor

from vocabdistil.alignment.spans import check_span_vectors
from vocabdistil.core import checks
from vocabdistil.reference._common import span_pool, upcast


def span_mean(
    x: Tensor, start: Tensor, end: Tensor, pooling: str = "mean", *, backend: str | None = None
) -> Tensor:
    """Averages (or adds) the rows of ``x`` over each span.

    ``out[p] = sum_{start[p] <= i < end[p]} x[i] / n_p`` with ``n_p = max(end[p] - start[p], 1)`` for
    ``"mean"`` and ``n_p = 1`` for ``"sum"``. An empty span gives 0 and no gradient. Each token lies in at
    most one span, so ``grad x[i] = grad out[p] / n_p`` for the span p that holds token i, and 0 outside all
    spans.

    Source: the span average of the reduce alignment, Kolesnikova et al., arXiv 2205.02340;
    ``"sum"`` is what the authors' code computes for hidden states.

    Args:
        x: ``[N, D]`` or ``[B, L, D]`` (flattened to ``N = B * L``); float32, float64, bfloat16 or float16.
        start, end: ``[P]`` int32 or int64, half-open, ascending, disjoint, over the flattened positions.
        pooling: ``"mean"`` or ``"sum"``.
        backend: None or ``"reference"``.

    Returns:
        ``[P, D]`` in the dtype of ``x``; half types are accumulated in float32.

    Raises:
        TypeError: not a tensor, or a wrong dtype.
        ValueError: wrong shapes, devices or names; spans that overlap, descend or run past the end (looked at
            only in host memory).
    """
    checks.check_reference_backend(backend)
    checks.check_float(x, "x", dims=(2, 3))
    checks.check_choice(pooling, "pooling", checks.POOLINGS)
    rows = x.flatten(0, -2)
    check_span_vectors(start, end, rows.shape[0], rows.device)
    return span_pool(upcast(rows), start, end, pooling).to(x.dtype)
