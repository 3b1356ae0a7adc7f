"""The main job: what it writes, that it learns, that it resumes exactly, and what it does with bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import vocabdistil as vd
from tests.models.tiny_teachers import with_code_of_its_own
from tests.runs import PRESET, at_step, interrupt, options
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.distillation.calibration import calibrate
from vocabdistil.distillation.job import DistillConfig
from vocabdistil.distillation.runs import Interrupted
from vocabdistil.models.teachers import Reading
from vocabdistil.reference.layers import LayerAssignment


@pytest.fixture(scope="module")
def student(teacher_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("student") / "student"
    return vd.distill(**options(teacher_folder, text_file, out, steps=80))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") | load_file(folder / "projection.safetensors")


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_it_learns(student):
    before, after = student.metrics["before"], student.metrics["after"]
    assert after["kl_reduce"] < before["kl_reduce"]
    assert after["kl_own"] < before["kl_own"]
    assert after["mlm"] < before["mlm"]
    assert after["cosine"] > before["cosine"]


def test_the_folder_loads_without_the_package(student):
    code = (
        "import sys; sys.modules['vocabdistil'] = None\n"
        "from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer\n"
        f"folder = {str(student.path)!r}\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "batch = tokenizer(['The sailor mends the net.', 'Olga'], padding=True, return_tensors='pt')\n"
        "hidden = AutoModel.from_pretrained(folder)(**batch).last_hidden_state\n"
        "logits = AutoModelForMaskedLM.from_pretrained(folder)(**batch).logits\n"
        "print(len(tokenizer), hidden.shape[-1], logits.shape[-1], bool(hidden.isfinite().all()))\n"
        "print(tokenizer.decode(tokenizer('The sailor mends.')['input_ids'], skip_special_tokens=True))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    figures, decoded = run.stdout.splitlines()
    assert figures.split() == [str(PRESET.vocab_size), str(PRESET.dim), str(PRESET.vocab_size), "True"]
    assert decoded == "the sailor mends."


def test_the_folder_says_what_was_done(student):
    files = {path.name for path in student.path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "metrics.json", "README.md", "remap.vdrt"} <= files
    metrics = json.loads((student.path / "metrics.json").read_text())
    assert metrics == student.metrics
    models = metrics["models"]
    loaded = AutoModel.from_pretrained(student.path)
    assert models["student"]["vocab"] == PRESET.vocab_size
    assert models["student"]["parameters"] > sum(p.numel() for p in loaded.parameters())  # the MLM head counts too
    assert models["compression"] == pytest.approx(models["teacher"]["mb"] / models["student"]["mb"], abs=0.01)
    log = [json.loads(line) for line in (student.path / "training_log.jsonl").read_text().splitlines()]
    assert {"kl_reduce", "kl_own", "mlm"} <= log[0].keys()
    assert not student.path.with_name("student.partial").exists()
    assert sorted(files) == metrics["files"]
    assert vd.RemapTable.load(student.path / "remap.vdrt").indptr[-1] > 0


def test_the_same_seed_gives_the_same_student(teacher_folder, text_file, tmp_path):
    a, b, c = (
        vd.distill(**options(teacher_folder, text_file, tmp_path / name, seed=seed)).path
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert_equal(weights(a), weights(b))
    assert not torch.equal(*(weights(x)["distilbert.embeddings.word_embeddings.weight"] for x in (a, c)))


@pytest.fixture(scope="module")
def uninterrupted(teacher_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "student"
    return vd.distill(**options(teacher_folder, text_file, out))


def test_a_signal_saves_and_resuming_gives_the_same_student(
    teacher_folder, text_file, tmp_path, monkeypatch, uninterrupted
):
    out = tmp_path / "student"
    with monkeypatch.context() as patch:
        at_step(patch, 6, interrupt)
        with pytest.raises(Interrupted, match="step 7 of 12.*resume=True"):
            vd.distill(**options(teacher_folder, text_file, out))
    assert not out.exists()
    with pytest.raises(VocabdistilError, match="out: .*interrupted run.*resume=True"):
        vd.distill(**options(teacher_folder, text_file, out))
    with pytest.raises(VocabdistilError, match="lr: .*resume"):
        vd.distill(**options(teacher_folder, text_file, out, resume=True, lr=1e-3))
    resumed = vd.distill(**options(teacher_folder, text_file, out, resume=True))
    assert_equal(weights(resumed.path), weights(uninterrupted.path))
    assert resumed.metrics["before"] == uninterrupted.metrics["before"]
    assert resumed.metrics["after"] == uninterrupted.metrics["after"]


def test_a_crash_loses_nothing_before_the_last_checkpoint(
    teacher_folder, text_file, tmp_path, monkeypatch, uninterrupted
):
    def crash():
        raise RuntimeError("power cut")

    out = tmp_path / "student"
    with monkeypatch.context() as patch:
        at_step(patch, 9, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            vd.distill(**options(teacher_folder, text_file, out, save_every=4))
    resumed = vd.distill(**options(teacher_folder, text_file, out, save_every=4, resume=True))
    assert_equal(weights(resumed.path), weights(uninterrupted.path))


def test_a_crash_before_any_checkpoint_leaves_nothing(teacher_folder, text_file, tmp_path, monkeypatch):
    def crash():
        raise RuntimeError("power cut")

    at_step(monkeypatch, 2, crash)
    with pytest.raises(RuntimeError, match="power cut"):
        vd.distill(**options(teacher_folder, text_file, tmp_path / "student"))
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_the_folder_only_at_the_end(teacher_folder, text_file, tmp_path, monkeypatch):
    out = tmp_path / "student"
    before = weights(vd.distill(**options(teacher_folder, text_file, out, steps=1)).path)
    with pytest.raises(VocabdistilError, match="out: .*exists"):
        vd.distill(**options(teacher_folder, text_file, out))
    with monkeypatch.context() as patch:
        at_step(patch, 3, interrupt)
        with pytest.raises(Interrupted):
            vd.distill(**options(teacher_folder, text_file, out, overwrite=True))
    assert_equal(weights(out), before)
    vd.distill(**options(teacher_folder, text_file, out, overwrite=True))
    assert json.loads((out / "metrics.json").read_text())["steps"] == 12
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_folder_with_the_teacher_or_the_text_is_not_replaced(teacher_folder, text_file):
    for out in (teacher_folder, teacher_folder.parent, text_file.parent):
        with pytest.raises(VocabdistilError, match="out: .* holds .*, which the run reads"):
            vd.distill(**options(teacher_folder, text_file, out, overwrite=True))
    assert (teacher_folder / "config.json").exists() and text_file.exists()


def test_several_teachers_and_layer_maps(teacher_folder, text_file, tmp_path):
    shape = {"vocab_size": 400, "layers": 4, "dim": 32, "heads": 4, "max_length": 32}
    other = vd.train_teacher(text=text_file, out=tmp_path / "other", steps=5, quiet=True, **shape)
    changes = {"teacher_weights": [3, 1], "weights": "kl=1,cosine=0.5,mse=0.1,mlm=0", "steps": 4}
    result = vd.distill(**options([teacher_folder, other], text_file, tmp_path / "a", layer_map="average", **changes))
    assert len(result.metrics["coverage"]) == 2
    projections = load_file(result.path / "projection.safetensors")
    assert {tuple(w.shape) for w in projections.values()} == {(48, 24), (32, 24), (48,)}
    assert len(projections) == 5  # two teachers, two student layers each; and the bias of the fitted one
    assert (result.path / "remap_1.vdrt").exists()


def test_a_teacher_with_code_of_its_own_has_students_of_another_body(teacher_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = with_code_of_its_own(teacher_folder, tmp_path / "teacher")
    small = options(folder, text_file, tmp_path / "student", steps=2, trust_remote_code=True)
    made = vd.distill(**small)
    assert set(made.metrics["baselines"]) == {"mean of input embeddings"}
    with pytest.raises(VocabdistilError, match="no rule for layers of model_type 'own'; preset makes"):
        vd.distill(**small | {"preset": None, "layers": 1, "overwrite": True})


def test_nan_in_the_teacher_is_told_and_nothing_is_left(teacher_folder, text_file, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(teacher_folder, broken)
    state = load_file(broken / "model.safetensors")
    state["bert.encoder.layer.1.output.dense.bias"][0] = float("nan")
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VocabdistilError, match="teacher: .*broken gives NaN"):
        vd.distill(**options(broken, text_file, tmp_path / "student"))
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "huge"}, "preset: expected base, small"),
        ({"vocab_size": 0}, "vocab_size: expected a number above 0, got 0"),
        ({"steps": -1}, "steps"),
        ({"lr": float("nan")}, "lr"),
        ({"held_out": 1.0}, "held_out"),
        ({"weight_decay": float("inf")}, "weight_decay"),
        ({"seed": -1}, "seed: expected a number from 0"),
        ({"seed": 2**40}, "seed"),
        ({"max_length": 2}, "max_length: expected a number above 2, got 2"),
        ({"out": "."}, "out: expected the name of a folder"),
        ({"weights": "kl=0,mlm=0,logits=0"}, "weights"),
        ({"weights": "kul=1"}, "weights: unknown loss 'kul'"),
        ({"weights": "kl=x"}, "weights: kl: expected a number"),
        ({"teacher_weights": [1, 2]}, "teacher_weights"),
        ({"layer_map": "first"}, "layer_map"),
        ({"vocab_size": 9}, "vocab_size: expected at least .* special tokens and characters"),
        ({"resume": True}, "resume: no interrupted run"),
    ],
)
def test_bad_options(teacher_folder, text_file, tmp_path, changes, message):
    with pytest.raises(VocabdistilError, match=message) as caught:
        vd.distill(**{**options(teacher_folder, text_file, tmp_path / "student"), **changes})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_config_and_options_together_are_an_error():
    with pytest.raises(TypeError, match="config or options"):
        vd.distill(DistillConfig(teacher="a", text="b", out="c"), steps=3)


class _Fixed:
    """Stands in for a model or an objective with hidden states that the test chose."""

    training = False

    def __init__(self, hidden, taught, projection):
        self.hidden, self.taught, self.weight = hidden, taught, projection
        self.assignments = [[LayerAssignment(student=(1,), teacher=(1,))]]

    def __call__(self, ids, mask):
        return Reading([None, self.hidden]), None

    def teach(self, model, batch):
        return [Reading([self.taught])]

    def projection(self, teacher, assignment):
        return self.weight

    def is_known(self, teacher, assignment):
        return False

    def train(self, mode=True):
        return self

    eval = train


def test_calibration_finds_the_scaled_isometry():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 10, 6, generator=generator)
    isometry = torch.linalg.qr(torch.randn(9, 6, generator=generator)).Q  # [9, 6], orthonormal columns
    taught = 2.5 * hidden @ isometry.T
    start = torch.arange(30, dtype=torch.int32)
    pairs = vd.SpanPairs(start, start + 1, start, start + 1)
    batch = {"student_ids": None, "student_mask": None, "teacher_ids": [torch.zeros(3, 10)], "reduce_pairs": [pairs]}
    fixed = _Fixed(hidden, taught, torch.zeros(9, 6))
    scales = calibrate(fixed, fixed, batch)
    torch.testing.assert_close(fixed.weight, 2.5 * isometry, atol=1e-3, rtol=1e-3)
    rows = taught.flatten(0, 1)
    want = (rows - rows.mean(1, keepdim=True)).square().mean().sqrt()
    assert scales[0][0] == pytest.approx(float(want), rel=1e-5)
