"""span_mean on CPU: the kernel against the float64 reference, autograd, compile, bad input."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd
from tests.spans import make_pairs
from tests.tolerances import assert_norm_close


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [1, 7, 264, 1000])
@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_against_float64(dim, dtype, pooling):
    pairs, n, _ = make_pairs(29, seed=dim, gaps=True, empty=True)
    start, end = pairs.student_start, pairs.student_end
    x = torch.randn(n, dim).to(dtype).requires_grad_()
    out = vd.span_mean(x, start, end, pooling=pooling)
    upstream = torch.randn(29, dim).to(dtype)
    out.backward(upstream)
    wide = x.detach().double().requires_grad_()
    want = vd.reference.span_mean(wide, start, end, pooling=pooling)
    want.backward(upstream.double())
    assert out.dtype == dtype
    assert_norm_close(out.detach(), want.detach(), dtype, "out")
    assert_norm_close(x.grad, wide.grad, dtype, "gradient")


def test_worked_by_hand():
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]], requires_grad=True)
    out = vd.span_mean(x, torch.tensor([0, 2, 2]), torch.tensor([2, 2, 3]))
    assert out.tolist() == [[2.0, 3.0], [0.0, 0.0], [5.0, 6.0]]
    out.sum().backward()
    assert x.grad.tolist() == [[[0.5, 0.5], [0.5, 0.5]], [[1.0, 1.0], [0.0, 0.0]]]


def test_strides_and_expanded_gradients():
    pairs, n, _ = make_pairs(10, seed=1)
    start, end = pairs.student_start, pairs.student_end
    base = torch.randn(6, n)
    x = base.t().requires_grad_()
    out = vd.span_mean(x, start, end)
    torch.testing.assert_close(out, vd.reference.span_mean(x, start, end))
    (grad,) = torch.autograd.grad(out, x, torch.ones(1, 1).expand(10, 6))
    reference_out = vd.reference.span_mean(x, start, end)
    (want,) = torch.autograd.grad(reference_out, x, torch.ones(10, 6))
    torch.testing.assert_close(grad, want)


def test_gradcheck_opcheck_compile():
    pairs, n, _ = make_pairs(7, seed=2, gaps=True, empty=True)
    start, end = pairs.student_start, pairs.student_end
    x = torch.randn(n, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: vd.span_mean(x, start, end), (x,))
    for rows in (torch.randn(n, 4), torch.randn(n, 8)[:, :4]):
        torch.library.opcheck(
            torch.ops.vocabdistil.span_mean.default, ([rows], start, end, None, True, False, "cpu")
        )
    for grad in (torch.randn(7, 4), torch.randn(4, 7).t()):
        torch.library.opcheck(
            torch.ops.vocabdistil.span_mean_backward.default,
            (grad, start, end, None, True, 1, n, torch.float32, "cpu"),
        )
    compiled = torch.compile(lambda x: vd.span_mean(x, start, end).square().sum(), fullgraph=True, backend="aot_eager")
    y = torch.randn(n, 3, requires_grad=True)
    compiled(y).backward()
    (want,) = torch.autograd.grad(vd.span_mean(y, start, end).square().sum(), y)
    torch.testing.assert_close(y.grad, want)


@pytest.mark.parametrize(
    ("start", "end", "error", "name"),
    [
        ([0, 1], [2, 3], ValueError, "start"),
        ([2, 0], [3, 1], ValueError, "start"),
        ([-1], [1], ValueError, "start"),
        ([2], [1], ValueError, "end"),
        ([0], [9], ValueError, "end"),
        ([0, 1], [1], ValueError, "end"),
        ([0.0], [1.0], TypeError, "start"),
    ],
)
def test_bad_spans_are_named(start, end, error, name):
    with pytest.raises(error, match=f"^{name}"):
        vd.span_mean(torch.randn(4, 2), torch.tensor(start), torch.tensor(end))


def test_spans_changed_in_place_are_checked_again():
    start, end = torch.tensor([0, 2]), torch.tensor([2, 4])
    vd.span_mean(torch.randn(4, 2), start, end)
    end[1] = 400
    with pytest.raises(ValueError, match="^end"):
        vd.span_mean(torch.randn(4, 2), start, end)


@pytest.mark.parametrize("write", ["torch", "numpy"])
def test_spans_written_to_in_any_way_are_refused(write):
    start, end = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([2, 4], dtype=torch.int32)
    x = torch.randn(4, 2, requires_grad=True)
    out = vd.span_mean(x, start, end)
    (end if write == "torch" else end.numpy())[1] = 2**31 - 1
    with pytest.raises(ValueError, match="^(end: expected positions|start, end: expected ascending disjoint spans)"):
        vd.span_mean(x, start, end)
    with pytest.raises((ValueError, RuntimeError), match="start, end: expected|modified by an inplace operation"):
        out.sum().backward()


def test_a_kept_start_with_a_new_end_each_time():
    """An end that is gone may leave its id to another: it is not told apart by that."""
    start, x = torch.tensor([0, 2], dtype=torch.int32), torch.randn(8, 2)
    for step in range(200):
        good = 2 + step % 7
        last = good if step % 3 else 400
        end = torch.tensor([2, last], dtype=torch.int32)
        if last > 8:
            with pytest.raises(ValueError, match="^end: expected positions up to 8, got 400"):
                vd.span_mean(x, start, end)
        else:
            torch.testing.assert_close(vd.span_mean(x, start, end), vd.reference.span_mean(x, start, end))
        del end
