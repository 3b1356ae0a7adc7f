"""SpanPairs: what it accepts, what it refuses, moving and pickling."""

from __future__ import annotations

import pickle
from importlib import import_module

import pytest
import torch

import vocabdistil as vd
from tests.spans import make_pairs
from tests.vocabularies import make_matched, randn
from vocabdistil.alignment.spans import text_pairs

contrastive = import_module("vocabdistil.ops.contrastive")


def pairs(*fields):
    return vd.SpanPairs(*(torch.tensor(f) for f in fields))


def test_counts_and_dtype():
    p = pairs([0, 2, 2], [2, 2, 5], [0, 1, 2], [1, 2, 3])
    assert (len(p), p.num_nonempty, p.student_tokens, p.teacher_tokens) == (3, 2, 5, 3)
    assert all(getattr(p, f).dtype == torch.int32 for f in ("student_start", "teacher_end"))
    assert vd.SpanPairs([0], [1], [0], [2]).teacher_end.tolist() == [2]
    assert len(vd.SpanPairs([], [], [], [])) == 0


def test_moves_and_pickles():
    p = pickle.loads(pickle.dumps(pairs([0], [2], [0], [1])))
    assert (p.student_end.tolist(), p.student_tokens) == ([2], 2)
    assert p.to("meta").device.type == "meta" and p.to("meta").num_nonempty == 1


@pytest.mark.parametrize(
    ("fields", "error", "name"),
    [
        (([0, 1], [2, 3], [0, 1], [1, 2]), ValueError, "student_start"),
        (([0, 1], [1, 2], [1, 0], [2, 1]), ValueError, "teacher_start"),
        (([-1], [1], [0], [1]), ValueError, "student_start"),
        (([0], [1], [3], [1]), ValueError, "teacher_end"),
        (([0], [1, 2], [0], [1]), ValueError, "student_start and student_end"),
        (([0], [1], [0, 1], [1, 2]), ValueError, "teacher_start"),
        (([[0]], [[1]], [[0]], [[1]]), ValueError, "student_start"),
        (([0.5], [1.0], [0.0], [1.0]), TypeError, "student_start"),
        (([0], [2**31], [0], [1]), ValueError, "student_end"),
        (([0], [1], [-(2**32)], [1]), ValueError, "teacher_start"),
    ],
)
def test_bad_spans_are_named(fields, error, name):
    with pytest.raises(error, match=f"^{name}") as caught:
        pairs(*fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (None, TypeError, "NoneType"),
        ("a", TypeError, "str"),
        ([2**70], ValueError, str(2**70)),
        ([[1], [1, 2]], ValueError, "expected a list of integers"),
        (torch.tensor([1]).to_sparse(), ValueError, "sparse_coo"),
        (torch.zeros(1, dtype=torch.int32, device="meta"), ValueError, "meta"),
    ],
)
def test_values_that_are_no_positions_are_named(value, error, text):
    with pytest.raises(error, match=f"^teacher_end: .*{text}"):
        vd.SpanPairs([0], [1], [0], value)


def losses_of(module, pairs, reduction):
    table = vd.RemapTable([0, 2, 2, 5], [0, 3, 1, 1, 4], student_vocab_size=20, unk_id=0, pad_id=0)
    student, teacher = randn(90, 12), randn(70, 12, seed=1)
    logits_s, logits_t = randn(90, 20, seed=2), randn(70, 30, seed=3)
    leaves = [student.requires_grad_(), logits_s.requires_grad_(), randn(20, 12, seed=4).requires_grad_()]
    weights = randn(len(pairs), seed=5).abs().requires_grad_()
    matched, options = make_matched(20, 30, 11), {"pairs": pairs, "reduction": reduction}
    values = [
        module.span_loss(student, teacher, pairs, reduction=reduction),
        module.span_loss(student, teacher, pairs, divergence="cosine", pair_weights=weights, reduction=reduction),
        module.matched_kl(logits_s, logits_t, matched, **options),
        module.linear_matched_kl(student, leaves[2], teacher, randn(30, 12, seed=6), matched, **options),
        module.remapped_kl(logits_s, logits_t, table, **options),
        module.contrastive(student, teacher, pairs, reduction=reduction),
        module.relation_loss(student[None], teacher[None], pairs, heads=3, reduction=reduction),
    ]
    total = sum((n + 1) * value.sum() for n, value in enumerate(values))
    return values + list(torch.autograd.grad(total, [*leaves, weights]))


@pytest.mark.parametrize("module", [vd, vd.reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_a_count_that_is_a_tensor_gives_the_same_losses(module, reduction, monkeypatch):
    p, _, _ = make_pairs(25, seed=0, gaps=True, empty=True)
    want = losses_of(module, p, reduction)
    fields = (p.student_start, p.student_end, p.teacher_start, p.teacher_end)
    counted = vd.SpanPairs._trusted(fields, torch.tensor(p.num_nonempty), p.student_tokens, p.teacher_tokens, p.padded)
    moved = pickle.loads(pickle.dumps(counted.to("cpu")))
    assert 0 < moved.num_nonempty < 25 and moved.to("meta").num_nonempty.device.type == "meta"
    for got, expected in zip(losses_of(module, moved, reduction), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("negatives", [3, 24, 40])
def test_drawn_negatives_are_pairs_that_count(negatives, monkeypatch):
    p, n_s, n_t = make_pairs(25, seed=0, gaps=True, empty=True)
    student, teacher = randn(n_s, 12), randn(n_t, 12, seed=1)
    fields = (p.student_start, p.student_end, p.teacher_start, p.teacher_end)
    counted = vd.SpanPairs._trusted(fields, torch.tensor(p.num_nonempty), p.student_tokens, p.teacher_tokens, p.padded)
    for sparse in (0, 64):
        monkeypatch.setattr(contrastive, "_SPARSE", sparse)
        results = []
        for pairs in (p, counted):
            generator = torch.Generator().manual_seed(0)
            leaf = student.clone().requires_grad_()
            loss = vd.contrastive(leaf, teacher, pairs, negatives=negatives, generator=generator)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        torch.testing.assert_close(*results)


def test_pairs_of_a_batch_take_its_rows_as_they_were_padded():
    """With more padding their positions would be those of other tokens."""
    table = vd.RemapTable(torch.tensor([0, 1, 3]), torch.tensor([4, 5, 6]), student_vocab_size=9, unk_id=7, pad_id=8)
    out = table.remap(torch.tensor([[0, 1, 1], [1, 0, 0]]))
    student, teacher = torch.randn(2, 5, 4), torch.randn(2, 3, 4)
    for pairs in (out.pairs, out.pairs.to("cpu"), pickle.loads(pickle.dumps(out.pairs))):
        assert pairs.padded and torch.isfinite(vd.span_kl(student, teacher, pairs))
        longer = torch.nn.functional.pad(student, (0, 0, 0, 1))
        with pytest.raises(ValueError, match="^pairs: expected the student rows of the batch .* 10 .* got 12"):
            vd.span_kl(longer, teacher, pairs)
        with pytest.raises(ValueError, match="^pairs: expected the teacher rows of the batch .* 6 .* got 12"):
            vd.matched_kl(student, longer, vd.MatchedVocab([0, 1], [1, 2]), pairs=pairs)
    spans = (out.pairs.student_start, out.pairs.student_end, out.pairs.teacher_start, out.pairs.teacher_end)
    free = vd.SpanPairs(*spans)
    assert not free.padded and torch.isfinite(vd.span_kl(longer, teacher, free))


def test_they_own_their_memory():
    fields = [torch.tensor(v, dtype=torch.int32) for v in ([0, 2], [2, 4], [0, 1], [1, 3])]
    p = vd.SpanPairs(*fields)
    for field in fields:
        field.fill_(400)
    assert p.student_end.tolist() == [2, 4] and p.teacher_start.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["student_end", "num_nonempty", "teacher_tokens", "padded", "other"])
def test_they_stay_as_they_were_made(name):
    p = pairs([0], [2], [0], [1])
    with pytest.raises(AttributeError, match=f"^{name}: expected span pairs to stay as they were made"):
        setattr(p, name, torch.tensor([9], dtype=torch.int32))
    with pytest.raises(AttributeError, match=f"^{name}: expected"):
        delattr(p, name)


def test_inference_mode_makes_pairs_that_autograd_can_keep():
    with torch.inference_mode():
        made = pairs([0], [2], [0], [1])
        counted = vd.SpanPairs._trusted((torch.zeros(1, dtype=torch.int32),) * 4, torch.tensor(0), 0, 0)
        texts = text_pairs(torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool))
    for p in (made, counted, texts, counted.to("cpu")):
        assert not any(getattr(p, f).is_inference() for f in ("student_start", "student_end", "teacher_end"))
    assert not counted.num_nonempty.is_inference()
    assert len(pickle.loads(pickle.dumps(made))) == 1
