"""Token-span averaging in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["span_mean"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def span_mean(
    x: Tensor, start: Tensor, end: Tensor, *, pooling: str = "mean", backend: str | None = None
) -> Tensor:
    r"""Mean (or sum) of the rows of ``x`` over each span.

    .. math:: \mathrm{mean}_p = \frac{1}{e_p - s_p} \sum_{i=s_p}^{e_p - 1} x_i

    Source: the averaged hidden states of Kolesnikova et al., arXiv 2205.02340. The published code divides by a
    padded group width; ``"mean"`` is the true mean and ``"sum"`` what its hidden-state path computes.

    Args:
        x: ``[N, D]`` or ``[B, L, D]``, floating.
        start, end: integer ``[P]``, half-open spans, ascending and disjoint.
        pooling: ``"mean"`` or ``"sum"``.
        backend: None or ``"reference"``.

    Returns:
        ``[P, D]`` in the dtype of ``x`` (accumulated in float32 for half types); 0 for an empty span.
    """
    if pooling not in ("mean", "sum"):
        raise ValueError(f"pooling: expected one of mean, sum, got {pooling!r}")
    return pooled(x.reshape(-1, x.shape[-1]), start, end, pooling).to(x.dtype)


def pooled(x: Tensor, start: Tensor, end: Tensor, pooling: str) -> Tensor:
    """[N, D] -> [P, D] in the accumulation dtype."""
    lengths = (end - start).to(torch.int64)
    rows = torch.nn.functional.pad(x.to(accumulation_dtype(x.dtype)), (0, 0, 0, 1))
    # Which pair a token belongs to: spans ascend, so it is the first whose end lies beyond the token.
    token = torch.arange(rows.shape[0], device=x.device)
    pair = torch.searchsorted(end.to(torch.int64), token, right=True)
    last = max(start.shape[0] - 1, 0)
    inside = (pair < start.shape[0]) & (token >= start.to(torch.int64)[pair.clamp(max=last)]) if start.shape[0] else None
    out = rows.new_zeros(start.shape[0], x.shape[1])
    if inside is not None:
        kept = torch.where(inside[:, None], rows, 0)
        out = out.index_add(0, pair.clamp(max=last), kept)
    if pooling == "mean":
        out = out / lengths.clamp(min=1).to(out.dtype)[:, None]
    return out
