"""CUDA graphs of what a test calls, and a whole step of training to make one of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import vocabdistil as vd
from tests.spans import make_pairs
from tests.vocabularies import make_matched


def capture(call: Callable[[], Any], warm: int = 3) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The graph of a call, and the results that its replays write; the call runs ``warm`` times before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


class TrainingStep(nn.Module):
    """A student of another vocabulary and width than its teacher, whose states and output layer are given; calling it
    is a step of training: forward, losses over aligned spans and over the matched vocabulary, backward, optimizer."""

    def __init__(self, device: str, dim: int = 64, teacher_dim: int = 96, columns: int = 120) -> None:
        super().__init__()
        torch.manual_seed(0)
        pairs, n_s, n_t = make_pairs(150, seed=0, gaps=True, empty=True)
        self.pairs, self.matched = pairs.to(device), make_matched(columns, 200, 100).to(device)
        self.embedding = nn.Embedding(columns, dim, device=device)
        layer = {"dim_feedforward": 2 * dim, "dropout": 0.0, "batch_first": True, "device": device}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(dim, 4, **layer) for _ in range(2))
        self.projection = nn.Linear(dim, teacher_dim, device=device)
        self.ids = torch.randint(columns, (1, n_s), device=device)
        self.teacher = torch.randn(1, n_t, teacher_dim, device=device)
        self.output = torch.randn(200, teacher_dim, device=device) / teacher_dim**0.5
        self.share = torch.tensor(0.3, device=device)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, capturable=device == "cuda")

    def new_batch(self, seed: int) -> None:
        """Other tokens and states where the last ones were."""
        generator = torch.Generator().manual_seed(seed)
        self.ids.copy_(torch.randint(len(self.embedding.weight), self.ids.shape, generator=generator))
        self.teacher.copy_(torch.randn(self.teacher.shape, generator=generator))

    def forward(self) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        hidden = self.embedding(self.ids)
        for layer in self.layers:
            hidden = layer(hidden)
        projection = {"weight": self.projection.weight, "bias": self.projection.bias}
        loss = vd.span_loss(hidden, self.teacher, self.pairs, **projection, scale=self.share)
        loss = loss + vd.contrastive(hidden, self.teacher, self.pairs, **projection, temperature=0.2)
        loss = loss + vd.linear_matched_kl(
            hidden, self.embedding.weight, self.teacher, self.output, self.matched, pairs=self.pairs, unmatched="rest"
        )
        loss.backward()
        self.optimizer.step()
        return loss.detach()
