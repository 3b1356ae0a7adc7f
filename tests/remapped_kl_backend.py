"""What remapped_kl must do in every backend, against the float64 reference. A tier imports these tests and says by its
fixture which ``backend`` runs: the C++ on the CPU (None), or Triton in the interpreter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import vocabdistil as vd
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


def run(module, student, teacher, table, **options):
    student = student.clone().requires_grad_()
    loss = module.remapped_kl(student, teacher, table, **options)
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
    (loss * upstream).sum().backward()
    return loss.detach(), student.grad


def compare(student, teacher, table, backend=None, **options):
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
