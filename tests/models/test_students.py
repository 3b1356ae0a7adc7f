"""Architectures, and how a student starts from its teacher."""

from __future__ import annotations

import pytest
import torch

from tests.models.tiny_teachers import KINDS, LAYERS, POSITIONS, texts, tiny_teacher
from vocabdistil.evaluation.timing import describe_model
from vocabdistil.models.start import plan_start
from vocabdistil.models.students import (
    PRESETS,
    Preset,
    build_student,
    initialise_from_teacher,
    principal_axes,
)
from vocabdistil.models.teachers import load_teacher
from vocabdistil.models.vocabularies import train_vocabulary


class _Vocabulary:
    """All that an architecture asks of a tokenizer."""

    pad_token_id = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


@pytest.mark.parametrize(("preset", "tokens", "millions"), [("tiny-5k", 5031, 3.6), ("tiny", 30522, 10.4)])
def test_published_sizes(preset, tokens, millions):
    model = build_student(PRESETS[preset], _Vocabulary(tokens))
    assert round(describe_model(model, tokens)["parameters"] / 1e6, 1) == pytest.approx(millions, abs=0.11)


def test_input_and_output_embeddings_are_tied():
    model = build_student(Preset(1, 8, 2, 16, 50), _Vocabulary(50))
    assert model.vocab_projector.weight is model.distilbert.embeddings.word_embeddings.weight


def test_principal_axes_span_the_best_subspace():
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(200, 3, generator=generator) @ torch.randn(3, 10, generator=generator)
    axes = principal_axes(low, 3)
    torch.testing.assert_close(axes.T @ axes, torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(low @ axes @ axes.T, low, atol=1e-3, rtol=1e-3)
    assert principal_axes(low, 12).shape == (10, 12)


@pytest.fixture(scope="module")
def pair(teacher_folder, demo_lines):
    teacher = load_teacher(teacher_folder)
    return teacher, teacher.tokenizer, train_vocabulary(teacher.tokenizer, demo_lines, 150).tokenizer


def test_tokens_start_from_the_teacher_s_rows(pair):
    teacher, tokenizer, own = pair
    student = build_student(Preset(2, 48, 4, 96, 150), own)
    initialise_from_teacher(student, teacher, plan_start(tokenizer, own).rows)
    source = teacher.model.get_input_embeddings().weight
    ours = student.distilbert.embeddings.word_embeddings.weight
    shared = own.get_vocab().keys() & tokenizer.get_vocab().keys()
    assert len(shared) > 50
    for token in shared:
        want = source[tokenizer.convert_tokens_to_ids(token)]
        torch.testing.assert_close(ours[own.convert_tokens_to_ids(token)], want)


def test_a_student_of_the_teacher_s_own_shape_computes_what_it_computes(pair):
    """Equal widths and depths: every weight is copied, so on a token that both have the two models agree."""
    teacher, tokenizer, own = pair
    student = build_student(Preset(2, 48, 4, 192, 600), tokenizer).eval()
    done = initialise_from_teacher(student, teacher, torch.clone)
    assert done == {"embedding": "copied", "positions": 32, "copied_layers": [0, 1], "head": True}
    batch = tokenizer(["The sailor mends the net."], return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        want, got = teacher.masked_lm(**inputs, output_hidden_states=True), student(**inputs, output_hidden_states=True)
    for ours, theirs in zip([got.logits, *got.hidden_states], [want.logits, *want.hidden_states], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_every_teacher_starts_a_student(name):
    """An embedding narrower than the body goes through the teacher's own map; what fits a DistilBERT is copied."""
    teacher = load_teacher(tiny_teacher(name))
    size = teacher.model.config.vocab_size
    student = build_student(Preset(2, 16, 2, 32, size), teacher.tokenizer).eval()
    done = initialise_from_teacher(student, teacher, torch.clone)
    assert done["embedding"] == "copied"
    source, ours = teacher.model.get_input_embeddings().weight, student.distilbert.embeddings.word_embeddings.weight
    widen = {"electra": "embeddings_project", "albert": "encoder.embedding_hidden_mapping_in"}.get(name)
    wide = source if widen is None else source @ teacher.model.get_submodule(widen).weight.T
    torch.testing.assert_close(ours, wide)
    relative = name.startswith(("deberta", "mod", "mm", "t5"))
    assert done["positions"] == (0 if relative else POSITIONS)
    assert done["copied_layers"] == ([] if relative else [0, LAYERS - 1])
    narrow = build_student(Preset(1, 12, 2, 32, size), teacher.tokenizer)
    assert initialise_from_teacher(narrow, teacher, torch.clone)["embedding"] == "projected"
    assert bool(narrow.distilbert.embeddings.word_embeddings.weight.isfinite().all())


@pytest.mark.parametrize("name", ["distilbert", "roberta", "xlm-roberta", "camembert"])
def test_a_distilbert_of_the_teacher_s_shape_computes_what_it_computes(name):
    teacher = load_teacher(tiny_teacher(name))
    size = teacher.model.config.vocab_size
    student = build_student(Preset(LAYERS, 16, 2, 32, size), teacher.tokenizer).eval()
    initialise_from_teacher(student, teacher, torch.clone)
    batch = teacher.tokenizer(texts()[:4], padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        want, got = (model(input_ids=ids, attention_mask=mask).logits for model in (teacher.masked_lm, student))
    torch.testing.assert_close(got[mask == 1], want[mask == 1], atol=1e-4, rtol=1e-4)


def test_a_narrower_student_is_projected(pair):
    teacher, tokenizer, own = pair
    student = build_student(Preset(1, 24, 4, 48, 150), own)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    done = initialise_from_teacher(student, teacher, plan_start(tokenizer, own).rows)
    assert done == {"embedding": "projected", "positions": 32, "copied_layers": [], "head": False}
    key = "distilbert.transformer.layer.0.ffn.lin1.weight"
    assert torch.equal(student.state_dict()[key], before[key])
    key = "distilbert.embeddings.position_embeddings.weight"
    assert not torch.equal(student.state_dict()[key][:32], before[key][:32])
    assert torch.equal(student.state_dict()[key][32:], before[key][32:])  # the teacher has no more
