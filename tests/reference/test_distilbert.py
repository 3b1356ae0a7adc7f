from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.reference_cases import F64, rows
from tests.tolerances import LOSS, assert_close
from vocabdistil.reference import distilbert

LABELS = torch.tensor([[2, -100, -100], [-100, 0, 4]])


def inputs(dtype=F64):
    z_s, z_t, h_s, h_t = (
        rows(6, width, seed=seed, dtype=dtype).view(2, 3, width) for seed, width in enumerate((5, 5, 8, 8))
    )
    return z_s, z_t, h_s, h_t


def test_recipe_is_5_2_1_at_temperature_2():
    z_s, z_t, h_s, h_t = inputs()
    out = distilbert(z_s, z_t, h_s, h_t, LABELS)
    ce = 4 * F.kl_div(
        (z_s / 2).log_softmax(-1).flatten(0, 1), (z_t / 2).softmax(-1).flatten(0, 1), reduction="batchmean"
    )
    mlm = F.cross_entropy(z_s.flatten(0, 1), LABELS.flatten())
    cos = F.cosine_embedding_loss(h_s.flatten(0, 1), h_t.flatten(0, 1), torch.ones(6))
    for actual, expected in zip(out, (5 * ce + 2 * mlm + cos, ce, mlm, cos), strict=True):
        assert_close(actual, expected, LOSS, F64)


def test_attention_mask():
    z_s, z_t, h_s, h_t = inputs()
    attention = torch.tensor([[1, 1, 0], [1, 1, 1]])
    kept = attention.bool()
    out = distilbert(
        z_s, z_t, h_s, h_t, LABELS, attention_mask=attention, alpha_ce=1, alpha_mlm=0.5, alpha_cos=3
    )
    short = distilbert(z_s[kept], z_t[kept], h_s[kept], h_t[kept], LABELS[kept])
    assert_close(out.ce, short.ce, LOSS, F64)
    assert_close(out.cos, short.cos, LOSS, F64)
    assert_close(out.loss, out.ce + 0.5 * out.mlm + 3 * out.cos, LOSS, F64)
    none = distilbert(z_s, z_t, h_s, h_t, torch.full_like(LABELS, -100), attention_mask=torch.zeros(2, 3))
    assert none.loss.item() == 0


def test_gradcheck_and_teacher():
    z_s, z_t, h_s, h_t = (x.requires_grad_() for x in inputs())
    assert torch.autograd.gradcheck(lambda z, h: distilbert(z, z_t, h, h_t, LABELS).loss, (z_s, h_s))
    distilbert(z_s, z_t, h_s, h_t, LABELS).loss.backward()
    assert z_t.grad is None and h_t.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    given = inputs(dtype)
    out = distilbert(*given, LABELS)
    assert out.loss.dtype == torch.float32
    assert_close(out.loss, distilbert(*(x.double() for x in given), LABELS).loss, LOSS, dtype)


def test_errors():
    z_s, z_t, h_s, h_t = inputs()
    with pytest.raises(ValueError, match=r"teacher_logits: expected shape \(2, 3, 5\) as student_logits"):
        distilbert(z_s, z_t[..., :4], h_s, h_t, LABELS)
    with pytest.raises(ValueError, match="student_hidden: expected positions"):
        distilbert(z_s, z_t, h_s[:1], h_t[:1], LABELS)
    with pytest.raises(ValueError, match="attention_mask: expected shape"):
        distilbert(z_s, z_t, h_s, h_t, LABELS, attention_mask=torch.ones(2, 2))
    with pytest.raises(ValueError, match="teacher_hidden: expected device cpu as student_hidden, got meta"):
        distilbert(z_s, z_t, h_s, h_t.to("meta"), LABELS)
