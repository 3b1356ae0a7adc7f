"""The vocabulary losses against the float64 reference: needs a CUDA device."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd
from tests import contrastive_backend, relation_loss_backend
from tests.graphs import capture
from tests.numbers_backend import (  # noqa: F401
    test_divergences_over_a_remapped_vocabulary_at_any_temperature,
    test_linear_classes_of_one_size_at_any_temperature,
    test_linear_divergences_at_any_temperature,
)
from tests.ops import test_span_likelihood
from tests.remapped_kl_backend import make_table, make_weights
from tests.spans import make_pairs
from tests.tolerances import RELATIVE, assert_norm_close
from tests.vocabularies import make_matched
from vocabdistil.ops._products import product

pytestmark = pytest.mark.gpu


@pytest.fixture
def backend():
    return "triton"


@pytest.fixture
def device():
    return "cuda"


def check_row_loss(name, student, teacher, correspondence, upstream, **options):
    """The Triton kernel against the float64 reference, and the same bits every time."""

    def both(module, s, t, **backend):
        leaf = s.clone().requires_grad_()
        loss = getattr(module, name)(leaf, t, correspondence, **options, **backend)
        (loss * upstream).backward()
        return loss.detach(), leaf.grad

    loss, grad = both(vd, student, teacher, backend="triton")
    again = both(vd, student, teacher, backend="triton")
    want, want_grad = both(vd.reference, student.double(), teacher.double())
    assert torch.equal(loss, again[0]) and torch.equal(grad, again[1])
    exact = torch.float64 if student.dtype == torch.float64 else torch.float32
    assert_norm_close(loss, want, exact, "loss", 2)
    assert_norm_close(grad, want_grad, student.dtype, "gradient", 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_span_likelihood_against_float64(linear, dtype):
    arguments = test_span_likelihood.make(dtype, linear, batch=20, v_s=5031, v_t=20000, d_s=64, d_t=96)
    arguments = {k: v.to("cuda") for k, v in arguments.items()}
    # Hidden states in half precision go through the tensor cores, and so does the gradient of their logits.
    for reduction in ("batchmean", "none"):
        got = test_span_likelihood.compare(arguments, "triton", reduction=reduction)
    again = test_span_likelihood.run(vd, arguments, backend="triton", reduction="none")
    assert all(torch.equal(got[k], again[k]) for k in got)


def test_memory_of_linear_span_likelihood():
    arguments = test_span_likelihood.make(torch.bfloat16, True, batch=400, v_s=32000, v_t=32000, d_s=64, d_t=64)
    arguments = {k: v.to("cuda") for k, v in arguments.items()}
    arguments["student_weight"].requires_grad_()
    for _ in range(2):  # what stays with a device is made by the first call
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        vd.linear_span_likelihood(**arguments).backward()
        torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 100e6  # the logits of one side would take 460 MB


def linear_tensors(rows, v_s, v_t, d_s, d_t, dtype):
    shapes = (rows, d_s), (v_s, d_s), (rows, d_t), (v_t, d_t)
    return [(torch.randn(*shape, device="cuda") / shape[1] ** 0.25).to(dtype) for shape in shapes]


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("unmatched", ["renormalize", "rest", "drop"])
@pytest.mark.parametrize(("rows", "v_s", "v_m"), [(700, 5031, 4700), (300, 20011, 17001)])
def test_linear_matched_kl_against_float64(rows, v_s, v_m, unmatched, dtype, backend):
    matched = make_matched(v_s, 30000, v_m).to("cuda")
    tensors = linear_tensors(rows, v_s, 30000, 64, 96, dtype)

    def all_of(module, dtype, **options):
        leaves = [x.to(dtype, copy=True).requires_grad_(i < 2) for i, x in enumerate(tensors)]
        loss = module.linear_matched_kl(*leaves, matched, unmatched=unmatched, temperature=1.7, **options)
        loss.backward()
        return loss.detach(), leaves[0].grad, leaves[1].grad

    got, again = (all_of(vd, dtype, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    for value, want in zip(got, all_of(vd.reference, torch.float64), strict=True):
        assert_norm_close(value, want, value.dtype, unmatched, 10 if value.dtype == torch.float32 else 2)


@pytest.mark.parametrize(
    ("rows", "v_t", "v_s", "v_m", "limit"), [(4096, 119547, 5031, 4700, 64e6), (8192, 151936, 32000, 28000, 300e6)]
)
def test_memory_of_linear_matched_kl(rows, v_t, v_s, v_m, limit):
    matched = make_matched(v_s, v_t, v_m).to("cuda")
    student, weight, *teacher = linear_tensors(rows, v_s, v_t, 264, 768, torch.bfloat16)
    leaves = student.requires_grad_(), weight.requires_grad_()
    for dtype in (torch.float32, torch.bfloat16):  # the first product of a process allocates a workspace
        torch.ones(8, 8, device="cuda", dtype=dtype) @ torch.ones(8, 8, device="cuda", dtype=dtype)
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = vd.linear_matched_kl(*leaves, *teacher, matched)
        assert torch.cuda.max_memory_allocated() - before <= limit
        loss.backward()
        for leaf in leaves:
            leaf.grad = None


@pytest.mark.parametrize("unmatched", ["renormalize", "rest", "drop"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_matched_kl_in_a_cuda_graph(dtype, unmatched):
    matched = make_matched(5031, 30000, 4700).to("cuda")
    student, weight, *teacher = linear_tensors(700, 5031, 30000, 264, 768, dtype)
    leaves = student.requires_grad_(), weight.requires_grad_()

    def step():
        loss = vd.linear_matched_kl(*leaves, *teacher, matched, unmatched=unmatched, backend="triton") * 2
        return loss, *torch.autograd.grad(loss, leaves)

    graph, captured = capture(step)
    with torch.no_grad():
        student.copy_(torch.randn_like(student))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("temperature", [1.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_rows_that_are_close_keep_their_digits(dtype, temperature):
    """And where they are equal all is 0."""
    ids = torch.arange(4700)
    matched = vd.MatchedVocab(ids, ids).to("cuda")
    student, weight, *_ = linear_tensors(700, 5031, 5031, 264, 264, dtype)
    bias, noise = (torch.randn(5031, device="cuda") for _ in range(2))

    def all_of(module, cast, apart, **options):
        leaves = [cast(x).clone().requires_grad_() for x in (student, weight, bias)]
        teacher = {"teacher_bias": cast(bias + apart * noise), "temperature": temperature, **options}
        loss = module.linear_matched_kl(
            *leaves[:2], cast(student), cast(weight), matched, student_bias=leaves[2], **teacher
        )  # fmt: skip
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    scale = 2.0**16  # so that float16 has room for the gradients
    got = all_of(vd, lambda x: x, 1e-3, scale=scale)
    for i, (value, want) in enumerate(zip(got, all_of(vd.reference, torch.Tensor.double, 1e-3), strict=True)):
        error = (value.double() / scale - want).norm() / want.norm()
        assert error <= (2 * RELATIVE[dtype] if i else 2e-4)
    assert all(torch.count_nonzero(value) == 0 for value in all_of(vd, lambda x: x, 0.0))


def test_half_products_are_written_in_float32():
    a, b = (torch.randn(n, 256, device="cuda").bfloat16() for n in (300, 500))
    out = torch.empty(300, 512, device="cuda")[:, :500]
    want = a.double() @ b.double().t()
    for add, factor in ((False, 1), (True, 2)):
        product(a, b.t(), out, add)
        assert_norm_close(out, factor * want, torch.float32, "product")


@pytest.mark.parametrize("given", ["pairs", "mask", "rows"])
def test_shifts_do_not_wait_for_the_device(given):
    matched = make_matched(503, 700, 470)
    at = torch.arange(256)
    every = {"pairs": vd.SpanPairs(at, at + 1, at, at + 1), "mask": torch.ones(4, 64, dtype=torch.bool)}
    options = {name: x for name, x in every.items() if name == given}
    student, teacher = torch.randn(4, 64, 503), torch.randn(4, 64, 700)
    want = vd.matched_kl(student, teacher, matched, teacher_shift=1, **options)
    student, teacher, matched = student.cuda().requires_grad_(), teacher.cuda(), matched.to("cuda")
    options = {name: x.to("cuda") for name, x in options.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = vd.matched_kl(student, teacher, matched, teacher_shift=1, **options)
        got.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got.cpu(), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("combine", ["sum", "logsumexp"])
@pytest.mark.parametrize("paired", [False, True])
def test_remapped_kl_against_float64(paired, combine, dtype):
    """With a piece that stands in every fourth row, and chunks of pairs."""
    table = make_table(9000, 700, longest=9)
    table.ids[table.indptr[:-2:4].long()] = 5
    pairs, n_s, n_t = make_pairs(300, seed=3, gaps=True, empty=True)
    pairs, n_s, n_t = (pairs.to("cuda"), n_s, n_t) if paired else (None, 300, 300)
    student, teacher = (torch.randn(n, v, device="cuda").to(dtype) for n, v in ((n_s, 700), (n_t, 9000)))
    check_row_loss("remapped_kl", student, teacher, table, 3.0, pairs=pairs, combine=combine, temperature=1.7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("remainder", ["rest", "drop", "renormalize"])
@pytest.mark.parametrize("combine", ["sum", "logsumexp"])
def test_remapped_kl_with_weights_and_top_k(combine, remainder, dtype):
    table = make_table(9000, 700, longest=9)
    student, teacher = (torch.randn(300, v, device="cuda").to(dtype) for v in (700, 9000))
    options = {"entry_weights": make_weights(table), "top_k": 50, "remainder": remainder, "combine": combine}
    check_row_loss("remapped_kl", student, teacher, table, 3.0, temperature=1.7, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"top_k": 50}, {"combine": "logsumexp"}], ids=str)
def test_linear_remapped_kl_against_float64(options, dtype):
    table, tensors = make_table(9000, 700, longest=9), linear_tensors(500, 700, 9000, 64, 96, dtype)

    def all_of(module, dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_(i < 2) for i, x in enumerate(tensors)]
        loss = module.linear_remapped_kl(*leaves, table, temperature=1.7, **options)
        loss.backward()
        return loss.detach(), leaves[0].grad, leaves[1].grad

    got, again = (all_of(vd, dtype) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    for value, want in zip(got, all_of(vd.reference, torch.float64), strict=True):
        assert_norm_close(value, want, value.dtype, str(options), 10 if value.dtype == torch.float32 else 2)


@pytest.mark.parametrize("combine", ["sum", "logsumexp"])
def test_memory_of_remapped_kl_does_not_grow_with_the_rows(combine):
    table = make_table(30000, 700)
    peaks = []
    for rows in (4096, 12288):
        student, teacher = (torch.randn(rows, v, device="cuda").bfloat16() for v in (700, 30000))
        student.requires_grad_()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        vd.remapped_kl(student, teacher, table, combine=combine).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before - student.grad.nbytes)
    assert peaks[1] < 1.2 * peaks[0] < 4e8


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("parts", contrastive_backend.PARTS)
@pytest.mark.parametrize("known", [None, True, False], ids=["all", "known", "unknown"])
@pytest.mark.parametrize(("count", "negatives"), [(37, 5), (3001, 0), (3001, 200)])
def test_contrastive_against_float64(count, negatives, known, parts, backend):
    contrastive_backend.compare_op(count, negatives, known, parts, backend, "cuda")


@pytest.mark.parametrize("parts", contrastive_backend.PARTS)
@pytest.mark.parametrize("known", [None, False], ids=["all", "unknown"])
def test_contrastive_of_more_pairs_than_a_program_holds(known, parts):
    contrastive_backend.compare_op(9001, 0, known, parts, "triton", "cuda")


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", contrastive_backend.HALF_OR_SINGLE, ids=str)
@pytest.mark.parametrize(("count", "width"), [(1, 8), (700, 384), (2000, 768)])
def test_contrastive_of_hidden_states(count, width, dtype, backend):
    pairs, n_s, n_t = make_pairs(count, seed=3, gaps=True, empty=count > 1)
    student, teacher = (torch.randn(n, width).to(dtype) for n in (n_s, n_t))
    contrastive_backend.compare(student, teacher, pairs, backend, "cuda", temperature=0.1)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("negatives", [-1, 4, 32])
def test_contrastive_is_deterministic_and_reproducible(negatives, backend):
    pairs, n_s, n_t = make_pairs(3000, seed=1, gaps=True, empty=True)
    pairs = pairs.to("cuda")
    student, teacher = torch.randn(n_s, 64, device="cuda"), torch.randn(n_t, 64, device="cuda")

    def once():
        leaf = student.clone().requires_grad_()
        generator = torch.Generator("cuda").manual_seed(1)
        options = {"negatives": negatives, "generator": generator, "backend": backend}
        loss = vd.contrastive(leaf, teacher, pairs, **options)
        loss.backward()
        return loss.detach(), leaf.grad

    first = once()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    if negatives == -1:
        want = vd.reference.contrastive(student.double(), teacher.double(), pairs)
        assert_norm_close(first[0], want, torch.float32, "loss", 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_contrastive_of_half_hidden_states(dtype):
    pairs, n_s, n_t = make_pairs(3000, seed=1, gaps=True, empty=True)
    pairs = pairs.to("cuda")
    student, teacher = ((torch.randn(n, 64, device="cuda") + 1).to(dtype) for n in (n_s, n_t))

    def both(module, dtype):
        leaf = student.to(dtype, copy=True).requires_grad_()
        loss = module.contrastive(leaf, teacher.to(dtype), pairs, temperature=0.1)
        loss.backward()
        return loss.detach(), leaf.grad

    (loss, grad), (want, want_grad) = both(vd, dtype), both(vd.reference, torch.float64)
    assert_norm_close(loss, want, torch.float32, "loss", 50)
    assert_norm_close(grad, want_grad, dtype, "gradient", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("d_s", "d_t", "heads"), [(264, 768, 12), (384, 768, 48), (1024, 1024, 16), (300, 768, 1)])
def test_relation_loss_against_float64(d_s, d_t, heads, dtype):
    pairs, shape_s, shape_t = relation_loss_backend.make_texts([250, 1, 0, 90, 130], seed=3, empty=True)
    student = relation_loss_backend.states(shape_s, d_s, 1, dtype, heads)
    teacher = relation_loss_backend.states(shape_t, d_t, 2, dtype, heads)
    relation_loss_backend.compare(student, teacher, pairs, "triton", "cuda", heads=heads)


def test_relation_loss_of_equal_sides_is_zero_and_the_host_never_waits():
    pairs, shape, _ = relation_loss_backend.make_texts([250, 90], seed=6)
    same = vd.SpanPairs(pairs.student_start, pairs.student_end, pairs.student_start, pairs.student_end).to("cuda")
    x = relation_loss_backend.states(shape, 768, 1).cuda()
    leaf = x.clone().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = vd.relation_loss([leaf, leaf * 1], [x, x], same, heads=12)
        loss.backward(torch.full((), 3.0, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.item() == 0 and torch.count_nonzero(leaf.grad) == 0


def test_memory_of_relation_loss_does_not_grow_with_the_square_of_the_length():
    pairs, shape_s, shape_t = relation_loss_backend.make_texts([4000], seed=6)
    student = relation_loss_backend.states(shape_s, 96, 1, heads=12).cuda().requires_grad_()
    teacher, pairs = relation_loss_backend.states(shape_t, 96, 2, heads=12).cuda(), pairs.to("cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    vd.relation_loss(student, teacher, pairs, heads=12).backward()
    assert torch.cuda.max_memory_allocated() - before < 4000 * 4000 * 4  # the scores of one head of one side
