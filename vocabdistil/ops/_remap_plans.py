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
    """The table in int64, and without entries of weight 0."""
    indptr, ids = indptr.to(torch.int64), ids.to(torch.int64)
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
    transposed = torch.zeros(student_columns + 1, dtype=torch.int64)
    torch.cumsum(interleaved.bincount(minlength=student_columns), 0, out=transposed[1:])
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
    """A table that was seen, and its plan."""

    def __init__(self, table: tuple[Tensor, ...], plan: Any) -> None:
        self.table, self.plan = tuple(x.clone() for x in table), plan
        self.note(table)

    def note(self, table: tuple[Tensor, ...]) -> None:
        """These tensors hold the table."""
        self.seen = Seen(*table)


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
            for one in known:
                if all(map(torch.equal, one.table, table)):
                    one.note(table)
                    return one.plan
            check_table(indptr, ids, student_columns)
            indptr, ids, entries = _without_zeros(indptr, ids, weights)
            if entries is not None:
                entries = (entries.double().log() if logsumexp else entries).to(dtype)
            plan = self._make(indptr, ids, entries, student_columns)
            if device is not None:
                plan = type(plan)(*(x.to(device) if isinstance(x, Tensor) else x for x in plan))
            known[:] = [*known, _Known(table, plan)][-self._size :]
            while len(self._plans) > self._size:
                self._plans.popitem(last=False)
        return plan


def _make_gather_plan(indptr: Tensor, ids: Tensor, weights: Tensor | None, student_columns: int) -> Any:
    return implementation("remapped_kl", "triton", "make_gather_plan")(indptr, ids, weights, student_columns)


plans = Plans(make_plan, 4)
compact_plans = Plans(make_compact_plan, 4)
gather_plans = Plans(_make_gather_plan, 4)
