"""The losses under DistributedDataParallel: two processes, each with its half of the batch."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import vocabdistil as vd
from tests.spans import make_pairs

WORLD = 2


class Student(nn.Module):
    """Two layers to be distilled and a projection to the teacher's width."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.projection = nn.Linear(8, 10)

    def forward(self, x, teacher, pairs):
        first = self.first(x)
        return vd.span_kl(
            [first, self.second(first)], teacher, pairs, weight=self.projection.weight, bias=self.projection.bias
        )


def part(rank):
    pairs, n_s, n_t = make_pairs(20, seed=rank, gaps=True)
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(n_s, 6, generator=generator), torch.randn(n_t, 10, generator=generator), pairs


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    model = nn.parallel.DistributedDataParallel(Student())
    model(*part(rank)).backward()
    torch.save(gradients(model), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    # DDP keeps the group's gloo threads alive beyond this line, and one that lets go of its last tensor while the
    # interpreter shuts down aborts the process: leave without shutting down.
    os._exit(0)


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo")
def test_gradients_are_those_of_the_whole_batch(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=WORLD)
    model = Student()
    sum(model(*part(rank)) / WORLD for rank in range(WORLD)).backward()
    for rank in range(WORLD):
        for got, want in zip(torch.load(tmp_path / f"{rank}.pt"), gradients(model), strict=True):
            assert want.any()
            torch.testing.assert_close(got, want)
