"""The order in which a run reads its texts, found as far as it is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..core.seeds import mix_seed

__all__ = ["TrainingOrder"]

# Batches among which texts of similar length are brought together.
_WINDOW = 32


class TrainingOrder(Dataset):
    """A whole run's texts in the order in which they are read: one item per text and epoch.

    Every epoch is a permutation of its own, drawn from the seed and its number when it is reached. Texts of similar
    length share a batch, drawn from windows of 32 batches, so that little padding is computed. As the order of the run
    is one sequence, continuing it means skipping items, at no cost.

    Args:
        texts: to train on.
        batch_size: texts of a batch.
        steps: batches of the run.
        seed: of the order.
    """

    def __init__(self, texts: Sequence[str], batch_size: int, steps: int, seed: int) -> None:
        self.texts, self.batch_size, self.steps, self.seed = texts, batch_size, steps, seed
        self._lengths = torch.tensor([len(text) for text in texts])
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)
        self._window: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __getitem__(self, i: int) -> dict[str, str | int]:
        if not 0 <= i < len(self):
            raise IndexError(f"expected an item from 0 to {len(self) - 1}, got {i}")
        number, place = divmod(i, _WINDOW * self.batch_size)
        if number != self._window[0]:
            self._window = number, self._draw(number)
        return {"text": self.texts[self._window[1][place]], "number": i}

    def _draw(self, number: int) -> list[int]:
        """The texts of a window."""
        size = _WINDOW * self.batch_size
        part = self._slice(number * size, min((number + 1) * size, len(self)))
        part = part[self._lengths[part].argsort(stable=True)].view(-1, self.batch_size)
        # Odd ones are for windows, even ones for epochs.
        generator = torch.Generator().manual_seed(mix_seed(self.seed, 2 * number + 1))
        return part[torch.randperm(len(part), generator=generator)].flatten().tolist()

    def _slice(self, start: int, end: int) -> Tensor:
        """From one place to another of all epochs, one after the other."""
        parts: list[Tensor] = []
        while start < end:
            epoch, place = divmod(start, len(self.texts))
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(mix_seed(self.seed, 2 * epoch))
                self._epoch, self._permutation = epoch, torch.randperm(len(self.texts), generator=generator)
            parts.append(self._permutation[place : place + end - start])
            start += len(parts[-1])
        return torch.cat(parts)
