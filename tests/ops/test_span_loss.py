"""span_loss on CPU: the kernels against the float64 reference, autograd, compile, determinism, bad input."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd
from tests.compiling import assert_compiles
from tests.spans import make_pairs
from tests.tolerances import assert_norm_close

DIVERGENCES = ["kl", "reverse_kl", "jsd", "mse", "cosine"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def run(module, student, teacher, pairs, **options):
    """Loss and gradients of every tensor that can have one."""
    student = [x.clone().requires_grad_() for x in student]
    learned = {
        k: v.clone().requires_grad_()
        for k, v in options.items()
        if k in ("weight", "bias", "pair_weights", "student_layer_weights", "teacher_layer_weights")
    }
    loss = module.span_loss(
        student if len(student) > 1 else student[0], teacher, pairs, **{**options, **learned}
    )
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
    (loss * upstream).sum().backward()
    return {"loss": loss.detach(), **{f"d{i}": x.grad for i, x in enumerate(student)}} | {
        k: v.grad for k, v in learned.items()
    }


def compare(student, teacher, pairs, **options):
    got = run(vd, student, teacher, pairs, **options)
    wide = {k: v.double() if torch.is_tensor(v) else v for k, v in options.items()}
    want = run(vd.reference, [x.double() for x in student], [x.double() for x in teacher], pairs, **wide)
    assert got.keys() == want.keys()
    dtype = student[0].dtype
    for name, value in got.items():
        expected_dtype = torch.float32 if name == "loss" and dtype != torch.float64 else dtype
        assert value.dtype == expected_dtype or name.endswith("weights"), name
        # A loss is float32 even for half inputs, and accurate as float32 is.
        assert_norm_close(value, want[name], expected_dtype, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dim", [1, 7, 264, 768, 1000, 4096])
def test_against_float64(dim, divergence, dtype):
    pairs, n_s, n_t = make_pairs(23, seed=dim, gaps=True)
    g = torch.Generator().manual_seed(dim)
    student = torch.randn(n_s, dim, generator=g).to(dtype)
    teacher = torch.randn(n_t, dim, generator=g).to(dtype)
    if dim == 1 and divergence == "cosine":  # the gradient is 0 by cancellation of terms of the size 1 / |s|
        student, teacher = student.abs() + 1, teacher.abs() + 1
    compare([student], [teacher], pairs, divergence=divergence, temperature=1.7, beta=0.3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_reductions_and_pooling(divergence, reduction, pooling):
    pairs, n_s, n_t = make_pairs(31, seed=3, gaps=True, empty=True)
    student, teacher = torch.randn(n_s, 40), torch.randn(n_t, 40)
    compare(
        [student], [teacher], pairs, divergence=divergence, reduction=reduction, pooling=pooling,
        pair_weights=torch.rand(31),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_projection(divergence, dtype):
    pairs, n_s, n_t = make_pairs(40, seed=5, gaps=True, empty=True)
    student, teacher = torch.randn(n_s, 24).to(dtype), torch.randn(n_t, 56).to(dtype)
    weight, bias = (torch.randn(56, 24) / 5).to(dtype), torch.randn(56).to(dtype)
    compare([student], [teacher], pairs, divergence=divergence, temperature=2.0, weight=weight, bias=bias)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_layer_lists(divergence, learned):
    pairs, n_s, n_t = make_pairs(20, seed=6)
    students = [torch.randn(n_s, 33) for _ in range(3)]
    teachers = [torch.randn(n_t, 33) for _ in range(4)]
    options = {}
    if learned:
        options = {
            "student_layer_weights": torch.rand(3) + 0.2,
            "teacher_layer_weights": torch.rand(4) + 0.2,
        }
    compare(students, teachers, pairs, divergence=divergence, temperature=0.8, **options)


def test_three_dimensional_and_strided_inputs():
    pairs, n_s, n_t = make_pairs(14, seed=8)
    flat_s, flat_t = torch.randn(n_s + n_s % 2, 12), torch.randn(n_t + n_t % 2, 12)
    expected = run(vd.reference, [flat_s], [flat_t], pairs)
    views = {
        "3d": (flat_s.view(2, -1, 12), flat_t.view(2, -1, 12)),
        "transposed": (flat_s.t().contiguous().t(), flat_t.t().contiguous().t()),
        "row stride": (torch.cat([flat_s, flat_s], 1)[:, :12], torch.cat([flat_t, flat_t], 1)[:, :12]),
    }
    for name, (s, t) in views.items():
        leaf = s.requires_grad_()
        loss = vd.span_loss(leaf, t, pairs)
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected["loss"], msg=name)
        torch.testing.assert_close(leaf.grad.reshape(-1, 12), expected["d0"] * 2, msg=name)  # run() has 0.5 upstream


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_is_zero_where_the_means_are_equal(divergence, dtype):
    pairs, n, _ = make_pairs(17, seed=1, same=True)
    x = torch.randn(n, 200).to(dtype)
    student = x.clone().requires_grad_()
    loss = vd.span_loss(student, x, pairs, divergence=divergence, temperature=1.3)
    loss.backward()
    assert torch.count_nonzero(student.grad) == 0
    if divergence in ("kl", "reverse_kl", "mse", "cosine"):
        assert loss.item() == 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence):
    pairs, n_s, n_t = make_pairs(6, seed=2, gaps=True, empty=True)
    student = torch.randn(n_s, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    pair_weights = torch.rand(6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(n_t, 4, dtype=torch.float64)
    for reduction in ("batchmean", "none"):
        assert torch.autograd.gradcheck(
            lambda s, w, p, r=reduction: vd.span_loss(
                s, teacher, pairs, divergence=divergence, temperature=1.5, weight=w, pair_weights=p, reduction=r
            ),
            (student, weight, pair_weights),
        )


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("projected", [False, True])
def test_bit_identical_for_any_number_of_threads(threads, projected):
    pairs, n_s, n_t = make_pairs(3000, seed=9, gaps=True)
    student, teacher = torch.randn(n_s, 96), torch.randn(n_t, 160 if projected else 96)
    options = {"weight": torch.randn(160, 96)} if projected else {}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(vd, [student], [teacher], pairs, temperature=2.0, **options)
        torch.set_num_threads(threads)
        for _ in range(2):
            got = run(vd, [student], [teacher], pairs, temperature=2.0, **options)
            for name in expected:
                assert torch.equal(got[name], expected[name]), name
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_compiles_as_one_graph(dtype, reduction):
    pairs, n_s, n_t = make_pairs(12, seed=4)
    student, teacher = torch.randn(n_s, 24).to(dtype), torch.randn(n_t, 24).to(dtype)

    def loss(s):
        return (vd.span_loss(s * 2, teacher, pairs, temperature=2.0, reduction=reduction) * 3).sum()

    assert_compiles(loss, student)


def test_opcheck():
    pairs, n_s, n_t = make_pairs(9, seed=4, gaps=True)
    spans = [pairs.student_start, pairs.student_end, pairs.teacher_start, pairs.teacher_end]
    for student in (torch.randn(n_s, 8), torch.randn(n_s, 16)[:, ::2].contiguous(), torch.randn(n_s, 16)[:, :8]):
        torch.library.opcheck(
            torch.ops.vocabdistil.span_loss.default,
            ([student], [torch.randn(n_t, 8)], spans, torch.rand(9), 0.5, None, None, 0, True, 2.0, 0.5, "cpu")
            + (True, True),
        )


def test_upstream_gradients():
    pairs, n_s, n_t = make_pairs(8, seed=4)
    student, teacher = torch.randn(n_s, 16), torch.randn(n_t, 16)
    unit = torch.autograd.grad(vd.span_loss(leaf := student.clone().requires_grad_(), teacher, pairs), leaf)[0]
    leaf = student.clone().requires_grad_()
    loss = vd.span_loss(leaf, teacher, pairs)
    once = torch.autograd.grad(loss, leaf, retain_graph=True)[0].clone()
    scaled = torch.autograd.grad(loss, leaf, torch.tensor(-3.0), retain_graph=True)[0]
    again = torch.autograd.grad(loss, leaf)[0]
    assert torch.equal(once, unit) and torch.equal(again, unit)
    torch.testing.assert_close(scaled, -3 * unit)
    leaf = student.clone().requires_grad_()  # a stride-0 upstream gradient
    vd.span_loss(leaf, teacher, pairs, reduction="none").sum().backward()
    torch.testing.assert_close(leaf.grad, unit * 8)


def test_float16_gradients_survive_a_loss_scale():
    pairs, n_s, n_t = make_pairs(500, seed=4)
    student, teacher = torch.randn(n_s, 64).half(), torch.randn(n_t, 64).half()
    leaf = student.clone().requires_grad_()
    (vd.span_loss(leaf, teacher, pairs) * 65536).backward()
    wide = student.double().requires_grad_()
    (vd.reference.span_loss(wide, teacher.double(), pairs) * 65536).backward()
    assert_norm_close(leaf.grad, wide.grad, torch.float16, "gradient")


def test_inputs_are_left_alone_and_gradients_are_owned():
    pairs, n_s, n_t = make_pairs(8, seed=4)
    student, teacher = torch.randn(n_s, 16, requires_grad=True), torch.randn(n_t, 16)
    copies = student.detach().clone(), teacher.clone()
    for _ in range(2):
        vd.span_loss(student, teacher, pairs).backward()
    assert torch.equal(student.detach(), copies[0]) and torch.equal(teacher, copies[1])
    single = torch.autograd.grad(vd.span_loss(student, teacher, pairs), student)[0]
    torch.testing.assert_close(student.grad, 2 * single)


def test_zero_pairs_and_uncovered_tokens():
    none = torch.zeros(0, dtype=torch.int32)
    student = torch.randn(4, 8, requires_grad=True)
    loss = vd.span_loss(student, torch.randn(3, 8), vd.SpanPairs(none, none, none, none))
    loss.backward()
    assert loss.item() == 0 and torch.count_nonzero(student.grad) == 0
    pairs = vd.SpanPairs(*(torch.tensor([v]) for v in (1, 3, 0, 1)))
    student = torch.randn(5, 8, requires_grad=True)
    vd.span_loss(student, torch.randn(3, 8), pairs).backward()
    assert torch.count_nonzero(student.grad[[0, 3, 4]]) == 0
    assert torch.count_nonzero(student.grad[1:3]) == 16


def test_nan_is_not_hidden():
    pairs, n_s, n_t = make_pairs(8, seed=4)
    for divergence in DIVERGENCES:
        student, teacher = torch.randn(n_s, 16), torch.randn(n_t, 16)
        student[3, 5] = float("nan")
        assert vd.span_loss(student, teacher, pairs, divergence=divergence).isnan(), divergence


def test_autocast_takes_mixed_dtypes():
    pairs, n_s, n_t = make_pairs(8, seed=4)
    student, teacher = torch.randn(n_s, 16), torch.randn(n_t, 16)
    weight = torch.randn(16, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = vd.span_loss(student.bfloat16(), teacher, pairs, weight=weight)
    loss.backward()
    expected = vd.reference.span_loss(student.bfloat16().float(), teacher, pairs, weight=weight)
    torch.testing.assert_close(loss, expected)
    assert weight.grad.dtype == torch.float32


def test_teacher_gets_no_gradient():
    pairs, n_s, n_t = make_pairs(8, seed=4)
    student, teacher = torch.randn(n_s, 4, requires_grad=True), torch.randn(n_t, 4, requires_grad=True)
    vd.span_loss(student, teacher, pairs).backward()
    assert teacher.grad is None and student.grad is not None


GOOD = {"student": torch.randn(6, 4), "teacher": torch.randn(3, 4)}
BAD = [
    ({"student": [[1.0]]}, TypeError, "student"),
    ({"student": torch.randn(4)}, ValueError, "student"),
    ({"student": torch.randn(6, 4).long()}, TypeError, "student"),
    ({"student": torch.randn(6, 5)}, ValueError, "weight"),
    ({"student": torch.randn(5, 4)}, ValueError, "pairs"),
    ({"teacher": torch.randn(2, 4)}, ValueError, "pairs"),
    ({"teacher": torch.randn(3, 4, device="meta")}, ValueError, "teacher"),
    ({"student": []}, ValueError, "student"),
    ({"student": [torch.randn(6, 4), torch.randn(7, 4)]}, ValueError, r"student\[1\]"),
    ({"pairs": None}, TypeError, "pairs"),
    ({"divergence": "l2"}, ValueError, "divergence"),
    ({"temperature": 0.0}, ValueError, "temperature"),
    ({"temperature": float("nan")}, ValueError, "temperature"),
    ({"pooling": "max"}, ValueError, "pooling"),
    ({"reduction": "mean"}, ValueError, "reduction"),
    ({"divergence": "jsd", "beta": 1.0}, ValueError, "beta"),
    ({"weight": torch.randn(4, 5)}, ValueError, "weight"),
    ({"student": torch.randn(6, 0), "teacher": torch.randn(3, 0)}, ValueError, "student"),
    ({"weight": torch.randn(4, 4).double()}, TypeError, "weight"),
    ({"bias": torch.randn(4)}, ValueError, "bias"),
    ({"weight": torch.randn(4, 4), "bias": torch.randn(5)}, ValueError, "bias"),
    ({"pair_weights": torch.ones(2)}, ValueError, "pair_weights"),
    ({"student_layer_weights": [1.0, 2.0]}, ValueError, "student_layer_weights"),
    ({"backend": "tpu"}, ValueError, "backend"),
    ({"backend": "cuda"}, ValueError, "backend"),
]


@pytest.mark.parametrize(("change", "error", "name"), BAD, ids=[f"{list(b[0])[0]}-{i}" for i, b in enumerate(BAD)])
def test_bad_input_is_named(change, error, name):
    pairs = vd.SpanPairs(*(torch.tensor(v) for v in ([0, 2, 3], [2, 3, 6], [0, 1, 2], [1, 2, 3])))
    options = {**GOOD, "pairs": pairs, **change}
    with pytest.raises(error, match=f"^{name}") as caught:
        vd.span_loss(options.pop("student"), options.pop("teacher"), options.pop("pairs"), **options)
    assert "\n" not in str(caught.value)


def test_mse_gradient_of_large_and_close_rows():
    """Subtracting first is exact here; scaling first would leave the rounding of 1000 in a difference of 0.001."""
    generator = torch.Generator().manual_seed(0)
    student = 1000 + 10 * torch.randn(3, 64, generator=generator)
    teacher = student + 1e-3 * torch.randn(3, 64, generator=generator)
    at = torch.arange(4, dtype=torch.int32)
    pairs = vd.SpanPairs(at[:-1], at[1:], at[:-1], at[1:])
    leaf, wide = student.clone().requires_grad_(), student.double().requires_grad_()
    vd.span_loss(leaf, teacher, pairs, divergence="mse").backward()
    vd.reference.span_loss(wide, teacher.double(), pairs, divergence="mse").backward()
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-6, atol=0)


def test_a_temperature_that_float32_cannot_square_is_refused():
    at = torch.arange(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="temperature"):
        vd.span_kl(torch.ones(1, 2), torch.ones(1, 2), vd.SpanPairs(at[:1], at[1:], at[:1], at[1:]), temperature=1e-40)
