from __future__ import annotations

import math

import pytest
import torch

from tests.reference_cases import F64, matched, mixed_pairs, naive_kl, no_pairs, remap, rows
from tests.tolerances import LOSS, VALUE, assert_close
from vocabdistil.reference import matched_kl, remapped_kl

TABLE = remap([[2], [], [0, 3], [3, 1, 1], [4]])  # 5 teacher tokens, 5 student columns


def naive(z_s, z_t, combine, temperature):
    ends = TABLE.indptr.tolist()
    ids = [TABLE.ids[a:b].tolist() for a, b in zip(ends, ends[1:], strict=False)]
    kept = [v for v, row in enumerate(ids) if row]
    losses = []
    for s, t in zip(z_s, z_t, strict=True):
        if combine == "sum":
            z = torch.stack([sum(s[j] for j in ids[v]) for v in kept])
        else:
            z = torch.stack([sum(s[j].exp() for j in ids[v]).log() for v in kept])
        q, r = torch.softmax(t[kept] / temperature, 0), torch.softmax(z / temperature, 0)
        losses.append(temperature**2 * naive_kl(q, r))
    return torch.stack(losses)


def test_by_hand():
    # Rows {0, 1} and {2}: the sum maps logits (log 2, log 3, 0) to (log 6, 0), logsumexp to (log 5, 0).
    table = remap([[0, 1], [2]])
    student = torch.tensor([[math.log(2), math.log(3), 0.0]], dtype=F64)
    teacher = torch.zeros(1, 2, dtype=F64)
    by_sum = 0.5 * math.log(0.5 * 7 / 6) + 0.5 * math.log(0.5 * 7)
    by_logsumexp = 0.5 * math.log(0.5 * 6 / 5) + 0.5 * math.log(0.5 * 6)
    assert remapped_kl(student, teacher, table).item() == pytest.approx(by_sum, abs=1e-14)
    loss = remapped_kl(student, teacher, table, combine="logsumexp")
    assert loss.item() == pytest.approx(by_logsumexp, abs=1e-14)


@pytest.mark.parametrize("combine", ["sum", "logsumexp"])
def test_equals_a_loop(combine):
    z_s, z_t = rows(4, 5, grad=True), rows(4, 6, seed=1)
    losses = remapped_kl(z_s, z_t, TABLE, combine=combine, temperature=1.8, reduction="none")
    expected = naive(z_s, z_t, combine, 1.8)
    assert_close(losses, expected, LOSS, F64)
    (grad,) = torch.autograd.grad(losses.sum(), z_s)
    (expected_grad,) = torch.autograd.grad(expected.sum(), z_s)
    assert_close(grad, expected_grad, VALUE, F64)
    mean = remapped_kl(z_s, z_t, TABLE, combine=combine, temperature=1.8)
    assert_close(mean, expected.mean(), LOSS, F64)


@pytest.mark.parametrize("combine", ["sum", "logsumexp"])
def test_pairs(combine):
    pairs = mixed_pairs()
    z_s, z_t = rows(7, 5), rows(6, 5, seed=1)
    losses = remapped_kl(z_s, z_t, TABLE, pairs=pairs, combine=combine, reduction="none")
    assert losses[[1, 3, 4]].eq(0).all()
    first = naive(z_s[0:2].mean(0, keepdim=True), z_t[0:2].mean(0, keepdim=True), combine, 1.0)
    assert_close(losses[:1], first, LOSS, F64)
    assert_close(remapped_kl(z_s, z_t, TABLE, pairs=pairs, combine=combine), losses.sum() / 3, LOSS, F64)


@pytest.mark.parametrize("combine", ["sum", "logsumexp"])
def test_gradcheck(combine):
    z_s, z_t = rows(7, 5, grad=True), rows(6, 5, seed=1)
    assert torch.autograd.gradcheck(
        lambda z: remapped_kl(z, z_t, TABLE, pairs=mixed_pairs(), combine=combine, temperature=1.3), z_s
    )


WEIGHTS = torch.tensor([0.5, 2.0, 0.25, 1.0, 0.0, 3.0, 0.0], dtype=F64)  # the row [4] counts for nothing


@pytest.mark.parametrize("remainder", ["rest", "drop", "renormalize"])
@pytest.mark.parametrize("combine", ["sum", "logsumexp"])
def test_weights_and_top_k_equal_a_loop(combine, remainder):
    z_s, z_t = rows(4, 5, grad=True), rows(4, 5, seed=1)
    dense = torch.zeros(5, 5, dtype=F64)
    for v, (a, b) in enumerate(zip(TABLE.indptr, TABLE.indptr[1:], strict=False)):
        for e in range(int(a), int(b)):
            dense[v, TABLE.ids[e]] += WEIGHTS[e]
    dense = dense[[0, 2, 3]]
    losses, expected = [], []
    for top_k in (1, 2, 3, 9):
        losses.append(
            remapped_kl(
                z_s,
                z_t,
                TABLE,
                entry_weights=WEIGHTS,
                combine=combine,
                top_k=top_k,
                remainder=remainder,
                temperature=1.8,
                reduction="none",
            )  # fmt: skip
        )
        each = []
        for s, t in zip(z_s, z_t[:, [0, 2, 3]], strict=True):
            z = dense @ s if combine == "sum" else (dense @ s.exp()).log()
            q, r = torch.softmax(t / 1.8, 0), torch.softmax(z / 1.8, 0)
            order = t.argsort(descending=True)
            inside, outside = order[:top_k], order[top_k:]
            if remainder == "renormalize":
                q, r = (x[inside] / x[inside].sum() for x in (q, r))
                inside, outside = torch.arange(len(q)), outside[:0]
            kl = (q[inside] * (q[inside] / r[inside]).log()).sum()
            if remainder == "rest" and len(outside):
                kl = kl + q[outside].sum() * (q[outside].sum() / r[outside].sum()).log()
            each.append(1.8**2 * kl)
        expected.append(torch.stack(each))
    assert_close(torch.stack(losses), torch.stack(expected), LOSS, F64)
    (grad,) = torch.autograd.grad(sum(x.sum() for x in losses), z_s)
    (expected_grad,) = torch.autograd.grad(sum(x.sum() for x in expected), z_s)
    assert_close(grad, expected_grad, VALUE, F64)


def test_top_k_by_hand():
    # q = (1/2, 1/4, 1/4), r = (1/4, 1/4, 1/2): the most probable one, and the rest.
    teacher, student = (torch.tensor([x], dtype=F64).log() for x in ([2.0, 1, 1], [1.0, 1, 2]))
    table = remap([[0], [1], [2]])
    rest = remapped_kl(student, teacher, table, top_k=1)
    assert rest.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75), abs=1e-14)
    assert remapped_kl(student, teacher, table, top_k=1, remainder="drop").item() == pytest.approx(0.5 * math.log(2))
    assert remapped_kl(student, teacher, table, top_k=1, remainder="renormalize").item() == 0
    both = remapped_kl(student, teacher, table, top_k=2, remainder="renormalize")  # the second and third tie: all
    assert both.item() == pytest.approx(remapped_kl(student, teacher, table).item(), abs=1e-14)


@pytest.mark.parametrize("combine", ["sum", "logsumexp"])
def test_rows_of_one_id_are_the_matched_vocabulary(combine):
    z_s, z_t = rows(4, 5), rows(4, 3, seed=1)
    loss = remapped_kl(z_s, z_t, remap([[3], [], [1]]), combine=combine)
    assert_close(loss, matched_kl(z_s, z_t, matched([3, 1], [0, 2])), LOSS, F64)


@pytest.mark.parametrize("combine", ["sum", "logsumexp"])
def test_minus_infinity(combine):
    z_s, z_t = rows(2, 5), rows(2, 5, seed=1)
    z_s[0, 2] = z_t[0, 0] = -math.inf  # row 0 of the table loses its only piece
    z_s.requires_grad_()
    losses = remapped_kl(z_s, z_t, TABLE, combine=combine, reduction="none")
    losses.sum().backward()
    assert losses.isfinite().all() and z_s.grad.isfinite().all()


def test_large_logits_do_not_overflow():
    z = 1e4 * rows(2, 5, dtype=torch.float32, grad=True)
    loss = remapped_kl(z, rows(2, 5, seed=1, dtype=torch.float32), TABLE, combine="logsumexp")
    assert loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    z_s, z_t = rows(4, 5, dtype=dtype), rows(4, 5, seed=1, dtype=dtype)
    loss = remapped_kl(z_s, z_t, TABLE)
    assert loss.dtype == torch.float32
    assert_close(loss, remapped_kl(z_s.double(), z_t.double(), TABLE), LOSS, dtype)


def test_nothing_gives_zero():
    z_s = rows(3, 5, grad=True)
    loss = remapped_kl(z_s, rows(3, 5), TABLE, pairs=no_pairs())
    loss.backward()
    assert loss.item() == 0 and z_s.grad.eq(0).all()
    assert remapped_kl(rows(0, 5), rows(0, 5), TABLE).item() == 0
    assert remapped_kl(z_s, rows(3, 2), remap([[], []])).item() == 0


def test_teacher_gets_no_gradient():
    z_s, z_t = rows(4, 5, grad=True), rows(4, 5, seed=1, grad=True)
    remapped_kl(z_s, z_t, TABLE).backward()
    assert z_t.grad is None and z_s.grad is not None


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((rows(3, 5), rows(3, 4), TABLE), {}, ValueError, "table: expected at most 4 rows"),
        ((rows(3, 4), rows(3, 5), TABLE), {}, ValueError, "table.ids: expected ids from 0 to 3, got 4"),
        ((rows(3, 5), rows(3, 5), {}), {}, TypeError, r"table: expected a RemapTable \(an object with indptr\)"),
        ((rows(3, 5), rows(2, 5), TABLE), {}, ValueError, "student_logits: expected as many rows"),
        ((rows(3, 5), rows(3, 5), TABLE), {"combine": "max"}, ValueError, "combine: expected one of 'sum'"),
        ((rows(3, 5), rows(3, 5), TABLE), {"entry_weights": torch.ones(2)}, ValueError, "entry_weights: expected one"),
        ((rows(3, 5), rows(3, 5), TABLE), {"top_k": -1}, ValueError, "top_k: expected a number from 1 to"),
        ((rows(3, 5), rows(3, 5), TABLE), {"temperature": math.inf}, ValueError, "temperature: expected"),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        remapped_kl(*arguments, **options)


@pytest.mark.parametrize(
    "options", [{}, *({"top_k": 2, "remainder": r} for r in ("rest", "drop", "renormalize"))], ids=str
)
def test_nan_of_the_teacher_is_not_hidden(options):
    teacher = rows(2, 5, seed=2)
    teacher[1, 2] = float("nan")
    loss = remapped_kl(rows(2, 5, seed=1), teacher, TABLE, reduction="none", **options)
    assert loss[0].isfinite() and loss[1].isnan()
    assert matched_kl(rows(2, 5, seed=1), teacher, matched([0, 2], [0, 2]), reduction="none").isnan().tolist() == [
        False,
        True,
    ]
