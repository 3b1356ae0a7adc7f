"""span_likelihood and linear_span_likelihood on CPU, native, against the float64 reference; autograd, compile, bounded
memory, threads and instruction sets, tied weights, bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch

import vocabdistil as vd
from tests.compiling import assert_compiles
from tests.tolerances import assert_norm_close
from tests.vocabularies import randn

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")

V_S, V_T, L_S, L_T = 50, 90, 9, 7


def make(dtype=torch.float32, linear=False, bias=True, d_s=12, d_t=20, batch=3, v_s=V_S, v_t=V_T):
    """Arguments by name: texts of 9 and of 7 tokens, spans of one to three, gaps, beginnings, an empty span."""
    g = torch.Generator().manual_seed(0)
    if linear:
        tensors = {
            "student_hidden": randn(batch, L_S, d_s, seed=1), "student_weight": randn(v_s, d_s, seed=2, scale=0.4),
            "teacher_hidden": randn(batch, L_T, d_t, seed=3), "teacher_weight": randn(v_t, d_t, seed=4, scale=0.4),
        }  # fmt: skip
        if bias:
            tensors |= {"student_bias": randn(v_s, seed=5), "teacher_bias": randn(v_t, seed=6)}
    else:
        tensors = {
            "student_logits": randn(batch, L_S, v_s, seed=1, scale=2),
            "teacher_logits": randn(batch, L_T, v_t, seed=2, scale=2),
        }  # fmt: skip
    tensors = {k: v.to(dtype) for k, v in tensors.items()}
    spans = [(0, 1, 0, 1), (1, 3, 1, 2), (3, 6, 2, 4), (6, 6, 4, 5), (7, 9, 5, 7)]
    at = [(b * L_S + a, b * L_S + c, b * L_T + d, b * L_T + e) for b in range(batch) for a, c, d, e in spans]
    return tensors | {
        "student_ids": torch.randint(v_s, (batch, L_S), generator=g),
        "teacher_ids": torch.randint(v_t, (batch, L_T), generator=g).int(),
        "pairs": vd.SpanPairs(*torch.tensor(at, dtype=torch.int64).view(-1, 4).T),
    }


def function(module, arguments):
    return module.linear_span_likelihood if "student_hidden" in arguments else module.span_likelihood


def run(module, arguments, **options):
    """Loss and gradients of all that can have one."""
    learns = {k: v.detach().clone().requires_grad_() for k, v in arguments.items() if _is_float(v)}
    loss = function(module, arguments)(**{**arguments, **learns}, **options)
    upstream = torch.linspace(50, 200, loss.numel(), dtype=loss.dtype, device=loss.device).view_as(loss)
    (loss * upstream).sum().backward()
    assert all(v.grad is None for k, v in learns.items() if k.startswith("teacher"))
    return {"loss": loss.detach(), **{k: v.grad for k, v in learns.items() if k.startswith("student")}}


def _is_float(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def compare(arguments, backend="cpu", **options):
    got = run(vd, arguments, backend=backend, **options)
    wide = {k: v.double() if _is_float(v) else v for k, v in arguments.items()}
    want = run(vd.reference, wide, **options)
    inputs = [v.dtype for v in arguments.values() if _is_float(v)]
    for name, value in got.items():
        exact = torch.float64 if torch.float64 in inputs else torch.float32
        dtype = exact if name == "loss" else arguments[name].dtype
        assert value.dtype == dtype, name
        # In proportion, as a loss of the order of 1 / T is small beside what the tolerances begin with; float16 has a
        # smallest step.
        size = 1.0 if dtype == torch.float16 else max(float(want[name].norm()), 1e-30)
        factor = 4 if dtype == torch.float32 else 2
        assert_norm_close(value.double() / size, want[name] / size, dtype, name, factor)
    return got


@pytest.fixture(params=[False, True], ids=["logits", "linear"])
def linear(request):
    return request.param


@pytest.fixture
def few_columns(monkeypatch):
    """As few columns at a time as can be, so that small vocabularies take several turns."""
    monkeypatch.setattr(import_module("vocabdistil.ops.log_prob"), "BUDGET", 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", ["kl", "total_variation"])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_against_float64(reduction, divergence, dtype, linear):
    compare(make(dtype, linear, bias=dtype != torch.float16), reduction=reduction, divergence=divergence)


@pytest.mark.parametrize(("student_shift", "teacher_shift"), [(0, 1), (1, 0), (0, 0)])
@pytest.mark.parametrize("temperature", [1.0, 7.0])
def test_shifts_and_temperatures(temperature, student_shift, teacher_shift, linear):
    options = {"student_shift": student_shift, "teacher_shift": teacher_shift, "temperature": temperature}
    compare(make(linear=linear), **options)
    if not student_shift and not teacher_shift:
        flat = {k: v.flatten(0, 1) if k.split("_")[1] in ("logits", "hidden", "ids") else v
                for k, v in make(linear=linear).items() if k != "pairs"}  # fmt: skip
        compare({**flat, "pairs": make()["pairs"]}, **options)


# Texts, dims and columns that fill panels, tiles and blocks of columns, or leave one over, in several turns.
SIZES = [(1, 1, 1, 2, 1), (1, 0, 3, 9, 8), (3, 3, 0, 73, 145), (12, 64, 17, 433, 500), (25, 100, 73, 1300, 300)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, dtype, few_columns):
    compare(sized(*size, dtype))


def sized(batch, d_s, d_t, v_s, v_t, dtype=torch.float32):
    return make(dtype, True, batch=batch, d_s=d_s, d_t=d_t, v_s=v_s, v_t=v_t)


@pytest.mark.parametrize("columns", [1, 2, 1023, 1025, 5000])
def test_rows_of_logits(columns):
    for dtype in (torch.float32, torch.bfloat16):
        compare(make(dtype, v_s=columns, v_t=columns + 1))


def test_the_same_for_any_number_of_threads(few_columns, linear):
    arguments = sized(25, 100, 73, 1300, 900) if linear else make(batch=25, v_s=3000)
    want = run(vd, arguments)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            got = run(vd, arguments)
            assert all(torch.equal(got[k], want[k]) for k in want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    code = """
import torch
from tests.ops.test_span_likelihood import compare, make, sized
for dtype in (torch.float32, torch.float64, torch.float16):
    compare(sized(9, 37, 70, 433, 500, dtype))
    compare(make(dtype, v_s=1300))
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "VOCABDISTIL_ISA": isa}, check=True)


def test_large_logits(linear):
    """Blocks of columns of very different size: their sums are brought together without overflow or loss."""
    for dtype in (torch.float64, torch.float32):
        arguments = make(dtype, linear, v_s=3000, v_t=2500)
        for side in ("student", "teacher"):
            x = arguments[f"{side}_bias" if linear else f"{side}_logits"]
            x += torch.linspace(-900, 900, x.shape[-1], dtype=dtype)
        arguments["student_ids"] = arguments["student_ids"] % 40 + 2950
        arguments["teacher_ids"] = arguments["teacher_ids"] % 40 + 2450
        compare(arguments, temperature=100.0)  # at which the rounding of sums of thousands counts little


def test_sure_tokens_keep_their_digits(linear):
    """Probabilities that are 1 when rounded: what both lack of 1 is compared, and no gradient is infinite."""
    arguments = make(linear=linear)
    for side, v in (("student", V_S), ("teacher", V_T)):
        peaks = torch.nn.functional.one_hot(arguments[f"{side}_ids"].long().roll(-1, 1), v) * 40.0
        if linear:
            arguments |= {f"{side}_hidden": peaks + randn(*peaks.shape, seed=7), f"{side}_weight": torch.eye(v)}
        else:
            arguments[f"{side}_logits"] = peaks + randn(*peaks.shape, seed=7)
    for temperature in (1.0, 100.0):
        got = compare(arguments, temperature=temperature)
        assert 0 < got["loss"] < 1e-10
    certain = {k: v * 100 if _is_float(v) else v for k, v in arguments.items()}
    assert all(x.isfinite().all() for x in run(vd, certain, temperature=1.0).values())


def test_minus_infinity(linear):
    arguments = make(linear=linear)
    if linear:
        arguments["teacher_bias"][::7] = arguments["student_bias"][::9] = -INF
        arguments["student_ids"] -= (arguments["student_ids"] % 9 == 0).long() - 1
        arguments["student_ids"] %= V_S - 1
    else:
        arguments["teacher_logits"][..., ::7] = arguments["student_logits"][..., 49:] = -INF
    arguments["student_ids"] = torch.where(arguments["student_ids"] % 9 == 0, 1, arguments["student_ids"]) % 49
    compare(arguments)
    if not linear:
        arguments["student_logits"][0, 0] = -INF  # a row without any mass
        got = run(vd, arguments, reduction="none")
        assert got["loss"][1].isinf() and got["student_logits"].isfinite().all()
        assert not got["student_logits"][0, 0].any()


def test_float32_weights_with_half_hidden_states():
    arguments = make(linear=True)
    for name in ("student_hidden", "teacher_hidden"):
        arguments[name] = arguments[name].bfloat16()
    compare(arguments)


def test_gradcheck(linear):
    arguments = make(torch.float64, linear, batch=1, d_s=3, d_t=4, v_s=6, v_t=7)
    student = [k for k, v in arguments.items() if k.startswith("student") and _is_float(v)]
    weights = torch.rand(5, dtype=torch.float64)
    for reduction in ("batchmean", "none"):

        def loss(weights, *tensors, reduction=reduction):
            given = {**arguments, **dict(zip(student, tensors, strict=True))}
            return function(vd, given)(**given, temperature=2.0, pair_weights=weights, reduction=reduction)

        assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in (weights, *(arguments[k] for k in student))])


def test_tied_embeddings():
    arguments = make(linear=True, bias=False)

    def grad(module, dtype):
        wide = {k: v.to(dtype) if _is_float(v) else v for k, v in arguments.items()}
        weight = wide["student_weight"].clone().requires_grad_()
        hidden = weight[wide["student_ids"]].tanh()
        module.linear_span_likelihood(**{**wide, "student_hidden": hidden, "student_weight": weight}).backward()
        return weight.grad * 1e3

    assert_norm_close(grad(vd, torch.float32), grad(vd.reference, torch.float64), torch.float32, "weight", 4)


def test_only_what_is_wanted_is_computed():
    arguments = make(linear=True)
    full = run(vd, arguments)
    for name in ("student_hidden", "student_weight", "student_bias"):
        leaf = arguments[name].clone().requires_grad_()
        vd.linear_span_likelihood(**{**arguments, name: leaf}).backward(torch.tensor(50.0))
        torch.testing.assert_close(leaf.grad, full[name], rtol=1e-6, atol=0)
    assert not vd.linear_span_likelihood(**arguments).requires_grad


def test_rows_of_no_span_are_not_read(linear):
    """Not where they are NaN, nor of pairs with weight 0."""
    arguments = make(linear=linear)
    name = "student_hidden" if linear else "student_logits"
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0] * 3)
    want = run(vd, arguments, pair_weights=weights)
    arguments[name][:, [0, 1, 5]] = float("nan")  # of tokens 1 and 2, and of token 6, which is in no span
    got = run(vd, arguments, pair_weights=weights)
    assert all(torch.equal(got[k], want[k]) for k in got)
    assert not got[name][:, [0, 1, 5]].any() and got[name][:, [2, 3, 4, 6, 7]].any(-1).all()


def test_no_texts(linear):
    got = run(vd, {**make(linear=linear, batch=0), "pairs": vd.SpanPairs([], [], [], [])})
    assert not any(x.any() for x in got.values())


def test_nan_is_not_hidden(linear):
    for value in (float("nan"), INF):
        arguments = make(linear=linear)
        arguments["student_hidden" if linear else "student_logits"][0, 1, 3] = value
        assert run(vd, arguments)["loss"].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upstream_gradients(dtype, linear):
    arguments = make(dtype, linear)
    leaves = {k: v.requires_grad_() for k, v in arguments.items() if k.startswith("student") and _is_float(v)}
    loss = function(vd, arguments)(**arguments)
    once = torch.autograd.grad(loss, [*leaves.values()], retain_graph=True)
    scaled = torch.autograd.grad(loss, [*leaves.values()], torch.tensor(-4.0))
    assert all(torch.equal(-4 * a, b) for a, b in zip(once, scaled, strict=True))


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_as_one_graph(dtype, reduction, linear):
    arguments = make(dtype, linear)
    names = ("student_hidden", "student_weight") if linear else ("student_logits",)

    def loss(*tensors):
        given = {**arguments, **dict(zip(names, (2 * x for x in tensors), strict=True))}
        return (function(vd, given)(**given, reduction=reduction) * 300).sum()

    assert_compiles(loss, *(arguments[name] for name in names))


def test_opcheck():
    ops, needed, grad = torch.ops.vocabdistil, torch.arange(9) % 3 > 0, torch.rand(9)
    hidden, weight, bias, logits = randn(9, 5), randn(20, 5), randn(20), randn(9, 40)[:, ::2]
    tokens = torch.arange(9), needed
    for x in (logits.contiguous(), logits.contiguous().t().contiguous().t()):
        torch.library.opcheck(ops.log_prob.default, (x.contiguous(), *tokens, "student", "cpu"))
    odds = ops.log_prob(logits.contiguous(), *tokens, "student", "cpu")
    args = (grad, logits.contiguous(), *tokens, *odds, "student", "cpu")
    torch.library.opcheck(ops.log_prob_backward.default, args)
    for b in (bias, None):
        args = (hidden, weight, b, *tokens, "student", "cpu")
        torch.library.opcheck(ops.linear_log_prob.default, args)
        odds = ops.linear_log_prob(*args)
        args = (grad, hidden, weight, b, *tokens, *odds, "student", "cpu", True, True, b is not None)
        torch.library.opcheck(ops.linear_log_prob_backward.default, args)


def test_strided_inputs(linear):
    arguments = make(linear=linear)
    want = run(vd, arguments)
    strided = {k: v.transpose(-1, 0).contiguous().transpose(-1, 0) if isinstance(v, torch.Tensor) else v
               for k, v in arguments.items()}  # fmt: skip
    for name, value in run(vd, strided).items():
        torch.testing.assert_close(value, want[name], msg=name)


def test_autocast_does_not_round_the_products():
    arguments = make(linear=True)
    want = run(vd, arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(vd, arguments)
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_inputs_are_left_alone(linear):
    arguments = make(linear=linear)
    copies = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    run(vd, arguments)
    assert all(torch.equal(arguments[k], copies[k]) for k in copies)


def test_memory_is_bounded():
    """The peak of a process, beyond what it held before the call. The logits of both sides would take 240 MB each."""
    code = """
import resource, sys, torch, vocabdistil as vd
from tests.ops.test_span_likelihood import sized

def step(batch):
    arguments = sized(batch, 8, 8, 20000, 20000)
    arguments["student_hidden"].requires_grad_(), arguments["student_weight"].requires_grad_()
    vd.linear_span_likelihood(**arguments).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

scale = 1024 if sys.platform.startswith("linux") else 1
before, after = step(2), step(334)
assert (after - before) * scale < 30e6, (before, after)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_ids_of_a_compiled_function_are_checked_by_the_kernel(side, linear):
    arguments = make(linear=linear)
    arguments[f"{side}_ids"] = torch.full_like(arguments[f"{side}_ids"], 2**31 - 1)
    loss = torch.compile(lambda: function(vd, arguments)(**arguments), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=f"{side}_ids: expected ids from 0 to"):
        loss()


LOGITS = [
    ({"student_logits": [1]}, TypeError, "student_logits: expected a tensor"),
    ({"student_logits": torch.zeros(V_S)}, ValueError, r"student_logits: expected shape \[..., V\]"),
    ({"student_logits": torch.zeros(27, V_S)}, ValueError, r"student_logits: expected shape \[B, L, .\] beside"),
    ({"teacher_logits": torch.zeros(3, L_T, V_T, dtype=torch.int32)}, TypeError, "teacher_logits: expected float32"),
    ({"student_ids": None}, TypeError, "student_ids: expected a tensor, got NoneType"),
    ({"student_ids": torch.zeros(3, L_S)}, TypeError, "student_ids: expected int32 or int64, got float32"),
    ({"teacher_ids": torch.zeros(3, 6).long()}, ValueError, r"teacher_ids: expected shape \(3, 7\) as teacher_logits"),
    ({"student_ids": torch.full((3, L_S), V_S)}, ValueError, "student_ids: expected ids from 0 to 49, got 50"),
    ({"teacher_ids": torch.full((3, L_T), -100)}, ValueError, "teacher_ids: expected ids from 0 to 89, got -100"),
    ({"student_ids": torch.full((3, L_S), 2**32)}, ValueError, "student_ids: expected ids from 0 to 49, got 42949"),
    ({"pairs": None}, TypeError, "pairs: expected SpanPairs, got NoneType"),
    ({"pairs": vd.SpanPairs([1], [2], [1], [22])}, ValueError, "pairs: expected teacher positions up to 21"),
    ({"temperature": 0.0}, ValueError, "temperature"),
    ({"divergence": "mse"}, ValueError, "divergence: expected one of 'kl', 'total_variation', got 'mse'"),
    ({"pair_weights": torch.ones(3)}, ValueError, r"pair_weights: expected shape \(15,\)"),
    ({"student_shift": 2}, ValueError, "student_shift: expected 0 or 1"),
    ({"reduction": "mean"}, ValueError, "reduction"),
    ({"backend": "cuda"}, ValueError, "backend"),
]  # fmt: skip
LINEAR = [
    ({"student_hidden": torch.zeros(27, 12)}, ValueError, r"student_hidden: expected shape \[B, L, .\] beside"),
    ({"student_weight": torch.randn(V_S, 13)}, ValueError, r"student_weight: expected shape \(V, 12\)"),
    ({"student_weight": torch.nn.ReLU(), "student_bias": None}, TypeError, "student_weight: expected a tensor"),
    ({"teacher_weight": torch.randn(V_T, 20).double()}, TypeError, "teacher_weight"),
    ({"teacher_bias": torch.randn(V_S)}, ValueError, "teacher_bias"),
    ({"student_ids": torch.full((3, L_S), V_S)}, ValueError, "student_ids: expected ids from 0 to 49, got 50"),
    ({"teacher_ids": torch.zeros(3, 6).long()}, ValueError, r"teacher_ids: expected shape \(3, 7\) as teacher_hidden"),
]  # fmt: skip


@pytest.mark.parametrize("module", [vd, vd.reference], ids=["kernels", "reference"])
@pytest.mark.parametrize(
    ("linear", "change", "error", "text"), [(False, *b) for b in LOGITS] + [(True, *b) for b in LINEAR]
)
def test_bad_input_is_named(linear, change, error, text, module):
    arguments = make(linear=linear)
    with pytest.raises(error, match=f"^{text}"):
        function(module, arguments)(**{**arguments, **change})
