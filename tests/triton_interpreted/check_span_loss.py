"""The Triton span_loss kernels in the interpreter against the float64 reference."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd
from tests.spans import make_pairs
from tests.tolerances import assert_norm_close
from vocabdistil import _native
from vocabdistil.triton_kernels import span_loss as kernels

DIVERGENCES = list(_native.DIVERGENCE_CODES)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(module, student, teacher, pairs, upstream=None, **options):
    """The loss and the gradients of every layer of the student and of whatever option can have one."""
    student = [x.detach().clone().requires_grad_() for x in student]
    learned = {k: v.detach().clone().requires_grad_() for k, v in options.items() if torch.is_tensor(v)}
    loss = module.span_loss(student, teacher, pairs, **{**options, **learned})
    loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype))
    return {"loss": loss.detach()} | {f"d{i}": x.grad for i, x in enumerate(student)} | {
        k: v.grad for k, v in learned.items()
    }


def compare(student, teacher, pairs, upstream=None, **options):
    got = run(vd, student, teacher, pairs, upstream, backend="triton", **options)
    wide = {k: v.double() if torch.is_tensor(v) else v for k, v in options.items()}
    want = run(vd.reference, [x.double() for x in student], [x.double() for x in teacher], pairs, upstream, **wide)
    dtype = student[0].dtype
    for name, value in got.items():
        expected = dtype if name.startswith("d") else torch.float32
        assert value.dtype == expected, name
        factor = 2 if expected == torch.bfloat16 else 1  # the interpreter cuts a float32 instead of rounding it
        assert_norm_close(value, want[name], expected, name, factor)


def rows(count, dim, seed, dtype=torch.float32):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("dim", "pooling"), [(1, "mean"), (7, "mean"), (7, "sum"), (264, "mean"), (1000, "sum")])
def test_against_float64(dim, pooling, divergence, dtype):
    pairs, n_s, n_t = make_pairs(7 if dim < 100 else 3, seed=dim, gaps=True, empty=True)
    student, teacher = rows(n_s, dim, 1, dtype), rows(n_t, dim, 2, dtype)
    if dim == 1 and divergence == "cosine":  # the gradient is 0 by cancellation of terms of the size 1 / |s|
        student, teacher = student.abs() + 1, teacher.abs() + 1
    compare([student], [teacher], pairs, divergence=divergence, temperature=1.7, beta=0.3, pooling=pooling)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_reductions_pair_weights_and_upstream(reduction, divergence):
    pairs, n_s, n_t = make_pairs(9, seed=3, gaps=True, empty=True)
    upstream = torch.linspace(0.5, 2, 9) if reduction == "none" else torch.tensor(-3.0)
    compare(
        [rows(n_s, 40, 1)], [rows(n_t, 40, 2)], pairs, upstream, divergence=divergence, reduction=reduction,
        pair_weights=torch.rand(9, generator=torch.Generator().manual_seed(0)),
    )  # fmt: skip


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_layer_lists(divergence, learned):
    pairs, n_s, n_t = make_pairs(6, seed=6, gaps=True)
    options = {"student_layer_weights": [1.0, 2.0, 0.5]}
    if learned:
        options = {"student_layer_weights": torch.rand(3) + 0.2, "teacher_layer_weights": torch.rand(9) + 0.2}
    students = [rows(n_s, 66, i)[:, :33] if i == 1 else rows(n_s, 33, i) for i in range(3)]  # two row strides
    compare(students, [rows(n_t, 33, 5 + i) for i in range(9)], pairs, divergence=divergence, beta=0.2, **options)


def test_projection():
    pairs, n_s, n_t = make_pairs(8, seed=5, gaps=True, empty=True)
    weight, bias = rows(56, 24, 3) / 5, rows(1, 56, 4)[0]
    compare([rows(n_s, 24, 1)], [rows(n_t, 56, 2)], pairs, temperature=2.0, weight=weight, bias=bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_is_zero_where_the_means_are_equal(divergence, dtype):
    pairs, n, _ = make_pairs(17, seed=1, same=True)
    x = rows(n, 200, 1, dtype)
    student = x.clone().requires_grad_()
    loss = vd.span_loss(student, x, pairs, divergence=divergence, temperature=1.3, beta=0.3, backend="triton")
    loss.backward()
    assert torch.count_nonzero(student.grad) == 0
    assert loss.item() == 0


def test_strides_and_three_dimensions():
    pairs, n_s, n_t = make_pairs(14, seed=8)
    student, teacher = rows(n_s + n_s % 2, 12, 1), rows(n_t + n_t % 2, 12, 2)
    want = run(vd.reference, [student], [teacher], pairs)
    for s, t in [
        (student.view(2, -1, 12), teacher.view(2, -1, 12)),
        (student.t().contiguous().t(), teacher.t().contiguous().t()),
        (torch.cat([student, student], 1)[:, :12], torch.cat([teacher, teacher], 1)[:, 12:]),
    ]:
        leaf = s.requires_grad_()
        loss = vd.span_loss(leaf, t, pairs, backend="triton")
        loss.backward()
        torch.testing.assert_close(loss.detach(), want["loss"])
        torch.testing.assert_close(leaf.grad.reshape(-1, 12), want["d0"])


def call(student, teacher, spans, grads, **changes):
    loss, total = torch.full((len(spans[0]),), float("nan")), torch.tensor(float("nan"))
    arguments = {
        "weights": None, "base": 1.0, "student_coef": None, "teacher_coef": None, "divergence": 0, "mean": True,
        "temperature": 1.0, "beta": 0.5, "loss": loss, "total": total, "grads": grads, "upstream": None,
    }  # fmt: skip
    kernels.span_loss([student], [teacher], spans, **{**arguments, **changes})
    return loss, total


def test_every_row_is_written_and_none_outside_is_touched():
    spans = [torch.tensor(v, dtype=torch.int32) for v in ([1, 4], [2, 900], [0, 2], [2, 700])]  # past the ends
    grads = torch.full((8, 3), float("nan"))
    loss, total = call(rows(6, 3, 1), rows(4, 3, 2), spans, [grads[1:7]])
    assert torch.isfinite(grads[1:7]).all() and grads[[0, 7]].isnan().all()
    assert torch.count_nonzero(grads[[1, 3, 4]]) == 0 and torch.count_nonzero(grads[[2, 5, 6]]) == 9
    torch.testing.assert_close(total, loss.sum())


def test_zero_pairs_clear_the_gradient():
    empty = torch.zeros(0, dtype=torch.int32)
    grad = torch.full((4, 3), float("nan"))
    _, total = call(rows(4, 3, 1), rows(4, 3, 2), [empty] * 4, [grad])
    assert total == 0 and torch.count_nonzero(grad) == 0


def test_an_upstream_gradient_of_one_leaves_the_gradient_alone():
    pairs, n_s, n_t = make_pairs(5, seed=8)
    spans = [pairs.student_start, pairs.student_end, pairs.teacher_start, pairs.teacher_end]
    student, teacher, grad = rows(n_s, 5, 1), rows(n_t, 5, 2), torch.full((n_s, 5), 7.0)
    call(student, teacher, spans, [grad], loss=None, total=None, upstream=torch.tensor(1.0))
    assert torch.all(grad == 7)
    call(student, teacher, spans, [grad], loss=None, total=None, upstream=torch.tensor(2.0))
    want = torch.empty_like(grad)
    call(student, teacher, spans, [want])
    torch.testing.assert_close(grad, 2 * want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_is_not_hidden(divergence, bad):
    pairs, n_s, n_t = make_pairs(8, seed=4)
    student, teacher = rows(n_s, 16, 1), rows(n_t, 16, 2)
    student[3, 5] = bad
    assert not vd.span_loss(student, teacher, pairs, divergence=divergence, backend="triton").isfinite()


def test_inputs_that_the_kernels_cannot_take():
    pairs, n_s, n_t = make_pairs(2, seed=4)
    for dim, dtype, reason in [(4, torch.float64, "float64"), (20000, torch.float32, "hidden size 20000")]:
        with pytest.raises(ValueError, match=f"^backend.*{reason}"):
            vd.span_loss(rows(n_s, dim, 1, dtype), rows(n_t, dim, 2, dtype), pairs, backend="triton")


def test_mixed_dtypes_under_autocast():
    pairs, n_s, n_t = make_pairs(8, seed=4)
    student, teacher = rows(n_s, 16, 1, torch.float16).requires_grad_(), rows(n_t, 16, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = vd.span_loss(student, teacher, pairs, backend="triton")
    loss.backward()
    wide = student.detach().double().requires_grad_()
    vd.reference.span_loss(wide, teacher.double(), pairs).backward()
    assert_norm_close(student.grad, wide.grad, torch.float16, "gradient")
