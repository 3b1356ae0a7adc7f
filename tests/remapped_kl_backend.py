"""What remapped_kl must do in every backend, against the float64 reference. A tier imports these tests and says by its
fixture which ``backend`` runs: the C++ on the CPU (None), or Triton in the interpreter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import vocabdistil as vd
from tests.spans import make_pairs
from tests.tolerances import assert_norm_close
from tests.vocabularies import randn

COMBINES = ["sum", "logsumexp"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")


def make_table(rows, student, seed=0, longest=5, unknown=0.1):
    """Rows of 0 to ``longest`` pieces, some of them id 1 alone, as unknown tokens are."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (rows,), generator=g)
    alone = torch.rand(rows, generator=g) < unknown
    lengths[alone] = 1
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = torch.randint(0, student, (int(indptr[-1]),), generator=g)
    ids[indptr[:-1][alone]] = min(1, student - 1)
    return SimpleNamespace(indptr=indptr.to(torch.int32), ids=ids.to(torch.int32))


def make_weights(table, seed=0):
    """Of either sign but where they are to be logs, some of them 0, and of one whole row."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(table.ids.numel(), generator=g) + 0.1
    weights[torch.rand(weights.shape, generator=g) < 0.2] = 0
    longest = int(table.indptr.diff().argmax())
    weights[table.indptr[longest] : table.indptr[longest + 1]] = 0
    return weights


REMAINDERS = ["rest", "drop", "renormalize"]


def run(module, student, teacher, table, **options):
    student = student.clone().requires_grad_()
    loss = module.remapped_kl(student, teacher, table, **options)
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
    (loss * upstream).sum().backward()
    return loss.detach(), student.grad


def compare(student, teacher, table, backend=None, **options):
    """Loss and gradient of the kernel against those of the reference in float64."""
    loss, grad = run(vd, student, teacher, table, backend=backend, **options)
    want_loss, want_grad = run(vd.reference, student.double(), teacher.double(), table, **options)
    dtype = student.dtype
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == exact and grad.dtype == dtype and grad.shape == student.shape
    factor = 2 if backend == "triton" else 1  # the interpreter cuts a float32 to bfloat16 instead of rounding
    assert_norm_close(loss, want_loss, exact, "loss", factor)
    assert_norm_close(grad, want_grad, dtype, "gradient", factor)


@pytest.mark.parametrize("combine", COMBINES)
def test_a_piece_that_stands_twice_counts_twice(combine, backend):
    table = SimpleNamespace(indptr=torch.tensor([0, 3, 4, 4, 6]), ids=torch.tensor([2, 2, 0, 1, 3, 3]))
    compare(randn(3, 5), randn(3, 4, seed=1), table, combine=combine, backend=backend)


@pytest.mark.parametrize("combine", COMBINES)
def test_minus_infinity(combine, backend):
    table = make_table(60, 20, seed=5, longest=3)
    student, teacher = randn(4, 20, seed=1), randn(4, 60, seed=2)
    teacher[0, :30] = -INF
    teacher[1, :] = -INF
    teacher[1, int(table.indptr.diff().argmax())] = 0  # all mass on one token
    student[2, 7] = -INF
    for v in range(60):  # nor has the teacher mass there
        if 7 in table.ids[table.indptr[v] : table.indptr[v + 1]]:
            teacher[2, v] = -INF
    compare(student, teacher, table, combine=combine, backend=backend, temperature=2.0)


def test_logsumexp_of_values_far_apart(backend):
    table = make_table(90, 40)
    compare(randn(6, 40, scale=100), randn(6, 90, seed=1, scale=100), table, combine="logsumexp", backend=backend)


KINDS = [("sum", torch.float64), ("logsumexp", torch.float32), ("sum", torch.bfloat16), ("logsumexp", torch.float16)]


@pytest.mark.parametrize(("combine", "dtype"), KINDS, ids=str)
def test_weights_of_entries(combine, dtype, backend):
    table = make_table(60, 20, seed=3)
    weights = make_weights(table)
    if combine == "sum":
        weights[::3] *= -1
    student, teacher = randn(5, 20, seed=1, dtype=dtype), randn(5, 60, seed=2, dtype=dtype)
    compare(student, teacher, table, entry_weights=weights, combine=combine, backend=backend, temperature=1.7)
    compare(student, teacher, table, entry_weights=weights.double() + 1, combine=combine, backend=backend)


@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize(("combine", "dtype"), KINDS[:3], ids=str)
def test_top_k(combine, dtype, remainder, backend):
    table = make_table(60, 20, seed=3)
    pairs, n_s, n_t = make_pairs(5, seed=3, gaps=True, empty=True)
    student, teacher = randn(n_s, 20, seed=3, dtype=dtype), randn(n_t, 60, seed=4, dtype=dtype, scale=2)
    compare(
        student, teacher, table, top_k=7, remainder=remainder, pairs=pairs, entry_weights=make_weights(table),
        combine=combine, backend=backend, temperature=1.7,
    )  # fmt: skip


@pytest.mark.parametrize("remainder", REMAINDERS)
def test_columns_as_large_as_the_last_of_the_top_k_are_among_them(remainder, backend):
    table = SimpleNamespace(indptr=torch.arange(7), ids=torch.tensor([3, 2, 1, 0, 1, 2]))
    teacher = torch.tensor([[1.0, 2.0, 1.0, 0.0, 1.0, -1.0], [0.0] * 6, [-INF] * 6, [3.0] + [-INF] * 5])
    compare(randn(4, 4), teacher, table, top_k=2, remainder=remainder, backend=backend)


@pytest.mark.parametrize("remainder", REMAINDERS)
def test_top_k_of_sides_that_are_nearly_equal(remainder, backend):
    table = SimpleNamespace(indptr=torch.arange(41), ids=torch.arange(40))
    teacher = randn(3, 40, scale=2)
    compare(teacher + 1e-4 * randn(3, 40, seed=1), teacher, table, top_k=5, remainder=remainder, backend=backend)
    loss, grad = run(vd, teacher, teacher, table, top_k=5, remainder=remainder, backend=backend)
    if remainder != "drop":
        assert loss.item() == 0 and torch.count_nonzero(grad) == 0


@pytest.mark.parametrize("remainder", REMAINDERS)
def test_top_k_does_not_hide_nan(remainder, backend):
    table, teacher = make_table(60, 20, seed=3), randn(2, 60)
    teacher[1, int(table.indptr.diff().argmax())] = float("nan")
    loss = vd.remapped_kl(
        randn(2, 20, seed=1), teacher, table, top_k=4, remainder=remainder, reduction="none", backend=backend
    )
    assert loss[0].isfinite() and loss[1].isnan()
