"""What linear_remapped_kl must do in every backend, against the float64 reference. A tier imports these tests and says
by its fixture which ``backend`` runs: the C++ on the CPU, or the chunks of a GPU with Triton in the interpreter."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd
from tests.output_layers import loss_and_grads, make
from tests.remapped_kl_backend import COMBINES, DTYPES, REMAINDERS, make_table, make_weights
from tests.spans import make_pairs
from tests.tolerances import assert_norm_close

V_S, V_T, ROWS = 50, 90, 83  # the teacher has columns without a row of the table


def run(module, tensors, table, **options):
    """Loss and gradients of all that can have one."""
    return loss_and_grads(module.linear_remapped_kl, tensors, table=table, **options)


def compare(tensors, table, backend, **options):
    got = run(vd, tensors, table, backend=backend, **options)
    want = run(vd.reference, {k: v.double() for k, v in tensors.items()}, table, **options)
    exact = torch.float64 if tensors["student_hidden"].dtype == torch.float64 else torch.float32
    for name, value in got.items():
        dtype = exact if name == "loss" else tensors[name].dtype
        assert value.dtype == dtype and value.shape == want[name].shape, name
        # In float32 the products round; on a GPU the gradient of the logits is rounded to half before them.
        factor = 4 if dtype == torch.float32 else 2 if backend == "triton" else 1
        assert_norm_close(value, want[name], dtype, name, factor=factor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("combine", COMBINES)
def test_against_float64(combine, dtype, backend):
    rows = 41 if backend == "cpu" else 9
    tensors = make(rows, rows, dtype=dtype, bias=dtype != torch.float16)
    compare(tensors, make_table(ROWS, V_S), backend, combine=combine, temperature=1.7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize("combine", COMBINES)
def test_weights_and_top_k(combine, remainder, dtype, backend):
    table = make_table(ROWS, V_S)
    pairs, n_s, n_t = make_pairs(21 if backend == "cpu" else 6, seed=3, gaps=True, empty=True)
    if backend == "triton" and dtype == torch.bfloat16:  # means are rounded there, and others may be the largest
        pairs, n_s, n_t = None, 6, 6
    options = {"combine": combine, "entry_weights": make_weights(table), "remainder": remainder, "pairs": pairs}
    tensors = make(n_s, n_t, dtype=dtype)
    for top_k, reduction in ((9, "none"), *(((1, "sum"), (200, "batchmean")) if backend == "cpu" else ())):
        compare(tensors, table, backend, top_k=top_k, reduction=reduction, temperature=1.7, **options)


def test_single_biases(backend):
    tensors = make(9, 9)
    for left_out in ("student_bias", "teacher_bias"):
        compare({k: v for k, v in tensors.items() if k != left_out}, make_table(ROWS, V_S), backend)


@pytest.mark.parametrize("combine", COMBINES)
def test_minus_infinity_in_the_bias(combine, backend):
    tensors, table = make(9, 9), make_table(ROWS, V_S, longest=3)
    tensors["student_bias"][7] = -float("inf")
    for v in range(ROWS):  # nor has the teacher mass there
        if 7 in table.ids[table.indptr[v] : table.indptr[v + 1]]:
            tensors["teacher_bias"][v] = -float("inf")
    compare(tensors, table, backend, combine=combine)
    compare(tensors, table, backend, combine=combine, top_k=5)


def test_only_what_is_wanted_is_computed(backend):
    tensors, table = make(9, 9), make_table(ROWS, V_S)
    full = run(vd, tensors, table, backend=backend)
    for name in ("student_hidden", "student_weight", "student_bias"):
        leaf = tensors[name].clone().requires_grad_()
        vd.linear_remapped_kl(**{**tensors, name: leaf}, table=table, backend=backend).backward(torch.tensor(0.5))
        torch.testing.assert_close(leaf.grad, full[name])
    assert not vd.linear_remapped_kl(**tensors, table=table, backend=backend).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upstream_gradients(dtype, backend):
    tensors, table = make(9, 9, dtype=dtype), make_table(ROWS, V_S)
    leaves = {k: v.clone().requires_grad_() for k, v in tensors.items() if k.startswith("student")}
    loss = vd.linear_remapped_kl(**{**tensors, **leaves}, table=table, backend=backend)
    wanted = list(leaves.values())
    once = [g.clone() for g in torch.autograd.grad(loss, wanted, retain_graph=True)]
    scaled = torch.autograd.grad(loss, wanted, torch.tensor(-4.0), retain_graph=True)
    for a, b, c in zip(once, scaled, torch.autograd.grad(loss, wanted), strict=True):
        assert torch.equal(a, c) and torch.equal(-4 * a, b)


def test_no_rows_and_nothing_mapped(backend):
    none = torch.zeros(0, dtype=torch.int32)
    table = make_table(ROWS, V_S)
    for pairs, n in ((None, 0), (vd.SpanPairs(none, none, none, none), 3)):
        got = run(vd, make(n, n), table, pairs=pairs, backend=backend)
        assert all(torch.count_nonzero(v) == 0 for v in got.values())
    for options in ({}, {"top_k": 3}):
        got = run(vd, make(3, 3), table, entry_weights=torch.zeros(len(table.ids)), backend=backend, **options)
        assert all(torch.count_nonzero(v) == 0 for v in got.values())


def test_nan_of_a_pair_that_counts_for_nothing(backend):
    pairs = vd.SpanPairs([0, 1, 2], [1, 2, 3], [0, 1, 1], [1, 1, 2])
    tensors = make(3, 2)
    tensors["student_hidden"][1] = float("nan")
    got = run(vd, tensors, make_table(ROWS, V_S), pairs=pairs, backend=backend)
    assert all(v.isfinite().all() for v in got.values())
    assert torch.count_nonzero(got["student_hidden"][1]) == 0


def test_nan_is_not_hidden(backend):
    tensors = make(3, 3)
    tensors["teacher_bias"][int(make_table(ROWS, V_S).indptr.diff().argmax())] = float("nan")
    for options in ({}, {"top_k": 2}, {"top_k": 2, "remainder": "renormalize"}):
        got = run(vd, tensors, make_table(ROWS, V_S), backend=backend, **options)
        assert got["loss"].isnan()
