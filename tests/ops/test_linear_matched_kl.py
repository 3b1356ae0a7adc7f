"""linear_matched_kl on CPU, native and in PyTorch (``_dense_sweep.py``, more of which: ``dense_sweep_backend.py``),
against the float64 reference; autograd, compile, bounded memory, tied weights, bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch

import vocabdistil as vd
from tests.compiling import assert_compiles
from tests.output_layers import loss_and_grads, make, one_thread  # noqa: F401 - a fixture
from tests.spans import make_pairs
from tests.tolerances import assert_norm_close
from tests.vocabularies import make_matched, randn

UNMATCHED = ["renormalize", "rest", "drop"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cpu", "torch"])
def backend(request):
    return request.param


@pytest.fixture
def small_chunks(monkeypatch):
    """As few rows at a time as can be, so that small inputs take several turns."""
    module = import_module("vocabdistil.ops.linear_matched_kl")  # the package holds the function of that name
    monkeypatch.setattr(module, "BUDGET", 0)


def run(module, tensors, matched, **options):
    """Loss and gradients of all that can have one."""
    return loss_and_grads(module.linear_matched_kl, tensors, matched=matched, **options)


def compare(tensors, matched, backend, **options):
    got = run(vd, tensors, matched, backend=backend, **options)
    want = run(vd.reference, {k: v.double() for k, v in tensors.items()}, matched, **options)
    exact = torch.float64 if tensors["student_hidden"].dtype == torch.float64 else torch.float32
    for name, value in got.items():
        dtype = exact if name == "loss" else tensors[name].dtype
        assert value.dtype == dtype, name
        # In float32 the products round, and the shares of matched and unmatched mass cancel. In PyTorch the gradient of
        # the logits is rounded to half before the products.
        factor = 4 if dtype == torch.float32 else 2 if backend == "torch" else 1
        assert_norm_close(value, want[name], dtype, name, factor=factor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_against_float64(unmatched, dtype, backend):
    tensors = make(41, 41, dtype=dtype, bias=dtype != torch.float16)
    compare(tensors, make_matched(50, 90, 37), backend, unmatched=unmatched, temperature=1.7)


# Rows, dims and columns that fill panels, tiles and blocks of columns, or leave one over, in several chunks.
SIZES = [(1, 1, 1, 2, 3, 1), (7, 0, 3, 9, 8, 5), (7, 3, 0, 9, 8, 5)]
SIZES += [(48, 48, 64, 130, 150, 108), (97, 17, 100, 230, 500, 217), (200, 73, 5, 600, 300, 300)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unmatched", UNMATCHED)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, unmatched, dtype, small_chunks):
    rows, d_s, d_t, v_s, v_t, v_m = size
    tensors = make(rows, rows, v_s=v_s, v_t=v_t, d_s=d_s, d_t=d_t, dtype=dtype)
    compare(tensors, make_matched(v_s, v_t, v_m), "cpu", unmatched=unmatched, temperature=1.7)


@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_the_same_for_any_number_of_threads(unmatched, small_chunks):
    tensors, matched = make(150, 150, v_s=700, v_t=900, d_s=70, d_t=50), make_matched(700, 900, 450)
    want = run(vd, tensors, matched, unmatched=unmatched, backend="cpu")
    for threads in (2, 3):
        torch.set_num_threads(threads)
        got = run(vd, tensors, matched, unmatched=unmatched, backend="cpu")
        assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_large_logits(unmatched):
    """Blocks of columns of very different size: their sums are brought together without overflow or loss."""
    tensors, matched = make(50, 50, v_s=400, v_t=500, dtype=torch.float64), make_matched(400, 500, 350)
    for side in ("student", "teacher"):
        tensors[f"{side}_bias"] += torch.linspace(-900, 900, len(tensors[f"{side}_bias"]))
    compare(tensors, matched, "cpu", unmatched=unmatched)
    single = {k: v.float() for k, v in tensors.items()}
    compare(single, matched, "cpu", unmatched=unmatched)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    code = """
import torch
from tests.ops.test_linear_matched_kl import compare, make
from tests.vocabularies import make_matched
for unmatched in ("renormalize", "rest"):
    for dtype in (torch.float32, torch.float64, torch.float16):
        tensors = make(61, 61, v_s=230, v_t=500, d_s=37, d_t=70, dtype=dtype)
        compare(tensors, make_matched(230, 500, 217), "cpu", unmatched=unmatched)
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "VOCABDISTIL_ISA": isa}, check=True)


@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("pooling", ["mean", "sum"])
@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_pairs(unmatched, pooling, dtype, bias, small_chunks):
    pairs, n_s, n_t = make_pairs(61, seed=3, gaps=True, empty=True)
    for reduction in ("batchmean", "sum", "none"):
        compare(
            make(n_s, n_t, dtype=dtype, bias=bias), make_matched(50, 90, 37), "cpu", pairs=pairs, pooling=pooling,
            unmatched=unmatched, reduction=reduction, temperature=2.0,
        )  # fmt: skip


def test_single_biases(backend):
    tensors = make(20, 20)
    for left_out in ("student_bias", "teacher_bias"):
        others = {k: v for k, v in tensors.items() if k != left_out}
        compare(others, make_matched(50, 90, 37), backend, unmatched="rest")


@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_minus_infinity_in_the_bias(unmatched, backend):
    tensors, matched = make(9, 9), make_matched(50, 90, 37)
    tensors["teacher_bias"][matched.teacher_ids[:5]] = -float("inf")
    tensors["student_bias"][matched.student_ids[:3]] = -float("inf")
    rest_t = [v for v in range(90) if v not in matched.teacher_ids.tolist()]
    tensors["teacher_bias"][rest_t[3:]] = -float("inf")
    compare(tensors, matched, backend, unmatched=unmatched)


def test_float32_weights_with_half_hidden_states():
    tensors = make(20, 20)
    for name in ("student_hidden", "teacher_hidden"):
        tensors[name] = tensors[name].bfloat16()
    compare(tensors, make_matched(50, 90, 37), "cpu")


@pytest.mark.parametrize("unmatched", UNMATCHED)
@pytest.mark.parametrize("with_pairs", [False, True])
def test_gradcheck(unmatched, with_pairs, backend):
    pairs, n_s, n_t = make_pairs(4, seed=2, gaps=True, empty=True)
    if not with_pairs:
        pairs, n_s, n_t = None, 3, 3
    tensors = make(n_s, n_t, v_s=7, v_t=6, d_s=3, d_t=4, dtype=torch.float64)
    student = [tensors.pop(f"student_{k}").requires_grad_() for k in ("hidden", "weight", "bias")]
    for reduction in ("batchmean", "none"):

        def loss(hidden, weight, bias, reduction=reduction):
            return vd.linear_matched_kl(
                hidden, weight, **tensors, matched=make_matched(7, 6, 4), student_bias=bias, pairs=pairs,
                pooling="sum", unmatched=unmatched, temperature=1.5, reduction=reduction, backend=backend,
            )  # fmt: skip

        assert torch.autograd.gradcheck(loss, student)


def test_tied_embeddings(backend):
    matched = make_matched(50, 90, 37)
    tensors = make(40, 40, bias=False)
    ids = torch.arange(40) % 50

    def grad(module, dtype, **options):
        weight = tensors["student_weight"].to(dtype, copy=True).requires_grad_()
        hidden = weight[ids].tanh()
        teacher = (tensors["teacher_hidden"].to(dtype), tensors["teacher_weight"].to(dtype))
        module.linear_matched_kl(hidden, weight, *teacher, matched, **options).backward()
        return weight.grad

    assert_norm_close(
        grad(vd, torch.float32, backend=backend), grad(vd.reference, torch.float64), torch.float32, "weight"
    )
    leaf = tensors["student_weight"].clone().requires_grad_()
    vd.linear_matched_kl(**{**tensors, "student_weight": leaf}, matched=matched, backend=backend).backward()
    unmatched = [v for v in range(50) if v not in matched.student_ids.tolist()]
    assert torch.count_nonzero(leaf.grad[unmatched]) == 0
    assert torch.count_nonzero(leaf.grad[matched.student_ids]) == 37 * 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_what_is_wanted_is_computed(dtype, backend):
    tensors, matched = make(30, 30, dtype=dtype), make_matched(50, 90, 37)
    full = run(vd, tensors, matched, backend=backend)
    for name in ("student_hidden", "student_weight", "student_bias"):
        leaf = tensors[name].clone().requires_grad_()
        vd.linear_matched_kl(**{**tensors, name: leaf}, matched=matched, backend=backend).backward(torch.tensor(0.5))
        torch.testing.assert_close(leaf.grad, full[name])
    assert not vd.linear_matched_kl(**tensors, matched=matched, backend=backend).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upstream_gradients(dtype, backend):
    tensors, matched = make(30, 30, dtype=dtype), make_matched(50, 90, 37)
    leaves = {k: v.clone().requires_grad_() for k, v in tensors.items() if k.startswith("student")}
    loss = vd.linear_matched_kl(**{**tensors, **leaves}, matched=matched, backend=backend)
    wanted = list(leaves.values())
    once = [g.clone() for g in torch.autograd.grad(loss, wanted, retain_graph=True)]
    scaled = torch.autograd.grad(loss, wanted, torch.tensor(-4.0), retain_graph=True)
    for a, b, c in zip(once, scaled, torch.autograd.grad(loss, wanted), strict=True):
        assert torch.equal(a, c) and torch.equal(-4 * a, b)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_second_derivatives_are_refused(reduction, backend):
    tensors, matched = make(5, 5), make_matched(50, 90, 37)
    hidden = tensors["student_hidden"].requires_grad_()
    loss = vd.linear_matched_kl(**tensors, matched=matched, reduction=reduction, backend=backend).square().sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.square().sum().backward()


def test_an_infinite_weight_is_the_same_for_any_number_of_rows():
    for rows in (3, 48):
        tensors = {k: v.abs() for k, v in make(rows, rows, d_s=1, d_t=1, bias=False).items()}
        matched = make_matched(50, 90, 37)
        for side in ("student", "teacher"):
            tensors[f"{side}_weight"][getattr(matched, f"{side}_ids")[5]] = -float("inf")
        weight = tensors["student_weight"].requires_grad_()
        vd.linear_matched_kl(**tensors, matched=matched, backend="cpu").backward()
        assert weight.grad.isfinite().all()


@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_memory_does_not_grow_with_the_rows(unmatched):
    """The peak of a process, beyond what it held before the call. The logits of these rows would take 240 MB, the
    hidden states of the others take 120 MB."""
    code = f"""
import resource, sys, torch, vocabdistil as vd
from tests.output_layers import make
from tests.vocabularies import make_matched

def step(rows):
    tensors = {{k: v[:rows] if "hidden" in k else v for k, v in all_rows.items()}}
    tensors["student_weight"].requires_grad_()
    vd.linear_matched_kl(**tensors, matched=matched, unmatched={unmatched!r}, backend="cpu").backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

scale = 1024 if sys.platform.startswith("linux") else 1
for rows, v_s, v_t, v_m, d in ((20000, 2000, 1500, 1000, 4), (30000, 3, 4, 2, 512)):
    all_rows, matched = make(rows, rows, v_s=v_s, v_t=v_t, d_s=d, d_t=d, bias=False), make_matched(v_s, v_t, v_m)
    before, after = step(200), step(rows)
    assert (after - before) * scale < 24e6, (before, after)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_as_one_graph(reduction, dtype, backend):
    pairs, n_s, n_t = make_pairs(12, seed=4)
    tensors, matched = make(n_s, n_t, dtype=dtype), make_matched(50, 90, 37)

    def loss(hidden, weight):
        options = {**tensors, "student_hidden": hidden * 2, "student_weight": weight}
        value = vd.linear_matched_kl(**options, matched=matched, pairs=pairs, reduction=reduction, backend=backend)
        return (value * 3).sum()

    assert_compiles(loss, tensors["student_hidden"], tensors["student_weight"])


@pytest.mark.parametrize("unmatched", [0, 1])
def test_opcheck(unmatched, backend):
    t, matched = make(9, 9), make_matched(50, 90, 37)
    for hidden in (t["student_hidden"], t["student_hidden"].t().contiguous().t()):
        args = (
            hidden, t["student_weight"], t["student_bias"], None, t["teacher_hidden"], t["teacher_weight"], None, None,
            matched.student_ids, matched.teacher_ids, torch.rand(9), unmatched, 2.0, backend, True, True, False,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.vocabdistil.linear_matched_kl.default, args)


def test_strided_inputs(backend):
    tensors, matched = make(20, 20), make_matched(50, 90, 37)
    want = run(vd, tensors, matched, backend=backend)
    strided = {k: v.t().contiguous().t() if v.dim() == 2 else v.repeat_interleave(2)[::2] for k, v in tensors.items()}
    strided["student_hidden"] = strided["student_hidden"].unflatten(0, (4, 5))
    strided["teacher_hidden"] = strided["teacher_hidden"].unflatten(0, (4, 5))
    for name, value in run(vd, strided, matched, backend=backend).items():
        torch.testing.assert_close(value, want[name].view_as(value), msg=name)


def test_autocast_does_not_round_the_products(backend):
    tensors, matched = make(20, 20), make_matched(50, 90, 37)
    want = run(vd, tensors, matched, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(vd, tensors, matched, backend=backend)
    for name, value in got.items():
        assert torch.equal(value, want[name]), name


def test_no_rows(backend):
    none = torch.zeros(0, dtype=torch.int32)
    for pairs, n in ((None, 0), (vd.SpanPairs(none, none, none, none), 3)):
        got = run(vd, make(n, n), make_matched(50, 90, 37), pairs=pairs, backend=backend)
        assert all(torch.count_nonzero(v) == 0 for v in got.values())


def test_nan_of_a_pair_that_counts_for_nothing(backend):
    pairs = vd.SpanPairs([0, 1, 2], [1, 2, 3], [0, 1, 1], [1, 1, 2])
    tensors = make(3, 2)
    tensors["student_hidden"][1] = float("nan")
    got = run(vd, tensors, make_matched(50, 90, 37), pairs=pairs, backend=backend)
    assert all(v.isfinite().all() for v in got.values())
    assert torch.count_nonzero(got["student_hidden"][1]) == 0


def test_inputs_are_left_alone(backend):
    tensors, matched = make(20, 20), make_matched(50, 90, 37)
    copies = {k: v.clone() for k, v in tensors.items()}
    run(vd, tensors, matched, unmatched="rest", backend=backend)
    assert all(torch.equal(v, copies[k]) for k, v in tensors.items())


BAD = [
    ({"student_hidden": torch.randn(6)}, ValueError, "student_hidden"),
    ({"student_hidden": torch.randn(7, 12)}, ValueError, "student_hidden"),
    ({"student_weight": torch.randn(50, 13)}, ValueError, "student_weight"),
    ({"teacher_weight": torch.randn(90, 20).double()}, TypeError, "teacher_weight"),
    ({"student_bias": torch.randn(49)}, ValueError, "student_bias"),
    ({"student_weight": torch.randn(20, 12), "student_bias": None}, ValueError, r"matched\.student_ids"),
    ({"unmatched": "keep"}, ValueError, "unmatched"),
    ({"temperature": -1.0}, ValueError, "temperature"),
    ({"backend": "cuda"}, ValueError, "backend"),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD, ids=[f"{list(b[0])[0]}-{i}" for i, b in enumerate(BAD)])
def test_bad_input_is_named(change, error, text):
    with pytest.raises(error, match=f"^{text}"):
        vd.linear_matched_kl(**{**make(6, 6), "matched": make_matched(50, 90, 37), **change})


def test_one_graph_for_any_number_of_rows(backend):
    tensors, matched = make(1, 1), make_matched(50, 90, 37)
    weights = {k: tensors[k] for k in ("student_weight", "teacher_weight")}

    def loss(student, teacher):
        logits = (student @ weights["student_weight"].t(), teacher @ weights["teacher_weight"].t())
        both = vd.linear_matched_kl(student, weights["student_weight"], teacher, weights["teacher_weight"], matched,
                                    backend=backend)  # fmt: skip
        return both + vd.matched_kl(*logits, matched, unmatched="rest")

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 8, 13):
        student, teacher = randn(n, 12, seed=n).requires_grad_(), randn(n, 20, seed=n + 1)
        got, want = (torch.autograd.grad(f(student, teacher), student)[0] for f in (compiled, loss))
        torch.testing.assert_close(got, want)
