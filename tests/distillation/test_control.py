"""How a run is steered: its length, its checkpoints, its end, what it remembers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import vocabdistil as vd
from tests.runs import at_step, interrupt, options
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.distillation import job, runs, trainer
from vocabdistil.distillation.command import command_of
from vocabdistil.distillation.mixing import SHARES
from vocabdistil.distillation.runs import Interrupted
from vocabdistil.distillation.teacher_cache import TeacherCache

EMBEDDING = {"recipe": "embedding", "preset": None, "layers": 1, "vocabulary": "train", "vocab_size": 150}


@pytest.fixture
def pairs(tmp_path, demo_lines):
    file = tmp_path / "pairs.csv"
    rows = [f'"{demo_lines[i]}","{demo_lines[i + 1]}",{i % 5}' for i in range(12)]
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


def student_of(result):
    return load_file(result.path / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_minutes_become_steps_once(headless_folder, text_file, tmp_path, monkeypatch):
    """The steps that fit are found at the start; a slower machine that goes on keeps them."""
    changes = {**EMBEDDING, "steps": None, "minutes": 8.0, "save_every": 2}
    arguments = options(headless_folder, text_file, tmp_path / "student", **changes)
    monkeypatch.setattr(runs, "seconds_per_step", lambda *args: 20.0)
    at_step(monkeypatch, 3, interrupt)
    with pytest.raises(Interrupted):
        vd.distill(**arguments)
    record = json.loads((tmp_path / "student.partial" / "run.json").read_text())
    assert 10 <= record["steps"] <= 23  # of at most 24, less what came before and comes after
    monkeypatch.undo()
    monkeypatch.setattr(runs, "seconds_per_step", lambda *args: 1e9)
    result = vd.distill(**arguments, resume=True)
    assert result.metrics["steps"] == record["steps"]


@pytest.mark.parametrize(("minutes", "steps"), [(2.0, 21), (1.45, 10), (1.4, 0), (0.5, 0)])
def test_what_comes_after_training_is_left_room_for(minutes, steps):
    """30 s are gone; an evaluation of 5 s, five scores of 2 s and the last look of 10 s are to come, and every tenth
    step is looked at: a step takes 3 s."""
    record = {"evaluation_seconds": 5.0, "score_seconds": 2.0, "checkup_seconds": 10.0}
    run = SimpleNamespace(record=record, say=SimpleNamespace(seconds=30.0), config=SimpleNamespace(save_every=10))
    assert job._Run.steps_within(run, 60 * minutes, 2.0) == steps


@pytest.mark.parametrize(("given", "steps", "rises"), [({}, 3, 10), ({}, 1000, 50), ({"least_warmup": 0}, 100, 5)])
def test_the_rate_rises_over_some_steps(given, steps, rises, tmp_path):
    arguments = runs.training_arguments(tmp_path, steps=steps, batch_size=1, lr=1.0, seed=0, warmup=0.05, **given)
    assert arguments.warmup_steps == rises


@pytest.mark.parametrize(("warmup", "moves"), [(None, False), (0.0, True)])
def test_a_first_step_moves_a_student_little_unless_it_is_told_to(warmup, moves, headless_folder, text_file, tmp_path):
    changes = {**EMBEDDING, "steps": 1, "lr": 0.1, "warmup": warmup}
    result = vd.distill(**options(headless_folder, text_file, tmp_path / "student", **changes))
    start, step = result.metrics["checkups"]
    assert (abs(step["loss"] - start["loss"]) > 0.01) == moves


def test_the_last_step_is_told(headless_folder, text_file, tmp_path, capsys):
    changes = {**EMBEDDING, "steps": 6, "quiet": False}
    result = vd.distill(**options(headless_folder, text_file, tmp_path / "student", **changes))
    assert "step 4/6" in (said := capsys.readouterr().out) and "step 6/6" in said
    assert f"Next: its README.md has the code that loads it; vocabdistil evaluate --model {headless_folder}" in said
    log = map(json.loads, (result.path / "training_log.jsonl").read_text().splitlines())
    assert [row["step"] for row in log if "loss" in row] == [4, 6]


def test_timing_teaches_nothing(headless_folder, text_file, tmp_path, monkeypatch):
    found = []
    original = runs.seconds_per_step

    def watched(loss_of, model, batches, most):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        seconds = original(loss_of, model, batches, most)
        assert seconds > 0
        found.append(same(before, model.state_dict()) and all(p.grad is None for p in model.parameters()))
        return seconds

    monkeypatch.setattr(runs, "seconds_per_step", watched)
    vd.distill(**options(headless_folder, text_file, tmp_path / "student", **EMBEDDING))
    assert found == [True]


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"schedule": "cosine"}, {"schedule": "constant"}])
def test_resuming_is_exact(changes, headless_folder, text_file, tmp_path, monkeypatch):
    changes = {**EMBEDDING, **changes, "steps": 8, "save_every": 3}
    whole = vd.distill(**options(headless_folder, text_file, tmp_path / "whole", **changes))
    at_step(monkeypatch, 4, interrupt)
    arguments = options(headless_folder, text_file, tmp_path / "parts", **changes)
    with pytest.raises(Interrupted):
        vd.distill(**arguments)
    monkeypatch.undo()
    parts = vd.distill(**arguments, resume=True)
    assert same(student_of(whole), student_of(parts))
    assert whole.metrics["checkups"] == parts.metrics["checkups"]
    assert [row["step"] for row in whole.metrics["checkups"]] == [0, 3, 6, 8]


def test_accumulated_batches_are_one_step(headless_folder, text_file, tmp_path):
    """The gradients of two batches are added up before a step: as many texts are read as with twice the batch."""
    seen = []
    for name, changes in (("a", {"batch_size": 4, "accumulate": 2}), ("b", {"batch_size": 8})):
        sizes: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            original = trainer.DistillTrainer.training_step

            def watched(self, model, inputs, *args, sizes=sizes, original=original, **kwargs):
                sizes.append(len(inputs["teacher_ids"][0]))
                return original(self, model, inputs, *args, **kwargs)

            patch.setattr(trainer.DistillTrainer, "training_step", watched)
            result = vd.distill(**options(headless_folder, text_file, tmp_path / name, **EMBEDDING | changes, steps=3))
        assert result.metrics["steps"] == 3
        seen.append(sizes)
    assert seen == [[4] * 6, [8] * 3]


def test_patience_ends_the_run_and_the_best_is_kept(headless_folder, text_file, tmp_path, monkeypatch):
    losses = iter([5.0, 3.0, 2.0, 2.5, 2.2, 1.0])
    kept = {}

    def examine(self, training):
        loss = next(losses)
        kept[loss] = {k: v.clone() for k, v in training.model.student.state_dict().items()}
        return {"loss": loss}

    monkeypatch.setattr(job._Run, "examine", examine)
    changes = {**EMBEDDING, "steps": 12, "save_every": 2, "patience": 2}
    result = vd.distill(**options(headless_folder, text_file, tmp_path / "student", **changes))
    assert result.metrics["steps"] == 8 and result.metrics["best_step"] == 4
    assert [row["loss"] for row in result.metrics["checkups"]] == [5.0, 3.0, 2.0, 2.5, 2.2]
    saved = student_of(result)
    share = result.metrics["share"]
    for key in saved:
        between = kept[2.0][key].lerp(kept[5.0][key], 1 - share) if saved[key].is_floating_point() else kept[2.0][key]
        torch.testing.assert_close(saved[key], between)
    assert not all(torch.equal(saved[key], kept[2.2][key]) for key in saved)


def test_dev_pairs_are_scored_at_every_checkpoint(headless_folder, text_file, tmp_path, pairs, capsys):
    changes = {**EMBEDDING, "steps": 4, "save_every": 2, "dev": pairs}
    result = vd.distill(**options(headless_folder, text_file, tmp_path / "student", **changes, quiet=False))
    assert "Caution: the score of 12 pairs is largely chance; take 100 or more" in capsys.readouterr().out
    rows = result.metrics["checkups"]
    assert [row["step"] for row in rows] == [0, 2, 4] and all(-1 <= row["dev"] <= 1 for row in rows)
    assert result.metrics["before"]["dev"] == rows[0]["dev"]
    found = vd.evaluate([headless_folder, result.path], pairs=[pairs], max_length=32)
    assert found["tasks"][0]["results"][1]["spearman"] == pytest.approx(
        result.metrics["after"]["dev"], abs=1e-6
    )
    assert {"dev", "parameters", "spearman"} <= set(result.metrics["baselines"]["trimmed teacher"])


def test_a_bad_dev_file_is_one_line_before_any_work(headless_folder, text_file, tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text("a,b\n", encoding="utf-8")
    with pytest.raises(VocabdistilError, match="dev: "):
        vd.distill(**options(headless_folder, text_file, tmp_path / "student", **EMBEDDING, dev=file))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.csv"]


def test_a_cached_teacher_is_not_asked_twice(headless_folder, text_file, tmp_path, monkeypatch):
    """The second run, of another student, trains without one pass of the teacher, to the same result as the first."""
    changes = {**EMBEDDING, "cache_teacher": tmp_path / "cache"}
    plain = vd.distill(**options(headless_folder, text_file, tmp_path / "plain", **EMBEDDING))
    first = vd.distill(**options(headless_folder, text_file, tmp_path / "first", **changes))
    computed = []
    read = TeacherCache.read

    def watched(self, ids, mask):
        found = read(self, ids, mask)
        computed.append(self.computed)
        return found

    monkeypatch.setattr(TeacherCache, "read", watched)
    second = vd.distill(**options(headless_folder, text_file, tmp_path / "second", **changes))
    assert computed and max(computed) == 0
    assert same(student_of(first), student_of(second))
    ours, theirs = student_of(first), student_of(plain)
    assert all(torch.allclose(ours[key], theirs[key], atol=5e-3) for key in ours if ours[key].is_floating_point())
    narrow = {**changes, "vocab_size": 120}
    vd.distill(**options(headless_folder, text_file, tmp_path / "narrow", **narrow))


def test_a_cache_of_masked_texts_is_refused(teacher_folder, text_file, tmp_path):
    with pytest.raises(VocabdistilError, match="cache_teacher: expected losses of the last hidden states of whole"):
        vd.distill(**options(teacher_folder, text_file, tmp_path / "student", cache_teacher=tmp_path / "cache"))
    assert not (tmp_path / "student.partial").exists()


def test_several_teachers_each_with_its_tokens(headless_folder, teacher_folder, text_file, tmp_path):
    changes = {**EMBEDDING, "teacher_weights": [3, 1], "cache_teacher": tmp_path / "cache"}
    result = vd.distill(**options([headless_folder, teacher_folder], text_file, tmp_path / "student", **changes))
    assert result.metrics["after"]["kl_own"] < result.metrics["before"]["kl_own"]
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"teacher-0", "teacher-1"}


def test_training_that_did_not_help_is_told(headless_folder, text_file, tmp_path, capsys):
    """A rate that ruins the student: it is what it was, and that is said."""
    changes = {**EMBEDDING, "lr": 0.3, "steps": 6, "quiet": False}
    result = vd.distill(**options(headless_folder, text_file, tmp_path / "student", **changes))
    assert any("training did not help" in line for line in result.metrics["warnings"])
    assert result.metrics["after"]["spearman"] == pytest.approx(result.metrics["before"]["spearman"])
    said = capsys.readouterr().out
    assert "Warning: training did not help" in said and "To beat: trimmed teacher" in said and "about" in said


def test_what_got_worse_is_told(teacher_folder, text_file, tmp_path, monkeypatch):
    """Weights that a rate has ruined, and that are chosen all the same."""
    losses = iter([2.0, 1.0])
    monkeypatch.setattr(job._Run, "examine", lambda self, training: {"loss": next(losses)})
    result = vd.distill(**options(teacher_folder, text_file, tmp_path / "student", lr=0.3, steps=6))
    before, after = result.metrics["before"], result.metrics["after"]
    worse = after["kl_own"] > before["kl_own"]
    assert any("span KL, own tokenization got worse" in line for line in result.metrics["warnings"]) == worse
    assert worse


def test_the_start_is_kept_where_nothing_is_better(teacher_folder, text_file, tmp_path, capsys):
    """A recipe that does not mix start and trained weights, and a rate that ruins these."""
    changes = {"lr": 0.3, "steps": 12, "save_every": 6, "quiet": False}
    result = vd.distill(**options(teacher_folder, text_file, tmp_path / "student", **changes))
    assert result.metrics["best_step"] == 0 and result.metrics["share"] == 0
    assert result.metrics["after"]["kl_own"] == pytest.approx(result.metrics["before"]["kl_own"])
    said = capsys.readouterr().out
    assert "step 0: held-out loss" in said and "the best was step 0" in said
    assert "Warning: training did not help: the student is what it started from; try more text or a lower" in said


def test_a_budget_without_room_for_steps_is_told(headless_folder, text_file, tmp_path, capsys, monkeypatch):
    changes = {**EMBEDDING, "steps": None, "minutes": 0.001, "quiet": False}
    monkeypatch.setattr(job, "mix", lambda *args: pytest.fail("nothing to mix"))
    result = vd.distill(**options(headless_folder, text_file, tmp_path / "student", **changes))
    metrics = result.metrics
    assert metrics["steps"] == metrics["best_step"] == metrics["share"] == 0 and metrics["mixed"] == {}
    assert metrics["after"] == metrics["before"] and "no time to train" in metrics["warnings"][0]
    said = capsys.readouterr().out
    assert "Nothing is trained: " in said and "of 0.001 minutes are gone" in said and "\n0 steps" not in said


def test_what_is_not_whitened_is_told(teacher_folder, text_file, tmp_path, capsys):
    changes = {**EMBEDDING, "recipe": "embedding", "whiten": None, "quiet": False, "steps": 1}
    vd.distill(**options(teacher_folder, text_file, tmp_path / "student", **changes))
    assert f"{teacher_folder} is not whitened: its MLM head reads its hidden states" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{}, {"layers": 1}, {"vocabulary": "train"}], ids=str)
def test_that_a_whole_body_gains_nothing_is_told(headless_folder, text_file, tmp_path, capsys, changes):
    given = {**EMBEDDING, "layers": 2, "vocabulary": "trim", "steps": 1, "quiet": False, **changes}
    vd.distill(**options(headless_folder, text_file, tmp_path / "student", **given))
    printed = " ".join(capsys.readouterr().out.split())
    assert ("All of the teacher's layers are kept" in printed) == (not changes)


def test_the_trimmed_teacher_is_fitted_even_if_the_student_is_not(headless_folder, text_file, tmp_path):
    changes = {**EMBEDDING, "layers": 1, "preset": None, "fit": False, "steps": 1}
    result = vd.distill(**options(headless_folder, text_file, tmp_path / "student", **changes))
    assert result.metrics["baselines"]["trimmed teacher"]["spearman"] != result.metrics["before"]["spearman"]


def test_training_that_only_hurts_still_ends(headless_folder, text_file, tmp_path, monkeypatch):
    """No look is better than the start, and later ones are worse: the first is the best that training has."""
    losses = iter([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(job._Run, "examine", lambda self, training: {"loss": next(losses)})
    changes = {**EMBEDDING, "steps": 6, "save_every": 2}
    result = vd.distill(**options(headless_folder, text_file, tmp_path / "student", **changes))
    assert result.metrics["best_step"] == 2


def test_a_run_that_had_ended_early_stays_ended(headless_folder, text_file, tmp_path, monkeypatch):
    losses = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(job._Run, "examine", lambda self, training: {"loss": next(losses)})
    arguments = options(headless_folder, text_file, tmp_path / "student", **EMBEDDING, save_every=2, patience=1)
    with monkeypatch.context() as patch:
        patch.setattr(job._Run, "mix", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            vd.distill(**arguments)
    result = vd.distill(**arguments, resume=True)
    assert result.metrics["steps"] == 4
    assert [row["step"] for row in result.metrics["checkups"]] == [0, 2, 4]


def test_what_a_run_reads_is_not_overwritten(headless_folder, text_file, tmp_path, pairs):
    for name in ("dev", "cache_teacher"):
        with pytest.raises(VocabdistilError, match="out: .* holds .*, which the run reads"):
            changes = {**EMBEDDING, "overwrite": True, name: pairs if name == "dev" else tmp_path / "cache"}
            vd.distill(**options(headless_folder, text_file, tmp_path, **changes))
    assert pairs.exists()


def test_few_texts_are_enough(headless_folder, demo_lines, tmp_path):
    """Eight held-out texts: three to choose by, five to report of."""
    arguments = options(headless_folder, demo_lines[:200], tmp_path / "student", **EMBEDDING, held_out=0.05)
    result = vd.distill(**arguments)
    assert result.metrics["held_out_texts"] >= 5 and len(result.metrics["mixed"]) == len(SHARES)


def test_any_training_argument_can_be_given(headless_folder, text_file, tmp_path):
    """Batches made by another process, and layers computed anew in the backward pass, change nothing."""
    base = options(headless_folder, text_file, tmp_path / "plain", **EMBEDDING) | {"steps": 3}
    plain = vd.distill(**base)
    given = {"dataloader_num_workers": 1, "gradient_checkpointing": True}
    other = vd.distill(**base | {"out": tmp_path / "other", "training_arguments": given})
    a, b = student_of(plain), student_of(other)
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)
    card = (other.path / "README.md").read_text()
    assert "--training-arguments" in card and "gradient_checkpointing=true" in card


def test_lists_among_training_arguments_are_told_in_python():
    options = vd.DistillConfig(teacher="t", text=["t.txt"], out="o", training_arguments={"report_to": ["a", "b"]})
    language, text = command_of("distill", options, ["t.txt"])
    assert language == "python" and "training_arguments={'report_to': ['a', 'b']}" in text


def test_how_a_run_is_carried_out_may_change_between_its_parts():
    def identity(given):
        return vd.DistillConfig(teacher="t", text=["t.txt"], out="o", training_arguments=given).identity()

    assert identity("report_to=none,fsdp=true") == identity("") == identity({})
    assert identity("optim=sgd") == identity({"optim": "sgd"}) != identity("")


@pytest.mark.parametrize(
    ("given", "named"),
    [("dataloader_workers=1", "dataloader_workers"), ("learning_rate=1", "learning_rate"), ("optim=adamx", "adamx"),
     ("optim", "NAME=VALUE"), (7, "int"), ("report_to=bogus", "bogus"), ("save_only_model=true", "save_only_model"),
     ("fsdp=true", "training_arguments"), ({"logging_dir": object()}, "JSON")],
)  # fmt: skip
def test_training_arguments_that_cannot_be(given, named, headless_folder, text_file, tmp_path):
    with pytest.raises(VocabdistilError, match=named):
        vd.distill(**options(headless_folder, text_file, tmp_path / "student", **EMBEDDING, training_arguments=given))
    assert not (tmp_path / "student.partial").exists()
