"""A last layer that whitens against the formula, computed outside of the model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM, BertModel

from vocabdistil.core.errors import VocabdistilError
from vocabdistil.evaluation.student import pooled
from vocabdistil.models.teachers import Teacher, load_teacher
from vocabdistil.models.whitening import cannot_whiten, set_last_layer, whiten


def _whitened_in_part(vectors: torch.Tensor, power: float) -> torch.Tensor:
    vectors = vectors.double()
    mean = vectors.mean(0)
    left, deviations, right = torch.linalg.svd(vectors - mean, full_matrices=False)
    return (vectors - 0.8 * mean) @ (right.T * (deviations / deviations[0]).clamp(min=1e-2) ** -power) @ right


def _spread(vectors: torch.Tensor) -> float:
    """Mean cosine of two different texts."""
    unit = F.normalize(vectors, dim=1)
    return float((unit @ unit.T).fill_diagonal_(0).sum() / (len(unit) * (len(unit) - 1)))


@pytest.fixture
def teacher(headless_folder) -> Teacher:
    return load_teacher(headless_folder)


def test_vectors_come_near_to_whitened_ones(teacher, demo_lines):
    texts = demo_lines[:800]
    before = pooled(teacher, texts, 32)
    wanted = _whitened_in_part(before, 0.5)
    made = whiten(teacher, texts, 0.5, max_length=32)
    set_last_layer(teacher, made.layer)
    after = pooled(teacher, texts, 32)
    assert made.explained > 0.8
    assert F.cosine_similarity(after.double(), wanted).mean() > 0.9
    assert F.cosine_similarity(before.double(), wanted).mean() < F.cosine_similarity(after.double(), wanted).mean()
    assert _spread(after) < _spread(before)


def test_tokens_have_the_length_that_they_had_on_average(teacher, demo_lines):
    ids = torch.tensor([teacher.tokenizer(demo_lines[0])["input_ids"]])
    texts = demo_lines[:200]
    rows = [teacher.read(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)).last[0]
            for row in teacher.tokenizer(texts)["input_ids"]]
    length = torch.cat(rows).square().sum(1).mean()
    set_last_layer(teacher, whiten(teacher, texts, 0.3).layer)
    lengths = teacher.read(ids, torch.ones_like(ids)).last[0].square().sum(1)
    torch.testing.assert_close(lengths, length.expand_as(lengths), rtol=1e-3, atol=0)


def test_only_the_last_layer_changes(teacher, demo_lines):
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    made = whiten(teacher, demo_lines[:200], 0.3)
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    set_last_layer(teacher, made.layer)
    last = f"layer.{teacher.num_layers - 1}.output."
    changed = {name for name, value in teacher.model.state_dict().items() if not torch.equal(value, before[name])}
    assert len(changed) == 4 and all(last in name for name in changed)


def test_padding_and_batches_change_nothing(teacher, demo_lines):
    texts = sorted(demo_lines[:130], key=len)
    one, other = (whiten(teacher, part, 0.3).layer for part in (texts, texts[::-1]))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-2, atol=1e-2 * float(one[name].abs().max()))


def test_what_cannot_be_whitened(teacher, demo_lines):
    with pytest.raises(VocabdistilError, match="several different texts"):
        whiten(teacher, demo_lines[:1] * 3, 0.3)
    with pytest.raises(VocabdistilError, match="several different texts"):
        whiten(teacher, [], 0.3)
    config = BertConfig(vocab_size=len(teacher.tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                        intermediate_size=8)  # fmt: skip
    headed = BertForMaskedLM(config).eval()
    assert "MLM head" in cannot_whiten(Teacher("headed", headed.bert, teacher.tokenizer, headed))
    assert not cannot_whiten(Teacher("headless", BertModel(config).eval(), teacher.tokenizer))
    with pytest.raises(VocabdistilError, match="MLM head"):
        whiten(Teacher("headed", headed.bert, teacher.tokenizer, headed), demo_lines, 0.3)
