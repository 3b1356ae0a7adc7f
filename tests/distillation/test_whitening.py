"""The job with a teacher whose vectors are whitened."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import vocabdistil as vd
from tests.runs import at_step, interrupt, options
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.distillation import job
from vocabdistil.distillation.runs import Interrupted
from vocabdistil.models.teachers import load_teacher
from vocabdistil.models.whitening import set_last_layer

EMBEDDING = {"recipe": "embedding", "preset": None, "layers": 1, "vocabulary": "train", "vocab_size": 150, "steps": 4}


def test_a_teacher_is_whitened_once(headless_folder, text_file, tmp_path, monkeypatch):
    """A resumed run takes the layer that was stored, whatever this machine would make."""
    given = options(headless_folder, text_file, tmp_path / "student", **EMBEDDING, save_every=2)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, interrupt)
        with pytest.raises(Interrupted):
            vd.distill(**given)
    stored, used = load_file(tmp_path / "student.partial" / "whitened_0.safetensors"), []
    monkeypatch.setattr(job, "whiten", lambda *args: pytest.fail("whitened again"))
    monkeypatch.setattr(job, "set_last_layer", lambda teacher, layer: used.append(layer))
    result = vd.distill(**given, resume=True)
    assert list(result.metrics["whitened"]) == [str(headless_folder)]
    assert all(torch.equal(used[0][name], stored[name]) for name in stored)
    assert "not comparable" in (result.path / "README.md").read_text(encoding="utf-8")


def test_the_trimmed_student_of_a_whitened_teacher_is_that_of_its_new_last_layer(
    headless_folder, text_file, tmp_path, monkeypatch
):
    from vocabdistil.distillation import trim as module

    layers = []
    monkeypatch.setattr(module, "set_last_layer", lambda teacher, layer: layers.append(layer) or
                        set_last_layer(teacher, layer))  # fmt: skip
    whole = load_teacher(headless_folder).num_layers
    given = {"teacher": headless_folder, "text": text_file, "vocab_size": 150, "quiet": True}
    plain, white = (vd.trim(out=tmp_path / f"{w}", whiten=w, **given) for w in (0, 0.3))
    assert plain.metrics["whitened"] == {} and list(white.metrics["whitened"]) == [str(headless_folder)]
    before, after = (load_file(made.path / "model.safetensors") for made in (plain, white))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    last = f"encoder.layer.{whole - 1}.output."
    assert changed == {last + name for name in ("dense.weight", "dense.bias", "LayerNorm.weight", "LayerNorm.bias")}
    (layer,) = layers
    assert torch.equal(after[last + "dense.weight"], layer["weight"])


def test_what_was_not_asked_for_is_left_where_it_cannot_be(teacher_folder, text_file, tmp_path):
    given = options(teacher_folder, text_file, tmp_path / "student", **EMBEDDING)
    assert vd.distill(**given).metrics["whitened"] == {}


def test_what_was_asked_for_and_cannot_be_is_refused_before_any_work(teacher_folder, text_file, tmp_path):
    for make in (vd.distill, vd.trim):
        given = {"teacher": teacher_folder, "text": text_file, "out": tmp_path / "student", "whiten": 0.3}
        with pytest.raises(VocabdistilError, match="^whiten: .* cannot be whitened: its MLM head reads"):
            make(**given)
        assert not list(tmp_path.iterdir())
