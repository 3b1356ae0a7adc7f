"""Aligned span pairs: which student tokens cover the same text as which teacher tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_choice, check_float, check_index, check_tensor, check_weight_dtype, dtype_name, kind_of
from ..core.values import INT32_MAX, Seen, check_dense, check_int32, int_vector, kept

__all__ = ["SpanPairs", "TEXT_POOLINGS", "text_pairs"]

TEXT_POOLINGS = ("mean", "cls", "lasttoken")

_FIELDS = ("student_start", "student_end", "teacher_start", "teacher_end")


def _as_positions(value: Any, name: str) -> Tensor:
    """int32 in memory of its own: nobody else writes to it."""
    positions = int_vector(value, name)
    # What is left unseen here, check_spans finds without one more wait for a device.
    if positions.dtype != torch.int32 and not torch.compiler.is_compiling():
        check_int32(positions, name)
    return positions.to(torch.int32, copy=True).contiguous()


def check_spans(start: Tensor, end: Tensor, prefix: str = "") -> int:
    """Raises unless the spans are non-negative, ascending and disjoint; returns the largest end (0 if none).

    Costs one host synchronisation for spans on a device: done once, when spans are built. In compiled code the values
    are left to the kernels, which look at them too, and the end that they need is taken for 0.
    """
    if start.shape != end.shape:
        raise ValueError(
            f"{prefix}start and {prefix}end: expected equal lengths, got {start.numel()} and {end.numel()}"
        )
    if start.device != end.device:
        raise ValueError(
            f"{prefix}start and {prefix}end: expected one device, got {start.device} and {end.device}"
        )
    if torch.compiler.is_compiling() or not start.numel():
        return 0
    negative = start < 0
    reversed_ = end < start
    overlap = start[1:] < end[:-1]
    flags = torch.stack([negative.any(), reversed_.any(), overlap.any()]).tolist()
    if flags[0]:
        p = int(negative.nonzero()[0])
        raise ValueError(f"{prefix}start: expected positions >= 0, got {int(start[p])} for pair {p}")
    if flags[1]:
        p = int(reversed_.nonzero()[0])
        raise ValueError(
            f"{prefix}end: expected end >= start, got span [{int(start[p])}, {int(end[p])}) for pair {p}"
        )
    if flags[2]:
        p = int(overlap.nonzero()[0])
        raise ValueError(
            f"{prefix}start: expected ascending spans that do not overlap, got [{int(start[p])}, {int(end[p])}) "
            f"and then [{int(start[p + 1])}, {int(end[p + 1])}) (pairs {p} and {p + 1})"
        )
    return int(end[-1])


def known_end(start: Tensor, end: Tensor) -> int | None:
    """The positions that these spans need, if they were found right before and have not been written to since."""
    known = getattr(start, "_vocabdistil_checked", None)
    return known[1] if known is not None and known[0].are(start, end) else None


def mark_checked(start: Tensor, end: Tensor, tokens: int) -> None:
    """Notes on the vectors that their spans are right and need ``tokens`` positions: looking again would cost a
    synchronisation."""
    start._vocabdistil_checked = (Seen(start, end), tokens)  # type: ignore[attr-defined]


def at_least_one(count: int | Tensor) -> int | Tensor:
    """``max(count, 1)``, on the device where the count lives there: nothing waits for it."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


class SpanPairs:
    """Pairs of aligned spans over flattened positions ``b * L + i``, half-open.

    They own their memory and stay as they were made; what is written into their tensors nevertheless, the losses find
    where they read it. In a compiled function (``torch.compile``) the values are not looked at when pairs are made.

    Args:
        student_start, student_end, teacher_start, teacher_end: ``[P]`` integers. The spans of each side are
            ascending and disjoint; a span may be empty (``start == end``): its mean is 0 and its pair counts
            for nothing.

    Attributes:
        student_start, student_end, teacher_start, teacher_end: int32 ``[P]``.
        num_nonempty: the number of pairs with both spans non-empty (the ``P`` of ``batchmean``): an int, or an
            int64 tensor ``[]`` where it was counted on a device and the host has not waited for it
            (:meth:`RemapTable.remap` there), or in a compiled function. The losses take either;
            ``int(pairs.num_nonempty)`` waits.
        student_tokens, teacher_tokens: the least number of tokens that a side must have: its largest end,
            or, if ``padded``, all tokens of the batch.
        padded: whether a side must have exactly so many: of pairs that :func:`align`, a collator or a remap table made,
            whose positions are those of the batch as it was padded there.

    Raises:
        TypeError: a field is not of an integer dtype.
        ValueError: unequal lengths or devices, a position that is negative or does not fit 32 bits, spans that overlap
            or descend, a tensor that is sparse, nested or on the meta device.
    """

    __slots__ = (*_FIELDS, "num_nonempty", "student_tokens", "teacher_tokens", "padded", "__weakref__")

    student_start: Tensor
    student_end: Tensor
    teacher_start: Tensor
    teacher_end: Tensor
    num_nonempty: int | Tensor
    student_tokens: int
    teacher_tokens: int
    padded: bool

    def __init__(
        self, student_start: Tensor, student_end: Tensor, teacher_start: Tensor, teacher_end: Tensor
    ) -> None:
        values = (student_start, student_end, teacher_start, teacher_end)
        fields = [_as_positions(value, name) for name, value in zip(_FIELDS, values, strict=True)]
        start_s, end_s, start_t, end_t = fields
        if start_s.shape != start_t.shape:
            raise ValueError(
                f"teacher_start: expected one span per student span ({start_s.numel()}), got {start_t.numel()}"
            )
        if start_s.device != start_t.device:
            raise ValueError(f"teacher_start: expected device {start_s.device}, got {start_t.device}")
        tokens = check_spans(start_s, end_s, "student_"), check_spans(start_t, end_t, "teacher_")
        count = ((end_s > start_s) & (end_t > start_t)).sum()
        self._fill(*fields, count if torch.compiler.is_compiling() else int(count), *tokens, False)

    @classmethod
    def _trusted(
        cls,
        spans: Iterable[Tensor],
        num_nonempty: int | Tensor,
        student_tokens: int,
        teacher_tokens: int,
        padded: bool = True,
    ) -> SpanPairs:
        """Wraps int32 vectors that are right by construction (native alignments), without checking them again: starts
        and ends of the student's spans, then of the teacher's."""
        self = cls.__new__(cls)
        self._fill(*spans, num_nonempty, student_tokens, teacher_tokens, padded)
        return self

    def _fill(self, *state: Any) -> None:
        for name, value in zip(self.__slots__[:-1], state, strict=True):
            object.__setattr__(self, name, kept(value) if isinstance(value, Tensor) else value)
        if not torch.compiler.is_compiling():  # so that span_mean need not look at these vectors again
            mark_checked(self.student_start, self.student_end, self.student_tokens)
            mark_checked(self.teacher_start, self.teacher_end, self.teacher_tokens)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name}: expected span pairs to stay as they were made, got an assignment")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{name}: expected span pairs to stay as they were made, got a deletion")

    def __len__(self) -> int:
        return self.student_start.numel()

    def __repr__(self) -> str:
        return f"SpanPairs({len(self)} pairs, device={self.device})"

    @property
    def device(self) -> torch.device:
        return self.student_start.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SpanPairs:
        """The same pairs on another device (nothing is checked again)."""
        moved = [getattr(self, name).to(device, non_blocking=non_blocking) for name in _FIELDS]
        count = self.num_nonempty
        if isinstance(count, Tensor):
            count = count.to(device, non_blocking=non_blocking)
        return self._trusted(moved, count, self.student_tokens, self.teacher_tokens, self.padded)

    def pin_memory(self) -> SpanPairs:
        pinned = [getattr(self, name).pin_memory() for name in _FIELDS]
        return self._trusted(pinned, self.num_nonempty, self.student_tokens, self.teacher_tokens, self.padded)

    def __getstate__(self) -> tuple:
        return tuple(getattr(self, name) for name in self.__slots__[:-1])

    def __setstate__(self, state: tuple) -> None:
        self._fill(*state)


def text_pairs(student_mask: Tensor, teacher_mask: Tensor, pooling: str = "mean") -> SpanPairs:
    """One pair per text: the tokens whose mean is the vector of the text, on each side.

    In host memory masks are looked at; on a device, and under ``torch.compile``, they are taken as right and the number
    of texts is counted there: nothing waits for it.

    Args:
        student_mask: bool or integers ``[B, L_s]``, 0 for padding, which may stand on either side of a text.
        teacher_mask: ``[B, L_t]``, the same for the teacher, on the same device.
        pooling: ``"mean"`` (all attended tokens), ``"cls"`` (the first of them) or ``"lasttoken"`` (the last).

    Returns:
        ``B`` pairs over positions ``b * L_s + i`` and ``b * L_t + j``, for :func:`span_loss` and others. A text without
        tokens has empty spans: it counts for nothing.

    Raises:
        TypeError: a mask that is no tensor of integers or bool.
        ValueError: another shape, device or number of texts, positions that do not fit 32 bits, a mask with gaps, an
            unknown pooling.
    """
    check_choice(pooling, "pooling", TEXT_POOLINGS)
    check_mask(student_mask, "student_mask")
    check_mask(teacher_mask, "teacher_mask")
    if teacher_mask.device != student_mask.device:
        raise ValueError(f"teacher_mask: expected device {student_mask.device}, got {teacher_mask.device}")
    if teacher_mask.shape[0] != student_mask.shape[0]:
        raise ValueError(f"teacher_mask: expected {student_mask.shape[0]} texts, got {teacher_mask.shape[0]}")
    seen = student_mask.device.type == "cpu" and not torch.compiler.is_compiling()
    student = text_spans(student_mask, "student_mask", pooling, seen)
    teacher = text_spans(teacher_mask, "teacher_mask", pooling, seen)
    count = ((student[1] > student[0]) & (teacher[1] > teacher[0])).sum()
    tokens = student_mask.numel(), teacher_mask.numel()
    return SpanPairs._trusted((*student, *teacher), int(count) if seen else count, *tokens)


def check_mask(mask: Tensor, name: str) -> None:
    check_tensor(mask, name)
    check_dense(mask, name)
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"{name}: expected bool or integers, got {dtype_name(mask.dtype)}")
    if mask.dim() != 2:
        raise ValueError(f"{name}: expected shape [B, L], got {tuple(mask.shape)}")
    if mask.numel() > INT32_MAX:
        raise ValueError(f"{name}: expected at most {INT32_MAX} tokens, got {tuple(mask.shape)}")


def text_spans(mask: Tensor, name: str, pooling: str, look: bool) -> tuple[Tensor, Tensor]:
    batch, length = mask.shape
    attended = mask != 0
    first = (attended.cumsum(1) == 0).sum(1)
    end = first + attended.sum(1)
    if look:
        at = torch.arange(length)
        gaps = (attended != ((at >= first[:, None]) & (at < end[:, None]))).any(1)
        if bool(gaps.any()):
            row = int(gaps.nonzero()[0])
            raise ValueError(f"{name}: expected attended tokens in one piece, got gaps between those of text {row}")
    if pooling == "cls":
        end = torch.minimum(first + 1, end)
    elif pooling == "lasttoken":
        first = torch.maximum(end - 1, first)
    before = length * torch.arange(batch, device=mask.device)
    return (before + first).to(torch.int32), (before + end).to(torch.int32)


def check_pairs(pairs: SpanPairs, student: Tensor, teacher: Tensor) -> None:
    """Span pairs on the device of the rows ``student [N_s, .]``, ``teacher [N_t, .]``, none past an end."""
    if not isinstance(pairs, SpanPairs):
        raise TypeError(f"pairs: expected SpanPairs, got {kind_of(pairs)}")
    if pairs.device != student.device:
        raise ValueError(f"pairs: expected device {student.device}, got {pairs.device}")
    for side, rows, tokens in (
        ("student", student.shape[0], pairs.student_tokens), ("teacher", teacher.shape[0], pairs.teacher_tokens),
    ):  # fmt: skip
        if tokens > rows:
            raise ValueError(f"pairs: expected {side} positions up to {rows}, got a span that ends at {tokens}")
        if pairs.padded and tokens != rows:  # positions of the same tokens are others in a batch of another length
            raise ValueError(
                f"pairs: expected the {side} rows of the batch that was aligned, {tokens} with its padding, got {rows}"
            )


def check_row_pairs(
    pairs: SpanPairs | None, student: Tensor, teacher: Tensor, student_name: str, teacher_name: str
) -> None:
    """Span pairs, or None for row i of the student with row i of the teacher."""
    if pairs is not None:
        check_pairs(pairs, student, teacher)
    elif student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"{student_name}: expected as many rows as {teacher_name} ({teacher.shape[0]}) as there are no "
            f"pairs, got {student.shape[0]}"
        )


def check_pair_weights(pair_weights: Tensor | None, count: int, student: Tensor) -> None:
    if pair_weights is None:
        return
    check_float(pair_weights, "pair_weights")
    check_weight_dtype(pair_weights, "pair_weights", student)
    if pair_weights.shape != (count,):
        raise ValueError(f"pair_weights: expected shape ({count},), got {tuple(pair_weights.shape)}")


def check_shift(shift: object, x: Tensor, side: str, name: str) -> None:
    """0, or 1 for rows of known texts."""
    if isinstance(shift, bool) or not isinstance(shift, int):
        raise TypeError(f"{side}_shift: expected 0 or 1, got {kind_of(shift)}")
    if shift not in (0, 1):
        raise ValueError(f"{side}_shift: expected 0 or 1, got {shift}")
    if shift and x.dim() != 3:
        raise ValueError(f"{side}_{name}: expected shape [B, L, .] beside {side}_shift=1, got {tuple(x.shape)}")


def _before(start: Tensor, end: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The spans one row earlier. Before the first row of a text there is none, so a span that begins there becomes
    empty; all stay ascending."""
    first = (start % length == 0) & (end > start)
    return tuple(torch.where(first, start, (at - 1).clamp(min=0)) for at in (start, end))  # type: ignore[return-value]


def shifted_pairs(pairs: SpanPairs, lengths: tuple[int, int], shifts: tuple[int, int]) -> SpanPairs:
    """The pairs at the rows that predict their tokens; where they are counted on a device nothing waits for it.

    Args:
        lengths: of a text on the student's and on the teacher's side, with its padding, which stands behind it.
        shifts: 0, or 1 for a side whose row i predicts token i + 1.
    """
    sides = [(pairs.student_start, pairs.student_end), (pairs.teacher_start, pairs.teacher_end)]
    for i, (length, shift) in enumerate(zip(lengths, shifts, strict=True)):
        if shift:
            sides[i] = _before(*sides[i], max(length, 1))
    (start_s, end_s), (start_t, end_t) = sides
    count = ((end_s > start_s) & (end_t > start_t)).sum()
    waits = pairs.device.type != "cpu" or torch.compiler.is_compiling()
    return SpanPairs._trusted(
        (start_s, end_s, start_t, end_t), count if waits else int(count), pairs.student_tokens, pairs.teacher_tokens,
        pairs.padded,
    )  # fmt: skip


def chosen_pairs(
    pairs: SpanPairs | None, mask: Tensor | None, pair_weights: Tensor | None, student: Tensor, teacher: Tensor,
    name: str, shifts: tuple[int, int] = (0, 0),
) -> SpanPairs | None:  # fmt: skip
    """The pairs of a loss over rows of ``student [..., V_s]`` and ``teacher [..., V_t]``, all arguments checked.

    Args:
        mask: bool or integers ``[...]`` beside no pairs: each row that it has is a pair, and the others are empty ones.
        name: ``logits`` or ``hidden``, as in the names of the arguments.
        shifts: ``student_shift`` and ``teacher_shift``: see :func:`shifted_pairs`.

    Returns:
        None for row i with row i.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, value or device.
    """
    for side, x, shift in (("student", student, shifts[0]), ("teacher", teacher, shifts[1])):
        check_shift(shift, x, side, name)
    rows_s, rows_t = student.flatten(0, -2), teacher.flatten(0, -2)
    check_row_pairs(pairs, rows_s, rows_t, f"student_{name}", f"teacher_{name}")
    if pairs is None and any(shifts) and student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student_{name}: expected texts of teacher_{name}'s length beside a shift, as there are no pairs: "
            f"{tuple(teacher.shape[:-1])}, got {tuple(student.shape[:-1])}"
        )
    if mask is not None:
        if pairs is not None:
            raise ValueError("mask: expected None beside pairs, got a tensor")
        check_tensor(mask, "mask")
        check_dense(mask, "mask")
        if mask.is_floating_point() or mask.is_complex():
            raise TypeError(f"mask: expected bool or integers, got {dtype_name(mask.dtype)}")
        if mask.device != student.device:
            raise ValueError(f"mask: expected device {student.device}, got {mask.device}")
        if mask.shape != student.shape[:-1]:
            raise ValueError(f"mask: expected shape {tuple(student.shape[:-1])}, got {tuple(mask.shape)}")
        chosen = mask.flatten() != 0
        start = torch.arange(len(chosen), dtype=torch.int32, device=mask.device)
        spans = start, start + chosen
        pairs = SpanPairs._trusted((*spans, *spans), chosen.sum(), len(chosen), len(chosen))
    elif pairs is None and any(shifts):
        start = torch.arange(len(rows_s), dtype=torch.int32, device=student.device)
        spans = start, start + 1
        pairs = SpanPairs._trusted((*spans, *spans), len(start), len(start), len(start))
    check_pair_weights(pair_weights, rows_s.shape[0] if pairs is None else len(pairs), student)
    if pairs is None or not any(shifts):
        return pairs
    return shifted_pairs(pairs, (student.shape[-2], teacher.shape[-2]), shifts)


def check_span_vectors(start: Tensor, end: Tensor, num_tokens: int, device: torch.device) -> None:
    """Two int32 or int64 vectors of equal length on ``device``: ascending, disjoint, within the tokens.

    The values are looked at outside compilation, the first time that a pair of vectors is seen: on a device that
    costs one synchronisation.
    """
    for name, value in (("start", start), ("end", end)):
        check_index(value, name)
        if value.device != device:
            raise ValueError(f"{name}: expected device {device}, got {value.device}")
    if start.dtype != end.dtype:
        raise TypeError(f"end: expected dtype {dtype_name(start.dtype)} as start, got {dtype_name(end.dtype)}")
    if start.shape != end.shape:
        raise ValueError(f"end: expected as many positions as start ({start.numel()}), got {end.numel()}")
    if torch.compiler.is_compiling() or device.type == "meta":
        return
    tokens = known_end(start, end)
    if tokens is None:
        tokens = check_spans(start, end)
        mark_checked(start, end, tokens)
    if tokens > num_tokens:
        raise ValueError(f"end: expected positions up to {num_tokens}, got {tokens}")
