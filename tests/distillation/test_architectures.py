"""Every architecture with the kind of tokenizer it comes with: trimmed, distilled, resumed, loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

import vocabdistil as vd
from tests.models.tiny_teachers import KINDS, WITH_HEAD, texts, tiny_teacher
from tests.runs import at_step, interrupt
from vocabdistil.distillation import folder
from vocabdistil.distillation.runs import Interrupted
from vocabdistil.models.students import Preset

TEXTS = [f"{line} {i}" for i in range(3) for line in texts()]
COMMON = {"text": TEXTS, "vocab_size": 420, "max_length": 24, "time_batch": 2, "time_length": 12, "quiet": True}
SHORT = COMMON | {"steps": 4, "batch_size": 8, "held_out": 0.2}


@pytest.fixture
def saved(monkeypatch) -> list[Any]:
    """The students as they were before they were saved."""
    students = []
    def keep(partial, options, source, student, *args, **kwargs):
        students.append(student)
        return write(partial, options, source, student, *args, **kwargs)

    write = folder.write_student
    for module in ("job", "trim"):
        monkeypatch.setattr(f"vocabdistil.distillation.{module}.write_student", keep)
    return students


def load(path: Path, head: bool) -> Any:
    name = json.loads((path / "config.json").read_text())["architectures"][0]
    if name.endswith("EncoderModel"):
        return getattr(transformers, name).from_pretrained(path)
    return (AutoModelForMaskedLM if head else AutoModel).from_pretrained(path)


@torch.no_grad()
def check(path: Path, student: Any, head: bool) -> None:
    """The folder gives what the student gave before it was saved."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), load(path, head).eval()
    batch = tokenizer(TEXTS[:4], padding=True, truncation=True, max_length=24, return_tensors="pt")
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    ours = student.tokenizer(TEXTS[:4], padding=True, truncation=True, max_length=24, return_tensors="pt")
    assert torch.equal(batch["input_ids"], ours["input_ids"])
    before, after = student.model.eval()(**batch), model(**batch)
    key = "logits" if head else "last_hidden_state"
    assert torch.equal(getattr(before, key), getattr(after, key)) and bool(getattr(after, key).isfinite().all())
    body = AutoModel.from_pretrained(path) if head else model
    assert body.config.num_hidden_layers == student.architecture["layers"]
    assert max(tokenizer.get_vocab().values()) < body.get_input_embeddings().weight.shape[0]


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_trim(name, head, tmp_path, saved):
    if head and name not in WITH_HEAD:
        pytest.skip("has no MLM head")
    result = vd.trim(teacher=tiny_teacher(name, head), out=tmp_path / "student", layers=2, **COMMON)
    check(result.path, saved[0], head)
    assert result.metrics["architecture"]["layers"] == 2
    assert result.metrics["initialisation"]["tokens"]["tokens"]["none"] == 0
    loyalty = result.metrics["loyalty"]
    assert loyalty.keys() == {"all layers", "2 layers"}
    assert loyalty["all layers"]["cosine"] > loyalty["2 layers"]["cosine"]
    assert ("label" in loyalty["2 layers"]) == head


@pytest.mark.parametrize("vocabulary", ["train", "trim"])
@pytest.mark.parametrize("name", KINDS)
def test_distill(name, vocabulary, tmp_path, saved):
    head = name in WITH_HEAD
    options = SHORT | {"teacher": tiny_teacher(name, head), "vocabulary": vocabulary}
    result = vd.distill(**options, out=tmp_path / "student")
    check(result.path, saved[0], head)
    losses = [row["loss"] for row in result.metrics["checkups"]]
    layers = AutoConfig.from_pretrained(options["teacher"]).num_hidden_layers
    assert result.metrics["architecture"]["layers"] == layers // 2
    assert losses[0] != losses[-1] and ("mlm" in result.metrics["after"]) == head


@pytest.mark.parametrize("name", ["xlm-roberta", "modernbert", "t5"])
def test_resume(name, tmp_path, monkeypatch):
    options = SHORT | {"teacher": tiny_teacher(name, name in WITH_HEAD)}
    whole = vd.distill(**options, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        at_step(patch, 2, interrupt)
        with pytest.raises(Interrupted):
            vd.distill(**options, out=tmp_path / "cut")
    cut = vd.distill(**options, out=tmp_path / "cut", resume=True)
    assert whole.metrics["checkups"] == cut.metrics["checkups"]
    a, b = (load_file(result.path / "model.safetensors") for result in (whole, cut))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ["xlm-roberta", "modernbert", "t5", "albert"])
def test_presets_take_any_teacher(name, tmp_path, saved):
    preset = Preset(layers=1, dim=12, heads=2, ffn=24, vocab_size=420)
    teacher = tiny_teacher(name, name in WITH_HEAD)
    result = vd.distill(**SHORT, teacher=teacher, out=tmp_path / name, preset=preset)
    # Nobody trains a head without a teacher that has one.
    check(result.path, saved[0], name in WITH_HEAD)
    assert ("mlm" in result.metrics["after"]) == (name != "t5")  # whose tokenizer has nothing to hide words with
