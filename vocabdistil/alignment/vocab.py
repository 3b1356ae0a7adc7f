"""The matched vocabulary: token strings that two vocabularies share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.values import check_int32, int_vector, kept
from .families import pairs_by_role
from .surfaces import Known, convention, ends_word, known, word_form

__all__ = ["MatchedVocab", "matched_ids"]


def _as_ids(value: Any, name: str) -> Tensor:
    tensor = int_vector(value, name)
    check_int32(tensor, name)
    tensor = kept(tensor.to(torch.int64).contiguous())
    values, counts = tensor.unique(return_counts=True)
    if values.numel() != tensor.numel():
        raise ValueError(f"{name}: expected each id once, got id {int(values[counts > 1][0])} repeatedly")
    return tensor


def matched_ids(source: Known, target: Known) -> Tensor:
    """int64 ``[V_m, 2]``: teacher and student id of each token that both have; found once."""
    found = source.matched.get(target)
    if found is None:
        found = source.matched[target] = _matched_ids(source, target)
    return found


def _matched_ids(source: Known, target: Known) -> Tensor:
    if convention(source) == convention(target):
        student_ids = target.info.ids()
        pairs = [
            (i, student_ids[token])
            for i, token in enumerate(source.info.tokens)
            if token is not None and token in student_ids
        ]
    else:
        pairs = _pairs_by_text(source, target)
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)


def _pairs_by_text(source: Known, target: Known) -> list[tuple[int, int]]:
    special: dict[int, int] = {}
    for i, j in pairs_by_role(source.info, target.info):
        if j not in special.values():
            special.setdefault(i, j)
    taken = set(special.values())
    for token, i in source.info.special.items():
        same = target.info.special.get(token)
        if i not in special and same is not None and same not in taken:
            special[i] = same
            taken.add(same)
    by_form: dict[tuple[bool, bytes], int] = {}
    apart, byte_tokens = set(target.info.special.values()), set(target.surfaces.byte_ids.values())
    # Where word ends are marked, tokens that have the mark are the words of others.
    for j in sorted(range(len(target.info.tokens)), key=lambda j: not ends_word(target, j)):
        form = word_form(target, j) if j not in apart else None
        # A byte token yields to a token of the same text that is not one.
        if form is not None and (form not in by_form or by_form[form] in byte_tokens):
            by_form[form] = j
    apart = set(source.info.special.values())
    pairs = list(special.items())
    bytes_last = set(source.surfaces.byte_ids.values())
    for i in sorted(range(len(source.info.tokens)), key=lambda i: (i in bytes_last, not ends_word(source, i))):
        form = word_form(source, i) if i not in apart else None
        if form in by_form:
            pairs.append((i, by_form.pop(form)))
    return sorted(pairs)


class MatchedVocab:
    """Token strings in both vocabularies, as two index vectors (arXiv 2205.02340).

    Args:
        teacher_ids, student_ids: ``[V_m]`` integers: entry k is the same token on both sides.

    Attributes:
        teacher_ids, student_ids: int64 ``[V_m]``.

    Raises:
        TypeError: ids that are not integers.
        ValueError: unequal lengths or devices, not one dimension, an id that is negative, repeated or does not fit
            32 bits, a tensor that is sparse, nested or on the meta device.
    """

    teacher_ids: Tensor
    student_ids: Tensor

    def __init__(self, teacher_ids: Any, student_ids: Any) -> None:
        self.teacher_ids = _as_ids(teacher_ids, "teacher_ids")
        self.student_ids = _as_ids(student_ids, "student_ids")
        if self.teacher_ids.shape != self.student_ids.shape:
            raise ValueError(
                f"student_ids: expected one id per teacher id ({self.teacher_ids.numel()}), "
                f"got {self.student_ids.numel()}"
            )
        if self.teacher_ids.device != self.student_ids.device:
            raise ValueError(
                f"student_ids: expected device {self.teacher_ids.device}, got {self.student_ids.device}"
            )
        self._slots: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_tokenizers(cls, teacher: Any, student: Any) -> MatchedVocab:
        """Every token of both, special tokens included, by ascending teacher id.

        Tokens are equal when their strings are. Between tokenizers that spell in different ways (``##ing``,
        ``Ġwalk``, ``▁walk``) they are equal when both stand for the same text and both or neither start a
        word; special tokens are then equal by role, else by string.

        Args:
            teacher, student: ``transformers`` fast tokenizers or ``tokenizers.Tokenizer``, or names of models or
                folders that have one.

        Raises:
            TypeError: not a fast tokenizer.
            VocabdistilError: no such tokenizer.
        """
        both = matched_ids(known(teacher, "teacher"), known(student, "student"))
        return cls(both[:, 0], both[:, 1])

    def __len__(self) -> int:
        return self.teacher_ids.numel()

    def __repr__(self) -> str:
        return f"MatchedVocab({len(self)} tokens, device={self.device})"

    @property
    def device(self) -> torch.device:
        return self.teacher_ids.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MatchedVocab:
        """The same vocabulary on another device (nothing is checked again)."""
        moved = object.__new__(type(self))
        moved.teacher_ids = kept(self.teacher_ids.to(device, non_blocking=non_blocking))
        moved.student_ids = kept(self.student_ids.to(device, non_blocking=non_blocking))
        moved._slots = self._slots
        return moved

    def slots(self) -> tuple[Tensor, Tensor]:
        """Per side, id -> index into this vocabulary or -1: int32 [largest id + 1], on the CPU."""
        if self._slots is None:
            index = torch.arange(len(self), dtype=torch.int32)
            sides = []
            for ids in (self.teacher_ids.cpu(), self.student_ids.cpu()):
                slots = torch.full((int(ids.max()) + 1 if len(self) else 0,), -1, dtype=torch.int32)
                slots[ids] = index
                sides.append(slots)
            self._slots = (sides[0], sides[1])
        return self._slots
