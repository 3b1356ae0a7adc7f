from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.reference_cases import F64, rows
from tests.tolerances import LOSS, assert_close
from vocabdistil.reference import mask_tokens, masking_probabilities, mlm_loss
from vocabdistil.reference.mlm import IGNORE

VOCAB, MASK = 50, 4
PROBABILITIES = masking_probabilities(torch.arange(VOCAB) * 10, special_ids=range(5))


def batch(seed=0, shape=(64, 128)):
    return torch.randint(5, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def test_probabilities_by_hand():
    actual = masking_probabilities(torch.tensor([0, 1, 1024, 5]), special_ids=[3])
    assert actual.tolist() == pytest.approx([1.0, 1.0, 1024**-0.7, 0.0])
    assert masking_probabilities(torch.tensor([3, 9]), smoothing=0).tolist() == [1.0, 1.0]


def test_shares():
    ids = batch()
    out = mask_tokens(ids, PROBABILITIES, MASK, generator=torch.Generator().manual_seed(1))
    chosen = out.labels != IGNORE
    count = int(chosen.sum())
    assert count == math.ceil(0.15 * ids.numel())
    assert torch.equal(out.labels[chosen], ids[chosen]) and torch.equal(out.input_ids[~chosen], ids[~chosen])
    masked = (out.input_ids[chosen] == MASK).double().mean().item()
    changed = ((out.input_ids != ids) & (out.input_ids != MASK))[chosen].double().mean().item()
    kept = (out.input_ids == ids)[chosen].double().mean().item()
    # A drawn word is the word itself once in 45.
    assert masked == pytest.approx(0.8, abs=0.04)
    assert changed == pytest.approx(0.1 * 44 / 45, abs=0.03)
    assert kept == pytest.approx(0.1 + 0.1 / 45, abs=0.03)
    assert (PROBABILITIES[out.input_ids[chosen & (out.input_ids != MASK)]] > 0).all()


def test_rare_tokens_are_masked_more_often():
    # Two words of one length, one counted 1,024 times as often: its odds are 1024^-0.7 = 1/128.
    probabilities = masking_probabilities(torch.tensor([1, 1024]))
    ids = torch.arange(2).repeat(10_000)[None]
    generator = torch.Generator().manual_seed(0)
    labels = mask_tokens(ids, probabilities, 0, mlm_probability=0.01, generator=generator).labels
    rare, common = int((labels == 0).sum()), int((labels == 1).sum())
    assert rare + common == 200 and common <= 8


def test_specials_and_padding_are_never_masked():
    ids = batch(shape=(8, 32))
    ids[:, 0], ids[:, 15] = 1, 2
    attention = torch.ones_like(ids)
    attention[:, 16:] = 0
    out = mask_tokens(ids, PROBABILITIES, MASK, attention_mask=attention, mlm_probability=0.5)
    chosen = out.labels != IGNORE
    assert int(chosen.sum()) == math.ceil(0.5 * 8 * 16)
    assert not chosen[:, 0].any() and not chosen[:, 15:].any()


def test_no_more_than_can_be_masked():
    ids = torch.tensor([[1, 7, 2]])
    out = mask_tokens(
        ids, PROBABILITIES, MASK, mlm_probability=1.0, replace_with_mask=1.0, replace_with_random=0.0
    )
    assert out.input_ids.tolist() == [[1, MASK, 2]] and out.labels.tolist() == [[IGNORE, 7, IGNORE]]
    out = mask_tokens(ids[:, :1], PROBABILITIES, MASK, mlm_probability=1.0)
    assert out.input_ids.tolist() == [[1]] and out.labels.tolist() == [[IGNORE]]


def test_seeds():
    ids = batch()
    before = ids.clone()
    first, again, other = (
        mask_tokens(ids, PROBABILITIES, MASK, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4)
    )
    assert torch.equal(first.input_ids, again.input_ids) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.labels, other.labels)
    assert torch.equal(ids, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_equals_cross_entropy_on_all_positions(dtype):
    hidden, weight = rows(6, 4, dtype=dtype).view(2, 3, 4), rows(9, 4, seed=1, dtype=dtype)
    labels = torch.tensor([[IGNORE, 3, IGNORE], [8, IGNORE, 0]])
    seen = []

    def head(h):
        seen.append(h.shape[0])
        return F.linear(h, weight)

    loss = mlm_loss(hidden, labels, head)
    logits = F.linear(hidden, weight).to(loss.dtype)
    assert seen == [3]
    assert loss.dtype == (F64 if dtype == F64 else torch.float32)
    assert_close(loss, F.cross_entropy(logits.flatten(0, 1), labels.flatten()), LOSS, dtype)


def test_loss_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [5.0, 5.0]], dtype=F64)
    assert mlm_loss(logits, torch.tensor([1, IGNORE]), lambda z: z).item() == pytest.approx(-math.log(0.75))
    assert mlm_loss(logits, torch.tensor([1, 0]), lambda z: z).item() == pytest.approx(
        (math.log(4 / 3) + math.log(2)) / 2
    )


def test_nothing_masked_gives_zero():
    hidden = rows(3, 4, grad=True)
    loss = mlm_loss(hidden, torch.full((3,), IGNORE), lambda h: h)
    loss.backward()
    assert loss.item() == 0 and hidden.grad.eq(0).all()


def test_gradcheck():
    labels = torch.tensor([2, IGNORE, 0])
    inputs = (rows(3, 4, grad=True), rows(5, 4, seed=1, grad=True))
    assert torch.autograd.gradcheck(lambda h, w: mlm_loss(h, labels, lambda x: F.linear(x, w)), inputs)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: masking_probabilities(torch.ones(2, 2)), ValueError, "counts: expected a vector"),
        (
            lambda: masking_probabilities(torch.ones(2), special_ids=[2]),
            ValueError,
            "special_ids: expected ids",
        ),
        (lambda: masking_probabilities(torch.ones(2), smoothing=-1), ValueError, "smoothing: expected"),
        (
            lambda: mask_tokens(batch().float(), PROBABILITIES, MASK),
            TypeError,
            "input_ids: expected int32 or int64",
        ),
        (
            lambda: mask_tokens(batch() + 40, PROBABILITIES, MASK),
            ValueError,
            "input_ids: expected ids from 0 to 49",
        ),
        (
            lambda: mask_tokens(batch(), PROBABILITIES, 50),
            ValueError,
            "mask_id: expected an id from 0 to 49, got 50",
        ),
        (
            lambda: mask_tokens(batch(), PROBABILITIES, MASK, mlm_probability=2),
            ValueError,
            "mlm_probability: expected",
        ),
        (
            lambda: mask_tokens(batch(), PROBABILITIES, MASK, replace_with_random=0.5),
            ValueError,
            "replace_with_mask, replace_with_random: expected",
        ),
        (
            lambda: mask_tokens(batch(), PROBABILITIES, MASK, attention_mask=torch.ones(3)),
            ValueError,
            r"attention_mask: expected shape \(64, 128\)",
        ),
        (
            lambda: mlm_loss(rows(3, 4), torch.zeros(2).long(), abs),
            ValueError,
            r"labels: expected shape \(3,\)",
        ),
        (lambda: mlm_loss(rows(3, 4), torch.zeros(3), abs), TypeError, "labels: expected int32 or int64"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
