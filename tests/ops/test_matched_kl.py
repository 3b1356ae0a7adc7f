"""matched_kl on CPU: the kernel against the float64 reference, autograd, compile, determinism, bad input."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import vocabdistil as vd
from tests.compiling import assert_compiles
from tests.spans import make_pairs
from tests.tolerances import assert_norm_close
from tests.vocabularies import make_matched, randn

UNMATCHED = ["renormalize", "rest", "drop"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")


def run(module, student, teacher, matched, **options):
    student = student.clone().requires_grad_()
    loss = module.matched_kl(student, teacher, matched, **options)
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
    (loss * upstream).sum().backward()
    return loss.detach(), student.grad


def compare(student, teacher, matched, factor=1, **options):
    loss, grad = run(vd, student, teacher, matched, **options)
    want_loss, want_grad = run(vd.reference, student.double(), teacher.double(), matched, **options)
    dtype = student.dtype
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == exact and grad.dtype == dtype and grad.shape == student.shape
    assert_norm_close(loss, want_loss, exact, "loss", factor)
    assert_norm_close(grad, want_grad, dtype, "gradient", factor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unmatched", UNMATCHED)
@pytest.mark.parametrize(
    ("v_s", "v_t", "v_m"), [(2, 3, 1), (7, 9, 4), (50, 33, 32), (500, 3000, 450), (5031, 2048, 1999)]
)
def test_against_float64(v_s, v_t, v_m, unmatched, dtype):
    matched = make_matched(v_s, v_t, v_m)
    student, teacher = randn(13, v_s, seed=1, dtype=dtype, scale=2), randn(13, v_t, seed=2, dtype=dtype, scale=2)
    compare(student, teacher, matched, unmatched=unmatched, temperature=1.7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pooling", ["mean", "sum"])
@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_pairs(unmatched, pooling, dtype):
    pairs, n_s, n_t = make_pairs(31, seed=3, gaps=True, empty=True)
    student, teacher = randn(n_s, 60, seed=1, dtype=dtype), randn(n_t, 90, seed=2, dtype=dtype)
    for reduction in ("batchmean", "sum", "none"):
        options = {"pairs": pairs, "pooling": pooling, "unmatched": unmatched, "reduction": reduction}
        compare(student, teacher, make_matched(60, 90, 47), temperature=2.0, **options)


@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_large_vocabulary(unmatched):
    matched = make_matched(200_000, 256_000, 150_000)
    student, teacher = randn(2, 200_000, seed=1, scale=3), randn(2, 256_000, seed=2, scale=3)
    compare(student, teacher, matched, unmatched=unmatched)


@pytest.mark.parametrize("unmatched", ["renormalize", "rest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradient_is_zero_where_both_sides_are_equal(unmatched, dtype):
    x = randn(9, 300, dtype=dtype, scale=4)
    ids = torch.randperm(300)[:120]
    student = x.clone().requires_grad_()
    loss = vd.matched_kl(student, x, vd.MatchedVocab(ids, ids), unmatched=unmatched, temperature=1.3)
    loss.backward()
    assert loss.item() == 0 and torch.count_nonzero(student.grad) == 0


@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_minus_infinity(unmatched):
    matched = make_matched(40, 50, 30)
    student, teacher = randn(6, 40, seed=1), randn(6, 50, seed=2)
    s, t = matched.student_ids, matched.teacher_ids
    teacher[0, t[:7]] = -INF  # on the teacher's side only
    teacher[1, t[:7]] = student[1, s[:7]] = -INF  # on both
    teacher[2, t[1:]] = -INF  # all matched mass on one token
    teacher[3] = -INF
    teacher[3, t[5]] = 0  # all mass on one token
    student[4] = -1e4
    student[4, s[3]] = 0
    others = [v for v in range(40) if v not in s.tolist()]
    student[5, others[1:]] = teacher[5, [v for v in range(50) if v not in t.tolist()][1:]] = -INF
    compare(student, teacher, matched, unmatched=unmatched, temperature=2.0)
    student[0, s[9]] = -INF  # mass of the teacher where the student has none
    assert vd.matched_kl(student, teacher, matched, unmatched=unmatched).item() == INF


def test_a_side_without_matched_or_unmatched_mass():
    matched = make_matched(40, 50, 30)
    student, teacher = randn(2, 40, seed=1), randn(2, 50, seed=2)
    teacher[0, matched.teacher_ids] = -INF
    teacher[1, [v for v in range(50) if v not in matched.teacher_ids.tolist()]] = -INF
    for unmatched in ("rest", "drop"):
        compare(student, teacher, matched, unmatched=unmatched)
    # All columns matched, on the teacher's side or on both.
    compare(student, teacher[:, :30], vd.MatchedVocab(torch.arange(30), matched.student_ids), unmatched="rest")
    everything = vd.MatchedVocab(torch.arange(30), torch.arange(30))
    for unmatched in UNMATCHED:
        compare(student[:, :30], randn(2, 30, seed=3), everything, unmatched=unmatched)


@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_rare_classes_do_not_underflow(unmatched):
    matched = make_matched(40, 50, 30)
    student, teacher = randn(4, 40, seed=1, scale=40), randn(4, 50, seed=2, scale=40)
    student[0, matched.student_ids] += 500
    student[1, matched.student_ids] -= 500
    teacher[2, matched.teacher_ids] -= 500
    compare(student, teacher, matched, unmatched=unmatched, factor=3)


@pytest.mark.parametrize("unmatched", UNMATCHED)
@pytest.mark.parametrize("with_pairs", [False, True])
def test_gradcheck(unmatched, with_pairs):
    pairs, n_s, n_t = make_pairs(5, seed=2, gaps=True, empty=True)
    if not with_pairs:
        pairs, n_s, n_t = None, 4, 4
    student = randn(n_s, 7, dtype=torch.float64).requires_grad_()
    teacher = randn(n_t, 6, seed=1, dtype=torch.float64)
    for reduction in ("batchmean", "sum", "none"):
        options = {"pairs": pairs, "unmatched": unmatched, "temperature": 1.5, "reduction": reduction}
        assert torch.autograd.gradcheck(
            lambda s, o=options: vd.matched_kl(s, teacher, make_matched(7, 6, 4), **o), (student,)
        )


def test_strided_inputs():
    matched = make_matched(12, 20, 8)
    flat_s, flat_t = randn(10, 12, seed=1), randn(10, 20, seed=2)
    expected = run(vd, flat_s, flat_t, matched)
    views = {
        "3d": (flat_s.view(2, 5, 12), flat_t.view(2, 5, 20)),
        "transposed": (flat_s.t().contiguous().t(), flat_t.t().contiguous().t()),
        "row stride": (torch.cat([flat_s, flat_s], 1)[:, :12], torch.cat([flat_t, flat_t], 1)[:, :20]),
        "column stride": (flat_s.repeat_interleave(2, 1)[:, ::2], flat_t.repeat_interleave(2, 1)[:, ::2]),
        "cut": (
            torch.cat([flat_s.view(2, 5, 12)] * 2, 1)[:, :5], torch.cat([flat_t.view(2, 5, 20)] * 2, 1)[:, :5]
        ),
    }  # fmt: skip
    for name, (s, t) in views.items():
        leaf = s.detach().requires_grad_()
        loss = vd.matched_kl(leaf, t, matched) * 0.5
        loss.backward()
        assert torch.equal(loss.detach(), expected[0] * 0.5), name
        assert torch.equal(leaf.grad.reshape(10, 12), expected[1]), name
    row = randn(1, 12).expand(10, 12)
    compare(row, flat_t, matched)


@pytest.mark.parametrize("unmatched", UNMATCHED)
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_bit_identical_for_any_number_of_threads(threads, unmatched):
    pairs, n_s, n_t = make_pairs(300, seed=9, gaps=True)
    student, teacher, matched = randn(n_s, 900, seed=1), randn(n_t, 1100, seed=2), make_matched(900, 1100, 800)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(vd, student, teacher, matched, pairs=pairs, unmatched=unmatched)
        torch.set_num_threads(threads)
        for _ in range(2):
            loss, grad = run(vd, student, teacher, matched, pairs=pairs, unmatched=unmatched)
            assert torch.equal(loss, expected[0]) and torch.equal(grad, expected[1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("with_pairs", [False, True])
def test_compiles_as_one_graph(dtype, reduction, with_pairs):
    pairs, n_s, n_t = make_pairs(12, seed=4)
    if not with_pairs:
        pairs, n_s, n_t = None, 12, 12
    student, teacher = randn(n_s, 24, dtype=dtype), randn(n_t, 30, seed=1, dtype=dtype)
    matched = make_matched(24, 30, 20)

    def loss(s):
        return (vd.matched_kl(s * 2, teacher, matched, pairs=pairs, temperature=2.0, reduction=reduction) * 3).sum()

    assert_compiles(loss, student)


@pytest.mark.parametrize("unmatched", [0, 1, 2])
def test_opcheck(unmatched):
    pairs, n_s, n_t = make_pairs(9, seed=4, gaps=True)
    spans = [pairs.student_start, pairs.student_end, pairs.teacher_start, pairs.teacher_end]
    ids = [torch.tensor(v, dtype=torch.int32) for v in ([3, 0, 6], [1, 2, 9])]
    op = torch.ops.vocabdistil.matched_kl.default
    for student in (randn(n_s, 8), randn(n_s, 16)[:, :8], randn(8, n_s).t().contiguous()):
        torch.library.opcheck(
            op, (student, randn(n_t, 10), spans, *ids, torch.rand(9), unmatched, True, 2.0, "cpu", True, True)
        )
    rows = (randn(4, 8), randn(4, 10), [], *ids, torch.rand(4))
    torch.library.opcheck(op, (*rows, unmatched, True, 2.0, "cpu", True, False))


def test_upstream_gradients():
    student, teacher, matched = randn(8, 16), randn(8, 20, seed=1), make_matched(16, 20, 11)
    unit = torch.autograd.grad(vd.matched_kl(leaf := student.clone().requires_grad_(), teacher, matched), leaf)[0]
    leaf = student.clone().requires_grad_()
    loss = vd.matched_kl(leaf, teacher, matched)
    once = torch.autograd.grad(loss, leaf, retain_graph=True)[0].clone()
    scaled = torch.autograd.grad(loss, leaf, torch.tensor(-3.0), retain_graph=True)[0]
    again = torch.autograd.grad(loss, leaf)[0]
    assert torch.equal(once, unit) and torch.equal(again, unit)
    torch.testing.assert_close(scaled, -3 * unit)
    leaf = student.clone().requires_grad_()  # a stride-0 upstream gradient
    vd.matched_kl(leaf, teacher, matched, reduction="none").sum().backward()
    torch.testing.assert_close(leaf.grad, unit * 8)


def test_float16_gradients_survive_a_loss_scale():
    student, teacher = randn(300, 64, dtype=torch.float16), randn(300, 64, seed=1, dtype=torch.float16)
    matched = make_matched(64, 64, 40)
    leaf = student.clone().requires_grad_()
    (vd.matched_kl(leaf, teacher, matched) * 65536).backward()
    wide = student.double().requires_grad_()
    (vd.reference.matched_kl(wide, teacher.double(), matched) * 65536).backward()
    assert_norm_close(leaf.grad, wide.grad, torch.float16, "gradient")


def test_inputs_are_left_alone_and_gradients_are_owned():
    student, teacher = randn(8, 16).requires_grad_(), randn(8, 20, seed=1).requires_grad_()
    matched = make_matched(16, 20, 11)
    copies = student.detach().clone(), teacher.detach().clone()
    for _ in range(2):
        vd.matched_kl(student, teacher, matched).backward()
    assert torch.equal(student, copies[0]) and torch.equal(teacher, copies[1]) and teacher.grad is None
    single = torch.autograd.grad(vd.matched_kl(student, teacher, matched), student)[0]
    torch.testing.assert_close(student.grad, 2 * single)
    unmatched = [v for v in range(16) if v not in matched.student_ids.tolist()]
    assert torch.count_nonzero(student.grad[:, unmatched]) == 0


@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_no_rows(unmatched):
    none = torch.zeros(0, dtype=torch.int32)
    for pairs, n in ((None, 0), (vd.SpanPairs(none, none, none, none), 3)):
        student = randn(n, 8).requires_grad_()
        loss = vd.matched_kl(student, randn(n, 9), make_matched(8, 9, 5), pairs=pairs, unmatched=unmatched)
        loss.backward()
        assert loss.item() == 0 and torch.count_nonzero(student.grad) == 0


def test_nan_is_not_hidden():
    matched = make_matched(16, 20, 11)
    for side in (0, 1):
        for unmatched in UNMATCHED:
            logits = [randn(3, 16), randn(3, 20)]
            logits[side][1, (matched.student_ids, matched.teacher_ids)[side][4]] = float("nan")
            assert vd.matched_kl(*logits, matched, unmatched=unmatched).isnan(), (side, unmatched)
    student = randn(3, 16)
    student[:, [v for v in range(16) if v not in matched.student_ids.tolist()]] = float("nan")
    assert vd.matched_kl(student, randn(3, 20), matched).isfinite()  # not read
    assert vd.matched_kl(student, randn(3, 20), matched, unmatched="rest").isnan()


def test_autocast_takes_mixed_dtypes():
    student, teacher, matched = randn(8, 16, dtype=torch.bfloat16), randn(8, 20, seed=1), make_matched(16, 20, 11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = vd.matched_kl(student, teacher, matched)
    torch.testing.assert_close(loss, vd.reference.matched_kl(student.float(), teacher, matched))


IDS = SimpleNamespace(student_ids=torch.tensor([1, 3]), teacher_ids=torch.tensor([0, 4]))
BAD = [
    ({"student_logits": [[1.0]]}, TypeError, "student_logits"),
    ({"student_logits": torch.randn(4)}, ValueError, "student_logits"),
    ({"student_logits": torch.ones(3, 4).long()}, TypeError, "student_logits"),
    ({"student_logits": torch.randn(4, 4)}, ValueError, "student_logits"),
    ({"teacher_logits": torch.randn(3, 5, device="meta")}, ValueError, "teacher_logits"),
    ({"student_logits": torch.randn(3, 3)}, ValueError, r"matched\.student_ids: expected ids from 0 to 2, got 3"),
    ({"teacher_logits": torch.randn(3, 4)}, ValueError, r"matched\.teacher_ids: expected ids from 0 to 3, got 4"),
    ({"matched": None}, TypeError, "matched"),
    ({"matched": SimpleNamespace(student_ids=torch.tensor([1, 1]), teacher_ids=torch.tensor([0, 4]))}, ValueError,
     r"matched\.student_ids: expected each id once, got id 1"),
    ({"matched": SimpleNamespace(student_ids=torch.tensor([1, 2]), teacher_ids=torch.tensor([3, 3])),
      "unmatched": "rest"}, ValueError, r"matched\.teacher_ids: expected each id once, got id 3"),
    ({"pairs": "all"}, TypeError, "pairs"),
    ({"temperature": 0.0}, ValueError, "temperature"),
    ({"pooling": "max"}, ValueError, "pooling"),
    ({"unmatched": "keep"}, ValueError, "unmatched"),
    ({"reduction": "mean"}, ValueError, "reduction"),
    ({"student_logits": torch.randn(3, 2), "unmatched": "rest",
      "matched": SimpleNamespace(student_ids=torch.tensor([0, 1]), teacher_ids=torch.tensor([0, 4]))}, ValueError,
     "unmatched"),
    ({"backend": "cuda"}, ValueError, "backend"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "text"), BAD, ids=[f"{list(b[0])[0]}-{i}" for i, b in enumerate(BAD)])
def test_bad_input_is_named(change, error, text):
    options = {"student_logits": torch.randn(3, 4), "teacher_logits": torch.randn(3, 5), "matched": IDS, **change}
    with pytest.raises(error, match=f"^{text}") as caught:
        vd.matched_kl(**options)
    assert "\n" not in str(caught.value)


def test_the_kernel_itself_rejects_what_it_cannot_read():
    op = torch.ops.vocabdistil.matched_kl.default
    good = torch.tensor([0, 1], dtype=torch.int32)
    for ids in ([0, 4], [-1, 2], [2, 2]):
        with pytest.raises(ValueError, match="matched.student_ids"):
            bad = torch.tensor(ids, dtype=torch.int32)
            op(randn(2, 4), randn(2, 5), [], bad, good, torch.ones(2), 0, True, 1.0, "cpu", True, True)
    start, past = torch.tensor([0], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    with pytest.raises(ValueError, match="pairs: expected ascending disjoint teacher spans within 2 rows"):
        spans, scale = [start, past, start, past], torch.ones(1)
        op(randn(3, 4), randn(2, 5), spans, good, good, scale, 0, True, 1.0, "cpu", True, True)
    with pytest.raises(ValueError, match="within 2 rows"):
        op(randn(2, 4), randn(2, 5), [], good, good, torch.ones(3), 0, True, 1.0, "cpu", True, True)
