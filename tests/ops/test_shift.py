"""Losses over output distributions where row i of a side predicts token i + 1."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import vocabdistil as vd

V = 11
MATCHED = vd.MatchedVocab(torch.arange(V), torch.arange(V))
TABLE = vd.RemapTable(torch.arange(V + 1), torch.arange(V), student_vocab_size=V, unk_id=0, pad_id=0)
LENGTHS = 5, 4
SIDES = ("student", "teacher")


def pairs_by_hand():
    """Two texts of 5 and of 4 tokens on the two sides: spans of one and two tokens, one that begins a text, an empty
    one, the last token of a text."""
    student = [(0, 1), (1, 3), (4, 5), (5, 7), (7, 7), (8, 9)]
    teacher = [(0, 1), (1, 2), (2, 4), (4, 5), (5, 6), (6, 8)]
    return vd.SpanPairs(*(torch.tensor(x) for side in (student, teacher) for x in zip(*side, strict=True)))


# The same pairs one row earlier, of one side: those that begin a text have nothing that predicts them.
SHIFTED = {
    "student": [(0, 0), (0, 2), (3, 4), (5, 5), (6, 6), (7, 8)],
    "teacher": [(0, 0), (0, 1), (1, 3), (4, 4), (4, 5), (5, 7)],
}


def logits(seed, requires_grad=True):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(2, n, V, generator=draw).requires_grad_(requires_grad) for n in LENGTHS]


def call(name, module, student, teacher, **options):
    known = TABLE if "remapped" in name else MATCHED
    if name.startswith("linear"):
        weight = torch.eye(V)
        return getattr(module, name)(student, weight, teacher, weight, known, **options)
    return getattr(module, name)(student, teacher, known, **options)


LOSSES = ("matched_kl", "linear_matched_kl", "remapped_kl", "linear_remapped_kl")


@pytest.mark.parametrize("module", [vd, vd.reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_causal_teacher_and_a_masked_student_agree(name, module):
    tokens = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
    # The student says of each place what stands there, the teacher what stands at the next one.
    student = 12.0 * F.one_hot(tokens, V)
    teacher = 12.0 * F.one_hot(torch.cat([tokens[:, 1:], torch.zeros(2, 1, dtype=torch.int64)], 1), V)
    at = torch.arange(8)
    same = vd.SpanPairs(at, at + 1, at, at + 1)
    assert float(call(name, module, student, teacher, pairs=same)) > 9
    each = call(name, module, student, teacher, pairs=same, teacher_shift=1, reduction="none")
    assert torch.equal(each, torch.zeros(8))
    assert float(call(name, module, student, teacher, teacher_shift=1)) == 0
    assert float(call(name, module, teacher, student, student_shift=1)) == 0


@pytest.mark.parametrize("shifted", [("student",), ("teacher",), SIDES], ids="+".join)
@pytest.mark.parametrize("name", LOSSES)
def test_is_the_loss_of_the_rows_before(name, shifted):
    pairs = pairs_by_hand()
    fields = {}
    for side in SIDES:
        spans = SHIFTED[side] if side in shifted else None
        start, end = zip(*spans, strict=True) if spans else (getattr(pairs, f"{side}_{at}") for at in ("start", "end"))
        fields |= {f"{side}_start": torch.as_tensor(start), f"{side}_end": torch.as_tensor(end)}
    before = vd.SpanPairs(**fields)
    shifts = {f"{side}_shift": 1 for side in shifted}
    for module in (vd, vd.reference):
        student, teacher = logits(1)
        again = student.detach().clone().requires_grad_()
        got = call(name, module, student, teacher, pairs=pairs, **shifts)
        want = call(name, module, again, teacher, pairs=before)
        got.backward()
        want.backward()
        assert torch.equal(got, want) and torch.equal(student.grad, again.grad)
        assert got.item() > 0 and student.grad.any()


@pytest.mark.parametrize("name", LOSSES)
def test_without_pairs(name):
    (student, _), (teacher, _) = logits(2, False), logits(3, False)
    each = call(name, vd, student, teacher, teacher_shift=1, reduction="none").view(2, 5)
    want = call(name, vd, student[:, 1:], teacher[:, :-1], reduction="none").view(2, 4)
    assert torch.equal(each[:, 1:], want) and not each[:, 0].any()
    # A mean over what is predicted.
    torch.testing.assert_close(call(name, vd, student, teacher, teacher_shift=1), want.mean())
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 1, 0]])
    masked = call(name, vd, student, teacher, teacher_shift=1, mask=mask, reduction="none").view(2, 5)
    assert torch.equal(masked, torch.where(mask.bool(), each, 0.0))


@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_pairs_stay_those_of_their_tokens(name):
    pairs, (student, teacher) = pairs_by_hand(), logits(4)
    weights = torch.rand(len(pairs)).requires_grad_()
    each = call(name, vd, student, teacher, pairs=pairs, teacher_shift=1, reduction="none").detach()
    got = call(name, vd, student, teacher, pairs=pairs, teacher_shift=1, pair_weights=weights, reduction="sum")
    got.backward()
    torch.testing.assert_close(got, (weights * each).sum())
    torch.testing.assert_close(weights.grad, each)


@pytest.mark.parametrize("module", [vd, vd.reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("name", LOSSES)
def test_what_cannot_be_shifted_is_refused(name, module):
    student, teacher = logits(5, False)
    for kinds, error in (((2, -1), ValueError), ((True, 1.0, "1", None), TypeError)):
        for bad in kinds:
            with pytest.raises(error, match=r"^teacher_shift: expected 0 or 1, got"):
                call(name, module, student, teacher, pairs=pairs_by_hand(), teacher_shift=bad)
    kind = "hidden" if name.startswith("linear") else "logits"
    with pytest.raises(ValueError, match=rf"^student_{kind}: expected shape \[B, L, .\] beside student_shift=1"):
        call(name, module, student.flatten(0, 1), teacher, pairs=pairs_by_hand(), student_shift=1)


    other = torch.zeros(3, 4, V), torch.zeros(2, 6, V)
    for mask in ({}, {"mask": torch.ones(3, 4, dtype=torch.bool)}):
        with pytest.raises(ValueError, match=rf"^student_{kind}: expected texts of teacher_{kind}'s length"):
            call(name, module, *other, teacher_shift=1, **mask)


def test_empty_batches():
    none = torch.empty(0, dtype=torch.int64)
    pairs = vd.SpanPairs(none, none, none, none)
    for length in (0, 3):
        x = torch.zeros(2, length, V)
        assert float(vd.matched_kl(x, x, MATCHED, pairs=pairs, teacher_shift=1)) == 0


@pytest.mark.parametrize("given", ["pairs", "mask", "rows"])
@pytest.mark.parametrize("name", LOSSES)
def test_compiles(name, given):
    student, teacher = logits(6, False)
    if given != "pairs":
        teacher = F.pad(teacher, (0, 0, 0, 1))
    options = {"rows": {}, "pairs": {"pairs": pairs_by_hand()}, "mask": {"mask": torch.ones(2, 5).int()}}[given]

    def loss(student, teacher):
        return call(name, vd, student, teacher.detach(), student_shift=1, teacher_shift=1, **options)

    torch._dynamo.reset()
    eager, compiled = [], []
    for found, f in ((eager, loss), (compiled, torch.compile(loss, fullgraph=True, backend="aot_eager"))):
        leaf = student.clone().requires_grad_()
        value = f(leaf, teacher)
        value.backward()
        found += [value.detach(), leaf.grad]
    torch.testing.assert_close(compiled, eager)
