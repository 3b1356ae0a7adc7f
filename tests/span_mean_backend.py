"""What span_mean must do in every GPU backend, against the float64 reference. A tier imports these tests and says by
its fixtures which ``backend`` runs on which ``device``."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd
from tests.spans import make_pairs
from tests.tolerances import assert_norm_close
from vocabdistil.core import dispatch
from vocabdistil.ops.span_mean import pooled_rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [1, 7, 264, 1032])
@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_span_mean_against_float64(dim, dtype, pooling, backend, device):
    pairs, n, _ = make_pairs(9, seed=dim, gaps=True, empty=True)
    pairs = pairs.to(device)
    start, end = pairs.student_start, pairs.student_end
    generator = torch.Generator().manual_seed(dim)
    x = torch.randn(n, dim, generator=generator).to(device, dtype).requires_grad_()
    upstream = torch.randn(9, dim, generator=generator).to(device, dtype)
    out = vd.span_mean(x, start, end, pooling=pooling, backend=backend)
    out.backward(upstream)
    wide = x.detach().double().requires_grad_()
    want = vd.reference.span_mean(wide, start, end, pooling=pooling)
    want.backward(upstream.double())
    assert out.dtype == dtype
    factor = 2 if dtype == torch.bfloat16 else 1  # the interpreter cuts a float32 to bfloat16 instead of rounding it
    assert_norm_close(out.detach(), want.detach(), dtype, "out", factor)
    assert_norm_close(x.grad, wide.grad, dtype, "gradient", factor)


@pytest.mark.parametrize("learned", [False, True])
def test_span_mean_of_layers(learned, backend, device):
    torch.manual_seed(0)
    pairs, n, _ = make_pairs(9, seed=2, gaps=True, empty=True)
    pairs = pairs.to(device)
    x = [torch.randn(n, 10), *(torch.randn(n, 20)[:, 5:15] for _ in range(9))]
    layers = [v.to(device).requires_grad_() for v in x]
    coef = torch.rand(10, dtype=torch.float64).to(device).requires_grad_() if learned else None
    upstream = torch.randn(9, 10).to(device)
    out = pooled_rows(layers, pairs.student_start, pairs.student_end, coef, True, True, backend)
    got = torch.autograd.grad(out, [*layers, coef] if learned else layers, upstream)
    wide = [v.detach().double().requires_grad_() for v in layers]
    weights = torch.full((10,), 0.1, dtype=torch.float64, device=device) if coef is None else coef.detach()
    weights.requires_grad_(learned)
    mixed = sum(v * w for v, w in zip(wide, weights.unbind(), strict=True))
    want_out = vd.reference.span_mean(mixed, pairs.student_start, pairs.student_end)
    want = torch.autograd.grad(want_out, [*wide, weights] if learned else wide, upstream.double())
    assert_norm_close(out.detach(), want_out.detach(), torch.float32, "out")
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_norm_close(a, b, torch.float32, f"gradient {i}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [7, 40])
def test_half_rows_are_not_rounded_where_the_caller_accumulates(dim, dtype, backend, device):
    pairs, n, _ = make_pairs(9, seed=2)
    pairs = pairs.to(device)
    x = torch.randn(n, dim).to(device, dtype)
    rows = pooled_rows([x], pairs.student_start, pairs.student_end, None, True, True, backend)
    assert rows.dtype == torch.float32
    want = vd.reference.span_mean(x.double(), pairs.student_start, pairs.student_end)
    assert_norm_close(rows, want, torch.float32, "rows")


def forward(backend, x, start, end):
    out = x.new_full((len(start), x.shape[1]), float("nan"))
    dispatch.implementation("span_mean", backend, "span_mean_fwd")([x], start, end, None, True, out)
    return out


@pytest.mark.parametrize("dim", [3, 8])
@pytest.mark.parametrize("last", [5, 900])  # before the end of the rows, and past it
def test_span_mean_writes_every_row_and_none_outside(last, dim, backend, device):
    start, end = (torch.tensor(v, dtype=torch.int32, device=device) for v in ([1, 4], [2, last]))
    x = torch.randn(6, dim, device=device)
    torch.testing.assert_close(forward(backend, x, start, end), torch.stack([x[1], x[4:last].mean(0)]))
    grad = torch.full((8, dim), float("nan"), device=device)
    upstream = torch.ones(2, dim, device=device)
    dispatch.implementation("span_mean", backend, "span_mean_bwd")(upstream, start, end, None, False, [grad[1:7]])
    assert grad[1:7, -1].tolist() == [0, 1, 0, 0, 1, last > 5] and grad[[0, 7]].isnan().all()


@pytest.mark.parametrize("dim", [3, 8, 1032])
def test_span_mean_clears_long_gaps(dim, backend, device):
    start, end = (torch.tensor(v, dtype=torch.int32, device=device) for v in ([130, 160, 260], [133, 160, 261]))
    grads = [torch.full((420, dim), float("nan"), device=device) for _ in range(2)]
    upstream = torch.ones(3, dim, device=device)
    inside = [grad[8:408] for grad in grads]
    dispatch.implementation("span_mean", backend, "span_mean_bwd")(upstream, start, end, None, False, inside)
    for grad in grads:
        assert grad[:8].isnan().all() and grad[408:].isnan().all()
        assert grad[8:408].abs().sum(1).nonzero().flatten().tolist() == [130, 131, 132, 260]


def test_span_mean_strides_and_zero_pairs(backend, device):
    x = torch.randn(5, 8, device=device)[:, :3]
    start = torch.tensor([0], dtype=torch.int32, device=device)
    torch.testing.assert_close(forward(backend, x, start, start + 2)[0], x[:2].mean(0))
    grad = torch.full((5, 3), float("nan"), device=device)
    upstream = torch.ones(0, 3, device=device)
    backward = dispatch.implementation("span_mean", backend, "span_mean_bwd")
    backward(upstream, start[:0], start[:0], None, True, [grad])
    assert torch.count_nonzero(grad) == 0
