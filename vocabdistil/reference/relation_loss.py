"""Relations between the tokens of a text: what each head sees of them, student against teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vocabdistil.alignment.spans import SpanPairs, check_pairs
from vocabdistil.core import checks
from vocabdistil.reference._common import kl_rows, log_softmax, pool_pairs, reduce_pairs, upcast, valid_pairs

Kinds = Tensor | Sequence[Tensor]


def relation_loss(
    student: Kinds,
    teacher: Kinds,
    pairs: SpanPairs,
    *,
    heads: int,
    reduction: str = "batchmean",
    backend: str | None = None,
) -> Tensor:
    """KL between the self-attention relations of the teacher and of the student, over aligned spans.

    ``s_i`` and ``t_i`` are the means of the states over the spans of pair i, cut into ``heads`` heads of width
    ``d_s = D_s / heads`` and ``d_t = D_t / heads``. In each head, with j over the pairs of the text of pair i (itself
    too)::

        q_i = softmax_j(<t_i, t_j> / sqrt(d_t))
        r_i = softmax_j(<s_i, s_j> / sqrt(d_s))
        l_i = mean over the heads of KL(q_i || r_i)

    Of several kinds (queries, keys and values) ``l_i`` is the mean. Pairs with an empty span have loss 0 and are no
    one's j; a pair alone in its text has loss 0. The sides may differ in width, so no projection is needed. No gradient
    reaches the teacher.

    Source: Wang et al., MiniLMv2, arXiv 2012.15828 (query-query, key-key and value-value relations of one layer,
    regrouped to the same number of relation heads), there over the tokens of one vocabulary.

    Args:
        student: ``[B, L_s, D_s]``, the states of one kind with the heads side by side, or a list of such tensors, one
            per kind, whose widths may differ; float32, float64, bfloat16 or float16.
        teacher: ``[B, L_t, D_t]``, or as many such tensors, on the student's device.
        pairs: P span pairs over the flattened positions; the spans of a pair lie in one text, the same on both sides
            (looked at only in host memory).
        heads: how many heads the states are cut into, whatever number the models have; divides every width.
        reduction: ``"batchmean"`` (mean over the pairs with both spans non-empty), ``"sum"`` or ``"none"``.
        backend: None or ``"reference"``.

    Returns:
        A scalar, or ``[P]`` for ``"none"``; float64 for float64 inputs, else float32.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: wrong shapes, names or devices, a width that ``heads`` does not divide, pairs past the end of a
            side or across texts.
    """
    checks.check_reference_backend(backend)
    students, teachers = check_relation_arguments(student, teacher, pairs, heads, reduction)
    batch, length = students[0].shape[0], min(students[0].shape[1], teachers[0].shape[1])
    valid = valid_pairs(pairs)
    place = _places(pairs, valid, students[0].shape[1], batch, length)
    there = torch.zeros(batch * length + 1, dtype=torch.bool, device=place.device)
    there = there.index_fill(0, place, True)[:-1].view(batch, 1, 1, length)

    def log_relations(rows: Tensor) -> Tensor:
        """[P, D] -> [B, heads, L, L], -inf where no pair lies."""
        width = rows.shape[1]
        grid = rows.new_zeros(batch * length + 1, width).index_copy(0, place, rows)[:-1]
        grid = grid.view(batch, length, heads, width // heads).transpose(1, 2)
        with torch.autocast(rows.device.type, enabled=False):
            scores = grid @ grid.transpose(2, 3) / (width // heads) ** 0.5
        return log_softmax(scores.masked_fill(~there, float("-inf")), 1.0)

    total = torch.zeros((), device=place.device)
    for s, t in zip(students, teachers, strict=True):
        s, t, _ = pool_pairs(upcast(s.flatten(0, 1)), upcast(t.flatten(0, 1)), pairs, "mean")
        losses = kl_rows(log_relations(t), log_relations(s)).mean(1).flatten()
        loss = torch.cat([losses, losses.new_zeros(1)])[place]
        total = total + loss
    return reduce_pairs(total / len(students), valid, pairs.num_nonempty, reduction)


def text_of(pairs: SpanPairs, length: int) -> tuple[Tensor, Tensor]:
    """int32 ``[P]`` twice: where the pairs of each pair's text begin and end among all; length: tokens of a text."""
    text = pairs.student_start // max(length, 1)  # ascending, that of empty spans too
    first, last = (torch.searchsorted(text, text, right=right, out_int32=True) for right in (False, True))
    return first, last


def _places(pairs: SpanPairs, valid: Tensor | None, tokens: int, batch: int, length: int) -> Tensor:
    """``[P]`` int64: where each pair lies in a grid of ``batch`` texts of ``length`` pairs; behind it, if it counts for
    nothing. Without a look at the values, for which the host would wait."""
    first, _ = text_of(pairs, tokens)
    text = pairs.student_start.to(torch.int64) // max(tokens, 1)
    if valid is None:
        return text * length + torch.arange(len(pairs), device=first.device) - first
    before = valid.cumsum(0) - valid.long()  # of the pairs that count
    return torch.where(valid, text * length + before - before[first], batch * length)


def check_relation_arguments(
    student: Kinds, teacher: Kinds, pairs: SpanPairs, heads: int, reduction: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the kinds of both sides, the teacher's detached."""
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise TypeError(f"heads: expected an integer, got {checks.kind_of(heads)}")
    if heads < 1:
        raise ValueError(f"heads: expected a number >= 1, got {heads}")
    students, teachers = _check_kinds(student, "student", heads), _check_kinds(teacher, "teacher", heads)
    if len(students) != len(teachers):
        raise ValueError(f"teacher: expected as many kinds as student ({len(students)}), got {len(teachers)}")
    s, t = students[0], teachers[0]
    checks.check_sides(s, "student", t, "teacher")
    if s.shape[0] != t.shape[0]:
        raise ValueError(f"teacher: expected as many texts as student ({s.shape[0]}), got {t.shape[0]}")
    check_pairs(pairs, s.flatten(0, 1), t.flatten(0, 1))
    checks.check_choice(reduction, "reduction", checks.REDUCTIONS)
    _check_texts(pairs, s.shape[1], t.shape[1])
    return students, [x.detach() for x in teachers]


def _check_kinds(value: object, side: str, heads: int) -> list[Tensor]:
    kinds = [value] if isinstance(value, Tensor) else value
    if not isinstance(kinds, (list, tuple)):
        raise TypeError(f"{side}: expected a tensor or a list of tensors, got {checks.kind_of(value)}")
    if not kinds:
        raise ValueError(f"{side}: expected at least one kind, got an empty list")
    for i, x in enumerate(kinds):
        name = f"{side}[{i}]" if len(kinds) > 1 else side
        checks.check_float(x, name, dims=(3,))
        if not x.shape[2] or x.shape[2] % heads:
            raise ValueError(f"{name}: expected a width that heads ({heads}) divides, got shape {tuple(x.shape)}")
        checks.check_same_kind(kinds[0], f"{side}[0]", x, name)
        if x.shape[:2] != kinds[0].shape[:2]:
            texts, tokens = kinds[0].shape[:2]
            raise ValueError(
                f"{name}: expected shape ({texts}, {tokens}, any) as {side}[0], got {tuple(x.shape)}"
            )
    return list(kinds)


def _check_texts(pairs: SpanPairs, student_length: int, teacher_length: int) -> None:
    """Each pair in one text, the same on both sides; looked at only in host memory and outside compilation."""
    if torch.compiler.is_compiling() or pairs.device.type != "cpu" or not len(pairs):
        return
    s, t = max(student_length, 1), max(teacher_length, 1)
    text = pairs.student_start // s
    apart = text != (pairs.student_end - 1) // s
    for position in (pairs.teacher_start, pairs.teacher_end - 1):
        apart |= text != position // t
    if (valid := valid_pairs(pairs)) is not None:
        apart &= valid
    if bool(apart.any()):
        p = int(apart.nonzero()[0])
        sides = (
            f"{name} [{int(start[p])}, {int(end[p])}) of texts of {length} tokens"
            for name, start, end, length in (
                ("student", pairs.student_start, pairs.student_end, student_length),
                ("teacher", pairs.teacher_start, pairs.teacher_end, teacher_length),
            )
        )
        raise ValueError(f"pairs: expected spans in one text, the same on both sides, got {', '.join(sides)}")
