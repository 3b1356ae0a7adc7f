"""Remap tables as the kernels read them, made once per table."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ..core.dispatch import implementation
from ..core.values import Seen

Plan = tuple[Tensor | None, ...]


def check_table(indptr: Tensor, ids: Tensor, student_columns: int) -> None:
    """
    Raises:
        ValueError: ``indptr`` does not ascend from 0 to the number of ids, or an id is no student column.
    """
    if int(indptr[0]) != 0 or int(indptr[-1]) != ids.numel() or bool((indptr.diff() < 0).any()):
        raise ValueError(f"table.indptr: expected values ascending from 0 to the number of ids ({ids.numel()})")
    checks.check_index_range(ids, "table.ids", student_columns)


def _without_zeros(indptr: Tensor, ids: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The table without entries of weight 0."""
    if weights is None:
        return indptr, ids, None
    there = weights != 0
    before = torch.cat([indptr.new_zeros(1), there.cumsum(0)])
    return before[indptr], ids[there], weights[there]


def make_plan(indptr: Tensor, ids: Tensor, weights: Tensor | None, student_columns: int) -> Plan:
    """The table as the CPU kernels read it (``RemapPlan`` in csrc/ops.h): rows of one length interleaved, and
    transposed; the weights of both, or their logs, in their dtype."""
    lengths = indptr.diff()
    by_length = lengths.argsort(stable=True)
    rows = by_length[lengths[by_length] > 0]
    shapes = torch.stack(lengths[rows].unique_consecutive(return_counts=True), 1)
    entries, positions, first = [ids.new_empty(0)], [ids.new_empty(0)], 0
    for length, count in shapes.tolist():
        entries.append((indptr[rows[first : first + count]] + torch.arange(length)[:, None]).flatten())
        positions.append(torch.arange(first, first + count).repeat(length))
        first += count
    order = torch.cat(entries)
    interleaved = ids[order]
    counts = interleaved.bincount(minlength=student_columns)
    transposed = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    by_piece = interleaved.argsort(stable=True)
    pieces_of = torch.cat(positions)[by_piece]
    plan = (rows, shapes, interleaved, transposed, pieces_of)
    of_rows = None if weights is None else weights[order].contiguous()
    of_pieces = None if of_rows is None else of_rows[by_piece].contiguous()
    return *(x.to(torch.int32).contiguous() for x in plan), of_rows, of_pieces


def make_compact_plan(indptr: Tensor, ids: Tensor, weights: Tensor | None, student_columns: int) -> Plan:
    """The student's columns that the table names, ascending, and the plan of a table of their positions."""
    columns, positions = ids.unique(return_inverse=True)
    return columns.to(torch.int32), *make_plan(indptr, positions, weights, columns.numel())


class _Known:
    """A table that was seen, a copy of it, and the plan of the copy."""

    def __init__(self, seen: Seen, table: tuple[Tensor, ...], plan: Any) -> None:
        self.seen, self.table, self.plan = seen, table, plan


class Plans:
    """The plans of the last tables seen, by ``make(indptr, ids, weights, student columns)`` of a checked table without
    entries of weight 0. A table is known by its tensors, as long as they live and are not written to, else by its
    values: comparing these takes a fraction of a millisecond.
    """

    def __init__(self, make: Callable[[Tensor, Tensor, Tensor | None, int], Any], size: int) -> None:
        self._make = make
        self._size = size
        self._lock = Lock()
        self._captured: dict[int, Any] = {}
        self._plans: OrderedDict[tuple, list[_Known]] = OrderedDict()

    def get(
        self, indptr: Tensor, ids: Tensor, weights: Tensor | None, student_columns: int, logsumexp: bool,
        dtype: torch.dtype, device: torch.device | None = None,
    ) -> Any:  # fmt: skip
        """logsumexp, dtype: whether the plan holds the weights' logs, and in which dtype; device: where the plan is to
        be, that of the table by default. One that a CUDA graph is being captured with is kept for good: whenever the
        graph is replayed, it reads it.

        Raises:
            ValueError: as :func:`check_table`.
        """
        plan = self._get(indptr, ids, weights, student_columns, logsumexp, dtype, device)
        if device is not None and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured[id(plan)] = plan
        return plan

    def _get(self, indptr, ids, weights, student_columns, logsumexp, dtype, device):
        table = (indptr, ids) if weights is None else (indptr, ids, weights)
        kind = None if weights is None else (weights.dtype, logsumexp, dtype)
        key = (indptr.numel(), ids.numel(), kind, student_columns, device)
        with self._lock:
            known = self._plans.setdefault(key, [])
            self._plans.move_to_end(key)
            for one in known:
                if one.seen.are(*table):
                    return one.plan
            # Whatever is written to the tensors from here on, what is checked is what the plan is made of.
            seen, copied = Seen(*table), tuple(x.clone() for x in table)
            for one in known:
                if all(map(torch.equal, one.table, copied)):
                    one.seen = seen
                    return one.plan
            check_table(*copied[:2], student_columns)
            entries = None if weights is None else copied[2] if logsumexp else copied[2].to(dtype)
            indptr, ids, entries = _without_zeros(*(x.to(torch.int64) for x in copied[:2]), entries)
            if entries is not None and logsumexp:
                entries = entries.double().log().to(dtype)
            plan = self._make(indptr, ids, entries, student_columns)
            if device is not None:
                plan = type(plan)(*(x.to(device) if isinstance(x, Tensor) else x for x in plan))
            known[:] = [*known, _Known(seen, copied, plan)][-self._size :]
            while len(self._plans) > self._size:
                self._plans.popitem(last=False)
        return plan


def _make_gather_plan(indptr: Tensor, ids: Tensor, weights: Tensor | None, student_columns: int) -> Any:
    return implementation("remapped_kl", "triton", "make_gather_plan")(indptr, ids, weights, student_columns)


plans = Plans(make_plan, 4)
compact_plans = Plans(make_compact_plan, 4)
gather_plans = Plans(_make_gather_plan, 4)
