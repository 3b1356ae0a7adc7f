"""Pseudo-perplexity and agreement of two masked language models with different vocabularies."""

from __future__ import annotations

import math

import pytest
import torch

import vocabdistil as vd
from vocabdistil.evaluation import predictions
from vocabdistil.evaluation.predictions import agreement, choose_excerpts, pseudo_perplexity
from vocabdistil.models.students import Preset, build_student
from vocabdistil.models.teachers import Teacher, load_teacher
from vocabdistil.models.vocabularies import train_vocabulary


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return load_teacher(teacher_folder)


@pytest.fixture(scope="module")
def student(teacher, demo_lines):
    tokenizer = train_vocabulary(teacher.tokenizer, demo_lines, 150).tokenizer
    model = build_student(Preset(2, 24, 4, 48, 150), tokenizer).eval().requires_grad_(False)
    torch.nn.init.normal_(model.vocab_projector.bias, generator=torch.Generator().manual_seed(0))
    return Teacher("student", model.distilbert, tokenizer, model)


@pytest.fixture(params=["at once", "in turns"])
def turns(request, monkeypatch):
    if request.param == "in turns":
        monkeypatch.setattr(predictions, "_PROBABILITIES_AT_ONCE", 2000)


def test_pseudo_perplexity_is_that_of_one_mask_at_a_time(teacher, student, demo_lines, turns):
    texts = [*demo_lines[:3], "Olga", "a b"]
    for model in (teacher, student):
        tokenizer, total = model.tokenizer, 0.0
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            for i in range(1, ids.shape[1] - 1):
                masked = ids.clone()
                masked[0, i] = tokenizer.mask_token_id
                logits = model.masked_lm(input_ids=masked, attention_mask=torch.ones_like(masked)).logits[0, i]
                total += float(logits.double().log_softmax(-1)[ids[0, i]])
        want = math.exp(-total / sum(map(len, texts)))
        assert pseudo_perplexity(model, texts) == pytest.approx(want, rel=1e-4)
    assert pseudo_perplexity(teacher, texts) < pseudo_perplexity(student, texts)  # one of them was trained
    with pytest.raises(ValueError, match="texts"):
        pseudo_perplexity(teacher, [])


def test_excerpts_can_be_read_by_both_and_are_bounded(teacher, student, demo_lines):
    tokenizers = [teacher.tokenizer, student.tokenizer]
    texts = ["☃ unknown", *demo_lines]
    chosen = choose_excerpts(texts, tokenizers, 32, seed=3, tokens=5000)
    assert chosen == choose_excerpts(texts, tokenizers, 32, seed=3, tokens=5000)
    assert chosen != choose_excerpts(texts, tokenizers, 32, seed=4, tokens=5000)
    lengths = [max(len(t(text)["input_ids"]) for t in tokenizers) for text in chosen]
    assert max(lengths) <= 32 and 2500 < sum(n * n for n in lengths) <= 5000
    for text in chosen:
        assert any(line.startswith(text) and line[len(text) :][:1] in ("", " ") for line in demo_lines)
    assert choose_excerpts(["☃"], tokenizers, 32, seed=0) == []
    assert choose_excerpts(["harbourboat"], tokenizers, 8, seed=0) == ["harbou"]  # no end of a word to cut at


def test_a_model_agrees_with_itself(teacher, demo_lines):
    matched = vd.MatchedVocab.from_tokenizers(teacher.tokenizer, teacher.tokenizer)
    found = agreement(teacher, teacher, matched, demo_lines[:20], (32, 32), batch_size=8)
    assert found["label"] == found["probability"] == 1
    assert found["logits_kl"] == pytest.approx(0, abs=1e-5)


def test_agreement_at_the_same_hidden_words(teacher, student, demo_lines, turns, monkeypatch):
    matched = vd.MatchedVocab.from_tokenizers(teacher.tokenizer, student.tokenizer)
    read = {"teacher": [], "student": []}
    for name, model in (("teacher", teacher), ("student", student)):
        original = model.read
        monkeypatch.setattr(
            model, "read", lambda ids, mask, head, n=name, o=original: (read[n].append(ids), o(ids, mask, head=head))[1]
        )
    found = agreement(teacher, student, matched, demo_lines[:12], (32, 40), batch_size=12, seed=5, temperature=2.0)
    rows = []
    for name, model in (("teacher", teacher), ("student", student)):
        (ids,) = read[name]
        logits = model.masked_lm(input_ids=ids, attention_mask=(ids != model.tokenizer.pad_token_id).long()).logits
        at = ids == model.tokenizer.mask_token_id
        columns = matched.teacher_ids if name == "teacher" else matched.student_ids
        rows.append((at, logits[at][:, columns].double()))
    (at_t, z_t), (at_s, z_s) = rows
    # The 1:1 alignment is in order, and so are the rows of each text.
    assert torch.equal(at_t.sum(1), at_s.sum(1)) and int(at_t.sum()) > 10
    identity = vd.MatchedVocab(range(len(matched)), range(len(matched)))
    want = vd.reference.matched_kl(z_s, z_t, identity, temperature=2.0)
    assert found["logits_kl"] == pytest.approx(float(want), rel=1e-4)
    assert found["label"] == pytest.approx(float(vd.loyalty.label(z_s, z_t)))
    assert found["probability"] == pytest.approx(float(vd.loyalty.probability(z_s, z_t)), rel=1e-4)


def test_no_aligned_tokens_no_agreement(teacher, student):
    matched = vd.MatchedVocab.from_tokenizers(teacher.tokenizer, student.tokenizer)
    assert agreement(teacher, student, matched, ["☃"], (8, 8)) == {}
