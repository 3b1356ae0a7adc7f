"""Architectures, and how a student starts from its teacher."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

import vocabdistil as vd
from tests._wordpiece import SPECIALS
from vocabdistil.evaluation.timing import describe_model
from vocabdistil.models.students import (
    PRESETS,
    Preset,
    build_student,
    copied_layers,
    initialise_from_teacher,
    principal_axes,
)
from vocabdistil.models.vocabularies import wordpiece_like


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


def test_layers_are_spread_evenly():
    assert copied_layers(12, 6) == [0, 2, 4, 7, 9, 11]
    assert copied_layers(4, 1) == [3] and copied_layers(3, 3) == [0, 1, 2]


def test_principal_axes_span_the_best_subspace():
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(200, 3, generator=generator) @ torch.randn(3, 10, generator=generator)
    axes = principal_axes(low, 3)
    torch.testing.assert_close(axes.T @ axes, torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(low @ axes @ axes.T, low, atol=1e-3, rtol=1e-3)
    assert principal_axes(low, 12).shape == (10, 12)


@pytest.fixture(scope="module")
def pair(teacher_folder, demo_lines):
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    return AutoModel.from_pretrained(teacher_folder).eval(), tokenizer, wordpiece_like(tokenizer, demo_lines, 150, 64)


def test_embeddings_are_means_over_the_teacher_tokens_that_hold_the_piece(pair):
    teacher, tokenizer, own = pair
    table = vd.RemapTable.from_tokenizers(tokenizer, own)
    student = build_student(Preset(2, 48, 4, 96, 150), own)
    initialise_from_teacher(student, teacher, table, tokenizer, own)
    source = teacher.get_input_embeddings().weight
    ours = student.distilbert.embeddings.word_embeddings.weight
    rows = [set(table.ids[a:b].tolist()) for a, b in zip(table.indptr[:-1], table.indptr[1:], strict=True)]
    for token in ("the", "net", "##s", "sailor"):
        piece = own.convert_tokens_to_ids(token)
        if piece == own.unk_token_id:
            continue
        holders = [t for t, row in enumerate(rows) if piece in row]
        torch.testing.assert_close(ours[piece], source[holders].mean(0), atol=1e-5, rtol=1e-4)
    for token in SPECIALS:
        want = source[tokenizer.convert_tokens_to_ids(token)]
        torch.testing.assert_close(ours[own.convert_tokens_to_ids(token)], want)


def test_a_student_of_the_teacher_s_own_shape_computes_what_it_computes(pair):
    """Equal widths and depths: every weight is copied, so on a token that both have the two models agree."""
    teacher, tokenizer, own = pair
    table = vd.RemapTable.from_tokenizers(tokenizer, tokenizer)  # the same vocabulary: each row is the token itself
    student = build_student(Preset(2, 48, 4, 192, 600), tokenizer).eval()
    done = initialise_from_teacher(student, teacher, table, tokenizer, tokenizer)
    assert done["embedding"] == "copied" and done["copied_layers"] == [0, 1]
    batch = tokenizer(["The sailor mends the net."], return_tensors="pt")
    used = batch["input_ids"].unique()
    # Rows of continuation pieces are means over all tokens that hold them; make them the teacher's to compare layers.
    with torch.no_grad():
        student.distilbert.embeddings.word_embeddings.weight[used] = teacher.get_input_embeddings().weight[used]
    with torch.no_grad():
        want = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        got = student.distilbert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    torch.testing.assert_close(got.last_hidden_state, want, atol=1e-4, rtol=1e-4)


def test_a_narrower_student_is_projected(pair):
    teacher, tokenizer, own = pair
    table = vd.RemapTable.from_tokenizers(tokenizer, own)
    student = build_student(Preset(1, 24, 4, 48, 150), own)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    done = initialise_from_teacher(student, teacher, table, tokenizer, own)
    assert done["embedding"] == "projected" and done["copied_layers"] == []
    key = "distilbert.transformer.layer.0.ffn.lin1.weight"
    assert torch.equal(student.state_dict()[key], before[key])
    key = "distilbert.embeddings.position_embeddings.weight"
    assert not torch.equal(student.state_dict()[key][:32], before[key][:32])
    assert torch.equal(student.state_dict()[key][32:], before[key][32:])  # the teacher has no more


def test_a_teacher_without_positions_or_head_is_enough(pair):
    _, tokenizer, own = pair
    plain = BertModel(BertConfig(vocab_size=600, hidden_size=24, num_hidden_layers=1, num_attention_heads=2))
    table = vd.RemapTable.from_tokenizers(tokenizer, own)
    done = initialise_from_teacher(build_student(Preset(2, 24, 4, 48, 150), own), plain, table, tokenizer, own)
    assert done["embedding"] == "copied"
