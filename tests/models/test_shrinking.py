"""Fewer and narrower layers, fitted to the teacher's on text."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel

from tests._wordpiece import small_text
from tests.models.test_bodies import all_equal, batch_of, computed, shuffled
from tests.models.tiny_teachers import KINDS, LAYERS, tiny_teacher
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.models.bodies import build_body
from vocabdistil.models.shapes import Shape, keep_layers, narrow_shape
from vocabdistil.models.shrinking import shrink
from vocabdistil.models.teachers import Teacher, load_teacher

FITTED = ["bert", "distilbert", "roberta", "xlm-roberta", "camembert", "electra", "mpnet"]
TEXTS = small_text(400)


def distance(model: torch.nn.Module, small, teacher: Teacher) -> float:
    """The share of the variance of the teacher's last hidden states that is lost on the way there and back."""
    ids = teacher.tokenizer(TEXTS[:20], padding=True, return_tensors="pt")
    batch = {name: ids[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        want, got = teacher.model(**batch).last_hidden_state, model(**batch).last_hidden_state
    real = batch["attention_mask"] == 1
    want, got = want[real], torch.nn.functional.linear(got[real], small.weight, small.bias)
    return float((got - want).square().sum() / (want - want.mean(0)).square().sum())


@pytest.mark.parametrize("name", FITTED)
def test_a_fitted_layer_stands_in_for_those_left_out(name):
    teacher = load_teacher(tiny_teacher(name))
    keep = [0, LAYERS - 1]
    small = shrink(teacher, keep, TEXTS)
    copied = build_body(teacher, torch.clone, teacher.tokenizer, keep).base_model
    plain = shrink(teacher, keep, TEXTS)
    assert small.explained[0] == pytest.approx(1, abs=1e-4) and 0.1 < small.explained[1] < 1
    assert all_equal(list(small.teacher.whole.state_dict().values()), list(plain.teacher.whole.state_dict().values()))
    layers = small.teacher.model.get_submodule(teacher.architecture.layers)
    first = teacher.model.get_submodule(teacher.architecture.layers)[0].state_dict()
    assert all(torch.equal(value, first[key]) for key, value in layers[0].state_dict().items())
    assert distance(small.teacher.model, small, teacher) < 0.8 * distance(copied, small, teacher)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("name", FITTED)
def test_narrower_layers(name, head, tmp_path):
    teacher = load_teacher(tiny_teacher(name, head))
    small = shrink(teacher, range(LAYERS), TEXTS, dim=12)
    assert narrow_shape(small.teacher.model.config) == Shape(12, 2, 24) and small.teacher.num_layers == LAYERS
    assert small.weight.shape == (16, 12) and small.bias.shape == (16,) and len(small.coordinates) == 12
    assert (small.teacher.masked_lm is not None) == head
    assert distance(small.teacher.model, small, teacher) < 0.9
    own = shuffled(small.teacher, pad=1 if name == "mpnet" else None)
    body = build_body(small.teacher, own.rows, own, range(LAYERS))
    body.save_pretrained(tmp_path)
    batch = batch_of(teacher)
    want = computed(small.teacher.model, batch)
    again = AutoModel.from_pretrained(tmp_path).eval()
    for ours, theirs in zip(computed(again, {**batch, "input_ids": own.place[batch["input_ids"]]}), want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_nothing_to_fit_is_the_teacher():
    teacher = load_teacher(tiny_teacher("bert"))
    small = shrink(teacher, range(LAYERS), TEXTS)
    assert small.teacher is teacher and torch.equal(small.weight, torch.eye(16)) and not small.bias.any()


def test_as_wide_and_as_deep_is_nearly_the_teacher():
    """Every product is fitted to one that the layers can compute: all of it comes back, but for what is cut."""
    teacher = load_teacher(tiny_teacher("bert"))
    small = shrink(teacher, range(LAYERS), TEXTS, ffn=31)
    assert min(small.explained) > 0.97 and distance(small.teacher.model, small, teacher) < 0.03


@pytest.mark.parametrize("name", sorted(set(KINDS) - set(FITTED)))
def test_layers_without_a_rule_are_copied(name):
    teacher = load_teacher(tiny_teacher(name))
    keep = keep_layers(teacher.model.config, 3)
    small = shrink(teacher, keep, TEXTS)
    copied = build_body(teacher, torch.clone, teacher.tokenizer, keep)
    batch = batch_of(teacher)
    assert all_equal(computed(small.teacher.whole, batch), computed(copied, batch)) and small.explained == []
    assert narrow_shape(teacher.model.config, dim=16) == narrow_shape(teacher.model.config)
    with pytest.raises(VocabdistilError, match="dim: expected the teacher's width, heads and .*narrower, got 12"):
        shrink(teacher, keep, TEXTS, dim=12)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dim": 17}, "dim: expected a number from 1 to 16, the teacher's, got 17"),
        ({"dim": 0}, "dim: expected a number from 1 to 16, the teacher's, got 0"),
        ({"heads": 3}, "heads: expected a number from 1 to 2, the teacher's, got 3"),
        ({"dim": 9, "heads": 2}, "heads: expected a number that divides the width 9, got 2"),
        ({"ffn": 33}, "ffn: expected a number from 1 to 32, the teacher's, got 33"),
    ],
)
def test_shapes_that_cannot_be(options, error):
    with pytest.raises(VocabdistilError, match=error):
        shrink(load_teacher(tiny_teacher("bert")), [0], TEXTS, **options)


def test_shapes_and_text():
    teacher = load_teacher(tiny_teacher("bert"))
    assert narrow_shape(teacher.model.config) == (16, 2, 32) and narrow_shape(teacher.model.config, 9) == (9, 1, 18)
    assert narrow_shape(teacher.model.config, 8, ffn=5) == (8, 2, 5)
    with pytest.raises(VocabdistilError, match="text: expected some text to fit the student to, got none"):
        shrink(teacher, [0], [])
    with pytest.raises(VocabdistilError, match="heads: expected 2, the teacher's, as each .* distances, got 1"):
        narrow_shape(load_teacher(tiny_teacher("mpnet")).model.config, 8, heads=1)
