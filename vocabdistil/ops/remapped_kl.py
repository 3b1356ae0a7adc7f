"""remapped_kl: schema, implementation, autograd, public function. Formula: ``reference/remapped_kl.py``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock

import torch
from torch import Tensor

from ..alignment.spans import SpanPairs, chosen_pairs
from ..core import checks, native
from ..core.checks import RemapLike, Scale
from ..core.dispatch import implementation, resolve
from ..core.values import Seen
from ..reference._common import reduce_pairs
from ..reference.remapped_kl import COMBINES
from ..reference.remapped_kl import remapped_kl as reference_remapped_kl
from ._gradient import RowLoss
from ._library import define
from ._scale import scalable, scaled
from .matched_kl import pair_count, row_scale, span_vectors
from .span_mean import native_rows

Plan = tuple[Tensor, ...]


def check_table(indptr: Tensor, ids: Tensor, student_columns: int) -> None:
    """
    Raises:
        ValueError: ``indptr`` does not ascend from 0 to the number of ids, or an id is no student column.
    """
    if int(indptr[0]) != 0 or int(indptr[-1]) != ids.numel() or bool((indptr.diff() < 0).any()):
        raise ValueError(f"table.indptr: expected values ascending from 0 to the number of ids ({ids.numel()})")
    checks.check_index_range(ids, "table.ids", student_columns)


def make_plan(indptr: Tensor, ids: Tensor, student_columns: int) -> Plan:
    """The table as the CPU kernel reads it (``RemapPlan`` in csrc/ops.h): rows of one length interleaved, and
    transposed. Raises as :func:`check_table`."""
    check_table(indptr, ids, student_columns)
    indptr, ids = indptr.to(torch.int64), ids.to(torch.int64)
    lengths = indptr.diff()
    by_length = lengths.argsort(stable=True)
    rows = by_length[lengths[by_length] > 0]
    shapes = torch.stack(lengths[rows].unique_consecutive(return_counts=True), 1)
    pieces, positions, first = [ids.new_empty(0)], [ids.new_empty(0)], 0
    for length, count in shapes.tolist():
        at = indptr[rows[first : first + count]] + torch.arange(length)[:, None]
        pieces.append(ids[at].flatten())
        positions.append(torch.arange(first, first + count).repeat(length))
        first += count
    interleaved = torch.cat(pieces)
    transposed = torch.zeros(student_columns + 1, dtype=torch.int64)
    torch.cumsum(interleaved.bincount(minlength=student_columns), 0, out=transposed[1:])
    pieces_of = torch.cat(positions)[interleaved.argsort(stable=True)]
    plan = (rows, shapes, interleaved, transposed, pieces_of)
    return tuple(x.to(torch.int32).contiguous() for x in plan)


class _Known:
    """A table that was seen, and its plan."""

    def __init__(self, indptr: Tensor, ids: Tensor, plan: Plan) -> None:
        self.indptr, self.ids, self.plan = indptr.clone(), ids.clone(), plan
        self.note(indptr, ids)

    def note(self, *tensors: Tensor) -> None:
        """These tensors hold the table."""
        self.seen = Seen(*tensors)


class _Plans:
    """The plans of the last tables seen, by ``make(indptr, ids, student columns)``. A table is known by its tensors, as
    long as they live and are not written to, else by its values: comparing these takes a fraction of a millisecond.
    """

    def __init__(self, make: Callable[[Tensor, Tensor, int], Plan], size: int) -> None:
        self._make = make
        self._size = size
        self._lock = Lock()
        self._captured: dict[int, Plan] = {}
        self._plans: OrderedDict[tuple, list[_Known]] = OrderedDict()

    def get(self, indptr: Tensor, ids: Tensor, student_columns: int, device: torch.device | None = None) -> Plan:
        """``device``: where the plan is to be; that of the table by default. One that a CUDA graph is being captured
        with is kept for good: whenever the graph is replayed, it reads it."""
        plan = self._get(indptr, ids, student_columns, device)
        if device is not None and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured[id(plan)] = plan
        return plan

    def _get(self, indptr: Tensor, ids: Tensor, student_columns: int, device: torch.device | None) -> Plan:
        key = (indptr.numel(), ids.numel(), student_columns, device)
        with self._lock:
            known = self._plans.setdefault(key, [])
            self._plans.move_to_end(key)
            for table in known:
                if table.seen.are(indptr, ids):
                    return table.plan
            for table in known:
                if torch.equal(table.indptr, indptr) and torch.equal(table.ids, ids):
                    table.note(indptr, ids)
                    return table.plan
            plan = self._make(indptr, ids, student_columns)
            if device is not None:
                plan = type(plan)(*(x.to(device) for x in plan))
            known[:] = [*known, _Known(indptr, ids, plan)][-self._size :]
            while len(self._plans) > self._size:
                self._plans.popitem(last=False)
        return plan


def _make_gather_plan(indptr: Tensor, ids: Tensor, student_columns: int) -> Plan:
    check_table(indptr, ids, student_columns)
    return implementation("remapped_kl", "triton", "make_gather_plan")(indptr, ids, student_columns)


_plans = _Plans(make_plan, 4)
_gather_plans = _Plans(_make_gather_plan, 4)


def _impl(
    student: Tensor, teacher: Tensor, spans: Sequence[Tensor], indptr: Tensor, ids: Tensor, scale: Tensor,
    logsumexp: bool, temperature: float, backend: str, wanted: bool, upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    total, loss, grad = _fake(student, teacher, spans, indptr, ids, scale, logsumexp, temperature, backend, wanted)
    if not 1 <= indptr.numel() <= teacher.shape[1] + 1:
        raise ValueError(f"table: expected at most {teacher.shape[1]} rows, got {indptr.numel() - 1}")
    given = grad if wanted else None
    if backend == "triton":
        total = _triton(student, teacher, spans, indptr, ids, scale, logsumexp, temperature, loss, given, upstream)
    else:
        plan = _plans.get(indptr, ids, student.shape[1])
        native.remapped_kl(student, teacher, spans, plan, logsumexp, temperature, scale, loss, total, given)
    return total, loss, grad


def _triton(student, teacher, spans, indptr, ids, scale, logsumexp, temperature, loss, grad, upstream, formed=None):
    plan = _gather_plans.get(indptr.cpu(), ids.cpu(), student.shape[1], student.device)
    return implementation("remapped_kl", "triton", "remapped_kl")(
        student, teacher, spans, plan, scale, logsumexp, temperature, loss, grad, upstream, formed
    )


def _again(student, teacher, spans, indptr, ids, scale, logsumexp, temperature, backend, grad, upstream, formed):
    _triton(student, teacher, spans, indptr, ids, scale, logsumexp, temperature, None, grad, upstream, formed)


def _fake(student, teacher, spans, indptr, ids, scale, logsumexp, temperature, backend, wanted, upstream=None):
    grad = student.new_empty(student.shape if wanted else 0)
    return scale.new_empty(()), torch.empty_like(scale), grad


_op = define(
    "remapped_kl(Tensor student, Tensor teacher, Tensor[] spans, Tensor indptr, Tensor ids, Tensor scale, "
    "bool logsumexp, float temperature, str backend, bool wanted, Tensor? upstream=None) -> (Tensor, Tensor, Tensor)",
    _impl,
    _fake,
)


@scalable
def remapped_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    table: RemapLike,
    *,
    pairs: SpanPairs | None = None,
    mask: Tensor | None = None,
    pair_weights: Tensor | None = None,
    combine: str = "sum",
    temperature: float = 1.0,
    student_shift: int = 0,
    teacher_shift: int = 0,
    reduction: str = "batchmean",
    scale: Scale = 1.0,
    backend: str | None = None,
) -> Tensor:
    """KL of the student from the teacher over all mapped teacher tokens ("reduce-map"); formulas in
    :func:`vocabdistil.reference.remapped_kl`.

    The student's logits are combined inside the kernel, on a CPU a row at a time, on a GPU in chunks of rows that take
    256 MiB; only their gradient is written, a gather over the transposed table, which is built when a table is first
    seen and kept for the next calls. A table is best kept in host memory, on a GPU too.

    Args:
        student_logits: ``[..., V_s]``, flattened to rows; float32, float64, bfloat16 or float16; any strides (one copy
            where the last dimension is not contiguous or the rows are not evenly spaced).
        teacher_logits: ``[..., V_t]``, at least as many columns as the table has rows. It gets no gradient.
        table: ``.indptr [rows + 1]`` and ``.ids [nnz]``, int32 or int64: a :class:`RemapTable`.
        pairs: span pairs over the flattened rows, whose logits are averaged; None for row i with row i.
        mask: bool or integers ``[...]``, one per row, beside no pairs: rows where it is 0 count for nothing.
        pair_weights: ``[P]``, what each pair (or row) counts; may require gradients.
        combine: ``"sum"`` or ``"logsumexp"`` of the student's logits of a row's pieces.
        temperature: ``T > 0``; divides the combined logits.
        student_shift, teacher_shift: as in :func:`vocabdistil.matched_kl`.
        reduction: ``"batchmean"`` (divided by the number of rows, or of pairs with both spans non-empty), ``"sum"``
            or ``"none"`` (``[P]``).
        scale: as in :func:`span_loss`.
        backend: ``"cpu"``, ``"triton"`` or ``"reference"``; None chooses by device.

    Returns:
        The loss, float32 (float64 if an input is float64): ``[]``, or ``[P]`` for ``reduction="none"``.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, value or device, named in the text; a table
            with ids outside the student's columns.
    """
    checks.check_columns(student_logits, "student_logits")
    checks.check_columns(teacher_logits, "teacher_logits")
    checks.check_sides(student_logits, "student_logits", teacher_logits, "teacher_logits")
    student, teacher = student_logits.flatten(0, -2), teacher_logits.detach().flatten(0, -2)
    shifts = student_shift, teacher_shift
    pairs = chosen_pairs(pairs, mask, pair_weights, student_logits, teacher_logits, "logits", shifts)
    checks.check_remap(table, student.shape[1], teacher.shape[1])
    checks.check_choice(combine, "combine", COMBINES)
    checks.check_temperature(temperature)
    checks.check_choice(reduction, "reduction", checks.REDUCTIONS)
    if pair_weights is not None and pair_weights.requires_grad:
        each = remapped_kl(
            student_logits, teacher_logits, table, pairs=pairs, combine=combine, temperature=temperature,
            reduction="none", backend=backend,
        )  # fmt: skip
        return scaled(reduce_pairs(each, None, pair_count(pairs, student), reduction, pair_weights), scale)
    choice = resolve("remapped_kl", student.device, backend)
    if choice == "reference":
        loss = reference_remapped_kl(
            student_logits, teacher_logits, table, pairs=pairs, pair_weights=pair_weights, combine=combine,
            temperature=temperature, reduction=reduction,
        )  # fmt: skip
        return scaled(loss, scale)
    dtype = native.accumulation_dtype(student.dtype, teacher.dtype)
    each = row_scale(pairs, student, reduction, dtype, scale, pair_weights)
    return RowLoss.apply(
        _op, _again if choice == "triton" else None, native_rows(student), native_rows(teacher), table.indptr,
        table.ids, each, (combine == "logsumexp", float(temperature), choice), reduction != "none",
        torch.is_grad_enabled() and student.requires_grad, *span_vectors(pairs),
    )  # fmt: skip
