"""The order in which a run reads its texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from vocabdistil.distillation import order
from vocabdistil.distillation.order import TrainingOrder

TEXTS = [f"{'x' * (i * 7 % 23)} {i}" for i in range(50)]


def read(found, start=0, end=None):
    return [found[i]["text"] for i in range(start, len(found) if end is None else end)]


def test_every_epoch_has_every_text_once():
    # One window is one epoch.
    texts, size = TEXTS[:32], 1
    found = TrainingOrder(texts, size, 32 * 5, seed=3)
    epochs = [read(found, e * 32, (e + 1) * 32) for e in range(5)]
    assert all(Counter(epoch) == Counter(texts) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


@pytest.mark.parametrize(("count", "batch_size", "steps"), [(50, 4, 100), (3, 8, 70), (1, 2, 5), (50, 64, 3)])
def test_texts_are_read_equally_often(count, batch_size, steps):
    found = read(TrainingOrder(TEXTS[:count], batch_size, steps, seed=0))
    assert len(found) == steps * batch_size
    counts = Counter(found)
    assert max(counts.values()) - min(counts[text] for text in TEXTS[:count]) <= 1


def test_texts_of_a_batch_are_of_similar_length():
    found = read(TrainingOrder(TEXTS, 4, 32, seed=1))
    spread = [max(map(len, found[i : i + 4])) - min(map(len, found[i : i + 4])) for i in range(0, len(found), 4)]
    assert max(spread) <= 3  # of 23: 128 texts of 23 lengths, sorted


def test_the_order_depends_on_seed_and_place_alone():
    first, other = (TrainingOrder(TEXTS, 4, 200, seed=seed) for seed in (5, 6))
    whole = read(first)
    assert whole != read(other)
    again = TrainingOrder(TEXTS, 4, 200, seed=5)
    assert read(again, 400) == whole[400:] and read(again, 0, 300) == whole[:300]
    assert [again[i]["text"] for i in (799, 3, 500, 3)] == [whole[i] for i in (799, 3, 500, 3)]
    # A longer run begins alike, up to the window in which the shorter one ends.
    assert read(TrainingOrder(TEXTS, 4, 300, seed=5), 0, 768) == whole[:768]
    for i in (-1, 800):
        with pytest.raises(IndexError):
            again[i]


def test_a_long_run_is_planned_no_further_than_it_is_read(monkeypatch):
    drawn = []
    randperm = torch.randperm

    def watched(count, **kwargs):
        drawn.append(count)
        return randperm(count, **kwargs)

    monkeypatch.setattr(order.torch, "randperm", watched)
    found = TrainingOrder(TEXTS, 4096, 10**6, seed=0)
    assert len(found) == 4096 * 10**6 and drawn == []
    tail = TrainingOrder(TEXTS, 2, 10**9, seed=0)
    assert tail[2 * 10**9 - 1]["text"] in TEXTS and sum(drawn) <= 32 + 3 * 50


@pytest.mark.parametrize("count", [1, 7, 16, 17, 50, 64])
def test_shards_are_shuffled_and_so_are_the_texts_of_each(monkeypatch, count):
    monkeypatch.setattr(order, "_SHARD", 16)
    texts = TEXTS[:count] + [f"more {i}" for i in range(count - len(TEXTS))]
    found, shards = TrainingOrder(texts, 1, count * 6, seed=3), -(-count // 16)
    epochs = [found._slice(e * count, (e + 1) * count).tolist() for e in range(6)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    bounds = [count * s // shards for s in range(shards + 1)]
    orders = set()
    for epoch in epochs:
        turns = []
        while epoch:
            shard = next(s for s in range(shards) if epoch[0] < bounds[s + 1])
            part = range(bounds[shard], bounds[shard + 1])
            assert sorted(epoch[: len(part)]) == list(part)
            turns.append(shard)
            epoch = epoch[len(part) :]
        assert sorted(turns) == list(range(shards))
        orders.add(tuple(turns))
    assert len(orders) > 1 or shards == 1
    # From any place on as if it had been read from the first.
    whole = read(found)
    again = TrainingOrder(texts, 1, count * 6, seed=3)
    assert [again[i]["text"] for i in range(len(whole) - 1, -1, -1)] == whole[::-1]
    assert Counter(whole) == Counter(texts * 6)


def test_no_more_than_a_shard_is_held(monkeypatch):
    """However many texts there are, and however far the run has come."""

    class Many(Sequence):
        def __len__(self):
            return 10**7

        def __getitem__(self, i):
            return str(i)

    drawn = []
    permutation = order._permutation
    monkeypatch.setattr(order, "_permutation", lambda count, seed: drawn.append(count) or permutation(count, seed))
    monkeypatch.setattr(order, "_SHARD", 1000)
    found = TrainingOrder(Many(), 2, 10**8, seed=0)
    assert len(found) == 2 * 10**8 and drawn == []
    found[10**8 + 5]
    # The order of the shards, one or two of them, and a window.
    assert sum(drawn) <= 10**4 + 2 * 1000 + 32
