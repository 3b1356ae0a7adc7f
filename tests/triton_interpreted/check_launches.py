"""Every launch goes to the device of its tensors, whichever is the current one."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections import Counter

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

import vocabdistil as vd
from benchmarks.launches import launch
from benchmarks.smoke import calls
from vocabdistil import triton_kernels

CPU = torch.device("cpu")
MODULES = [
    importlib.import_module(f"vocabdistil.triton_kernels.{found.name}")
    for found in pkgutil.iter_modules(triton_kernels.__path__)
]


@pytest.fixture
def launches(monkeypatch):
    """How often each kernel was launched where ``on_device`` held, and where it did not."""
    held, found = [], {True: Counter(), False: Counter()}
    run = InterpretedFunction.run

    @contextlib.contextmanager
    def on_device(x):
        held.append(x)
        yield
        held.pop()

    def counted(kernel, *args, **options):
        found[bool(held)][kernel.fn.__qualname__, kernel.fn.__module__.rpartition(".")[2]] += 1
        return run(kernel, *args, **options)

    for module in MODULES:
        if hasattr(module, "on_device"):
            monkeypatch.setattr(module, "on_device", on_device)
    monkeypatch.setattr(InterpretedFunction, "run", counted)
    return found


def small(call):
    return call.operation != "span_loss" or call.name.startswith("kl 264")


@pytest.mark.parametrize("top_k", [None, 3])
def test_remapped_kl_is_one_launch_in_each_direction(launches, top_k):
    table = vd.RemapTable(torch.arange(61), torch.arange(60) % 50, student_vocab_size=50, unk_id=1, pad_id=0)
    leaf = torch.randn(40, 50, requires_grad=True)
    loss = 3 * vd.remapped_kl(leaf, torch.randn(40, 60), table, top_k=top_k, backend="triton")
    assert launches[True]["kernel", "remapped_kl"] == 1
    loss.backward()
    assert launches[True]["kernel", "remapped_kl"] == 2


@pytest.mark.parametrize("chunks", [1, 3])
def test_contrastive_is_one_launch_for_a_chunk_of_pairs(launches, chunks, monkeypatch):
    monkeypatch.setattr(importlib.import_module("vocabdistil.ops.contrastive"), "GPU_BUDGET", 4 * 48 * 48 // chunks)
    start = torch.arange(48, dtype=torch.int32)
    leaf = torch.randn(48, 8, requires_grad=True)
    (3 * vd.contrastive(leaf, torch.randn(48, 8), vd.SpanPairs(*[start, start + 1] * 2), backend="triton")).backward()
    assert launches[True]["kernel", "contrastive"] == chunks


def test_on_the_device_of_their_tensors(launches):
    for call in filter(small, calls(CPU)):
        launch(call, "triton")
    hidden = next(calls(CPU)).leaves[0]
    layers = [hidden.float().clone().requires_grad_() for _ in range(2)]
    spans = torch.arange(4, dtype=torch.int32)
    same = vd.SpanPairs(spans, spans + 1, spans, spans + 1)
    vd.span_loss(layers, [x.detach() for x in layers], same, backend="triton").backward()
    table = vd.RemapTable(torch.arange(61), torch.arange(60) % 50, student_vocab_size=50, unk_id=1, pad_id=0)
    table.remap(torch.arange(60).view(2, 30), backend="triton")
    assert not launches[False]
    kernels = {
        (name, module.__name__.rpartition(".")[2])
        for module in MODULES
        for name, kernel in vars(module).items()
        if isinstance(kernel, InterpretedFunction) and kernel.fn.__module__ == module.__name__ and "kernel" in name
    }
    assert launches[True].keys() == kernels
