from __future__ import annotations

import math

import pytest
import torch

from tests.reference_cases import F64, both_spans, matched, mixed_pairs, naive_kl, no_pairs, rows
from tests.tolerances import LOSS, VALUE, assert_close
from vocabdistil.alignment.spans import SpanPairs
from vocabdistil.core.checks import UNMATCHED
from vocabdistil.reference import linear_matched_kl, matched_kl

IDS = matched([4, 0, 2], [1, 5, 3])  # of 6 student and 7 teacher columns


def naive_row(z_s, z_t, ids, temperature, unmatched):
    s, t = ids.student_ids.tolist(), ids.teacher_ids.tolist()
    if unmatched == "renormalize":
        return temperature**2 * naive_kl(
            torch.softmax(z_t[t] / temperature, 0), torch.softmax(z_s[s] / temperature, 0)
        )
    q, r = torch.softmax(z_t / temperature, 0), torch.softmax(z_s / temperature, 0)
    q_rest = torch.stack([q[i] for i in range(len(q)) if i not in t]).sum(0, keepdim=True)
    r_rest = torch.stack([r[i] for i in range(len(r)) if i not in s]).sum(0, keepdim=True)
    q, r = q[t], r[s]
    if unmatched == "rest":
        q, r = torch.cat([q, q_rest]), torch.cat([r, r_rest])
    return temperature**2 * naive_kl(q, r)


def naive(z_s, z_t, ids, pairs, temperature=1.0, unmatched="renormalize", pooling="mean"):
    if pairs is None:
        return torch.stack(
            [naive_row(a, b, ids, temperature, unmatched) for a, b in zip(z_s, z_t, strict=True)]
        )
    losses = []
    for (s0, s1), (t0, t1) in both_spans(pairs):
        if s0 == s1 or t0 == t1:
            losses.append(z_s.new_zeros(()))
            continue
        a, b = z_s[s0:s1].sum(0), z_t[t0:t1].sum(0)
        if pooling == "mean":
            a, b = a / (s1 - s0), b / (t1 - t0)
        losses.append(naive_row(a, b, ids, temperature, unmatched))
    return torch.stack(losses)


def by_hand(unmatched):
    # Teacher (1/2, 1/4, 1/8, 1/8) over 4 columns, student (1/4, 1/2, 1/4) over 3; teacher 0, 1 match student
    # 2, 1.
    teacher = torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 8]], dtype=F64).log()
    student = torch.tensor([[1 / 4, 1 / 2, 1 / 4]], dtype=F64).log() + 3
    return matched_kl(student, teacher, matched([2, 1], [0, 1]), unmatched=unmatched).item()


def test_renormalize_by_hand():
    # q = (2/3, 1/3), r = (1/3, 2/3).
    assert by_hand("renormalize") == pytest.approx(2 / 3 * math.log(2) - 1 / 3 * math.log(2), abs=1e-14)


def test_rest_by_hand():
    # q = (1/2, 1/4 | 1/4), r = (1/4, 1/2 | 1/4): the rest of both sides is 1/4 and adds nothing.
    assert by_hand("rest") == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2), abs=1e-14)
    # A student with less rest: q = (1/2 | 1/2), r = (3/4 | 1/4).
    teacher = torch.tensor([[1 / 2, 1 / 3, 1 / 6]], dtype=F64).log()
    student = torch.tensor([[3 / 4, 1 / 4]], dtype=F64).log()
    loss = matched_kl(student, teacher, matched([0], [0]), unmatched="rest").item()
    assert loss == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), abs=1e-14)


def test_drop_by_hand():
    assert by_hand("drop") == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2), abs=1e-14)
    teacher = torch.tensor([[1 / 2, 1 / 2]], dtype=F64).log()
    student = torch.tensor([[3 / 4, 1 / 4]], dtype=F64).log()
    loss = matched_kl(student, teacher, matched([0], [0]), unmatched="drop").item()
    assert loss == pytest.approx(0.5 * math.log(2 / 3), abs=1e-14) and loss < 0


@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_all_columns_matched_is_plain_kl(unmatched):
    z_s, z_t = rows(5, 6), rows(5, 6, seed=1)
    every = matched(list(range(6)), list(range(6)))
    expected = torch.nn.functional.kl_div(
        z_s.log_softmax(-1), z_t.log_softmax(-1), reduction="batchmean", log_target=True
    )
    z_s.requires_grad_()
    loss = matched_kl(z_s, z_t, every, unmatched=unmatched)
    assert_close(loss, expected, LOSS, F64)
    loss.backward()
    assert_close(z_s.grad, (z_s.softmax(-1) - z_t.softmax(-1)) / 5, VALUE, F64)


def test_rest_without_unmatched_teacher_columns():
    z_s, z_t = rows(3, 4, grad=True), rows(3, 2, seed=1)
    loss = matched_kl(z_s, z_t, matched([1, 3], [0, 1]), unmatched="rest")
    q, r = z_t.softmax(-1), z_s.softmax(-1)[:, [1, 3]]
    assert_close(loss, (q * (q / r).log()).sum() / 3, LOSS, F64)
    loss.backward()
    assert z_s.grad.isfinite().all()


def test_rest_without_unmatched_student_columns():
    with pytest.raises(
        ValueError, match="unmatched: expected 'renormalize' or 'drop' as all 2 student columns"
    ):
        matched_kl(rows(3, 2), rows(3, 4), matched([0, 1], [1, 3]), unmatched="rest")


@pytest.mark.parametrize("pooling", ["mean", "sum"])
@pytest.mark.parametrize("pairs", [None, mixed_pairs()])
@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_equals_a_loop(unmatched, pairs, pooling):
    z_s, z_t = rows(7, 6, grad=True), rows(7 if pairs is None else 6, 7, seed=1)
    options = dict(pairs=pairs, temperature=1.6, unmatched=unmatched, pooling=pooling)
    losses = matched_kl(z_s, z_t, IDS, reduction="none", **options)
    expected = naive(z_s, z_t, IDS, **options)
    assert_close(losses, expected, LOSS, F64)
    (grad,) = torch.autograd.grad(losses.sum(), z_s)
    (expected_grad,) = torch.autograd.grad(expected.sum(), z_s)
    assert_close(grad, expected_grad, VALUE, F64)
    count = 7 if pairs is None else pairs.num_nonempty
    assert_close(matched_kl(z_s, z_t, IDS, **options), expected.sum() / count, LOSS, F64)
    assert_close(matched_kl(z_s, z_t, IDS, reduction="sum", **options), expected.sum(), LOSS, F64)


@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_gradcheck(unmatched):
    z_s, z_t = rows(7, 6, grad=True), rows(6, 7, seed=1)
    assert torch.autograd.gradcheck(
        lambda z: matched_kl(z, z_t, IDS, pairs=mixed_pairs(), temperature=1.4, unmatched=unmatched), z_s
    )


@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_minus_infinity(unmatched):
    z_s, z_t = rows(4, 6), rows(4, 7, seed=1)
    z_t[0, 1] = z_s[0, 4] = -math.inf  # matched, on both sides
    z_t[1, 5] = -math.inf  # matched, teacher only
    z_t[2, [0, 2, 4, 6]] = z_s[2, [1, 3, 5]] = -math.inf  # everything unmatched, on both sides
    z_t[3, 0] = z_s[3, 1] = -math.inf  # something unmatched
    z_s.requires_grad_()
    losses = matched_kl(z_s, z_t, IDS, unmatched=unmatched, reduction="none")
    assert losses.isfinite().all()
    assert_close(losses, naive(z_s, z_t, IDS, None, unmatched=unmatched), LOSS, F64)
    losses.sum().backward()
    assert z_s.grad.isfinite().all()


@pytest.mark.parametrize("unmatched", UNMATCHED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, unmatched):
    z_s, z_t = rows(7, 6, dtype=dtype, grad=True), rows(7, 7, seed=1, dtype=dtype)
    loss = matched_kl(z_s, z_t, IDS, unmatched=unmatched)
    assert loss.dtype == torch.float32
    wide = z_s.detach().double().requires_grad_()
    expected = matched_kl(wide, z_t.double(), IDS, unmatched=unmatched)
    assert_close(loss, expected, LOSS, dtype)
    loss.backward()
    expected.backward()
    assert_close(z_s.grad, wide.grad, VALUE, dtype)


@pytest.mark.parametrize("unmatched", ["renormalize", "rest"])
def test_student_equal_to_teacher(unmatched):
    z = rows(4, 6)
    student = z.clone().requires_grad_()
    loss = matched_kl(student, z, matched([0, 1, 3], [0, 1, 3]), unmatched=unmatched, temperature=2.0)
    loss.backward()
    assert abs(loss.item()) < 1e-15 and student.grad.abs().max() < 1e-15


@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_nothing_gives_zero(unmatched):
    z_s = rows(3, 6, grad=True)
    for pairs in (no_pairs(), SpanPairs([0], [0], [0], [1])):
        loss = matched_kl(z_s, rows(3, 7), IDS, pairs=pairs, unmatched=unmatched)
        assert loss.item() == 0
    assert matched_kl(z_s[:0], rows(0, 7), IDS, unmatched=unmatched).item() == 0
    loss.backward()
    assert z_s.grad.eq(0).all()


def test_official_sum_over_pieces():
    # The published runs add the logits of a teacher token's pieces; a span of one teacher token is the token.
    z_s, z_t = rows(5, 6), rows(2, 7, seed=1)
    pairs = SpanPairs([0, 3], [3, 5], [0, 1], [1, 2])
    added = torch.stack([z_s[:3].sum(0), z_s[3:].sum(0)])
    assert_close(
        matched_kl(z_s, z_t, IDS, pairs=pairs, pooling="sum"), matched_kl(added, z_t, IDS), LOSS, F64
    )


def linear_inputs(dtype=F64):
    return {
        "student_hidden": rows(7, 3, dtype=dtype),
        "student_weight": rows(6, 3, seed=1, dtype=dtype),
        "teacher_hidden": rows(6, 5, seed=2, dtype=dtype),
        "teacher_weight": rows(7, 5, seed=3, dtype=dtype),
        "student_bias": rows(1, 6, seed=4, dtype=dtype)[0],
        "teacher_bias": rows(1, 7, seed=5, dtype=dtype)[0],
    }


@pytest.mark.parametrize("pooling", ["mean", "sum"])
@pytest.mark.parametrize("with_pairs", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_linear_equals_logits(unmatched, with_bias, with_pairs, pooling):
    inputs = linear_inputs()
    if not with_pairs:
        inputs["student_hidden"] = inputs["student_hidden"][:6]
    if not with_bias:
        inputs["student_bias"] = inputs["teacher_bias"] = None
    learned = [
        inputs[k] for k in ("student_hidden", "student_weight", "student_bias") if inputs[k] is not None
    ]
    for x in learned:
        x.requires_grad_()
    options = dict(
        pairs=mixed_pairs() if with_pairs else None, temperature=1.5, unmatched=unmatched, pooling=pooling
    )
    z_s = torch.nn.functional.linear(
        inputs["student_hidden"], inputs["student_weight"], inputs["student_bias"]
    )
    z_t = torch.nn.functional.linear(
        inputs["teacher_hidden"], inputs["teacher_weight"], inputs["teacher_bias"]
    )
    actual = linear_matched_kl(matched=IDS, **inputs, **options)
    expected = matched_kl(z_s, z_t, IDS, **options)
    assert_close(actual, expected, LOSS, F64)
    for a, b in zip(
        torch.autograd.grad(actual, learned), torch.autograd.grad(expected, learned), strict=True
    ):
        assert_close(a, b, VALUE, F64)


@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_linear_gradcheck(unmatched):
    inputs = linear_inputs()
    names = ("student_hidden", "student_weight", "student_bias")
    learned = [inputs[name].requires_grad_() for name in names]

    def loss(*values):
        given = {**inputs, **dict(zip(names, values, strict=True))}
        return linear_matched_kl(
            matched=IDS, pairs=mixed_pairs(), unmatched=unmatched, pooling="sum", **given
        )

    assert torch.autograd.gradcheck(loss, learned)


def test_linear_never_touches_the_teacher():
    inputs = linear_inputs()
    for x in inputs.values():
        x.requires_grad_()
    linear_matched_kl(matched=IDS, pairs=mixed_pairs(), **inputs).backward()
    for name, x in inputs.items():
        assert (x.grad is None) == name.startswith("teacher")


def test_linear_dtypes():
    inputs = linear_inputs(torch.bfloat16)
    loss = linear_matched_kl(matched=IDS, pairs=mixed_pairs(), **inputs)
    expected = linear_matched_kl(
        matched=IDS, pairs=mixed_pairs(), **{k: v.double() for k, v in inputs.items()}
    )
    assert loss.dtype == torch.float32
    assert_close(loss, expected, LOSS, torch.bfloat16)


ZS, ZT = torch.zeros(7, 6), torch.zeros(7, 7)


@pytest.mark.parametrize(
    ("student", "teacher", "ids", "options", "error", "message"),
    [
        (ZS[0], ZT, IDS, {}, ValueError, r"student_logits: expected shape \[..., V\]"),
        (ZS, ZT.long(), IDS, {}, TypeError, "teacher_logits: expected float32"),
        (ZS[:3], ZT, IDS, {}, ValueError, r"student_logits: expected as many rows as teacher_logits \(7\)"),
        (ZS, ZT, None, {}, TypeError, r"matched: expected a MatchedVocab \(an object with student_ids\)"),
        (ZS, ZT, matched([6], [0]), {}, ValueError, "matched.student_ids: expected ids from 0 to 5, got 6"),
        (ZS, ZT, matched([0], [-1]), {}, ValueError, "matched.teacher_ids: expected ids from 0 to 6, got -1"),
        (ZS, ZT, matched([0, 1], [0]), {}, ValueError, "matched.student_ids: expected as many"),
        (ZS, ZT, matched([0.5], [0]), {}, TypeError, "matched.student_ids: expected int32 or int64"),
        (ZS, ZT, IDS, {"unmatched": "ignore"}, ValueError, "unmatched: expected one of 'renormalize'"),
        (ZS, ZT, IDS, {"pooling": "first"}, ValueError, "pooling: expected one of"),
        (ZS, ZT, IDS, {"reduction": "mean"}, ValueError, "reduction: expected one of"),
        (ZS, ZT, IDS, {"temperature": -1}, ValueError, "temperature: expected a finite number > 0"),
        (ZS, ZT, IDS, {"pairs": 3}, TypeError, "pairs: expected SpanPairs, got int"),
        (ZS, ZT[:5], IDS, {"pairs": mixed_pairs()}, ValueError, "pairs: expected teacher positions up to 5"),
    ],
)
def test_errors(student, teacher, ids, options, error, message):
    with pytest.raises(error, match=message) as caught:
        matched_kl(student, teacher, ids, **options)
    assert "\n" not in str(caught.value)


def test_no_matched_token():
    with pytest.raises(ValueError, match="matched: expected at least one token"):
        matched_kl(ZS, ZT, type(IDS)(student_ids=torch.zeros(0).long(), teacher_ids=torch.zeros(0).long()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"student_weight": torch.zeros(6, 4, dtype=F64)},
            ValueError,
            r"student_weight: expected shape \(V, 3\)",
        ),
        (
            {"teacher_weight": torch.zeros(7, 5)},
            TypeError,
            "teacher_weight: expected dtype float64, got float32",
        ),
        (
            {"student_bias": torch.zeros(5, dtype=F64)},
            ValueError,
            r"student_bias: expected shape \(6,\), got \(5,\)",
        ),
        ({"teacher_hidden": torch.zeros(6, 5)}, TypeError, "teacher_weight: expected dtype float32"),
    ],
)
def test_linear_errors(change, error, message):
    with pytest.raises(error, match=message):
        linear_matched_kl(matched=IDS, pairs=mixed_pairs(), **{**linear_inputs(), **change})
