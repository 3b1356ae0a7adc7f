"""KL over a matched vocabulary by both GPU backends, at sizes that the other tiers are too slow for: needs a CUDA
device."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd
from tests.graphs import capture
from tests.matched_kl_backend import *  # noqa: F403
from tests.matched_kl_backend import UNMATCHED, compare, run
from tests.spans import make_pairs
from tests.vocabularies import make_matched

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    return request.param


@pytest.fixture
def device():
    return "cuda"


def logits(rows, columns, dtype=torch.float32, seed=0):
    return torch.randn(rows, columns, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("unmatched", UNMATCHED)
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("v_s", "v_t", "v_m"), [(5031, 20000, 4700), (5000, 20000, 4700), (60000, 70000, 50000)])
def test_large_vocabularies(v_s, v_t, v_m, paired, unmatched, dtype, backend, device):
    if dtype == torch.float64 and backend == "cuda":
        pytest.skip("it takes no float64")
    pairs, n_s, n_t = make_pairs(100, seed=3, gaps=True, empty=True)
    pairs, n_s, n_t = (pairs, n_s, n_t) if paired else (None, 100, 100)
    student, teacher, matched = logits(n_s, v_s, dtype), logits(n_t, v_t, dtype, 1), make_matched(v_s, v_t, v_m)
    compare(student, teacher, matched, backend, device, pairs=pairs, unmatched=unmatched, temperature=1.7)
    options = {"unmatched": unmatched, "backend": backend, "pairs": None if pairs is None else pairs.to(device)}
    first, second = (run(vd, student, teacher, matched.to(device), **options) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_upstream_gradient_is_folded_in_on_the_device(backend):
    """Neither waits for the device: a capture would fail, and so would a look at the value."""
    matched, student, teacher = make_matched(5031, 20000, 4700).to("cuda"), logits(200, 5031), logits(200, 20000)
    student, teacher, grads = student.half(), teacher.half(), []
    for upstream in (1.0, 4.0, 4.0):
        leaf, given = student.clone().requires_grad_(), torch.full((), upstream, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            vd.matched_kl(leaf, teacher, matched, backend=backend).backward(given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        grads.append(leaf.grad)
    torch.testing.assert_close(4 * grads[0], grads[1])
    assert torch.equal(grads[1], grads[2])


@pytest.mark.parametrize("unmatched", ["renormalize", "rest"])
def test_equal_sides_are_zero_apart(unmatched, backend):
    x, ids = logits(200, 5031), torch.randperm(5031)[:4000].sort().values.cuda()
    options = {"unmatched": unmatched, "temperature": 1.3, "backend": backend}
    loss, grad = run(vd, x, x, vd.MatchedVocab(ids, ids), **options)
    assert loss.item() == 0 and torch.count_nonzero(grad) == 0


@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_in_a_cuda_graph(unmatched, backend):
    """Tables of the ids are made in the capture, too."""
    matched, teacher = make_matched(503, 700, 470).to("cuda"), logits(64, 700, seed=1)
    student = logits(64, 503).requires_grad_()

    def step():
        loss = vd.matched_kl(student, teacher, matched, unmatched=unmatched, backend=backend) * 2
        return loss, *torch.autograd.grad(loss, student)

    graph, captured = capture(step)
    with torch.no_grad():
        student.copy_(torch.randn_like(student))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


def test_on_another_stream(backend):
    matched, student, teacher = make_matched(503, 700, 470).to("cuda"), logits(4000, 503), logits(4000, 700, seed=1)
    first = run(vd, student, teacher, matched, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = student + 0  # ready only after the sleep: a launch on any other stream reads what is not there yet
        second = run(vd, late, teacher, matched, backend=backend)
    stream.synchronize()
    assert all(map(torch.equal, first, second))
