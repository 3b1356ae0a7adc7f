"""Teacher ids replaced by the rows of a remap table, in plain PyTorch on any device: what the kernel is tested against,
and what runs on a GPU without one."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["measure", "remap"]


def _look_up(ids: Tensor, mask: Tensor | None, indptr: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``[B, L]``: whether a token is kept, whether it is in the table, its row there, and the length of that (1 for an
    id outside the table, 0 for a token left out)."""
    rows = indptr.numel() - 1
    known = (ids >= 0) & (ids < rows)
    row = torch.where(known, ids, 0).to(torch.int64)
    keep = torch.ones_like(known) if mask is None else mask.ne(0)
    length = indptr[(row + 1).clamp(max=rows)] - indptr[row]
    return keep, known, row, torch.where(keep, torch.where(known, length, 1), 0).to(torch.int64)


def measure(ids: Tensor, mask: Tensor | None, indptr: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the host must know of a batch to give its results the sizes that they need.

    Args:
        ids: int64 or int32 ``[B, L]``.
        mask: None, or bool or integer ``[B, L]``; tokens with 0 are left out.
        indptr: int32 ``[V + 1]``, the bounds of the table's rows, on the device of ``ids``.

    Returns:
        int64 ``[4]``: the longest sequence of student tokens, the tokens kept, those of them whose row is not empty,
        and those outside the table; and what :func:`remap` may use again.
    """
    keep, known, _, count = _look_up(ids, mask, indptr)
    longest = torch.nn.functional.pad(count.sum(1), (0, 1)).amax()  # of no sequences: 0
    sums = [x.count_nonzero() for x in (keep, count, keep & ~known)]
    return torch.stack([longest, *sums]), None


def remap(
    ids: Tensor, mask: Tensor | None, indptr: Tensor, pieces: Tensor, unk_id: int, pad_id: int, width: int,
    measured: Tensor | None = None, pairs: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The ``reduce`` alignment of arXiv 2205.02340, cut to a fixed width: the host waits for nothing.

    With the length ``n_i`` of token i's row (0 where the mask is 0) and ``e_i = n_1 + ... + n_i``, token i is kept if
    the mask is not 0 and ``e_i <= width``: it is never cut, and the first that does not fit ends its sequence. Its
    pieces stand at ``[e_i - n_i, e_i)``.

    Args:
        ids, mask, indptr: as in :func:`measure`; an id outside the table is the unknown token.
        pieces: int32 ``[nnz]``, the student ids of the rows, on the same device.
        unk_id, pad_id: the student's tokens.
        width: W, the columns of the result.
        measured: what :func:`measure` returned second, if it was called.
        pairs: None, or the number of tokens kept, where all of them fit.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 ``[B, W]``; int32 student_start, student_end, teacher_start and
        teacher_end as ``[4, pairs]``, or, without ``pairs``, as ``[4, B * L]`` with two empty spans for a token that
        is not kept; int64 ``[]``: the pairs with two spans that are not empty.
    """
    (batch, length), device = ids.shape, ids.device
    keep, known, row, count = _look_up(ids, mask, indptr)
    end = count.cumsum(1)
    start = (end - count).clamp(max=width)
    keep = keep & (end <= width)
    count = torch.where(keep, count, 0)

    columns = torch.arange(width, device=device).expand(batch, width)
    inside = columns < count.sum(1, keepdim=True)
    input_ids = torch.full((batch, width), pad_id, dtype=torch.int64, device=device)
    if length and width:
        # The first token that ends behind a column is the one that covers it.
        token = torch.searchsorted(start + count, columns.contiguous(), right=True).clamp(max=length - 1)
        # The unknown token stands behind all rows, so that there is something to read in a table without any.
        pieces = torch.nn.functional.pad(pieces, (0, 1), value=unk_id)
        first = torch.where(known, indptr[row], pieces.numel() - 1)
        at = torch.where(inside, (first - start).gather(1, token) + columns, 0)
        input_ids = torch.where(inside, pieces[at].to(torch.int64), input_ids)
    student = (torch.arange(batch, device=device)[:, None] * width + start).flatten()
    teacher = torch.arange(batch * length, device=device)
    spans = torch.stack([student, student + count.flatten(), teacher, teacher + keep.flatten()]).to(torch.int32)
    if pairs is not None and pairs < batch * length:
        nth = torch.arange(1, pairs + 1, device=device)
        spans = spans[:, torch.searchsorted(keep.flatten().cumsum(0), nth)]
    return input_ids, inside.to(torch.int64), spans, count.count_nonzero()
