"""remapped_kl on CPU: the kernel against the float64 reference, autograd, compile, determinism, bad input."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import vocabdistil as vd
from tests.compiling import assert_compiles
from tests.remapped_kl_backend import *  # noqa: F403
from tests.remapped_kl_backend import COMBINES, DTYPES, INF, REMAINDERS, compare, make_table, make_weights, run
from tests.spans import make_pairs
from tests.vocabularies import randn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize(("v_s", "rows", "v_t"), [(1, 2, 2), (5, 9, 9), (60, 200, 203), (500, 5000, 5000)])
def test_against_float64(v_s, rows, v_t, combine, dtype):
    student, teacher = randn(11, v_s, seed=1, dtype=dtype), randn(11, v_t, seed=2, dtype=dtype, scale=2)
    compare(student, teacher, make_table(rows, v_s, seed=v_s), combine=combine, temperature=1.7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_pairs(combine, reduction, dtype):
    pairs, n_s, n_t = make_pairs(31, seed=3, gaps=True, empty=True)
    student, teacher = randn(n_s, 40, seed=1, dtype=dtype), randn(n_t, 90, seed=2, dtype=dtype)
    compare(student, teacher, make_table(90, 40), pairs=pairs, combine=combine, reduction=reduction, temperature=2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize("combine", COMBINES)
def test_any_top_k(combine, remainder, dtype):
    table = make_table(200, 60, seed=3)
    student, teacher = randn(6, 60, seed=1, dtype=dtype), randn(6, 200, seed=2, dtype=dtype, scale=2)
    for top_k in (1, 2, 7, 100, 1000):
        compare(student, teacher, table, top_k=top_k, combine=combine, remainder=remainder, temperature=1.7)


@pytest.mark.parametrize("combine", COMBINES)
def test_one_to_one_tables(combine):
    everything = SimpleNamespace(indptr=torch.arange(31), ids=torch.randperm(30))
    compare(randn(5, 30), randn(5, 30, seed=1), everything, combine=combine)
    x = randn(5, 30)
    student = x.clone().requires_grad_()
    same = SimpleNamespace(indptr=torch.arange(31), ids=torch.arange(30))
    loss = vd.remapped_kl(student, x, same, combine=combine)
    loss.backward()
    assert loss.item() == 0 and torch.count_nonzero(student.grad) == 0


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("with_pairs", [False, True])
def test_gradcheck(combine, with_pairs):
    pairs, n_s, n_t = make_pairs(5, seed=2, gaps=True, empty=True)
    if not with_pairs:
        pairs, n_s, n_t = None, 4, 4
    student = randn(n_s, 6, dtype=torch.float64).requires_grad_()
    teacher, table = randn(n_t, 9, seed=1, dtype=torch.float64), make_table(9, 6)
    for reduction in ("batchmean", "none"):
        assert torch.autograd.gradcheck(
            lambda s, r=reduction: vd.remapped_kl(
                s, teacher, table, pairs=pairs, combine=combine, temperature=1.5, reduction=r
            ),
            (student,),
        )


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("remainder", REMAINDERS)
def test_gradcheck_of_weights_and_top_k(remainder, combine):
    student = randn(4, 6, dtype=torch.float64).requires_grad_()
    teacher, table = randn(4, 9, seed=1, dtype=torch.float64), make_table(9, 6)
    options = {"entry_weights": make_weights(table), "combine": combine, "top_k": 3, "remainder": remainder}
    assert torch.autograd.gradcheck(lambda s: vd.remapped_kl(s, teacher, table, temperature=1.5, **options), (student,))


def test_strided_inputs():
    table = make_table(20, 12)
    flat_s, flat_t = randn(10, 12, seed=1), randn(10, 20, seed=2)
    expected = run(vd, flat_s, flat_t, table)
    views = {
        "3d": (flat_s.view(2, 5, 12), flat_t.view(2, 5, 20)),
        "transposed": (flat_s.t().contiguous().t(), flat_t.t().contiguous().t()),
        "row stride": (torch.cat([flat_s, flat_s], 1)[:, :12], torch.cat([flat_t, flat_t], 1)[:, :20]),
    }
    for name, (s, t) in views.items():
        leaf = s.detach().requires_grad_()
        loss = vd.remapped_kl(leaf, t, table) * 0.5
        loss.backward()
        assert torch.equal(loss.detach(), expected[0] * 0.5), name
        assert torch.equal(leaf.grad.reshape(10, 12), expected[1]), name


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("top_k", [None, 20])
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_bit_identical_for_any_number_of_threads(threads, combine, top_k):
    pairs, n_s, n_t = make_pairs(200, seed=9, gaps=True)
    student, teacher, table = randn(n_s, 300, seed=1), randn(n_t, 2000, seed=2), make_table(2000, 300)
    options = {"pairs": pairs, "combine": combine, "entry_weights": make_weights(table), "top_k": top_k}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(vd, student, teacher, table, **options)
        torch.set_num_threads(threads)
        for _ in range(2):
            loss, grad = run(vd, student, teacher, table, **options)
            assert torch.equal(loss, expected[0]) and torch.equal(grad, expected[1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_compiles_as_one_graph(dtype, reduction, weighted):
    pairs, n_s, n_t = make_pairs(12, seed=4)
    student, teacher, table = randn(n_s, 24, dtype=dtype), randn(n_t, 30, seed=1, dtype=dtype), make_table(30, 24)

    given = {"entry_weights": make_weights(table), "top_k": 7} if weighted else {}

    def loss(s):
        loss = vd.remapped_kl(s * 2, teacher, table, pairs=pairs, temperature=2.0, reduction=reduction, **given)
        return (loss * 3).sum()

    assert_compiles(loss, student)


def test_opcheck():
    pairs, n_s, n_t = make_pairs(9, seed=4, gaps=True)
    spans = [pairs.student_start, pairs.student_end, pairs.teacher_start, pairs.teacher_end]
    table = make_table(10, 8)
    for student in (randn(n_s, 8), randn(n_s, 16)[:, :8]):
        for weights, top_k in ((None, 0), (make_weights(table), 3)):
            args = (student, randn(n_t, 10), spans, table.indptr, table.ids, weights, torch.rand(9))
            args += (True, top_k, 1, 2.0, "cpu", True)
            torch.library.opcheck(torch.ops.vocabdistil.remapped_kl.default, args)


def test_tables_are_told_apart():
    student, teacher = randn(3, 6), randn(3, 9, seed=1)
    table = make_table(9, 6, seed=1)
    first = vd.remapped_kl(student, teacher, table)
    for seed in range(2, 9):
        compare(student, teacher, make_table(9, 6, seed=seed))
    assert torch.equal(vd.remapped_kl(student, teacher, table), first)
    table.ids.copy_((table.ids + 1) % 6)  # a table changed in place is another table
    compare(student, teacher, table)
    weights = make_weights(table)
    for combine in COMBINES:  # one reads the weights, the other their logs
        compare(student, teacher, table, entry_weights=weights, combine=combine)
        compare(student.double(), teacher.double(), table, entry_weights=weights, combine=combine)
    weights.mul_(torch.linspace(1, 2, len(weights)))
    compare(student, teacher, table, entry_weights=weights)


def test_a_projection_of_probabilities():
    """What X-Token projects: ``KL(p_t || W p_s)`` of a matrix whose columns add up to 1."""
    student, teacher = randn(4, 6, dtype=torch.float64), randn(4, 9, seed=1, dtype=torch.float64)
    dense = torch.rand(9, 6, dtype=torch.float64) * (torch.rand(9, 6) < 0.5)
    dense[:6] += torch.eye(6)
    dense = dense[dense.sum(1) > 0]
    dense /= dense.sum(0)
    sparse = dense.to_sparse_csr()
    table = SimpleNamespace(indptr=sparse.crow_indices(), ids=sparse.col_indices())
    teacher = teacher[:, : len(dense)]
    for temperature in (1.0, 2.0):
        q, r = (teacher / temperature).softmax(1), (student / temperature).softmax(1) @ dense.t()
        want = temperature**2 * (q * (q / r).log()).sum(1).mean()
        got = temperature**2 * vd.remapped_kl(
            student / temperature, teacher / temperature, table, entry_weights=sparse.values(), combine="logsumexp"
        )
        torch.testing.assert_close(got, want)


def test_a_real_table():
    indptr, ids = torch.tensor([0, 1, 3, 4]), torch.tensor([0, 1, 2, 2])
    table = vd.RemapTable(indptr, ids, student_vocab_size=3, unk_id=2, pad_id=0)
    compare(randn(4, 3), randn(4, 3, seed=1), table)


def test_inputs_are_left_alone_and_gradients_are_owned():
    student, teacher, table = randn(8, 16).requires_grad_(), randn(8, 20, seed=1).requires_grad_(), make_table(20, 16)
    copies = student.detach().clone(), teacher.detach().clone()
    for _ in range(2):
        vd.remapped_kl(student, teacher, table).backward()
    assert torch.equal(student, copies[0]) and torch.equal(teacher, copies[1]) and teacher.grad is None
    single = torch.autograd.grad(vd.remapped_kl(student, teacher, table), student)[0]
    torch.testing.assert_close(student.grad, 2 * single)


def test_no_rows_and_no_mapped_token():
    none = torch.zeros(0, dtype=torch.int32)
    nothing = SimpleNamespace(indptr=torch.zeros(10, dtype=torch.int32), ids=none)
    empty = vd.SpanPairs(none, none, none, none)
    for pairs, n, table in ((None, 0, make_table(9, 8)), (empty, 3, make_table(9, 8)), (None, 4, nothing)):
        student = randn(n, 8).requires_grad_()
        loss = vd.remapped_kl(student, randn(n, 9), table, pairs=pairs)
        loss.backward()
        assert loss.item() == 0 and torch.count_nonzero(student.grad) == 0


@pytest.mark.parametrize("combine", COMBINES)
def test_nan_is_not_hidden(combine):
    table = SimpleNamespace(indptr=torch.tensor([0, 1, 3]), ids=torch.tensor([0, 1, 2]))
    for side in (0, 1):
        logits = [randn(3, 4), randn(3, 2)]
        logits[side][1, 1] = float("nan")
        assert vd.remapped_kl(*logits, table, combine=combine).isnan()
    student = torch.full((1, 4), float("nan"))
    assert vd.remapped_kl(student, randn(1, 2), table, combine=combine).isnan()


TABLE = SimpleNamespace(indptr=torch.tensor([0, 1, 3]), ids=torch.tensor([0, 1, 2]))
BAD = [
    ({"student_logits": torch.randn(4)}, ValueError, "student_logits"),
    ({"student_logits": torch.randn(4, 4)}, ValueError, "student_logits"),
    ({"student_logits": torch.randn(3, 2)}, ValueError, r"table\.ids: expected ids from 0 to 1, got 2"),
    ({"teacher_logits": torch.randn(3, 1)}, ValueError, "table"),
    ({"table": None}, TypeError, "table"),
    ({"table": SimpleNamespace(indptr=torch.tensor([0, 1, 2]), ids=TABLE.ids)}, ValueError, r"table\.indptr"),
    ({"table": SimpleNamespace(indptr=torch.tensor([0, 4, 3]), ids=TABLE.ids)}, ValueError, r"table\.indptr"),
    ({"combine": "mean"}, ValueError, "combine"),
    ({"entry_weights": [1, 1, 1]}, TypeError, "entry_weights"),
    ({"entry_weights": torch.ones(3, dtype=torch.int64)}, TypeError, "entry_weights"),
    ({"entry_weights": torch.ones(2)}, ValueError, r"entry_weights: expected one per entry of the table \(3\), got 2"),
    ({"entry_weights": torch.tensor([1, INF, 1])}, ValueError, "entry_weights: expected finite values, got inf"),
    (
        {"entry_weights": torch.tensor([1, -1.0, 1]), "combine": "logsumexp"},
        ValueError,
        "entry_weights: expected no negative value with combine='logsumexp', got -1.0",
    ),
    (
        {"entry_weights": torch.tensor([1, -1e300, 1], dtype=torch.float64)},
        ValueError,
        "entry_weights: expected values that float32 holds, got -1e",
    ),
    ({"top_k": 0}, ValueError, "top_k: expected a number from 1 to 2147483647, or None, got 0"),
    ({"top_k": 2**63}, ValueError, "top_k: expected a number from 1 to 2147483647, or None, got 9223372036854775808"),
    ({"top_k": 2.0}, TypeError, "top_k"),
    ({"remainder": "mean"}, ValueError, "remainder"),
    ({"temperature": 0.0}, ValueError, "temperature"),
    ({"reduction": "mean"}, ValueError, "reduction"),
    ({"backend": "cuda"}, ValueError, "backend"),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD, ids=[f"{list(b[0])[0]}-{i}" for i, b in enumerate(BAD)])
def test_bad_input_is_named(change, error, text):
    options = {"student_logits": torch.randn(3, 4), "teacher_logits": torch.randn(3, 5), "table": TABLE, **change}
    with pytest.raises(error, match=f"^{text}"):
        vd.remapped_kl(**options)


@pytest.mark.parametrize("weight", [1e-60, 1e300])
def test_weights_that_float32_does_not_hold_count_by_their_logarithms(weight):
    weights = torch.tensor([1.0, weight, 1.0], dtype=torch.float64)
    student, teacher = randn(3, 4, seed=1), randn(3, 5, seed=2)
    compare(student, teacher, TABLE, entry_weights=weights, combine="logsumexp", temperature=2.0)


def test_a_table_that_changes_after_it_was_checked(monkeypatch):
    from vocabdistil.ops import _remap_plans

    ids, check = TABLE.ids.clone(), _remap_plans.check_table
    table = SimpleNamespace(indptr=TABLE.indptr, ids=ids)

    def check_and_write(*arguments):
        check(*arguments)
        ids.numpy()[1] = 40_000_000

    student, teacher = randn(3, 4, seed=1), randn(3, 5, seed=2)
    wanted = vd.remapped_kl(student, teacher, TABLE)
    monkeypatch.setattr(_remap_plans, "check_table", check_and_write)
    monkeypatch.setattr(_remap_plans.plans, "_plans", type(_remap_plans.plans._plans)())
    assert torch.equal(vd.remapped_kl(student, teacher, table), wanted)
    with pytest.raises(ValueError, match=r"^table\.ids"):
        vd.remapped_kl(student, teacher, SimpleNamespace(indptr=TABLE.indptr, ids=ids))


def test_gather_plan_of_the_gpu_holds_the_table():
    kernels = pytest.importorskip("vocabdistil.triton_kernels.remapped_kl", reason="triton is not installed")
    table = make_table(2500, 60, longest=9)
    table.ids[::3] = 5  # in so many rows that its list is cut
    weights = torch.arange(1.0, len(table.ids) + 1)  # of each entry another
    plan = kernels.make_gather_plan(table.indptr.long(), table.ids.long(), weights, 60)
    height = kernels.SLICE

    def lists(at, values, count):
        """The entries of each list, without the padding."""
        entries = []
        for o in range(count):
            begin, end = at[o // height].item(), at[o // height + 1].item()
            column = values[begin:end].view(-1, height)[:, o % height]
            entries.append(column[column >= 0].tolist() if values.dtype == torch.int32 else column[column > 0].tolist())
        return entries

    rows = plan.rows.tolist()
    found = dict(zip(rows, lists(plan.pieces_at, plan.pieces, len(rows)), strict=True))
    found.pop(-1, None)
    want = [table.ids[a:b].tolist() for a, b in zip(table.indptr[:-1], table.indptr[1:], strict=True)]
    assert found == {v: pieces for v, pieces in enumerate(want) if pieces}
    entries = lists(plan.pieces_at, plan.weights, len(rows))
    assert all(table.ids[int(e) - 1] == j for row, of in zip(rows, entries, strict=True) if row >= 0
               for e, j in zip(of, found[row], strict=True))  # fmt: skip
    uses = lists(plan.uses_at, plan.uses, plan.owners.numel())
    of_uses = lists(plan.uses_at, plan.use_weights, plan.owners.numel())
    for o, (at, numbers) in enumerate(zip(uses, of_uses, strict=True)):
        for i, e in zip(at, numbers, strict=True):
            v = rows[i]
            assert table.ids[int(e) - 1] == plan.owners[o] and table.indptr[v] < e <= table.indptr[v + 1]
    assert max(map(len, uses)) == kernels.SEGMENT
    for j in range(60):
        segments = plan.segments[plan.of[j] : plan.of[j + 1]].tolist()
        assert all(plan.owners[o] == j for o in segments)
        got = sorted(rows[o] for segment in segments for o in uses[segment])
        assert got == sorted(v for v, pieces in enumerate(want) for piece in pieces if piece == j)
    # Rows side by side are of nearly one length: few lanes wait.
    assert plan.pieces.numel() < 1.3 * table.ids.numel()
