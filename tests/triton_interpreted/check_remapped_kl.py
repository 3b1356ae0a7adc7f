"""The Triton remapped_kl kernels in the interpreter against the float64 reference."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from vocabdistil.triton_kernels import remapped_kl as kernels

import vocabdistil as vd
from tests import remapped_kl_backend
from tests.compiling import assert_compiles
from tests.numbers_backend import test_divergences_over_a_remapped_vocabulary_at_any_temperature  # noqa: F401
from tests.remapped_kl_backend import *  # noqa: F403
from tests.remapped_kl_backend import COMBINES, DTYPES, make_table, run
from tests.spans import make_pairs
from tests.upstream import assert_guesses_the_upstream_gradient
from tests.vocabularies import randn

# -inf less -inf, and more, in lanes that are masked afterwards: numpy, which plays the GPU here, tells of it.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")


# Tables are cut as a hundred times larger ones are, and a program takes several groups of pairs.
SMALL = {"SLICE": 16, "SEARCH": 8, "WINDOW": 32, "SEGMENT": 3, "BUDGET": 4 * 4 * 900, "RESIDENT": 2}




@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(kernels, name, value)


compare = partial(remapped_kl_backend.compare, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize(("v_s", "rows", "v_t"), [(1, 2, 2), (5, 9, 9), (40, 70, 73)])
def test_against_float64(v_s, rows, v_t, combine, dtype):
    student, teacher = randn(9, v_s, seed=1, dtype=dtype), randn(9, v_t, seed=2, dtype=dtype, scale=2)
    compare(student, teacher, make_table(rows, v_s, seed=v_s), combine=combine, temperature=1.7)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize(
    ("reduction", "dtype"), [("batchmean", torch.bfloat16), ("none", torch.float32)], ids=str
)
def test_pairs(combine, reduction, dtype):
    pairs, n_s, n_t = make_pairs(10, seed=3, gaps=True, empty=True)
    student, teacher = randn(n_s, 40, seed=1, dtype=dtype), randn(n_t, 90, seed=2, dtype=dtype)
    compare(student, teacher, make_table(90, 40), pairs=pairs, combine=combine, reduction=reduction, temperature=2.0)


@pytest.mark.parametrize("combine", COMBINES)
def test_gradient_is_zero_where_both_sides_are_equal(combine):
    x = randn(5, 30)
    same = SimpleNamespace(indptr=torch.arange(31), ids=torch.arange(30))
    loss, grad = run(vd, x, x, same, combine=combine, backend="triton")
    assert loss.item() == 0 and torch.count_nonzero(grad) == 0


@pytest.mark.parametrize("combine", COMBINES)
def test_long_rows_and_frequent_pieces(combine):
    """One row of 70 pieces, and one piece in every row."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.full((60,), 2)
    lengths[17] = 70
    indptr = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    ids = torch.randint(0, 40, (int(indptr[-1]),), generator=g)
    ids[indptr[:-1]] = 3
    compare(randn(3, 40, scale=0.3), randn(3, 60, seed=1), SimpleNamespace(indptr=indptr, ids=ids), combine=combine)


@pytest.mark.parametrize(("combine", "dtype"), [("sum", torch.bfloat16), ("logsumexp", torch.float32)], ids=str)
def test_upstream_gradients_are_folded_in_once(combine, dtype):
    table, teacher = make_table(16, 9), randn(6, 16, seed=2, dtype=dtype)
    grads = []
    for upstream in (1.0, -4.0, 2.0**-30):
        leaf = randn(6, 9, seed=1, dtype=dtype).requires_grad_()
        vd.remapped_kl(leaf, teacher, table, combine=combine, backend="triton").backward(torch.tensor(upstream))
        grads.append(leaf.grad / upstream)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
    loss = partial(vd.remapped_kl, teacher_logits=teacher, table=table, combine=combine, backend="triton")
    assert_guesses_the_upstream_gradient(loss, randn(6, 9, seed=1, dtype=dtype))


@pytest.mark.parametrize("combine", COMBINES)
def test_nothing_is_read_that_was_not_written(combine, fresh_memory_holds_nan):
    pairs, n_s, n_t = make_pairs(10, seed=3, gaps=True, empty=True)
    loss, grad = run(
        vd, randn(n_s, 40), randn(n_t, 90, seed=1), make_table(90, 40), pairs=pairs, combine=combine, backend="triton"
    )
    assert loss.isfinite() and grad.isfinite().all()


def test_the_same_bits_again_and_no_rows():
    table, teacher = make_table(90, 40), randn(6, 90, seed=2)
    first, second = (run(vd, randn(6, 40), teacher, table, combine="logsumexp", backend="triton") for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    loss, grad = run(vd, randn(0, 40), teacher[:0], table, backend="triton")
    assert loss.item() == 0 and grad.shape == (0, 40)
    nothing = SimpleNamespace(indptr=torch.zeros(91, dtype=torch.int64), ids=torch.zeros(0, dtype=torch.int64))
    loss, grad = run(vd, randn(6, 40), teacher, nothing, backend="triton")
    assert loss.item() == 0 and torch.count_nonzero(grad) == 0


def test_bad_tables_are_named():
    for indptr, ids, text in (([0, 2, 1], [0], "indptr"), ([0, 1], [9], "ids")):
        table = SimpleNamespace(indptr=torch.tensor(indptr), ids=torch.tensor(ids))
        with pytest.raises(ValueError, match=rf"^table\.{text}"):
            vd.remapped_kl(randn(2, 5), randn(2, 4), table, backend="triton")


def test_compiles_as_one_graph():
    table, teacher = make_table(16, 9), randn(6, 16, seed=2, dtype=torch.bfloat16)

    def loss(x):
        return vd.remapped_kl(x * 2, teacher, table, backend="triton") * 3

    assert_compiles(loss, randn(6, 9, dtype=torch.bfloat16))
