"""relation_loss on CPU: what every backend must do, and autograd, long texts, threads, compile, bad input."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd
from tests.compiling import assert_compiles
from tests.relation_loss_backend import *  # noqa: F403
from tests.relation_loss_backend import compare, make_texts, run, states
from tests.vocabularies import randn

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "d_s", "d_t", "heads"),
    [([40, 3, 90], 264, 768, 12), ([50, 51], 4096, 1000, 1), ([1000], 8, 24, 2), ([530, 200], 16, 16, 1)],
)
def test_wide_states_and_long_texts(sizes, d_s, d_t, heads, dtype):
    """The scores of the longest texts do not fit into one block of rows."""
    pairs, shape_s, shape_t = make_texts(sizes, seed=d_s, empty=True)
    student, teacher = states(shape_s, d_s, 1, dtype, heads), states(shape_t, d_t, 2, dtype, heads)
    compare(student, teacher, pairs, None, "cpu", heads=heads)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_gradcheck(reduction):
    pairs, shape_s, shape_t = make_texts([5, 1, 4], seed=1, empty=True)
    student, other = (randn(*shape_s, width, dtype=torch.float64).requires_grad_() for width in (6, 4))
    teachers = [randn(*shape_t, width, seed=2, dtype=torch.float64) for width in (4, 10)]
    assert torch.autograd.gradcheck(
        lambda s, o: vd.relation_loss((s, o), teachers, pairs, heads=2, reduction=reduction), (student, other)
    )


def test_other_strides():
    pairs, shape_s, shape_t = make_texts([5, 9], seed=2)
    student, teacher = states(shape_s, 24, 1)[..., ::2], states(shape_t, 8, 2).transpose(1, 2).contiguous()
    compare(student, teacher.transpose(1, 2), pairs, None, "cpu", heads=2)


def test_large_scores():
    """Where nearly all mass lies on one of the scores, of hundreds."""
    pairs, shape_s, shape_t = make_texts([20, 30], seed=2)
    student, teacher = randn(*shape_s, 8, scale=12, seed=1), randn(*shape_t, 8, scale=12, seed=2)
    got = run(vd, student, teacher, pairs, heads=2)
    want = run(vd.reference, student.double(), teacher.double(), pairs, heads=2)
    for value, expected in zip(got, want, strict=True):
        torch.testing.assert_close(value, expected.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_the_same_bits_for_any_number_of_threads(reduction):
    pairs, shape_s, shape_t = make_texts([90, 130, 4], seed=9, empty=True)
    student, teacher = states(shape_s, 48, 1), states(shape_t, 96, 2)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(vd, student, teacher, pairs, heads=4, reduction=reduction))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_upstream_gradients_and_autocast():
    pairs, shape_s, shape_t = make_texts([9, 6], seed=4)
    student, teacher = states(shape_s, 8, 1).requires_grad_(), states(shape_t, 8, 2).requires_grad_()
    loss = vd.relation_loss(student, teacher, pairs, heads=2)
    once = torch.autograd.grad(loss, student, retain_graph=True)[0].clone()
    scaled = torch.autograd.grad(loss, student, torch.tensor(-4.0), retain_graph=True)[0]
    loss.backward()
    assert torch.equal(student.grad, once) and torch.equal(scaled, -4 * once) and teacher.grad is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vd.relation_loss(student, teacher, pairs, heads=2), loss)
        mixed = vd.relation_loss(student.bfloat16(), teacher, pairs, heads=2)
    assert mixed.dtype == torch.float32 and mixed != loss and abs(mixed - loss) < 0.01 * loss


def test_float16_gradients_survive_a_loss_scale():
    pairs, shape_s, shape_t = make_texts([200, 150], seed=4)
    student, teacher = states(shape_s, 8, 1, torch.float16), states(shape_t, 8, 2, torch.float16)
    leaf, wide = student.clone().requires_grad_(), student.double().requires_grad_()
    (vd.relation_loss(leaf, teacher, pairs, heads=2) * 4096).backward()
    (vd.reference.relation_loss(wide, teacher.double(), pairs, heads=2) * 4096).backward()
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_as_one_graph(dtype, reduction):
    pairs, shape_s, shape_t = make_texts([9, 6], seed=4, empty=True)
    student, teacher = states(shape_s, 8, 1, dtype), states(shape_t, 12, 2, dtype)

    def loss(s):
        kinds = [s * 2, s + 1]
        return vd.relation_loss(kinds, [teacher, teacher], pairs, heads=2, reduction=reduction).square().sum() * 3

    assert_compiles(loss, student)


def test_opcheck():
    op = torch.ops.vocabdistil.relation_loss.default
    first, last = torch.tensor([[0, 0, 2, 2, 2], [2, 2, 5, 2, 5]], dtype=torch.int32)
    student, teacher, scale = randn(5, 4), randn(5, 6, seed=1), torch.rand(5)
    for s, t in ((student, teacher), (randn(4, 5).t(), randn(6, 5, seed=1).t())):
        for wanted in (True, False):
            torch.library.opcheck(op, (s, t, first, last, scale, 2, "cpu", wanted))


def test_labels_are_only_compared():
    """Whatever they are, no row is read that is not there: texts are neighbours of one label."""
    op = torch.ops.vocabdistil.relation_loss.default
    student, teacher, scale = randn(6, 4), randn(6, 6, seed=1), torch.rand(6)
    sane = torch.tensor([[0, 0, 0, 3, 4, 4], [2, 2, 2, 3, 6, 6]], dtype=torch.int32)
    wild = torch.tensor([[-7, -7, -7, 9, 2**31 - 9, 2**31 - 9], [2**31 - 1] * 3 + [-5] + [2**31 - 1] * 2])
    for a, b in zip(*(op(student, teacher, *x.int(), scale, 2, "cpu", True) for x in (sane, wild)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_second_derivatives_are_refused(reduction):
    pairs, shape_s, shape_t = make_texts([9, 6], seed=4)
    student = states(shape_s, 8, 1).requires_grad_()
    loss = vd.relation_loss(student, states(shape_t, 8, 2), pairs, heads=2, reduction=reduction).square().sum()
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.square().sum().backward()


BAD = [
    ({"student": torch.randn(8, 4)}, ValueError, "student: expected 3 dimensions"),
    ({"student": torch.zeros(2, 4, 4, dtype=torch.int64)}, TypeError, "student: .*int64"),
    ({"student": 5}, TypeError, "student: .*int"),
    ({"student": []}, ValueError, "student: expected at least one kind"),
    ({"student": [torch.randn(2, 4, 4)] * 2}, ValueError, r"teacher: expected as many kinds as student \(2\), got 1"),
    ({"student": [torch.randn(2, 4, 4), torch.randn(2, 5, 4)], "teacher": [torch.randn(2, 3, 4)] * 2}, ValueError,
     r"student\[1\]: expected shape \(2, 4, any\) .*got \(2, 5, 4\)"),
    ({"student": [torch.randn(2, 4, 4), torch.randn(2, 4, 4).double()], "teacher": [torch.randn(2, 3, 4)] * 2},
     TypeError, r"student\[1\]: expected dtype float32"),
    ({"student": torch.randn(2, 4, 5)}, ValueError, r"student: expected a width that heads \(2\) divides"),
    ({"teacher": torch.randn(2, 3, 0)}, ValueError, r"teacher: expected a width that heads \(2\) divides"),
    ({"teacher": torch.randn(3, 3, 4)}, ValueError, r"teacher: expected as many texts as student \(2\), got 3"),
    ({"teacher": torch.randn(2, 2, 4)}, ValueError, "pairs: expected teacher positions up to 4"),
    ({"student": torch.randn(2, 5, 4)}, ValueError, "pairs: expected spans in one text"),
    ({"teacher": torch.randn(2, 4, 4)}, ValueError, r"pairs: .*got student \[4, 6\) of texts of 4 tokens, teacher"),
    ({"pairs": None}, TypeError, "pairs"),
    ({"heads": 0}, ValueError, "heads: expected a number >= 1, got 0"),
    ({"heads": 2.0}, TypeError, "heads: .*float"),
    ({"heads": True}, TypeError, "heads: .*bool"),
    ({"reduction": "mean"}, ValueError, "reduction: .*'mean'"),
    ({"backend": "cuda"}, ValueError, "backend: 'cuda' has no relation_loss"),
]  # fmt: skip


@pytest.mark.parametrize("module", [vd, vd.reference], ids=["kernels", "reference"])
@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[f"{list(b[0])[0]}-{i}" for i, b in enumerate(BAD)])
def test_bad_input_is_named(change, error, message, module):
    pairs = vd.SpanPairs([0, 2, 4], [2, 4, 6], [0, 1, 3], [1, 2, 6])
    options = {"student": torch.randn(2, 4, 4), "teacher": torch.randn(2, 3, 4), "pairs": pairs, "heads": 2, **change}
    if module is vd.reference and "backend" in change:
        message = "backend: expected one of"
    with pytest.raises(error, match=f"^{message}"):
        module.relation_loss(**options)
