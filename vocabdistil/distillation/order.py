"""The order in which a run reads its texts, found as far as it is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..core.seeds import mix_seed

__all__ = ["TrainingOrder"]

# Batches among which texts of similar length are brought together, and neighbouring texts that are shuffled at once: a
# permutation of these is 1 MiB.
_WINDOW, _SHARD = 32, 2**17


class TrainingOrder(Dataset):
    """A whole run's texts in the order in which they are read: one item per text and epoch.

    Every epoch is a permutation of its own, drawn from the seed and its number when it is reached: of shards of
    neighbouring texts, and then of the texts of each, so that no more than one shard's is held; up to 131,072 texts are
    one shard. Texts of similar length share a batch, drawn from windows of 32 batches, so that little padding is
    computed. As the order of the run is one sequence, continuing it means skipping items, at no cost; it can be sent to
    the workers of a data loader, if the texts can be.

    Args:
        texts: to train on; read one by one.
        batch_size: texts of a batch.
        steps: batches of the run.
        seed: of the order.
    """

    def __init__(self, texts: Sequence[str], batch_size: int, steps: int, seed: int) -> None:
        self.texts, self.batch_size, self.steps, self.seed = texts, batch_size, steps, seed
        shards = -(-len(texts) // _SHARD)
        # Where each of them begins, all about equally long, and where the last one ends.
        self._bounds = torch.arange(shards + 1) * len(texts) // max(shards, 1)
        # What was drawn last: the shards of an epoch, and the texts of one of them.
        self._epoch, self._order = -1, (self._bounds, self._bounds)
        self._held, self._places = (-1, -1), self._bounds
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
        lengths = torch.tensor([len(self.texts[i]) for i in part.tolist()])
        part = part[lengths.argsort(stable=True)].view(-1, self.batch_size)
        # Odd ones are for windows, even ones for epochs.
        return part[_permutation(len(part), mix_seed(self.seed, 2 * number + 1))].flatten().tolist()

    def _slice(self, start: int, end: int) -> Tensor:
        """From one place to another of all epochs, one after the other."""
        parts: list[Tensor] = []
        while start < end:
            epoch, place = divmod(start, len(self.texts))
            shards, ends = self._shards(epoch)
            turn = int(torch.searchsorted(ends, place, right=True))
            shard = self._shard(epoch, int(shards[turn]))
            # Counted from the end of the shard in this epoch.
            parts.append(shard[place - int(ends[turn]) + len(shard) :][: end - start])
            start += len(parts[-1])
        return torch.cat(parts)

    def _shards(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The shards as an epoch reads them, and where each of them then ends."""
        if epoch != self._epoch:
            order = _permutation(len(self._bounds) - 1, mix_seed(self.seed, 2 * epoch))
            self._epoch, self._order = epoch, (order, self._bounds.diff()[order].cumsum(0))
        return self._order

    def _shard(self, epoch: int, shard: int) -> Tensor:
        """The texts of a shard as an epoch reads them."""
        if (epoch, shard) != self._held:
            first, last = self._bounds[shard : shard + 2].tolist()
            seed = mix_seed(mix_seed(self.seed, 2 * epoch), shard + 1)
            self._held, self._places = (epoch, shard), first + _permutation(last - first, seed)
        return self._places


def _permutation(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
