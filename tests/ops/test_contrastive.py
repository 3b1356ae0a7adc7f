"""contrastive in torch on the CPU: what every backend must do, and autograd, negatives, compile, memory, bad input."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

import vocabdistil as vd
from tests.compiling import assert_compiles
from tests.contrastive_backend import *  # noqa: F403
from tests.spans import make_pairs
from tests.tolerances import assert_norm_close
from tests.vocabularies import LargestAllocation, randn
from vocabdistil.ops._products import left_parts, right_parts, split_tf32

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """A few pairs at a time, so that small inputs take several turns."""
    monkeypatch.setattr(import_module("vocabdistil.ops.contrastive"), "BUDGET", 2048)


@pytest.fixture(params=["product", "gathered"])
def scores(request, monkeypatch):
    """Both ways to form the scores of drawn negatives, however many pairs there are."""
    module = import_module("vocabdistil.ops.contrastive")
    monkeypatch.setattr(module, "_SPARSE", 10**9 if request.param == "product" else 0)


def run(module, student, teacher, pairs, seed=None, **options):
    leaves = {"student": student.clone().requires_grad_()}
    leaves |= {k: v.clone().requires_grad_() for k, v in options.items() if k in ("weight", "bias")}
    options = {**options, **{k: v for k, v in leaves.items() if k != "student"}}
    if seed is not None:
        options["generator"] = torch.Generator().manual_seed(seed)
    loss = module.contrastive(leaves["student"], teacher, pairs, **options)
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
    (loss * upstream).sum().backward()
    return {"loss": loss.detach(), **{k: v.grad for k, v in leaves.items()}}


def compare(student, teacher, pairs, seed=None, **options):
    got = run(vd, student, teacher, pairs, seed, **options)
    wide = {k: v.double() if torch.is_tensor(v) else v for k, v in options.items()}
    want = run(vd.reference, student.double(), teacher.double(), pairs, seed, **wide)
    for name, value in got.items():
        dtype = student.dtype
        if name == "loss" and dtype != torch.float64:
            dtype = torch.float32
        assert value.dtype == dtype, name
        assert_norm_close(value, want[name], dtype, name, factor=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("negatives", [-1, 1, 7, 60])
@pytest.mark.parametrize("empty", [False, True])
def test_against_float64(side, negatives, empty, dtype, scores):
    pairs, n_s, n_t = make_pairs(61, seed=3, gaps=True, empty=empty)
    student, teacher = randn(n_s, 20, seed=1, dtype=dtype), randn(n_t, 20, seed=2, dtype=dtype)
    options = {"side": side, "negatives": negatives, "temperature": 0.3}
    compare(student, teacher, pairs, seed=5, **options)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("negatives", [-1, 5])
def test_projection_and_reductions(negatives, side, reduction):
    pairs, n_s, n_t = make_pairs(40, seed=5, gaps=True, empty=True)
    compare(
        randn(n_s, 12, seed=1), randn(n_t, 17, seed=2), pairs, seed=6, weight=randn(17, 12, seed=3, scale=0.3),
        bias=randn(17, seed=4), side=side, negatives=negatives, reduction=reduction,
    )  # fmt: skip


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("negatives", [-1, 3])
def test_gradcheck(side, negatives, scores):
    pairs, n_s, n_t = make_pairs(9, seed=2, gaps=True, empty=True)
    student = randn(n_s, 4, dtype=torch.float64).requires_grad_()
    weight = randn(5, 4, seed=1, dtype=torch.float64).requires_grad_()
    teacher = randn(n_t, 5, seed=2, dtype=torch.float64)
    for reduction in ("batchmean", "none"):
        assert torch.autograd.gradcheck(
            lambda s, w, r=reduction: vd.contrastive(
                s, teacher, pairs, weight=w, side=side, negatives=negatives, temperature=0.5, reduction=r,
                generator=torch.Generator().manual_seed(1),
            ),
            (student, weight),
        )  # fmt: skip


def test_by_hand():
    # Two orthogonal pairs that agree with themselves: loss = log(1 + exp(-1 / T)).
    pairs = vd.SpanPairs([0, 1], [1, 2], [0, 1], [1, 2])
    loss = vd.contrastive(torch.eye(2) * 3, torch.eye(2), pairs, temperature=0.5)
    torch.testing.assert_close(loss, torch.tensor(1 + torch.e**-2).log())


def test_negatives_are_distinct_others():
    draw = import_module("vocabdistil.ops.contrastive").draw_negatives
    valid = torch.ones(50, dtype=torch.bool)
    valid[[3, 17, 40]] = False
    seen = torch.zeros(50, 50)
    for seed in range(60):
        ids = draw(50, valid, 12, torch.device("cpu"), torch.Generator().manual_seed(seed))
        assert ids.shape == (50, 12)
        assert all(len(set(row)) == 12 and p not in row and valid[row].all() for p, row in enumerate(ids.tolist()))
        seen.scatter_add_(1, ids, torch.ones(50, 12))
    others = valid[None] & ~torch.eye(50, dtype=torch.bool)
    # 60 draws of 12 out of 46 or 47: none is left out for long.
    assert (seen[others] > 0).all() and seen[others].max() < 35


def test_a_generator_makes_it_reproducible():
    pairs, n_s, n_t = make_pairs(40, seed=5)
    student, teacher = randn(n_s, 12, seed=1), randn(n_t, 12, seed=2)
    first, again, other = (
        run(vd, student, teacher, pairs, seed=seed, negatives=4)["student"] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("negatives", [-1, 9])
def test_nothing_large_is_allocated(negatives, scores):
    pairs, n_s, n_t = make_pairs(300, seed=5)
    student, teacher = randn(n_s, 8, seed=1).requires_grad_(), randn(n_t, 8, seed=2)
    with LargestAllocation() as largest:
        vd.contrastive(student, teacher, pairs, negatives=negatives).backward()
    # The inputs themselves and the choice of negatives; P x P is 90,000 numbers.
    assert 0 < largest.nbytes <= max(4 * max(n_s, n_t) * 8, 8 * 300 * negatives)


@pytest.mark.parametrize("negatives", [-1, 5])
def test_same_for_any_number_of_threads(negatives, scores):
    pairs, n_s, n_t = make_pairs(200, seed=9, gaps=True)
    student, teacher = randn(n_s, 30, seed=1), randn(n_t, 30, seed=2)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(run(vd, student, teacher, pairs, seed=1, negatives=negatives))
    finally:
        torch.set_num_threads(before)
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name])
        assert torch.equal(results[1][name], results[2][name])


def test_compiles_as_one_graph():
    pairs, n_s, n_t = make_pairs(12, seed=4, empty=True)
    student, teacher = randn(n_s, 8), randn(n_t, 8, seed=1)

    def loss(s):
        return vd.contrastive(s * 2, teacher, pairs, temperature=0.5) * 3

    assert_compiles(loss, student)


def test_opcheck():
    op = torch.ops.vocabdistil.contrastive.default
    a, b, scale = randn(9, 4), randn(9, 4, seed=1), torch.rand(9)
    valid = torch.arange(9) != 4
    ids = import_module("vocabdistil.ops.contrastive").draw_negatives(9, valid, 3, a.device, None)
    for args in ((None, None), (valid, None), (valid, ids)):
        count = 9 if args[0] is None else 8
        torch.library.opcheck(op, (a, b, *args, scale, 0.5, count, "whole", "torch", True, True))
    torch.library.opcheck(op, (a, b.t().contiguous().t(), None, ids, scale, 0.5, 9, "bfloat16", "torch", True, False))


@pytest.mark.parametrize("negatives", [False, True])
def test_split_products_are_exact_far_below_the_rounding_of_half_types(negatives):
    """What a GPU does for half-precision hidden states: the error is that of 16 bits, not of 8."""
    module = import_module("vocabdistil.ops.contrastive")
    a, b = (torch.nn.functional.normalize(randn(50, 24, seed=i) + 2) for i in (1, 2))
    ids = module.draw_negatives(50, None, 5, a.device, None) if negatives else None
    args = (a, b, None, ids, torch.full((50,), 0.02), 0.1, 50)
    op = torch.ops.vocabdistil.contrastive
    split, want = (op(*args, parts, "torch", True, True) for parts in ("bfloat16", "whole"))
    for got, expected in zip(split, want, strict=True):
        assert_norm_close(got, expected, torch.float32, "split", 50)
    assert not torch.equal(split[2], want[2])


def test_parts_in_tf32_keep_nearly_all_of_float32():
    """Of values whose last 13 bits a product does not see."""

    def seen(x):
        return (x.view(torch.int32) & -8192).view(torch.float32).double()

    a, b = randn(40, 700, seed=1), randn(30, 700, seed=2)
    high, low = split_tf32(a)
    assert torch.equal(seen(high), high.double()) and torch.equal(high + low, a)
    assert ((high.double() + seen(low) - a).abs() <= 2.0**-21 * a.abs()).all()
    left, right = left_parts(high, low).flatten(1), right_parts(*split_tf32(b)).flatten(1)
    error = (seen(left) @ seen(right).t() - a.double() @ b.double().t()).abs()
    assert (error <= 2.0**-20 * (a.abs().double() @ b.abs().double().t())).all()


def test_upstream_gradients_and_autocast():
    pairs, n_s, n_t = make_pairs(12, seed=4)
    student, teacher = randn(n_s, 8).requires_grad_(), randn(n_t, 8, seed=1).requires_grad_()
    loss = vd.contrastive(student, teacher, pairs)
    once = torch.autograd.grad(loss, student, retain_graph=True)[0].clone()
    scaled = torch.autograd.grad(loss, student, torch.tensor(-3.0), retain_graph=True)[0]
    loss.backward()
    assert torch.equal(student.grad, once) and teacher.grad is None
    torch.testing.assert_close(scaled, -3 * once)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vd.contrastive(student, teacher, pairs), loss)


BAD = [
    ({"student": torch.randn(4)}, ValueError, "student"),
    ({"student": torch.randn(6, 5)}, ValueError, "weight"),
    ({"pairs": None}, TypeError, "pairs"),
    ({"negatives": 0}, ValueError, "negatives"),
    ({"negatives": 1.5}, TypeError, "negatives"),
    ({"side": "left"}, ValueError, "side"),
    ({"temperature": 0.0}, ValueError, "temperature"),
    ({"reduction": "mean"}, ValueError, "reduction"),
    ({"bias": torch.randn(4)}, ValueError, "bias"),
    ({"backend": "cuda"}, ValueError, "backend"),
]


@pytest.mark.parametrize(("change", "error", "name"), BAD, ids=[f"{list(b[0])[0]}-{i}" for i, b in enumerate(BAD)])
def test_bad_input_is_named(change, error, name):
    pairs = vd.SpanPairs([0, 2, 3], [2, 3, 6], [0, 1, 2], [1, 2, 3])
    options = {"student": torch.randn(6, 4), "teacher": torch.randn(3, 4), "pairs": pairs, **change}
    with pytest.raises(error, match=f"^{name}"):
        vd.contrastive(**options)


@pytest.mark.parametrize("variable", ["torch", "cpu", "reference"])
def test_the_variable_leaves_alone_what_has_no_such_backend(variable, monkeypatch):
    """Nothing but the reference serves both on a CPU."""
    pairs = vd.SpanPairs([0, 2, 3], [2, 3, 6], [0, 1, 2], [1, 2, 3])
    student, teacher = randn(6, 4, seed=1), randn(3, 4, seed=2)
    want = vd.contrastive(student, teacher, pairs), vd.span_kl(student, teacher, pairs)
    monkeypatch.setenv("VOCABDISTIL_BACKEND", variable)
    torch.testing.assert_close((vd.contrastive(student, teacher, pairs), vd.span_kl(student, teacher, pairs)), want)
    monkeypatch.setenv("VOCABDISTIL_BACKEND", "gpu")
    with pytest.raises(ValueError, match="^VOCABDISTIL_BACKEND: expected one of"):
        vd.span_kl(student, teacher, pairs)
