"""The job with a teacher whose vectors are whitened."""

from __future__ import annotations

from itertools import pairwise
from math import isnan

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


@pytest.fixture
def pairs(tmp_path, demo_lines):
    file = tmp_path / "pairs.csv"
    rows = [f'"{one}","{other}",{i % 7}' for i, (one, other) in enumerate(pairwise(demo_lines[:102]))]
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


def student_of(result):
    return load_file(result.path / "model.safetensors")


@pytest.mark.parametrize(
    ("scores", "kept"),
    [((0.5, 0.6), True), ((0.5, 0.4), False), ((0.5, 0.5), False), ((0.5, float("nan")), False),
     ((float("nan"), 0.1), True)],
)  # fmt: skip
def test_a_teacher_is_whitened_if_the_dev_pairs_rank_better(
    scores, kept, headless_folder, text_file, tmp_path, pairs, monkeypatch, capsys
):
    """As if it had been said; the states that are kept for other runs are those of the teacher that was taken."""
    given = EMBEDDING | {"dev": pairs, "cache_teacher": tmp_path / "cache"}
    said = vd.distill(**options(headless_folder, text_file, tmp_path / "said", **given, whiten=0.3 if kept else 0.0))
    left = iter(scores[::-1])
    monkeypatch.setattr(job._Run, "_start_score", lambda self, student: next(left))
    found = vd.distill(**options(headless_folder, text_file, tmp_path / "found", **given | {"quiet": False}))
    assert list(found.metrics["whitened"]) == list(said.metrics["whitened"]) == [str(headless_folder)] * kept
    a, b = student_of(found), student_of(said)
    assert all(torch.equal(a[name], b[name]) for name in b)
    plain, white = ("-" if isnan(score) else f"{score:.4f}" for score in scores)
    line = f"starts from {white} (Spearman) if the teacher is whitened, {plain} if not"
    assert line in (printed := capsys.readouterr().out)
    assert ("are whitened on the text" in printed) == kept


@pytest.mark.parametrize("fit", [True, False])
def test_what_is_compared_is_what_the_student_starts_from(
    fit, headless_folder, text_file, tmp_path, pairs, monkeypatch
):
    found, original = [], job._Run._start_score

    def watched(self, student):
        found.append(original(self, student))
        return found[-1]

    monkeypatch.setattr(job._Run, "_start_score", watched)
    result = vd.distill(**options(headless_folder, text_file, tmp_path / "student", **EMBEDDING, dev=pairs, fit=fit))
    assert len(set(found)) == 2 and result.metrics["before"]["dev"] == pytest.approx(max(found), abs=1e-6)


@pytest.mark.parametrize("better", [0, 1])
def test_a_run_that_goes_on_keeps_what_was_chosen(
    better, headless_folder, text_file, tmp_path, pairs, monkeypatch, capsys
):
    given = options(headless_folder, text_file, tmp_path / "student", **EMBEDDING, dev=pairs, save_every=2, quiet=False)
    with pytest.MonkeyPatch.context() as patch:
        left = iter([0.0 + better, 1.0 - better])
        patch.setattr(job._Run, "_start_score", lambda self, student: next(left))
        at_step(patch, 2, interrupt)
        with pytest.raises(Interrupted):
            vd.distill(**given)
    told = [line for line in capsys.readouterr().out.splitlines() if "if its teacher is whitened" in line]
    monkeypatch.setattr(job._Run, "_start_score", lambda *args: pytest.fail("compared again"))
    monkeypatch.setattr(job, "whiten", lambda *args: pytest.fail("whitened again"))
    result = vd.distill(**given, resume=True)
    assert len(result.metrics["whitened"]) == better
    assert told == [line for line in capsys.readouterr().out.splitlines() if "if its teacher is whitened" in line]


def test_without_time_for_two_starts_the_recipe_s_is_taken(
    headless_folder, text_file, tmp_path, pairs, monkeypatch, capsys
):
    left = iter([0.5])
    monkeypatch.setattr(job._Run, "_start_score", lambda self, student: next(left))
    changes = EMBEDDING | {"steps": None, "minutes": 0.001, "dev": pairs, "quiet": False}
    made = vd.distill(**options(headless_folder, text_file, tmp_path / "student", **changes))
    assert len(made.metrics["whitened"]) == 1 and made.metrics["baselines"] == {}
    assert "there is no time to see whether it is better if not" in capsys.readouterr().out


def test_too_few_pairs_or_what_was_said_are_not_compared(headless_folder, text_file, tmp_path, pairs, monkeypatch):
    monkeypatch.setattr(job._Run, "_start_score", lambda *args: pytest.fail("compared"))
    few = tmp_path / "few.csv"
    few.write_text("".join(pairs.read_text().splitlines(keepends=True)[:99]))
    for name, changes in {"few": {"dev": few}, "said": {"dev": pairs, "whiten": 0.3}}.items():
        made = vd.distill(**options(headless_folder, text_file, tmp_path / name, **EMBEDDING, **changes))
        assert len(made.metrics["whitened"]) == 1


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
