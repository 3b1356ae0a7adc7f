"""Training a small teacher."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

import vocabdistil as vd
from tests.runs import at_step, interrupt
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.distillation.runs import Interrupted

SMALL = {"vocab_size": 300, "layers": 1, "dim": 16, "heads": 2, "max_length": 24, "steps": 8, "batch_size": 8}


def test_a_teacher_learns_and_loads(teacher_folder):
    metrics = json.loads((teacher_folder / "metrics.json").read_text())["held_out_mlm"]
    assert metrics["after"] < metrics["before"]
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    model = AutoModelForMaskedLM.from_pretrained(teacher_folder)
    assert len(tokenizer) == 600 == model.config.vocab_size
    assert tokenizer.is_fast
    assert tokenizer.tokenize("The SAILOR") == tokenizer.tokenize("the sailor")
    ids = tokenizer("The sailor, unbelievably, mends.")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the sailor, unbelievably, mends."


def test_cased_keeps_case(text_file, tmp_path):
    folder = vd.train_teacher(text=text_file, out=tmp_path / "t", cased=True, quiet=True, **SMALL | {"steps": 1})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("The") != tokenizer.tokenize("the")


def test_resuming_gives_the_same_teacher(text_file, tmp_path, monkeypatch):
    whole = vd.train_teacher(text=text_file, out=tmp_path / "whole", quiet=True, **SMALL)
    with monkeypatch.context() as patch:
        at_step(patch, 4, interrupt)
        with pytest.raises(Interrupted, match="step 5 of 8"):
            vd.train_teacher(text=text_file, out=tmp_path / "cut", quiet=True, **SMALL)
    cut = vd.train_teacher(text=text_file, out=tmp_path / "cut", quiet=True, resume=True, **SMALL)
    a, b = load_file(whole / "model.safetensors"), load_file(cut / "model.safetensors")
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 15}, "heads: expected a divisor"),
        ({"steps": 0}, "steps"),
        ({"lr": float("inf")}, "lr"),
        ({"log_every": 0}, "log_every"),
        ({"vocab_size": 10**6}, "vocab_size"),
        ({"vocab_size": 10**20}, "vocab_size: expected a number up to"),
        ({"vocab_size": "300"}, "vocab_size: expected a whole number, got '300'"),
        ({"layers": 10**20}, "layers: expected a number up to"),
        ({"layers": 10**9}, "dim: expected layers and positions of fewer than 2.33 weights, got"),
        ({"dim": 10**6, "heads": 1}, "dim: expected layers and positions of fewer than"),
        ({"max_length": 2**31 - 1}, "dim: expected layers and positions of fewer than"),
        ({"heads": 0}, "heads: expected a number above 0, got 0"),
        ({"batch_size": 10**11}, "batch_size: expected a number up to"),
        ({"out": ""}, "out: expected the name of a folder, got nothing"),
    ],
)
def test_bad_options(text_file, tmp_path, changes, message):
    with pytest.raises(VocabdistilError, match=message):
        vd.train_teacher(**{"text": text_file, "out": tmp_path / "t", "quiet": True, **SMALL, **changes})
    assert list(tmp_path.iterdir()) == []
