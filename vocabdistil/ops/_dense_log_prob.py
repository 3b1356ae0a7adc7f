"""linear_log_prob on a GPU: rows in a few large chunks, whose logits a product forms and the row kernel of log_prob
turns into log-probabilities or, formed once more, into their gradient, which two more products carry back. Chunks and
precision are those of ``_dense_sweep.py``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..core.dispatch import implementation
from ._dense_sweep import row_buffer, rows_per_chunk, unit_of
from ._products import product

Odds = tuple[Tensor, Tensor, Tensor]


def _chunks(count: int, step: int) -> Iterator[slice]:
    for begin in range(0, count, step):
        yield slice(begin, min(count, begin + step))


def _of(odds: Odds, part: slice) -> Odds:
    log_prob, shift, share = odds
    return log_prob[part], shift[part], share[part]


def dense_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, needed: Tensor, out: Odds, backend: str
) -> None:
    run = implementation("log_prob", backend, "log_prob_fwd")
    (rows, _), columns, dtype = hidden.shape, weight.shape[0], out[0].dtype
    if not rows:
        return
    weight = weight.to(hidden.dtype)
    step = rows_per_chunk(rows, weight.nbytes, weight.nbytes, dtype.itemsize * columns)
    z = row_buffer(out[0], min(step, rows), columns, dtype)
    for part in _chunks(rows, step):
        logits = z[: part.stop - part.start]
        product(hidden[part], weight.t(), logits)
        run(logits, bias, ids[part], needed[part], _of(out, part))


def dense_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, needed: Tensor, of: Odds,
    grads: Sequence[Tensor | None], backend: str,
) -> None:  # fmt: skip
    """Writes the gradients of hidden, weight and bias that are not None, in the accumulation dtype."""
    run = implementation("log_prob", backend, "log_prob_bwd")
    grad_hidden, grad_weight, grad_bias = grads
    (rows, _), columns, dtype, narrow = hidden.shape, weight.shape[0], grad.dtype, hidden.dtype
    if not rows:
        for g in grads:
            if g is not None:
                g.zero_()
        return
    weight = weight.to(narrow)
    hidden = torch.where(needed[:, None], hidden, 0.0)  # what is not needed may be NaN, which 0 times is no 0
    traffic = weight.nbytes + (0 if grad_weight is None else grad_weight.nbytes)
    per_row = columns * (dtype.itemsize + (narrow.itemsize if narrow != dtype else 0))
    step = rows_per_chunk(rows, traffic + (0 if grad_hidden is None else grad_hidden.nbytes), traffic, per_row)
    z = row_buffer(grad, min(step, rows), columns, dtype)
    d = z if narrow == dtype else row_buffer(grad, min(step, rows), columns, narrow)
    unit = unit_of(grad, 1.0) if narrow == torch.float16 else None
    if unit is not None:
        grad = grad / unit
    if grad_bias is not None:
        grad_bias.zero_()
    for part in _chunks(rows, step):
        x, slopes = hidden[part], d[: part.stop - part.start]
        logits = z[: part.stop - part.start]
        product(x, weight.t(), logits)
        run(logits, bias, ids[part], needed[part], _of(of, part), grad[part], slopes)
        if grad_hidden is not None:
            product(slopes, weight, grad_hidden[part])
        if grad_weight is not None:
            product(slopes.t(), x, grad_weight, add=part.start > 0)
        if grad_bias is not None:
            grad_bias.add_(slopes.sum(0, dtype=dtype))
    for g in grads:
        if g is not None and unit is not None:
            g.mul_(unit)
