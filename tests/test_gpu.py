"""The GPU kernels against the float64 reference: needs a CUDA device."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd
from tests.spans import make_pairs
from tests.tolerances import assert_norm_close

pytestmark = pytest.mark.gpu


def run(x, start, end, upstream, backend, pooling="mean"):
    leaf = x.clone().requires_grad_()
    out = vd.span_mean(leaf, start, end, pooling=pooling, backend=backend)
    out.backward(upstream)
    return out.detach(), leaf.grad


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [1, 7, 264, 768, 1000, 4096])
@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_span_mean_against_float64(dim, dtype, backend, pooling):
    pairs, n, _ = make_pairs(700, seed=dim, gaps=True, empty=True)
    pairs = pairs.to("cuda")
    x = torch.randn(n, dim, device="cuda").to(dtype)
    upstream = torch.randn(700, dim, device="cuda").to(dtype)
    out, grad = run(x, pairs.student_start, pairs.student_end, upstream, backend, pooling)
    want, want_grad = run(
        x.double(), pairs.student_start, pairs.student_end, upstream.double(), "reference", pooling
    )
    assert_norm_close(out, want, dtype, "out")
    assert_norm_close(grad, want_grad, dtype, "gradient")


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_span_mean_on_another_stream_and_twice_the_same(backend):
    pairs, n, _ = make_pairs(3000, seed=1, gaps=True)
    pairs = pairs.to("cuda")
    x, upstream = torch.randn(n, 768, device="cuda"), torch.randn(3000, 768, device="cuda")
    first = run(x, pairs.student_start, pairs.student_end, upstream, backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = run(x, pairs.student_start, pairs.student_end, upstream, backend)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_span_mean_in_a_cuda_graph(backend):
    pairs, n, _ = make_pairs(100, seed=1)
    pairs = pairs.to("cuda")
    x = torch.randn(n, 264, device="cuda")
    for _ in range(3):
        vd.span_mean(x, pairs.student_start, pairs.student_end, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = vd.span_mean(x, pairs.student_start, pairs.student_end, backend=backend)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert_norm_close(
        out, vd.reference.span_mean(x.double(), pairs.student_start, pairs.student_end), torch.float32, "out"
    )
