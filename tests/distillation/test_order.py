"""The order in which a run reads its texts."""

from __future__ import annotations

from collections import Counter

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
