"""What the sweeps of linear_matched_kl for a GPU have to fulfil, with any kernels; imported by the tests of each,
which give the fixture ``backend``."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

import vocabdistil as vd
from tests.compiling import assert_compiles
from tests.numbers_backend import product_bound, test_linear_divergences_at_any_temperature  # noqa: F401
from tests.ops.test_linear_matched_kl import (  # noqa: F401
    make,
    run,
    test_only_what_is_wanted_is_computed,
    test_upstream_gradients,
)
from tests.spans import make_pairs
from tests.tolerances import RELATIVE, assert_norm_close
from tests.vocabularies import make_matched, randn

UNMATCHED = ["renormalize", "rest", "drop"]
INF = float("inf")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """16 rows at a time and 32 of the teacher's other columns."""
    module = import_module("vocabdistil.ops._dense_sweep")
    monkeypatch.setattr(module, "BUDGET", 0)
    monkeypatch.setattr(module, "_TIMES", 0)
    monkeypatch.setattr(module, "_REST_COLUMNS", 32)


def rounded(tensors, dtype):
    return {k: v.to(dtype).double() for k, v in tensors.items()}


def compare(tensors, matched, backend, truth=None, loss_dtype=None, **options):
    """``truth``: the tensors of the reference; ``loss_dtype``: to what the inputs of the products were rounded."""
    got = run(vd, tensors, matched, backend=backend, **options)
    want = run(vd.reference, truth or {k: v.double() for k, v in tensors.items()}, matched, **options)
    exact = torch.float64 if tensors["student_hidden"].dtype == torch.float64 else torch.float32
    for name, value in got.items():
        dtype = exact if name == "loss" else tensors[name].dtype
        assert value.dtype == dtype, name
        # The logits' gradient is rounded to half before the products, and the interpreter cuts it instead.
        assert_norm_close(value, want[name], loss_dtype or dtype, name, factor=4 if dtype == torch.float32 else 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_against_float64(unmatched, dtype, backend):
    tensors = make(19, 19, dtype=dtype, bias=dtype != torch.float16)
    compare(tensors, make_matched(50, 90, 37), backend, unmatched=unmatched, temperature=1.7)


@pytest.mark.parametrize(
    ("pooling", "reduction", "dtype"),
    [
        ("mean", "batchmean", torch.bfloat16), ("mean", "none", torch.float32), ("sum", "batchmean", torch.float32),
        ("sum", "none", torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_pairs(unmatched, pooling, reduction, dtype, backend):
    pairs, n_s, n_t = make_pairs(18, seed=3, gaps=True, empty=True)
    tensors, matched = make(n_s, n_t, dtype=dtype), make_matched(50, 90, 37)
    compare(
        tensors, matched, backend, loss_dtype=None if dtype == torch.float32 else dtype, pairs=pairs,
        pooling=pooling, unmatched=unmatched, reduction=reduction, temperature=2.0,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unmatched", UNMATCHED)
@pytest.mark.parametrize(("v_s", "v_m"), [(33, 1), (48, 48), (17, 16), (200, 130)])
def test_sizes(v_s, v_m, unmatched, dtype, backend):
    if (unmatched, v_s) != ("rest", v_m):
        tensors = make(17, 17, v_s=v_s, v_t=v_s + 70, dtype=dtype)
        compare(tensors, make_matched(v_s, v_s + 70, v_m), backend, unmatched=unmatched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_minus_infinity_in_the_bias(unmatched, dtype, backend):
    tensors, matched = make(9, 9, dtype=dtype), make_matched(50, 90, 37)
    tensors["teacher_bias"][matched.teacher_ids[:5]] = -INF
    tensors["student_bias"][matched.student_ids[:3]] = -INF
    rest_t = [v for v in range(90) if v not in matched.teacher_ids.tolist()]
    tensors["teacher_bias"][rest_t[3:]] = -INF
    compare(tensors, matched, backend, unmatched=unmatched)


def test_float32_weights_are_rounded_as_half_hidden_states_are(backend):
    tensors = make(20, 20)
    truth = rounded(tensors, torch.bfloat16)
    for name in ("student_hidden", "teacher_hidden"):
        tensors[name] = tensors[name].bfloat16()
    for side in ("student", "teacher"):
        truth[f"{side}_bias"] = tensors[f"{side}_bias"].double()
    got = run(vd, tensors, make_matched(50, 90, 37), backend=backend)
    want = run(vd.reference, truth, make_matched(50, 90, 37))
    assert_norm_close(got["loss"], want["loss"], torch.float32, "loss", 4)
    assert_norm_close(got["student_weight"], want["student_weight"], torch.bfloat16, "weight")
    assert got["student_weight"].dtype == torch.float32


def test_small_shares_of_many_rows_do_not_vanish_in_float16(backend):
    """A loss scaler multiplies what was divided by the number of rows: half of it would be lost before."""
    t, matched = make(18, 18, dtype=torch.float16), make_matched(50, 90, 37)
    large, small = (
        torch.ops.vocabdistil.linear_matched_kl(
            t["student_hidden"], t["student_weight"], None, None, t["teacher_hidden"], t["teacher_weight"], None, None,
            matched.student_ids, matched.teacher_ids, torch.full((18,), share), 0, 2.0, backend, True, True, True,
        )
        for share in (1.0, 2.0**-20)
    )  # fmt: skip
    for i in (2, 3, 4):
        assert torch.count_nonzero(large[i]) and torch.equal(large[i] * 2.0**-20, small[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_is_zero_where_both_sides_are_equal(dtype, backend):
    hidden, weight = randn(20, 12, dtype=dtype), randn(140, 12, seed=1, dtype=dtype)
    ids = torch.randperm(140, generator=torch.Generator().manual_seed(0))[:93]
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = vd.linear_matched_kl(*leaves, hidden, weight, vd.MatchedVocab(ids, ids), backend=backend)
    loss.backward()
    if backend == "triton":
        assert loss.item() == 0 and all(torch.count_nonzero(x.grad) == 0 for x in leaves)
    assert loss.abs() < 1e-6 and all(x.grad.abs().max() < 1e-6 for x in leaves)


@pytest.mark.parametrize("temperature", [1.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_half_rows_that_are_close_keep_their_digits(unmatched, dtype, temperature, backend):
    """What both sides differ by is little beside their logits, and less than a rounding to half of either's share."""
    tensors = make(20, 20, v_s=300, v_t=300, d_t=12, dtype=dtype)
    tensors |= {f"teacher_{name}": tensors[f"student_{name}"] for name in ("hidden", "weight")}
    tensors["student_bias"] = tensors["student_bias"].float()
    tensors["teacher_bias"] = tensors["student_bias"] + 1e-3 * randn(300, seed=9)
    options = {"unmatched": unmatched, "temperature": temperature}
    matched = vd.MatchedVocab(torch.arange(170), torch.arange(170))
    scale = 2.0**12  # so that float16 has room for the gradients
    got = run(vd, tensors, matched, backend=backend, scale=scale, **options)
    want = run(vd.reference, {k: v.double() for k, v in tensors.items()}, matched, **options)
    for name, value in got.items():
        # The loss of "drop" is what one number differs from another by.
        allowed = (3e-3 if unmatched == "drop" else 2e-4) if name == "loss" else 2 * RELATIVE[dtype]
        error = (value.double() / scale - want[name]).norm() / want[name].norm()
        assert error <= allowed, f"{name}: {error:.1e}"


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("unmatched", ["renormalize", "rest"])
def test_half_rows_at_any_temperature(unmatched, temperature, backend):
    """One of them knows nothing of the teacher; tiles of very different mass."""
    tensors, matched = make(5, 5, v_s=300, v_t=400, dtype=torch.bfloat16), make_matched(300, 400, 200)
    tensors["teacher_hidden"][3] *= -8
    tensors["student_bias"] += torch.linspace(-30, 30, 300)
    options = {"unmatched": unmatched, "temperature": temperature, "reduction": "none"}
    got = run(vd, tensors, matched, backend=backend, **options)
    want = run(vd.reference, {k: v.double() for k, v in tensors.items()}, matched, **options)
    loss, exact = got.pop("loss").double(), want.pop("loss")
    assert (loss >= 0).all() and ((loss - exact).abs() <= product_bound(temperature) * exact).all()
    for name, value in got.items():
        assert_norm_close(value, want[name], torch.bfloat16, name, factor=2 if temperature > 0.01 else 8)


@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_rows_that_count_for_nothing_may_be_infinite(unmatched, backend):
    tensors, matched = make(20, 20, dtype=torch.bfloat16), make_matched(50, 90, 37)
    tensors["student_bias"][matched.student_ids[3]] = -INF
    got = run(vd, tensors, matched, unmatched=unmatched, backend=backend, scale=0.0)
    assert all(torch.count_nonzero(value) == 0 for value in got.values())
    assert run(vd, tensors, matched, unmatched=unmatched, backend=backend)["loss"] == INF


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_sums_over_no_tokens_of_an_infinite_bias(unmatched, dtype, backend):
    """No token times -inf is nothing, in the reference too."""
    pairs, n_s, n_t = make_pairs(18, seed=3, gaps=True, empty=True)
    assert (pairs.student_end == pairs.student_start).any() and (pairs.teacher_end == pairs.teacher_start).any()
    tensors, matched = make(n_s, n_t, dtype=dtype), make_matched(50, 90, 37)
    tensors["teacher_bias"][matched.teacher_ids[:2]] = -INF
    tensors["student_bias"][next(v for v in range(50) if v not in matched.student_ids.tolist())] = -INF
    loss_dtype = None if dtype == torch.float32 else dtype
    compare(tensors, matched, backend, loss_dtype=loss_dtype, pairs=pairs, pooling="sum", unmatched=unmatched)


@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_columns_without_mass(unmatched, backend):
    """More of them than a tile has, of one side and of both."""
    matched = make_matched(300, 400, 200)
    for sides in (("teacher",), ("student", "teacher")):
        tensors = make(9, 9, v_s=300, v_t=400, dtype=torch.bfloat16)
        for side in sides:
            tensors[f"{side}_bias"][getattr(matched, f"{side}_ids")[60:150]] = -INF
        compare(tensors, matched, backend, unmatched=unmatched)
    tensors["teacher_bias"][matched.teacher_ids[70:140]] = 0
    assert run(vd, tensors, matched, unmatched=unmatched, backend=backend)["loss"] == INF


def test_nan_among_half_weights_is_not_hidden(backend):
    for side in ("student", "teacher"):
        tensors, matched = make(20, 20, dtype=torch.bfloat16), make_matched(50, 90, 37)
        ids = getattr(matched, f"{side}_ids").tolist()
        weight = tensors[f"{side}_weight"]
        weight[next(i for i in range(len(weight)) if i not in ids)] = float("nan")
        got = run(vd, tensors, matched, backend=backend)
        assert all(value.isfinite().all() for value in got.values())
        assert run(vd, tensors, matched, unmatched="rest", backend=backend)["loss"].isnan()
        weight[ids[4]] = float("nan")
        assert run(vd, tensors, matched, backend=backend)["loss"].isnan()


def test_no_rows(backend):
    none = torch.zeros(0, dtype=torch.int32)
    for pairs, n in ((None, 0), (vd.SpanPairs(none, none, none, none), 3)):
        got = run(vd, make(n, n), make_matched(50, 90, 37), pairs=pairs, backend=backend)
        assert all(torch.count_nonzero(v) == 0 for v in got.values())


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_compiles_as_one_graph(reduction, backend):
    tensors, matched = make(17, 17, dtype=torch.bfloat16), make_matched(50, 90, 37)

    def loss(hidden, weight):
        options = {**tensors, "student_hidden": hidden * 2, "student_weight": weight}
        return (vd.linear_matched_kl(**options, matched=matched, reduction=reduction, backend=backend) * 3).sum()

    assert_compiles(loss, tensors["student_hidden"], tensors["student_weight"])


@pytest.mark.parametrize("unmatched", [0, 1])
def test_opcheck(unmatched, backend):
    t, matched = make(9, 9), make_matched(50, 90, 37)
    args = (
        t["student_hidden"], t["student_weight"], t["student_bias"], None, t["teacher_hidden"], t["teacher_weight"],
        None, None, matched.student_ids, matched.teacher_ids, torch.rand(9), unmatched, 2.0, backend, True, True, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.vocabdistil.linear_matched_kl.default, args)
