"""Texts as both sides read them, aligned: what :func:`align` and :class:`AlignmentCollator` return."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["AlignedBatch"]


class AlignedBatch(dict[str, Any]):
    """A ``dict`` whose items are attributes too, and go to a device, or into pinned memory, together; what is no
    tensor stays where it is.

    Attributes:
        teacher, student: ``input_ids`` and ``attention_mask``, int64 ``[B, L_t]`` and ``[B, L_s]``, to call a model
            with: ``model(**batch.student)``. Of a collator that masks, the student's have ``labels`` too.
        pairs: :class:`SpanPairs` over positions ``b * L + i`` of each side.
        coverage: how much of the batch the pairs cover; of :func:`align` alone.
        labels: those that the features of a collator brought, else those of the masked words, if there are either.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute or item {name!r}") from None

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> AlignedBatch:
        """The same batch on another device, span pairs included."""
        return self._each("to", device, non_blocking=non_blocking)

    def pin_memory(self) -> AlignedBatch:
        return self._each("pin_memory")

    def _each(self, method: str, *args: Any, **options: Any) -> AlignedBatch:
        return type(self)(
            {k: getattr(v, method)(*args, **options) if hasattr(v, method) else v for k, v in self.items()}
        )

    def get(self, key: str, default: Any = None) -> Any:
        """As of any ``dict``; but where there are no labels, what the student reads is in their place.

        A ``Trainer`` that evaluates asks in this way whether there is a loss, and calls the model by itself if not,
        which does not know what to do with two sides.
        """
        # No key of its own: it would be one more column of every batch, in the way of labels that features bring, and
        # ``label_names=["pairs"]``, the way that transformers has for this, takes tensors alone.
        if key not in self and "student" in self:
            if key == "labels":
                return self["student"]["input_ids"]
            if key == "return_loss":
                return True
        return super().get(key, default)
