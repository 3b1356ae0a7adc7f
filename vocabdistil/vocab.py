"""The matched vocabulary: token strings that two vocabularies share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._tokenizers import read_tokenizer

__all__ = ["MatchedVocab"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _as_ids(value: Any, name: str) -> Tensor:
    tensor = torch.as_tensor(value)
    if not isinstance(value, Tensor) and not tensor.numel():
        tensor = tensor.to(torch.int64)
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected integer token ids, got {tensor.dtype}")
    if tensor.dim() != 1:
        raise ValueError(f"{name}: expected a vector of token ids, got shape {tuple(tensor.shape)}")
    tensor = tensor.to(torch.int64).contiguous()
    if tensor.numel():
        low = int(tensor.min())
        if low < 0:
            raise ValueError(f"{name}: expected ids >= 0, got {low}")
        values, counts = tensor.unique(return_counts=True)
        if values.numel() != tensor.numel():
            raise ValueError(f"{name}: expected each id once, got id {int(values[counts > 1][0])} repeatedly")
    return tensor


class MatchedVocab:
    """Token strings in both vocabularies, as two index vectors (arXiv 2205.02340).

    Args:
        teacher_ids, student_ids: ``[V_m]`` integers: entry k is the same token on both sides.

    Attributes:
        teacher_ids, student_ids: int64 ``[V_m]``.

    Raises:
        TypeError: ids that are not integers.
        ValueError: unequal lengths or devices, more than one dimension, a negative or a repeated id.
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
        """Every string that is a token of both, special tokens included, by ascending teacher id.

        Args:
            teacher, student: ``transformers`` fast tokenizers or ``tokenizers.Tokenizer``.

        Raises:
            TypeError: not a fast tokenizer.
        """
        student_ids = read_tokenizer(student, "student").ids()
        pairs = [
            (i, student_ids[token])
            for i, token in enumerate(read_tokenizer(teacher, "teacher").tokens)
            if token is not None and token in student_ids
        ]
        both = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
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
        moved.teacher_ids = self.teacher_ids.to(device, non_blocking=non_blocking)
        moved.student_ids = self.student_ids.to(device, non_blocking=non_blocking)
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
