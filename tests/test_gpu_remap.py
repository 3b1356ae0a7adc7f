"""Remap on the GPU against the native code on the CPU, and the losses on what it returns: needs a CUDA device."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd
from tests.graphs import capture
from tests.remap_backend import *  # noqa: F403
from tests.remap_backend import make_batch, make_table
from tests.tolerances import assert_norm_close
from tests.vocabularies import make_matched
from vocabdistil.alignment.remap import RemapTable

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton", "torch"])
def backend(request):
    return request.param


@pytest.fixture
def device():
    return "cuda"


def tensors(out):
    pairs = out.pairs
    return [
        out.input_ids, out.attention_mask, pairs.student_start, pairs.student_end, pairs.teacher_start,
        pairs.teacher_end, torch.as_tensor(pairs.num_nonempty),
    ]  # fmt: skip


def test_the_host_never_waits(backend):
    table = make_table()
    ids, mask = (x.cuda() for x in make_batch(table, 64, 300, "padding"))
    first = table.remap(ids, mask, 400, backend)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        second = table.remap(ids, mask, 400, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(tensors(first), tensors(second), strict=True):
        assert torch.equal(a, b)


def test_in_a_cuda_graph(backend):
    table = make_table(empty=True)
    ids, mask = (x.cuda() for x in make_batch(table, 64, 300, "holes"))
    graph, captured = capture(lambda: table.remap(ids, mask, 400, backend))
    ids.copy_(make_batch(table, 64, 300, "holes", seed=1)[0])
    graph.replay()
    for a, b in zip(tensors(captured), tensors(table.remap(ids, mask, 400, backend)), strict=True):
        assert torch.equal(a, b)


def test_on_another_stream(backend):
    table = make_table()
    ids, mask = (x.cuda() for x in make_batch(table, 500, 512, "padding"))
    first = table.remap(ids, mask, 700, backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = ids + 0  # ready only after the sleep
        second = table.remap(late, mask, 700, backend)
    stream.synchronize()
    for a, b in zip(tensors(first), tensors(second), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("batch", "length"), [(2048, 512), (8, 100_000), (1, 1_000_000)])
@pytest.mark.parametrize("mask", ["none", "holes"])
def test_a_million_tokens(batch, length, mask, backend):
    table = make_table(5000, empty=True)
    ids, keep = make_batch(table, batch, length, mask)
    got = table.remap(ids.cuda(), None if keep is None else keep.cuda(), backend=backend)
    for a, b in zip(tensors(got), tensors(table.remap(ids, keep)), strict=True):
        assert torch.equal(a.cpu(), b)


def test_the_losses_take_it_without_waiting():
    table = make_table(40, empty=True)
    ids, mask = make_batch(table, 6, 30, "padding", seed=3)
    matched = make_matched(99, 40, 30)
    matched = vd.MatchedVocab(matched.teacher_ids.cuda(), matched.student_ids.cuda())
    exact = table.remap(ids, mask)
    student, teacher = (torch.randn(6, n, 32, device="cuda") for n in (100, 30))
    logits_s, logits_t = (torch.randn(6, n, v, device="cuda") for n, v in ((100, 99), (30, 40)))
    weight_s, weight_t = (torch.randn(n, 32, device="cuda") for n in (99, 40))
    leaves = [x.requires_grad_() for x in (student, logits_s, weight_s)]

    def losses(pairs, cut):
        s, z = student[:, :cut], logits_s[:, :cut]
        return [
            vd.span_kl(s, teacher, pairs),
            vd.span_loss(s, teacher, pairs, divergence="mse", pair_weights=torch.ones(len(pairs), device="cuda")),
            vd.matched_kl(z, logits_t, matched, pairs=pairs),
            vd.linear_matched_kl(s, weight_s, teacher, weight_t, matched, pairs=pairs),
            vd.contrastive(s, teacher, pairs),
        ]

    def step(pairs, cut):
        values = losses(pairs, cut)
        return values + list(torch.autograd.grad(sum(values), leaves))

    want = step(exact.pairs.to("cuda"), exact.input_ids.shape[1])
    ids, mask = ids.cuda(), mask.cuda()
    step(table.remap(ids, mask, 100).pairs, 100)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        got = step(table.remap(ids, mask, 100).pairs, 100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(got, want, strict=True):
        assert_norm_close(a, b.double(), torch.float32, "value", 4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_on_the_second_device(backend):
    table = make_table()
    ids, mask = make_batch(table, 5, 70, "padding")
    got = table.remap(ids.to("cuda:1"), mask.to("cuda:1"), 100, backend)
    assert got.input_ids.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    for a, b in zip(tensors(got), tensors(table.remap(ids.cuda(), mask.cuda(), 100, backend)), strict=True):
        assert torch.equal(a.cpu(), b.cpu())


def test_without_a_backend_a_kernel_runs(backend):
    table = make_table()
    ids, _ = make_batch(table, 5, 70, "none")
    for a, b in zip(tensors(table.remap(ids.cuda())), tensors(table.remap(ids.cuda(), backend=backend)), strict=True):
        assert torch.equal(a, b)


def test_a_table_used_by_the_device_is_still_a_table(tmp_path):
    table = make_table()
    table.remap(make_batch(table, 2, 3, "none")[0].cuda())
    table.save(tmp_path / "table")
    assert RemapTable.load(tmp_path / "table") == table
