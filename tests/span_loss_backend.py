"""What span_loss must do in every GPU backend, against the float64 reference. A tier imports these tests and says by
its fixtures which ``backend`` runs on which ``device``: Triton in the interpreter, CUDA on the host, both on a GPU."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd
from tests.compiling import assert_compiles
from tests.numbers_backend import test_span_divergences_at_any_temperature  # noqa: F401
from tests.spans import make_pairs
from tests.tolerances import assert_norm_close
from tests.upstream import assert_guesses_the_upstream_gradient
from vocabdistil.core import dispatch, native

DIVERGENCES = list(native.DIVERGENCE_CODES)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def to(device, value):
    if isinstance(value, (list, tuple)):
        return [to(device, v) for v in value]
    return value.to(device) if isinstance(value, (torch.Tensor, vd.SpanPairs)) else value


def run(module, student, teacher, pairs, upstream=None, **options):
    """The loss and the gradients of every layer of the student and of whatever option can have one."""
    student = [x.detach().requires_grad_() for x in student]
    learned = {k: v.detach().clone().requires_grad_() for k, v in options.items() if torch.is_tensor(v)}
    loss = module.span_loss(student, teacher, pairs, **{**options, **learned})
    loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype))
    grads = {f"d{i}": x.grad for i, x in enumerate(student)}
    return {"loss": loss.detach(), **grads, **{k: v.grad for k, v in learned.items()}}


def compare(backend, device, student, teacher, pairs, upstream=None, **options):
    student, teacher, pairs, upstream = (to(device, v) for v in (student, teacher, pairs, upstream))
    options = {k: to(device, v) for k, v in options.items()}
    got = run(vd, student, teacher, pairs, upstream, backend=backend, **options)
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


# The sizes reach every way to lay a row out: 8 or 16 threads or a warp with 16, 24, 32 columns each, blocks of some
# sizes, and column by column where 16 bytes cannot be read at once or the row is very wide.
SIZES = [(1, "mean"), (7, "sum"), (264, "mean"), (1000, "sum")]
CASES = [(*size, dtype) for size in SIZES for dtype in DTYPES] + [
    (72, "mean", torch.bfloat16),
    (256, "sum", torch.float32),
    (512, "mean", torch.float16),
    (600, "mean", torch.float32),
    (600, "mean", torch.bfloat16),
    (1025, "mean", torch.float16),
    (2056, "mean", torch.bfloat16),
    (4104, "mean", torch.float16),
    (8200, "sum", torch.bfloat16),
]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("dim", "pooling", "dtype"), CASES, ids=str)
def test_against_float64(dim, pooling, divergence, dtype, backend, device):
    pairs, n_s, n_t = make_pairs(7 if dim < 100 else 3, seed=dim, gaps=True, empty=True)
    student, teacher = rows(n_s, dim, 1, dtype), rows(n_t, dim, 2, dtype)
    if dim == 1 and divergence == "cosine":  # the gradient is 0 by cancellation of terms of the size 1 / |s|
        student, teacher = student.abs() + 1, teacher.abs() + 1
    options = {"divergence": divergence, "temperature": 1.7, "beta": 0.3, "pooling": pooling}
    compare(backend, device, [student], [teacher], pairs, **options)


@pytest.mark.parametrize(("count", "dim"), [(1100, 2), (300, 16), (70, 1100)])
def test_more_pairs_than_run_at_once(count, dim, backend, device):
    pairs, n_s, n_t = make_pairs(count, seed=dim, gaps=True, empty=True)
    compare(backend, device, [rows(n_s, dim, 1)], [rows(n_t, dim, 2)], pairs, divergence="mse")


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_reductions_pair_weights_and_upstream(reduction, divergence, backend, device):
    pairs, n_s, n_t = make_pairs(9, seed=3, gaps=True, empty=True)
    upstream = torch.linspace(0.5, 2, 9) if reduction == "none" else torch.tensor(-3.0)
    compare(
        backend, device, [rows(n_s, 40, 1)], [rows(n_t, 40, 2)], pairs, upstream, divergence=divergence,
        reduction=reduction, pair_weights=torch.rand(9, generator=torch.Generator().manual_seed(0)),
    )  # fmt: skip


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dim", [33, 40])
def test_layer_lists(dim, divergence, learned, backend, device):
    pairs, n_s, n_t = make_pairs(6, seed=6, gaps=True)
    options = {"student_layer_weights": [1.0, 2.0, 0.5]}
    if learned:
        options = {"student_layer_weights": torch.tensor([0.3, 1, 0.5]), "teacher_layer_weights": torch.arange(1.0, 10)}
    students = [rows(n_s, (1 + (i == 1)) * dim, i)[:, :dim] for i in range(3)]  # two row strides
    teachers = [rows(n_t, dim, 5 + i) for i in range(9)]
    compare(backend, device, students, teachers, pairs, divergence=divergence, beta=0.2, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [53, 56, 1032])
def test_projection(dim, dtype, backend, device):
    pairs, n_s, n_t = make_pairs(8, seed=5, gaps=True, empty=True)
    options = {"temperature": 2.0, "weight": rows(dim, 24, 3) / 5, "bias": rows(1, dim, 4)[0]}
    compare(backend, device, [rows(n_s, 24, 1, dtype)], [rows(n_t, dim, 2, dtype)], pairs, **options)


@pytest.mark.parametrize("learned", ["student", "teacher"])
def test_learned_layer_weights_of_half_precision(learned, backend, device):
    pairs, n_s, n_t = make_pairs(6, seed=6, gaps=True)
    students, teachers = ([rows(n, 33, i, torch.bfloat16) for i in range(2)] for n in (n_s, n_t))
    options = {f"{learned}_layer_weights": torch.tensor([0.3, 1])}
    compare(backend, device, students, teachers, pairs, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_is_zero_where_the_means_are_equal(divergence, dtype, backend, device):
    pairs, n, _ = make_pairs(17, seed=1, same=True)
    x = rows(n, 200, 1, dtype).to(device)
    student = x.clone().requires_grad_()
    options = {"divergence": divergence, "temperature": 1.3, "beta": 0.3}
    loss = vd.span_loss(student, x, pairs.to(device), backend=backend, **options)
    loss.backward()
    assert torch.count_nonzero(student.grad) == 0
    assert loss.item() == 0


def test_strides_and_three_dimensions(backend, device):
    pairs, n_s, n_t = make_pairs(14, seed=8)
    pairs, student, teacher = to(device, [pairs, rows(n_s + n_s % 2, 12, 1), rows(n_t + n_t % 2, 12, 2)])
    want = run(vd.reference, [student], [teacher], pairs)
    for s, t in [
        (student.view(2, -1, 12), teacher.view(2, -1, 12)),
        (student.t().contiguous().t(), teacher.t().contiguous().t()),
        (torch.cat([student, student], 1)[:, :12], torch.cat([teacher, teacher], 1)[:, 12:]),
        (torch.cat([student[:, :1], student], 1)[:, 1:], torch.cat([teacher[:, :1], teacher], 1)[:, 1:]),  # unaligned
    ]:
        leaf = s.requires_grad_()
        loss = vd.span_loss(leaf, t, pairs, backend=backend)
        loss.backward()
        torch.testing.assert_close(loss.detach(), want["loss"])
        torch.testing.assert_close(leaf.grad.reshape(-1, 12), want["d0"])


@pytest.mark.parametrize("size", [1.0, 1e30])
def test_cosines_of_rows_of_any_size(size, backend, device):
    pairs, n_s, n_t = make_pairs(7, seed=3)
    student, teacher = rows(n_s, 40, 1) * size, rows(n_t, 40, 2)
    got = run(vd, [student.to(device)], teacher.to(device), pairs.to(device), backend=backend, divergence="cosine")
    want = run(vd.reference, [student.double()], teacher.double(), pairs, divergence="cosine")
    torch.testing.assert_close(got["loss"].cpu().double(), want["loss"], rtol=1e-5, atol=1e-6)
    assert (got["d0"].cpu().double() - want["d0"]).norm() < 1e-4 * want["d0"].norm()


@pytest.mark.parametrize("size", [1e6, 1e12, 1e37])
@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "jsd"])
def test_divergences_of_rows_of_any_size(divergence, size, backend, device):
    """Those of one pair: its neighbours, in the same warp perhaps, are as they were."""
    pairs = vd.SpanPairs(*(torch.arange(i, i + 4) for i in (0, 1, 0, 1)))
    student, teacher = rows(4, 16, 1), rows(4, 16, 2)
    student[1] *= size
    teacher[1] = student[1].roll(3)
    compare(backend, device, [student], [teacher], pairs, divergence=divergence, reduction="none")


@pytest.mark.parametrize(("divergence", "infinite"), [("kl", "student"), ("reverse_kl", "teacher")])
def test_no_mass_where_the_other_side_has_some(divergence, infinite, backend, device):
    pairs, n, _ = make_pairs(5, seed=3, same=True)
    sides = {"student": rows(n, 16, 1), "teacher": rows(n, 16, 2)}
    sides[infinite][pairs.student_start[2], 5] = float("-inf")
    sides = to(device, sides["student"]), to(device, sides["teacher"])
    options = {"divergence": divergence, "reduction": "none"}
    got = vd.span_loss(*sides, to(device, pairs), backend=backend, **options).cpu()
    want = vd.reference.span_loss(*(x.cpu().double() for x in sides), pairs, **options)
    assert want[2] == float("inf")
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_jsd_where_a_share_is_subnormal(backend, device):
    pairs, student, teacher = make_pairs(1, seed=0, same=True)[0], torch.zeros(3, 8), torch.zeros(3, 8)
    student[:, 7], teacher[:, 7] = -87, 50
    got = run(vd, [student.to(device)], teacher.to(device), pairs.to(device), backend=backend, divergence="jsd")
    want = run(vd.reference, [student.double()], teacher.double(), pairs, divergence="jsd")
    torch.testing.assert_close(got["loss"].cpu().double(), want["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got["d0"].cpu().double(), want["d0"], rtol=1e-4, atol=1e-6)


def call(backend, student, teacher, spans, grads, **changes):
    loss, total = student.new_full((len(spans[0]),), float("nan")), student.new_full((), float("nan"))
    arguments = {
        "weights": None, "base": 1.0, "student_coef": None, "teacher_coef": None, "divergence": 0, "mean": True,
        "temperature": 1.0, "beta": 0.5, "loss": loss, "total": total, "grads": grads, "upstream": None,
        "formed": None,
    }  # fmt: skip
    kernel = dispatch.implementation("span_loss", backend, "span_loss")
    kernel([student], [teacher], spans, **{**arguments, **changes})
    return loss, total


@pytest.mark.parametrize("dim", [3, 8, 2056])
@pytest.mark.parametrize("last", [5, 900])  # before the end of the rows, and past it
def test_every_row_is_written_and_none_outside_is_touched(last, dim, backend, device):
    positions = [1, 4], [2, last], [0, 2], [2, 700]
    spans = [torch.tensor(v, dtype=torch.int32, device=device) for v in positions]
    grads = torch.full((8, dim), float("nan"), device=device)
    loss, total = call(backend, rows(6, dim, 1).to(device), rows(4, dim, 2).to(device), spans, [grads[1:7]])
    assert torch.isfinite(grads[1:7]).all() and grads[[0, 7]].isnan().all()
    written = [False, True, False, False, True, last > 5]
    assert (grads[1:7].abs().sum(1) > 0).tolist() == written
    torch.testing.assert_close(total, loss.sum())


@pytest.mark.parametrize(("dim", "dtype"), [(3, torch.bfloat16), (8, torch.float32), (1032, torch.float16)], ids=str)
def test_long_gaps_are_cleared(dim, dtype, backend, device):
    """The rows of the gradient between, before and behind spans, and those of a span whose other side is empty."""
    positions = [130, 160, 260, 300], [133, 160, 261, 302], [0, 1, 1, 2], [1, 1, 2, 2]
    spans = [torch.tensor(v, dtype=torch.int32, device=device) for v in positions]
    grads = torch.full((420, dim), float("nan"), device=device, dtype=dtype)
    student, teacher = rows(400, dim, 1, dtype).to(device), rows(2, dim, 2, dtype).to(device)
    call(backend, student, teacher, spans, [grads[8:408]], loss=student.new_empty(4, dtype=torch.float32), total=None)
    assert grads[:8].isnan().all() and grads[408:].isnan().all()
    assert grads[8:408].abs().sum(1).nonzero().flatten().tolist() == [130, 131, 132, 260]


def test_spans_that_make_no_sense_stay_inside(backend, device):
    positions = [-5, 9, 3, 2**31 - 1], [4, -(2**31), 2, 2**31 - 1], [7, 0, -1, -9], [1, 2, 9, 2**31 - 1]
    spans = [torch.tensor(v, dtype=torch.int32, device=device) for v in positions]
    padded = torch.full((6, 8), float("nan"), device=device)
    grads = padded.clone()
    padded[1:5] = rows(4, 8, 1)
    call(backend, padded[1:5], padded[1:5], spans, [grads[1:5]])
    assert grads[[0, 5]].isnan().all()


def test_zero_pairs_clear_the_gradient(backend, device):
    empty = torch.zeros(0, dtype=torch.int32, device=device)
    grad = torch.full((4, 3), float("nan"), device=device)
    _, total = call(backend, rows(4, 3, 1).to(device), rows(4, 3, 2).to(device), [empty] * 4, [grad])
    assert total == 0 and torch.count_nonzero(grad) == 0


def test_a_total_in_two_stages(backend, device, monkeypatch):
    count = native.CUDA_TOTAL_PAIRS + 9
    if backend == "triton":
        monkeypatch.setattr("vocabdistil.triton_kernels.span_loss.TOTAL_PAIRS", 8)
        count = 21
    start = torch.arange(count, dtype=torch.int32, device=device)
    student, teacher, weights = to(device, [rows(count, 1, 1), rows(count, 1, 2), rows(1, count, 3)[0]])
    options = {"weights": weights, "base": 0.5, "divergence": native.DIVERGENCE_CODES["mse"]}
    loss, total = call(backend, student, teacher, [start, start + 1] * 2, [], **options)
    torch.testing.assert_close(total.double(), 0.5 * (loss.double() * weights.double()).sum(), rtol=1e-5, atol=1e-4)
    assert torch.equal(total, call(backend, student, teacher, [start, start + 1] * 2, [], **options)[1])


def test_a_gradient_that_was_formed_with_the_same_upstream_is_left_alone(backend, device):
    pairs, n_s, n_t = make_pairs(5, seed=8)
    spans = to(device, [pairs.student_start, pairs.student_end, pairs.teacher_start, pairs.teacher_end])
    student, teacher = to(device, [rows(n_s, 5, 1), rows(n_t, 5, 2)])
    grad, want = torch.full_like(student, 7), torch.empty_like(student)
    loss, total = call(backend, student, teacher, spans, [want])
    two, options = grad.new_full((), 2), {"loss": None, "total": None}
    call(backend, student, teacher, spans, [grad], upstream=two, formed=two.clone(), **options)
    assert torch.all(grad == 7)
    call(backend, student, teacher, spans, [grad], upstream=two, formed=two + 1, **options)
    torch.testing.assert_close(grad, 2 * want)
    grad.fill_(7)
    again = call(backend, student, teacher, spans, [grad], upstream=two)
    torch.testing.assert_close(grad, 2 * want)
    assert torch.equal(again[0], loss) and torch.equal(again[1], total)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_upstream_gradient_is_guessed(dtype, backend, device):
    pairs, n_s, n_t = make_pairs(5, seed=8, gaps=True)
    student, teacher, pairs = to(device, [rows(n_s, 8, 1, dtype), rows(n_t, 8, 2, dtype), pairs])
    assert_guesses_the_upstream_gradient(lambda x: vd.span_loss(x, teacher, pairs, backend=backend), student)


def test_the_upstream_gradient_of_both_sides_is_guessed(backend, device):
    pairs, n_s, n_t = make_pairs(5, seed=8, gaps=True)
    student, teacher, pairs = to(device, [rows(n_s, 8, 1), rows(n_t, 8, 2), pairs])
    learned = torch.tensor([0.3, 1.0], device=device, requires_grad=True)

    def loss(x):
        return vd.span_loss(x, [teacher, 2 * teacher], pairs, teacher_layer_weights=learned, backend=backend)

    for upstream in (3.0, 3.0, 1.0, 3.0):
        (grad,) = torch.autograd.grad(upstream * loss(student.clone().requires_grad_()), learned)
        (plain,) = torch.autograd.grad(loss(student.clone().requires_grad_()), learned)
        torch.testing.assert_close(grad, upstream * plain)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_is_not_hidden(divergence, bad, backend, device):
    pairs, n_s, n_t = make_pairs(8, seed=4)
    student, teacher = rows(n_s, 16, 1), rows(n_t, 16, 2)
    student[3, 5] = bad
    student, teacher, pairs = to(device, [student, teacher, pairs])
    assert not vd.span_loss(student, teacher, pairs, divergence=divergence, backend=backend).isfinite()


@pytest.mark.parametrize("dim", [5, 16, 40])
def test_mixed_dtypes_under_autocast(dim, backend, device):
    pairs, n_s, n_t = make_pairs(8, seed=4)
    student, teacher, pairs = to(device, [rows(n_s, dim, 1, torch.float16), rows(n_t, dim, 2), pairs])
    student.requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = vd.span_loss(student, teacher, pairs, backend=backend)
    loss.backward()
    wide = student.detach().double().requires_grad_()
    vd.reference.span_loss(wide, teacher.double(), pairs).backward()
    assert_norm_close(student.grad, wide.grad, torch.float16, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_traces_as_one_graph(reduction, dtype, backend, device):
    pairs, n_s, n_t = make_pairs(12, seed=4)
    student, teacher, pairs = to(device, [rows(n_s, 24, 1, dtype), rows(n_t, 24, 2, dtype), pairs])

    def loss(s):
        return (vd.span_loss(s * 2, teacher, pairs, temperature=2.0, reduction=reduction, backend=backend) * 3).sum()

    assert_compiles(loss, student)


def test_opcheck(backend, device):
    pairs, n_s, n_t = make_pairs(9, seed=4, gaps=True)
    pairs = pairs.to(device)
    spans = [pairs.student_start, pairs.student_end, pairs.teacher_start, pairs.teacher_end]
    weights, coef = torch.rand(9, device=device), torch.rand(2, dtype=torch.float64, device=device)
    students = to(device, [rows(n_s, 8, 1), rows(n_s, 16, 2)[:, :8]])
    torch.library.opcheck(
        torch.ops.vocabdistil.span_loss.default,
        (students, to(device, [rows(n_t, 8, 3)]), spans, weights, 0.5, coef, None, 0, True, 2.0, 0.5, backend)
        + (True, True),
    )


def test_inputs_that_the_kernels_cannot_take(backend, device):
    pairs, n_s, n_t = make_pairs(2, seed=4)
    for dim, dtype, reason in [(4, torch.float64, "float64"), (20000, torch.float32, "hidden size 20000")]:
        student, teacher, there = to(device, [rows(n_s, dim, 1, dtype), rows(n_t, dim, 2, dtype), pairs])
        with pytest.raises(ValueError, match=f"^backend.*{reason}"):
            vd.span_loss(student, teacher, there, backend=backend)
