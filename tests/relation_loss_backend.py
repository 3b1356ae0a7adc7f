"""What relation_loss must do in every backend, against the float64 reference. A tier imports these tests and says by
its fixtures which ``backend`` runs on which ``device``: the C++ on the CPU (None), Triton in the interpreter or on a
GPU."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd
from tests.tolerances import assert_norm_close
from tests.vocabularies import randn

HALF_OR_SINGLE = [torch.float32, torch.bfloat16, torch.float16]


def make_texts(sizes, seed=0, empty=False):
    """Texts of so many pairs each, some tokens in no span; the pairs, and [B, L] of either side. ``empty``: some spans
    hold no token."""
    g = torch.Generator().manual_seed(seed)

    def side(longest):
        lengths = [torch.randint(0 if empty else 1, longest + 1, (n,), generator=g) for n in sizes]
        ends = [(length + torch.randint(0, 2, length.shape, generator=g)).cumsum(0) for length in lengths]
        width = max((int(end[-1]) for end in ends if len(end)), default=0) + 1
        end = torch.cat([end + width * text for text, end in enumerate(ends)])
        return end - torch.cat(lengths), end, (len(sizes), width)

    student, teacher = side(3), side(2)
    return vd.SpanPairs(*student[:2], *teacher[:2]), student[2], teacher[2]


def states(shape, width, seed, dtype=torch.float32, heads=1):
    """Such that the relations are neither all alike nor all of a row's mass on itself."""
    return randn(*shape, width, seed=seed, dtype=dtype, scale=1.3 * (width // heads) ** -0.25)


def run(module, student, teacher, pairs, **options):
    """The loss, and the student's gradient (of several kinds: one after the other)."""
    kinds = [x.clone().requires_grad_() for x in (student if isinstance(student, list) else [student])]
    loss = module.relation_loss(kinds if isinstance(student, list) else kinds[0], teacher, pairs, **options)
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype, device=loss.device).view_as(loss)
    (loss * upstream).sum().backward()
    return loss.detach(), torch.cat([x.grad.flatten() for x in kinds])


def compare(student, teacher, pairs, backend, device, **options):
    def on(x, dtype=None):
        return [on(y, dtype) for y in x] if isinstance(x, list) else x.to(device, dtype)

    student, teacher, pairs = on(student), on(teacher), pairs.to(device)
    loss, grad = run(vd, student, teacher, pairs, backend=backend, **options)
    again = run(vd, student, teacher, pairs, backend=backend, **options)
    want_loss, want_grad = run(
        vd.reference, on(student, torch.float64), on(teacher, torch.float64), pairs, **options
    )
    dtype = grad.dtype
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == exact and torch.equal(loss, again[0]) and torch.equal(grad, again[1])
    factor = 2 if backend == "triton" else 1  # three passes in TF32, or the interpreter's cut to bfloat16
    assert_norm_close(loss, want_loss, exact, "loss", factor)
    assert_norm_close(grad, want_grad, dtype, "gradient", factor)


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE, ids=str)
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize(("d_s", "d_t", "heads"), [(1, 1, 1), (6, 10, 2), (36, 60, 12), (7, 130, 1), (140, 20, 1)])
def test_widths_and_dtypes(d_s, d_t, heads, empty, dtype, backend, device):
    pairs, shape_s, shape_t = make_texts([5, 1, 17, 0, 8], seed=d_s, empty=empty)
    student, teacher = states(shape_s, d_s, 1, dtype, heads), states(shape_t, d_t, 2, dtype, heads)
    compare(student, teacher, pairs, backend, device, heads=heads)


@pytest.mark.parametrize("sizes", [[1], [63, 2], [70, 0, 131], [1] * 70], ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_sizes_of_texts_and_reductions(sizes, reduction, backend, device):
    pairs, shape_s, shape_t = make_texts(sizes, seed=3, empty=True)
    student, teacher = states(shape_s, 12, 1, heads=2), states(shape_t, 20, 2, heads=2)
    compare(student, teacher, pairs, backend, device, heads=2, reduction=reduction)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_several_kinds_are_averaged(reduction, backend, device):
    pairs, shape_s, shape_t = make_texts([9, 6], seed=4, empty=True)
    student = [states(shape_s, width, i) for i, width in enumerate((12, 4, 8))]
    teacher = [states(shape_t, width, 5 + i) for i, width in enumerate((20, 20, 4))]
    compare(student, teacher, pairs, backend, device, heads=4, reduction=reduction)


def test_a_pair_alone_in_its_text_has_no_loss_and_no_gradient(backend, device):
    pairs, shape_s, shape_t = make_texts([1, 1, 1])
    loss, grad = run(
        vd, states(shape_s, 6, 1).to(device), states(shape_t, 9, 2).to(device), pairs.to(device), heads=3,
        reduction="none", backend=backend,
    )  # fmt: skip
    assert torch.count_nonzero(loss) == 0 and torch.count_nonzero(grad) == 0 and len(loss) == 3


@pytest.mark.parametrize("width", [6, 130])
def test_equal_sides_have_no_loss_and_no_gradient(width, backend, device):
    pairs, shape, _ = make_texts([40, 90], seed=6)
    same = vd.SpanPairs(pairs.student_start, pairs.student_end, pairs.student_start, pairs.student_end).to(device)
    x = states(shape, width, 1).to(device)
    loss, grad = run(vd, x, x, same, heads=2, backend=backend)
    assert loss.item() == 0 and torch.count_nonzero(grad) == 0


def test_what_no_pair_holds_is_not_read(backend, device):
    """Tokens outside the spans, and the other side of an empty span, are NaN."""
    pairs, shape_s, shape_t = make_texts([12, 7], seed=8, empty=True)
    student, teacher = (torch.full((*shape, 4), float("nan")) for shape in (shape_s, shape_t))
    both = (pairs.student_end > pairs.student_start) & (pairs.teacher_end > pairs.teacher_start)
    assert 0 < pairs.num_nonempty < len(pairs)
    for p in both.nonzero()[:, 0].tolist():
        student.view(-1, 4)[pairs.student_start[p] : pairs.student_end[p]] = randn(4, seed=p)
        teacher.view(-1, 4)[pairs.teacher_start[p] : pairs.teacher_end[p]] = randn(4, seed=99 + p)
    compare(student, teacher, pairs, backend, device, heads=2, reduction="none")


def test_no_pairs(backend, device):
    none = torch.zeros(0, dtype=torch.int32)
    empty = vd.SpanPairs([0, 4], [0, 4], [0, 3], [1, 4])
    for pairs in (vd.SpanPairs(none, none, none, none), empty):
        student, teacher = randn(2, 4, 6).to(device), randn(2, 3, 4, seed=1).to(device)
        loss, grad = run(vd, student, teacher, pairs.to(device), heads=2, backend=backend)
        assert loss.item() == 0 and torch.count_nonzero(grad) == 0
