"""linear_remapped_kl on CPU: the kernel against the float64 reference; autograd, compile, bounded memory, bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

import vocabdistil as vd
from tests.compiling import assert_compiles
from tests.linear_remapped_kl_backend import *  # noqa: F403
from tests.linear_remapped_kl_backend import ROWS, V_S, compare, run
from tests.output_layers import make, one_thread  # noqa: F401 - a fixture
from tests.remapped_kl_backend import COMBINES, REMAINDERS, make_table, make_weights
from tests.spans import make_pairs
from tests.tolerances import assert_norm_close
from tests.vocabularies import randn


@pytest.fixture
def backend():
    return "cpu"


@pytest.fixture
def small_chunks(monkeypatch):
    """As few rows at a time as can be, so that small inputs take several turns."""
    module = import_module("vocabdistil.ops.linear_remapped_kl")  # the package holds the function of that name
    monkeypatch.setattr(module, "BUDGET", 0)


# Rows, dims and columns that fill panels, tiles and blocks of columns, or leave one over, in several chunks.
SIZES = [(1, 1, 1, 2, 3, 1), (7, 0, 3, 9, 8, 5), (7, 3, 0, 9, 8, 5)]
SIZES += [(48, 48, 64, 130, 150, 108), (97, 17, 100, 230, 500, 217), (200, 73, 5, 600, 900, 600)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, combine, dtype, small_chunks):
    rows, d_s, d_t, v_s, v_t, table_rows = size
    tensors = make(rows, rows, v_s=v_s, v_t=v_t, d_s=d_s, d_t=d_t, dtype=dtype)
    table = make_table(table_rows, v_s)
    compare(tensors, table, "cpu", combine=combine, temperature=1.7)
    compare(tensors, table, "cpu", combine=combine, temperature=1.7, top_k=7)


def test_equals_remapped_kl_of_the_logits():
    tensors, table = make(33, 33, dtype=torch.float64), make_table(ROWS, V_S)
    options = {"entry_weights": make_weights(table), "combine": "logsumexp", "top_k": 8, "reduction": "none"}
    logits = (
        tensors[f"{side}_hidden"] @ tensors[f"{side}_weight"].t() + tensors[f"{side}_bias"]
        for side in ("student", "teacher")
    )
    torch.testing.assert_close(
        vd.linear_remapped_kl(**tensors, table=table, **options), vd.remapped_kl(*logits, table, **options)
    )


@pytest.mark.parametrize("top_k", [None, 30])
@pytest.mark.parametrize("combine", COMBINES)
def test_the_same_for_any_number_of_threads(combine, top_k, small_chunks):
    tensors, table = make(150, 150, v_s=700, v_t=900, d_s=70, d_t=50), make_table(900, 700)
    options = {"combine": combine, "top_k": top_k, "entry_weights": make_weights(table), "backend": "cpu"}
    want = run(vd, tensors, table, **options)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        got = run(vd, tensors, table, **options)
        assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.parametrize("options", [{}, *({"top_k": 40, "remainder": r} for r in REMAINDERS)], ids=str)
def test_large_logits(options):
    """Blocks of columns of very different size: their sums are brought together without overflow or loss."""
    tensors, table = make(50, 50, v_s=400, v_t=500, dtype=torch.float64), make_table(500, 400, longest=2)
    for side in ("student", "teacher"):
        tensors[f"{side}_bias"] += torch.linspace(-900, 900, len(tensors[f"{side}_bias"]))
    compare(tensors, table, "cpu", **options)
    compare({k: v.float() for k, v in tensors.items()}, table, "cpu", **options)


@pytest.mark.parametrize("remainder", [None, *REMAINDERS])
def test_sides_that_are_nearly_equal(remainder):
    """Their divergence is a sum of small terms, not a difference of large ones."""
    same = SimpleNamespace(indptr=torch.arange(301), ids=torch.arange(300))
    tensors = make(20, 20, v_s=300, v_t=300, d_s=12, d_t=12, bias=False)
    tensors["teacher_hidden"], tensors["teacher_weight"] = tensors["student_hidden"], tensors["student_weight"]
    options = {} if remainder is None else {"top_k": 12, "remainder": remainder}
    if remainder != "drop":
        got = run(vd, tensors, same, backend="cpu", **options)
        assert all(torch.count_nonzero(v) == 0 for v in got.values())
    tensors["teacher_hidden"] = (tensors["student_hidden"].double() + 1e-3 * randn(20, 12, seed=9).double()).float()
    compare(tensors, same, "cpu", **options)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    code = """
import torch
from tests.linear_remapped_kl_backend import compare
from tests.output_layers import make
from tests.remapped_kl_backend import make_table
for combine, top_k in (("sum", None), ("logsumexp", 20)):
    for dtype in (torch.float32, torch.float64, torch.float16):
        tensors = make(61, 61, v_s=230, v_t=500, d_s=37, d_t=70, dtype=dtype)
        compare(tensors, make_table(500, 230), "cpu", combine=combine, top_k=top_k)
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "VOCABDISTIL_ISA": isa}, check=True)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("remainder", [None, *REMAINDERS])
@pytest.mark.parametrize("with_pairs", [False, True])
def test_gradcheck(combine, remainder, with_pairs):
    pairs, n_s, n_t = make_pairs(4, seed=2, gaps=True, empty=True)
    if not with_pairs:
        pairs, n_s, n_t = None, 3, 3
    tensors, table = make(n_s, n_t, v_s=7, v_t=9, d_s=3, d_t=4, dtype=torch.float64), make_table(9, 7)
    student = [tensors.pop(f"student_{k}").requires_grad_() for k in ("hidden", "weight", "bias")]
    options = {} if remainder is None else {"top_k": 3, "remainder": remainder, "entry_weights": make_weights(table)}
    for reduction in ("batchmean", "none"):

        def loss(hidden, weight, bias, reduction=reduction):
            return vd.linear_remapped_kl(
                hidden, weight, **tensors, table=table, student_bias=bias, pairs=pairs, combine=combine,
                temperature=1.5, reduction=reduction, backend="cpu", **options,
            )  # fmt: skip

        assert torch.autograd.gradcheck(loss, student)


def test_tied_embeddings():
    tensors, table, ids = make(40, 40, bias=False), make_table(ROWS, V_S), torch.arange(40) % V_S

    def grad(module, dtype):
        weight = tensors["student_weight"].to(dtype, copy=True).requires_grad_()
        teacher = tensors["teacher_hidden"].to(dtype), tensors["teacher_weight"].to(dtype)
        module.linear_remapped_kl(weight[ids].tanh(), weight, *teacher, table).backward()
        return weight.grad

    assert_norm_close(grad(vd, torch.float32), grad(vd.reference, torch.float64), torch.float32, "weight")


def test_rows_of_the_weight_that_no_row_of_the_table_names():
    table = make_table(ROWS, 9)
    named = table.ids.unique().long()
    got = run(vd, make(30, 30), table, backend="cpu")
    for name in ("student_weight", "student_bias"):
        others = got[name].clone()
        others[named] = 0
        assert torch.count_nonzero(others) == 0 and torch.count_nonzero(got[name]) > 0


def test_second_derivatives_are_refused():
    tensors = make(5, 5)
    hidden = tensors["student_hidden"].requires_grad_()
    loss = vd.linear_remapped_kl(**tensors, table=make_table(ROWS, V_S)).square()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.square().sum().backward()


@pytest.mark.parametrize("top_k", [None, 50])
def test_memory_does_not_grow_with_the_rows(top_k):
    """The peak of a process, beyond what it held before the call. The logits of these rows would take 280 MB."""
    code = f"""
import resource, sys, torch, vocabdistil as vd
from tests.output_layers import make
from tests.remapped_kl_backend import make_table

def step(rows):
    tensors = {{k: v[:rows] if "hidden" in k else v for k, v in all_rows.items()}}
    tensors["student_weight"].requires_grad_()
    vd.linear_remapped_kl(**tensors, table=table, top_k={top_k}, backend="cpu").backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

scale = 1024 if sys.platform.startswith("linux") else 1
all_rows, table = make(20000, 20000, v_s=2000, v_t=1500, d_s=4, d_t=4, bias=False), make_table(1500, 2000)
before, after = step(200), step(20000)
assert (after - before) * scale < 24e6, (before, after)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_as_one_graph(reduction, dtype):
    pairs, n_s, n_t = make_pairs(12, seed=4)
    tensors, table = make(n_s, n_t, dtype=dtype), make_table(ROWS, V_S)

    def loss(hidden, weight):
        options = {**tensors, "student_hidden": hidden * 2, "student_weight": weight}
        return (vd.linear_remapped_kl(**options, table=table, pairs=pairs, reduction=reduction) * 3).sum()

    assert_compiles(loss, tensors["student_hidden"], tensors["student_weight"])


def test_opcheck():
    t, table = make(9, 9), make_table(ROWS, V_S)
    for hidden in (t["student_hidden"], t["student_hidden"].t().contiguous().t()):
        for weights, top_k in ((None, 0), (make_weights(table), 3)):
            args = (
                hidden, t["student_weight"], t["student_bias"], t["teacher_hidden"], t["teacher_weight"], None,
                table.indptr, table.ids, weights, torch.rand(9), True, top_k, 1, 2.0, "cpu", True, True, False,
            )  # fmt: skip
            torch.library.opcheck(torch.ops.vocabdistil.linear_remapped_kl.default, args)


def test_strided_inputs():
    tensors, table = make(20, 20), make_table(ROWS, V_S)
    want = run(vd, tensors, table)
    strided = {k: v.t().contiguous().t() if v.dim() == 2 else v.repeat_interleave(2)[::2] for k, v in tensors.items()}
    for side in ("student", "teacher"):
        strided[f"{side}_hidden"] = strided[f"{side}_hidden"].unflatten(0, (4, 5))
    for name, value in run(vd, strided, table).items():
        torch.testing.assert_close(value, want[name].view_as(value), msg=name)


BAD = [
    ({"student_hidden": torch.randn(6)}, ValueError, "student_hidden"),
    ({"student_weight": torch.randn(50, 13)}, ValueError, "student_weight"),
    ({"teacher_weight": torch.randn(90, 20).double()}, TypeError, "teacher_weight"),
    ({"student_bias": torch.randn(49)}, ValueError, "student_bias"),
    ({"student_weight": torch.randn(20, 12), "student_bias": None}, ValueError, r"table\.ids"),
    (
        {"teacher_weight": torch.randn(80, 20), "teacher_bias": None}, ValueError,
        r"table: expected at most 80 rows \(rows of teacher_weight\), got 83",
    ),
    ({"table": None}, TypeError, "table"),
    ({"combine": "mean"}, ValueError, "combine"),
    ({"entry_weights": torch.ones(2)}, ValueError, "entry_weights"),
    ({"top_k": 0}, ValueError, "top_k"),
    ({"remainder": "keep"}, ValueError, "remainder"),
    ({"temperature": -1.0}, ValueError, "temperature"),
    ({"reduction": "mean"}, ValueError, "reduction"),
    ({"backend": "cuda"}, ValueError, "backend"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "text"), BAD, ids=[f"{list(b[0])[0]}-{i}" for i, b in enumerate(BAD)])
def test_bad_input_is_named(change, error, text):
    with pytest.raises(error, match=f"^{text}"):
        vd.linear_remapped_kl(**{**make(6, 6), "table": make_table(ROWS, V_S), **change})
