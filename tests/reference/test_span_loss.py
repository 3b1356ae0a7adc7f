from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.reference_cases import F64, both_spans, identity_pairs, mixed_pairs, naive_kl, no_pairs, rows
from tests.tolerances import LOSS, VALUE, assert_close
from vocabdistil.alignment.spans import SpanPairs
from vocabdistil.core.checks import DIVERGENCES
from vocabdistil.reference import span_kl, span_loss

LOG2, LOG3 = math.log(2), math.log(3)


def naive(
    student, teacher, pairs, divergence, temperature=1.0, weight=None, bias=None, beta=0.5, pooling="mean"
):
    losses = []
    for (s0, s1), (t0, t1) in both_spans(pairs):
        if s0 == s1 or t0 == t1:
            losses.append(student.new_zeros(()))
            continue
        s = student[s0:s1].sum(0) / ((s1 - s0) if pooling == "mean" else 1)
        t = teacher[t0:t1].sum(0) / ((t1 - t0) if pooling == "mean" else 1)
        if weight is not None:
            s = weight @ s + (0 if bias is None else bias)
        if divergence == "mse":
            losses.append(((s - t) ** 2).sum())
        elif divergence == "cosine":
            losses.append(1 - F.cosine_similarity(s, t, dim=0, eps=1e-8))
        else:
            q, r = torch.softmax(t / temperature, 0), torch.softmax(s / temperature, 0)
            m = beta * q + (1 - beta) * r
            loss = {
                "kl": lambda q=q, r=r: naive_kl(q, r),
                "reverse_kl": lambda q=q, r=r: naive_kl(r, q),
                "jsd": lambda q=q, r=r, m=m: beta * naive_kl(q, m) + (1 - beta) * naive_kl(r, m),
            }[divergence]()
            losses.append(temperature**2 * loss)
    return torch.stack(losses)


def two_distributions():
    """Hidden states with softmax r = (1/4, 1/4, 1/2) (student) and q = (1/2, 1/4, 1/4) (teacher)."""
    teacher = torch.tensor([[LOG2, 0.0, 0.0]], dtype=F64)
    student = torch.tensor([[0.0, 0.0, LOG2]], dtype=F64)
    return student, teacher


# KL(q||r) = 1/2 log 2 - 1/4 log 2; the midpoint is (3/8, 1/4, 3/8), so JS = 1/2 log(4/3) + 1/4 log(2/3).
JS_BY_HAND = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        ("kl", 0.25 * LOG2),
        ("reverse_kl", 0.25 * LOG2),
        ("jsd", JS_BY_HAND),
        ("mse", 2 * LOG2**2),
        ("cosine", 1.0),
    ],
)
def test_by_hand(divergence, expected):
    student, teacher = two_distributions()
    loss = span_loss(student, teacher, identity_pairs(1), divergence=divergence)
    assert loss.item() == pytest.approx(expected, abs=1e-14)


def test_kl_direction_by_hand():
    # q = (3/4, 1/4), r = (1/2, 1/2).
    teacher, student = torch.tensor([[LOG3, 0.0]], dtype=F64), torch.zeros(1, 2, dtype=F64)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    backward = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    pairs = identity_pairs(1)
    assert span_loss(student, teacher, pairs).item() == pytest.approx(forward, abs=1e-14)
    assert span_loss(student, teacher, pairs, divergence="reverse_kl").item() == pytest.approx(
        backward, abs=1e-14
    )


def test_temperature_by_hand():
    # At T = 2, logits twice as large give the same distributions; the loss grows by T^2.
    student, teacher = two_distributions()
    loss = span_kl(2 * student, 2 * teacher, identity_pairs(1), temperature=2.0)
    assert loss.item() == pytest.approx(4 * 0.25 * LOG2, abs=1e-14)


def test_mse_and_cosine_by_hand():
    student = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=F64)
    teacher = torch.tensor([[5.0, -3.0]], dtype=F64)
    pairs = SpanPairs([0], [2], [0], [1])
    # The student's mean is (2, 3).
    assert span_loss(student, teacher, pairs, divergence="mse", temperature=3.0).item() == 9 + 36
    assert span_loss(student, teacher, pairs, divergence="mse", pooling="sum").item() == 1 + 81
    cosine = (2 * 5 - 3 * 3) / math.sqrt(13 * 34)
    assert span_loss(student, teacher, pairs, divergence="cosine").item() == pytest.approx(
        1 - cosine, abs=1e-14
    )


def test_jsd_is_symmetric_at_one_half_and_swaps_otherwise():
    a, b, pairs = rows(4, 5), rows(4, 5, seed=1), identity_pairs(4)
    forward = span_loss(a, b, pairs, divergence="jsd")
    assert_close(forward, span_loss(b, a, pairs, divergence="jsd"), LOSS, F64)
    assert 0 < forward.item() < LOG2
    assert_close(
        span_loss(a, b, pairs, divergence="jsd", beta=0.2),
        span_loss(b, a, pairs, divergence="jsd", beta=0.8),
        LOSS,
        F64,
    )


def test_kl_equals_torch():
    student, teacher = rows(6, 9), rows(6, 9, seed=1)
    expected = F.kl_div(F.log_softmax(student / 2, -1), F.softmax(teacher / 2, -1), reduction="batchmean")
    assert_close(span_kl(student, teacher, identity_pairs(6), temperature=2.0), 4 * expected, LOSS, F64)


@pytest.mark.parametrize("pooling", ["mean", "sum"])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equals_a_loop(divergence, projected, pooling):
    pairs = mixed_pairs()
    student, teacher = rows(7, 3 if projected else 5, grad=True), rows(6, 5, seed=1)
    weight, bias = (rows(5, 3, seed=2, grad=True), rows(1, 5, seed=3)[0]) if projected else (None, None)
    options = dict(temperature=1.7, weight=weight, bias=bias, beta=0.3, pooling=pooling)
    losses = span_loss(student, teacher, pairs, divergence=divergence, reduction="none", **options)
    expected = naive(student, teacher, pairs, divergence, **options)
    assert_close(losses, expected, LOSS, F64)
    inputs = [student] + ([weight] if projected else [])
    for actual, wanted in zip(
        torch.autograd.grad(losses.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        assert_close(actual, wanted, VALUE, F64)
    pair_weights = rows(1, len(pairs), seed=4)[0]
    options["divergence"] = divergence
    weighted = span_loss(student, teacher, pairs, pair_weights=pair_weights, reduction="none", **options)
    assert_close(weighted, pair_weights * expected, LOSS, F64)
    total = span_loss(student, teacher, pairs, pair_weights=pair_weights, reduction="sum", **options)
    assert_close(total, weighted.sum(), LOSS, F64)
    mean = span_loss(student, teacher, pairs, pair_weights=pair_weights, **options)
    assert pairs.num_nonempty == 3
    assert_close(mean, weighted.sum() / 3, LOSS, F64)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence, reduction):
    pairs = mixed_pairs()
    teacher = [rows(6, 3, seed=s) for s in (1, 2)]
    inputs = (
        rows(7, 2, seed=3, grad=True),
        rows(7, 2, seed=4, grad=True),
        rows(3, 2, seed=5, grad=True),
        rows(1, 3, seed=6)[0].requires_grad_(),
        rows(1, len(pairs), seed=7)[0].abs().requires_grad_(),
        torch.tensor([0.5, 1.0], dtype=F64, requires_grad=True),
        torch.tensor([2.0, 0.7], dtype=F64, requires_grad=True),
    )

    def loss(h0, h1, weight, bias, pair_weights, student_layer_weights, teacher_layer_weights):
        return span_loss(
            [h0, h1],
            teacher,
            pairs,
            divergence=divergence,
            temperature=1.3,
            beta=0.4,
            weight=weight,
            bias=bias,
            pair_weights=pair_weights,
            reduction=reduction,
            student_layer_weights=student_layer_weights,
            teacher_layer_weights=teacher_layer_weights,
        )

    assert torch.autograd.gradcheck(loss, inputs)


def test_layers():
    pairs = mixed_pairs()
    students, teachers = [rows(7, 4, seed=s) for s in (0, 1, 2)], [rows(6, 4, seed=s) for s in (3, 4)]
    uniform = span_kl(students, teachers, pairs)
    assert_close(uniform, span_kl(sum(students) / 3, sum(teachers) / 2, pairs), LOSS, F64)
    weighted = span_kl(
        students,
        teachers,
        pairs,
        student_layer_weights=[1, 2, 1],
        teacher_layer_weights=torch.tensor([3.0, 1.0], dtype=F64),
    )
    expected = span_kl(
        (students[0] + 2 * students[1] + students[2]) / 4, (3 * teachers[0] + teachers[1]) / 4, pairs
    )
    assert_close(weighted, expected, LOSS, F64)
    assert_close(
        span_kl([students[0]], [teachers[0]], pairs), span_kl(students[0], teachers[0], pairs), LOSS, F64
    )


def test_batches_are_flattened():
    student, teacher = rows(8, 4), rows(6, 4, seed=1)
    pairs = SpanPairs([0, 3, 4], [2, 4, 8], [0, 2, 3], [1, 3, 5])
    assert torch.equal(
        span_kl(student.view(2, 4, 4), teacher.view(2, 3, 4), pairs), span_kl(student, teacher, pairs)
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_teacher_gets_no_gradient(divergence):
    student, teacher = rows(7, 4, grad=True), rows(6, 4, seed=1, grad=True)
    span_loss(student, teacher, mixed_pairs(), divergence=divergence).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_student_equal_to_teacher(divergence):
    x = rows(5, 16)
    student = x.clone().requires_grad_()
    loss = span_loss(student, x, identity_pairs(5), divergence=divergence, temperature=2.0)
    loss.backward()
    if divergence == "mse":
        assert loss.item() == 0 and student.grad.eq(0).all()
    # Autograd's softmax multiplies by a sum of probabilities that is 1 up to rounding only.
    assert abs(loss.item()) < 1e-15 and student.grad.abs().max() < 1e-15


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_pairs_give_zero(divergence, reduction):
    for pairs in (no_pairs(), SpanPairs([1, 2], [1, 3], [0, 2], [2, 2])):
        student, weight = rows(4, 2, grad=True), rows(3, 2, seed=1, grad=True)
        loss = span_loss(
            student, rows(4, 3), pairs, divergence=divergence, reduction=reduction, weight=weight
        )
        assert loss.item() == 0 and loss.shape == ()
        loss.backward()
        assert student.grad.eq(0).all() and weight.grad.eq(0).all()
    assert span_loss(rows(4, 3), rows(4, 3), no_pairs(), divergence=divergence, reduction="none").shape == (
        0,
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_empty_spans_keep_nan_out(divergence):
    # Pair 1 has no student token and its teacher token is NaN; student token 1 lies in no span.
    pairs = SpanPairs([0, 1, 2], [1, 1, 3], [0, 1, 2], [1, 2, 3])
    student, teacher, weight = rows(3, 4), rows(3, 4, seed=1), rows(4, 4, seed=2, grad=True)
    student[1], teacher[1] = float("nan"), float("nan")
    student.requires_grad_()
    loss = span_loss(student, teacher, pairs, divergence=divergence, weight=weight, reduction="none")
    assert loss[1] == 0 and loss.isfinite().all()
    loss.sum().backward()
    assert student.grad.isfinite().all() and weight.grad.isfinite().all() and student.grad[1].eq(0).all()


@pytest.mark.parametrize("divergence", ["kl", "jsd", "reverse_kl"])
def test_zero_probabilities(divergence):
    # Feature 0 has no mass on either side, and in the last pair only the student gives feature 1 some.
    inf = float("inf")
    teacher = torch.tensor([[-inf, 0.0, 1.0], [-inf, -inf, 0.0]], dtype=F64)
    student = torch.tensor([[-inf, 0.5, 0.0], [-inf, 0.0, 0.0]], dtype=F64, requires_grad=True)
    loss = span_loss(student, teacher, identity_pairs(2), divergence=divergence, reduction="none")
    if divergence == "reverse_kl":
        assert loss[0].isfinite() and loss[1] == inf
        student = student.detach()[:1].requires_grad_()
        loss = span_loss(student, teacher[:1], identity_pairs(1), divergence=divergence, reduction="none")
    elif divergence == "kl":
        assert loss[1].item() == pytest.approx(LOG2)
    assert loss.isfinite().all()
    loss.sum().backward()
    assert student.grad.isfinite().all() and student.grad[:, 0].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_dtypes(divergence, dtype):
    student, teacher = rows(7, 32, dtype=dtype, grad=True), rows(6, 32, seed=1, dtype=dtype)
    wide = student.detach().double().requires_grad_()
    loss = span_loss(student, teacher, mixed_pairs(), divergence=divergence)
    expected = span_loss(wide, teacher.double(), mixed_pairs(), divergence=divergence)
    assert loss.dtype == torch.float32 and expected.dtype == F64
    assert_close(loss, expected, LOSS, dtype)
    loss.backward()
    expected.backward()
    assert student.grad.dtype == dtype
    assert_close(student.grad, wide.grad, VALUE, dtype)


def test_projection_of_half_precision_may_be_float32():
    student, teacher = rows(7, 3, dtype=torch.bfloat16), rows(6, 5, seed=1, dtype=torch.bfloat16)
    weight = rows(5, 3, seed=2, dtype=torch.float32)
    loss = span_kl(student, teacher, mixed_pairs(), weight=weight)
    expected = span_kl(student.double(), teacher.double(), mixed_pairs(), weight=weight.double())
    assert_close(loss, expected, LOSS, torch.bfloat16)


def test_autocast_does_not_round():
    student, teacher, weight = rows(7, 3).float(), rows(6, 5, seed=1).float(), rows(5, 3, seed=2).float()
    expected = span_kl(student, teacher, mixed_pairs(), weight=weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(span_kl(student, teacher, mixed_pairs(), weight=weight), expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_compiles_without_a_graph_break(divergence):
    student, teacher, weight = rows(7, 3, grad=True), rows(6, 5, seed=1), rows(5, 3, seed=2)
    pairs = mixed_pairs()

    def loss(x):
        return span_loss(x, teacher, pairs, divergence=divergence, weight=weight)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(compiled(student), loss(student), LOSS, F64)
    (actual,) = torch.autograd.grad(compiled(student), student)
    (expected,) = torch.autograd.grad(loss(student), student)
    assert_close(actual, expected, VALUE, F64)


def test_span_kl_is_span_loss():
    student, teacher = rows(7, 4), rows(6, 4, seed=1)
    pairs = mixed_pairs()
    assert torch.equal(
        span_kl(student, teacher, pairs, temperature=2.0, pooling="sum", backend="reference"),
        span_loss(student, teacher, pairs, divergence="kl", temperature=2.0, pooling="sum"),
    )


S, T = torch.zeros(7, 4), torch.zeros(6, 4)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "error", "message"),
    [
        ("x", T, {}, TypeError, "student: expected a tensor or a list"),
        ([], T, {}, ValueError, "student: expected at least one layer"),
        (S, S.int(), {}, TypeError, "teacher: expected float32"),
        (S[0], T, {}, ValueError, "student: expected 2 or 3 dimensions"),
        ([S, S[:3]], T, {}, ValueError, r"student\[1\]: expected shape \(7, 4\)"),
        ([S, S.double()], T, {}, TypeError, r"student\[1\]: expected dtype float32"),
        (S, T.to("meta"), {}, ValueError, "teacher: expected device cpu as student, got meta"),
        (S[:6], T, {}, ValueError, "pairs: expected student positions up to 6, got a span that ends at 7"),
        (S, T[:5], {}, ValueError, "pairs: expected teacher positions up to 5, got a span that ends at 6"),
        (S[:, :3], T, {}, ValueError, r"weight: expected a projection of shape \(4, 3\)"),
        (S, T, {"weight": torch.zeros(4, 3)}, ValueError, r"weight: expected shape \(4, 4\), got \(4, 3\)"),
        (
            S,
            T,
            {"weight": torch.zeros(4, 4).double()},
            TypeError,
            "weight: expected dtype float32, got float64",
        ),
        (S, T, {"bias": torch.zeros(4)}, ValueError, "bias: expected None"),
        (
            S,
            T,
            {"weight": torch.zeros(4, 4), "bias": torch.zeros(3)},
            ValueError,
            r"bias: expected shape \(4,\)",
        ),
        (
            S,
            T,
            {"pair_weights": torch.zeros(2)},
            ValueError,
            r"pair_weights: expected shape \(6,\), got \(2,\)",
        ),
        (S, T, {"pair_weights": [1.0] * 6}, TypeError, "pair_weights: expected a tensor, got list"),
        (S, T, {"divergence": "l2"}, ValueError, "divergence: expected one of 'kl'"),
        (S, T, {"pooling": "max"}, ValueError, "pooling: expected one of"),
        (S, T, {"reduction": "mean"}, ValueError, "reduction: expected one of 'batchmean'"),
        (S, T, {"temperature": 0.0}, ValueError, "temperature: expected a finite number > 0, got 0.0"),
        (
            S,
            T,
            {"temperature": float("nan")},
            ValueError,
            "temperature: expected a finite number > 0, got nan",
        ),
        (S, T, {"temperature": "2"}, TypeError, "temperature: expected a number, got str"),
        (S, T, {"beta": 1.0}, ValueError, "beta: expected a number between 0 and 1"),
        (S, T, {"backend": "cuda"}, ValueError, "backend: expected one of None, 'reference', got 'cuda'"),
        (
            [S, S],
            T,
            {"student_layer_weights": [1.0]},
            ValueError,
            r"student_layer_weights: expected one weight per",
        ),
        (
            [S, S],
            T,
            {"student_layer_weights": [1.0, -1.0]},
            ValueError,
            "student_layer_weights: expected weights",
        ),
        (
            S,
            [T, T],
            {"teacher_layer_weights": 1.0},
            TypeError,
            "teacher_layer_weights: expected a tensor or a list",
        ),
    ],
)
def test_errors(student, teacher, options, error, message):
    with pytest.raises(error, match=message) as caught:
        span_loss(student, teacher, mixed_pairs(), **options)
    assert "\n" not in str(caught.value)


def test_pairs_must_be_span_pairs():
    with pytest.raises(TypeError, match="pairs: expected SpanPairs, got list"):
        span_loss(S, T, [(0, 1)])
