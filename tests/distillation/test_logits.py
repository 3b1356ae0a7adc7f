"""Learning the teacher's output distributions: which tokens are hidden, the losses, training with each mode."""

from __future__ import annotations

import json

import pytest
import torch

import vocabdistil as vd
from tests.distillation.test_job import assert_equal, weights
from tests.runs import PRESET, at_step, interrupt, options
from vocabdistil.alignment.masking import masking_probabilities
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.distillation import objective as objective_module
from vocabdistil.distillation.batches import DistillCollator
from vocabdistil.distillation.hiding import positions_of
from vocabdistil.distillation.model import DistillModel
from vocabdistil.distillation.objective import Objective
from vocabdistil.distillation.recipes import RECIPES, LossWeights
from vocabdistil.distillation.runs import Interrupted
from vocabdistil.distillation.trainer import DistillTrainer
from vocabdistil.models.students import build_student
from vocabdistil.models.teachers import load_teacher
from vocabdistil.models.vocabularies import count_tokens, train_vocabulary
from vocabdistil.reference.layers import layer_map

MODES = ("match", "reduce", "reduce-map")
SIZE = 12


@pytest.fixture(scope="module")
def setting(teacher_folder, headless_folder, demo_lines):
    """Two teachers, of which the second has no head, a student, and a batch."""
    teachers = [load_teacher(teacher_folder), load_teacher(headless_folder)]
    tokenizer = train_vocabulary(teachers[0].tokenizer, demo_lines, PRESET.vocab_size).tokenizer
    torch.manual_seed(0)
    student = build_student(PRESET, tokenizer)
    torch.nn.init.normal_(student.vocab_projector.bias)
    model = DistillModel(student, [48, 48], [layer_map("last", 2, 2)] * 2).eval()
    tokenizers = [teacher.tokenizer for teacher in teachers]
    tables = [vd.RemapTable.from_tokenizers(t, tokenizer) for t in tokenizers]
    matched = [vd.MatchedVocab.from_tokenizers(t, tokenizer) for t in tokenizers]
    batch = DistillCollator(tokenizers, tokenizer, tables, matched, 32, 64)(demo_lines[:SIZE])
    probabilities = masking_probabilities(count_tokens(tokenizer, demo_lines), tokenizer.all_special_ids)

    def objective(mode: str, **changes) -> Objective:
        paper, mask_id = RECIPES["paper"].weights, tokenizer.mask_token_id
        arguments = [teachers, paper, [0.3, 0.7], [[1.0], [1.0]], 2.0, probabilities, mask_id]
        made = Objective(*arguments, mode, tables, matched)
        for name, value in changes.items():
            setattr(made, name, value)
        return made

    return objective, model, batch


@pytest.mark.parametrize("mode", MODES)
def test_both_sides_read_mask_in_the_same_places(setting, mode):
    make, _, batch = setting
    objective = make(mode)
    masked = objective.mask(batch, 7)
    teacher_mask, student_mask = objective.teachers[0].tokenizer.mask_token_id, objective.mask_id
    changed = masked["teacher_ids"][0] != batch["teacher_ids"][0]
    assert 0.02 < float(changed.float().mean()) < 0.3
    assert bool((masked["teacher_ids"][0][changed] == teacher_mask).all())
    assert torch.equal(masked["teacher_ids"][1], batch["teacher_ids"][1])  # nothing to predict with
    assert masked["hidden_pairs"][1] is None

    pairs, hidden = masked["hidden_pairs"][0], changed.flatten()
    assert bool(hidden[pairs.teacher_start.long()].all())
    reduced, before = masked["student_ids"][:SIZE].flatten(), batch["student_ids"][:SIZE].flatten()
    whole = batch["reduce_pairs"][0]
    for start, end, at in zip(whole.student_start, whole.student_end, whole.teacher_start, strict=True):
        if hidden[at]:
            assert bool((reduced[start:end] == student_mask).all())
        else:
            assert torch.equal(reduced[start:end], before[start:end])
    assert torch.equal(masked["student_ids"][SIZE : 2 * SIZE], batch["student_ids"][SIZE : 2 * SIZE])

    lengths = pairs.student_end - pairs.student_start
    block = masked["student_ids"][-SIZE:].flatten() if mode == "match" else reduced
    assert bool((block[positions_of(pairs)[0]] == student_mask).all())
    if mode == "match":
        labels, ids = masked["labels"][-SIZE:].flatten(), batch["teacher_ids"][0].flatten()
        slots = torch.full((600,), -1)
        slots[objective.matched[0].teacher_ids] = objective.matched[0].student_ids
        assert torch.equal(slots[ids[pairs.teacher_start.long()]], labels[pairs.student_start.long()])
        assert int(lengths.max()) == 1
    else:
        assert int(lengths.max()) > 1 and len(pairs) == int(hidden[whole.teacher_start.long()].sum())


def test_without_output_distributions_teachers_read_everything(setting):
    make, _, batch = setting
    for objective in (make("none"), make("match", weights=LossWeights(logits=0))):
        masked = objective.mask(batch, 7)
        assert masked["hidden_pairs"] == [None, None]
        assert all(map(torch.equal, masked["teacher_ids"], batch["teacher_ids"]))
        assert torch.equal(masked["student_ids"][: 2 * SIZE], batch["student_ids"][: 2 * SIZE])
        hidden = make("match").mask(batch, 7)
        assert torch.equal(masked["labels"], hidden["labels"])  # the same draw, whatever the teachers read
        assert not torch.equal(masked["student_ids"], hidden["student_ids"])


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_is_that_of_the_reference(setting, mode, monkeypatch):
    make, model, batch = setting
    objective = make(mode)
    masked = objective.mask(batch, 3)
    hidden, _ = model(masked["student_ids"], masked["student_mask"])
    loss = objective.logits_loss(model, hidden, objective.teach(model, masked, head=True), masked)
    (gradient,) = torch.autograd.grad(loss, model.student.vocab_projector.weight)

    pairs, teacher = masked["hidden_pairs"][0], objective.teachers[0]
    rows = slice(2 * SIZE, None) if mode == "match" else slice(0, SIZE)
    student = model.student(input_ids=masked["student_ids"][rows], attention_mask=masked["student_mask"][rows])
    with torch.no_grad():
        taught = teacher.masked_lm(input_ids=masked["teacher_ids"][0], attention_mask=masked["teacher_mask"][0])
    common = {"pairs": pairs, "temperature": 2.0, "reduction": "sum"}
    if mode == "reduce-map":
        total = vd.reference.remapped_kl(student.logits, taught.logits, objective.tables[0], **common)
    else:
        total = vd.reference.matched_kl(student.logits, taught.logits, objective.matched[0], **common)
    want = total / (int((masked["labels"] != -100).sum()) if mode == "match" else len(pairs))
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)
    (expected,) = torch.autograd.grad(want, model.student.vocab_projector.weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)

    if mode == "reduce-map":
        monkeypatch.setattr(objective_module, "_REMAP_BUDGET", 600 * 5)
        hidden, _ = model(masked["student_ids"], masked["student_mask"])
        again = objective.logits_loss(model, hidden, objective.teach(model, masked, head=True), masked)
        torch.testing.assert_close(again, loss)
        torch.testing.assert_close(torch.autograd.grad(again, model.student.vocab_projector.weight)[0], gradient)


def test_nothing_hidden_is_no_loss(setting):
    make, model, batch = setting
    for mode in MODES:
        objective = make(mode)
        masked = objective.mask(batch, 3)
        empty = torch.empty(0, dtype=torch.int32)
        nothing = vd.SpanPairs(empty, empty, empty, empty)
        masked |= {"hidden_pairs": [nothing, None], "hidden_positions": [positions_of(nothing), None]}
        hidden, _ = model(masked["student_ids"], masked["student_mask"])
        loss = objective.logits_loss(model, hidden, objective.teach(model, masked, head=True), masked)
        loss.backward()
        assert loss.item() == 0
        model.zero_grad()


def test_one_pass_per_teacher_and_step(teacher_folder, text_file, tmp_path, monkeypatch):
    calls = []
    original = DistillTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        body, count = self.objective.teachers[0].model, []
        hook = body.register_forward_hook(lambda *_: count.append(1))
        result = original(self, *args, **kwargs)
        hook.remove()
        calls.append(len(count))
        return result

    monkeypatch.setattr(DistillTrainer, "compute_loss", compute_loss)
    vd.distill(**options(teacher_folder, text_file, tmp_path / "student", steps=2))
    assert calls == [1, 1]


@pytest.mark.parametrize("mode", ["reduce", "reduce-map", "none"])
def test_resuming_gives_the_same_student(mode, teacher_folder, text_file, tmp_path, monkeypatch):
    changes = {"logits": mode, "steps": 4}
    whole = vd.distill(**options(teacher_folder, text_file, tmp_path / "whole", **changes))
    with monkeypatch.context() as patch:
        at_step(patch, 1, interrupt)
        with pytest.raises(Interrupted, match="step 2 of 4"):
            vd.distill(**options(teacher_folder, text_file, tmp_path / "cut", **changes))
    other = "match" if mode == "none" else "none"
    with pytest.raises(VocabdistilError, match=f"logits: {other} differs from \\({mode}\\)"):
        vd.distill(**options(teacher_folder, text_file, tmp_path / "cut", **{**changes, "logits": other}, resume=True))
    cut = vd.distill(**options(teacher_folder, text_file, tmp_path / "cut", **changes, resume=True))
    assert_equal(weights(whole.path), weights(cut.path))
    assert whole.metrics["after"] == cut.metrics["after"] and whole.metrics["logits"] == mode


def test_a_run_of_an_older_version_is_not_continued(teacher_folder, text_file, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 1, interrupt)
        with pytest.raises(Interrupted):
            vd.distill(**options(teacher_folder, text_file, tmp_path / "old"))
    path = tmp_path / "old.partial" / "run.json"
    record = json.loads(path.read_text())
    del record["identity"]["logits"], record["identity"]["weights"]["logits"]
    path.write_text(json.dumps(record))
    with pytest.raises(VocabdistilError, match="logits: match differs from"):
        vd.distill(**options(teacher_folder, text_file, tmp_path / "old", resume=True))


def test_it_learns_the_teacher_s_distributions(teacher_folder, text_file, tmp_path):
    changes = {"steps": 60, "weights": "kl=0,mlm=0,logits=1"}
    result = vd.distill(**options(teacher_folder, text_file, tmp_path / "student", **changes))
    before, after = result.metrics["before"], result.metrics["after"]
    assert after["logits_kl"] < 0.7 * before["logits_kl"]
    assert after["probability"] > before["probability"]
    for row in (before, after):
        assert 0 <= row["masked_accuracy"] <= 1 and 0 <= row["label"] <= 1
        assert 0.16 < row["probability"] <= 1 and 1 < row["pseudo_perplexity"] < 100
    (teacher,) = result.metrics["teacher_pseudo_perplexity"]
    assert 1 < teacher < before["pseudo_perplexity"]
    card = (result.path / "README.md").read_text()
    assert "masked-token accuracy" in card and f"(teacher {teacher:.4g})" in card and "label loyalty" in card


def test_a_teacher_without_a_head(headless_folder, teacher_folder, text_file, tmp_path, capsys):
    alone = vd.distill(**options(headless_folder, text_file, tmp_path / "a", steps=1, quiet=False))
    lines = [line for line in capsys.readouterr().out.splitlines() if "no MLM head" in line]
    assert len(lines) == 1 and str(headless_folder) in lines[0] and "cls.predictions" in lines[0]
    assert alone.metrics["logits"] == "none" and alone.metrics["teacher_pseudo_perplexity"] == [None]
    assert "logits_kl" not in alone.metrics["after"] and alone.metrics["after"]["pseudo_perplexity"] > 1
    with pytest.raises(VocabdistilError, match="logits: reduce needs a teacher with an MLM head; .*headless"):
        vd.distill(**options(headless_folder, text_file, tmp_path / "b", logits="reduce"))
    with pytest.raises(VocabdistilError, match="weights: expected one above 0 of attention, cosine, kl, mlm"):
        vd.distill(**options(headless_folder, text_file, tmp_path / "b", weights="kl=0,mlm=0"))
    both = vd.distill(**options([headless_folder, teacher_folder], text_file, tmp_path / "c", steps=1))
    assert both.metrics["logits"] == "match" and both.metrics["teacher_pseudo_perplexity"][0] is None
    assert both.metrics["after"]["logits_kl"] > 0


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16(mode, teacher_folder, text_file, tmp_path):
    """The same training but for rounding, which three steps do not add up."""
    changes = {"logits": mode, "steps": 3, "fit": False}
    found = {}
    for precision in ("fp32", "bf16"):
        arguments = options(teacher_folder, text_file, tmp_path / precision, precision=precision, **changes)
        found[precision] = vd.distill(**arguments).metrics
    plain, half = (found[precision]["after"]["logits_kl"] for precision in ("fp32", "bf16"))
    assert half == pytest.approx(plain, rel=0.02) and plain != found["fp32"]["before"]["logits_kl"]


def test_unknown_mode(teacher_folder, text_file, tmp_path):
    with pytest.raises(VocabdistilError, match="logits: expected match, reduce, reduce-map or none, got 'all'"):
        vd.distill(**options(teacher_folder, text_file, tmp_path / "student", logits="all"))


def test_a_trainer_of_ones_own(setting, demo_lines, tmp_path):
    """A plain collator and data set: what is hidden is drawn in the step, and an evaluation has a loss too."""
    make, model, _ = setting
    objective = make("match")
    tokenizers = [teacher.tokenizer for teacher in objective.teachers]
    tokenizer = train_vocabulary(tokenizers[0], demo_lines, PRESET.vocab_size).tokenizer
    collator = DistillCollator(tokenizers, tokenizer, objective.tables, objective.matched, 32, 64)
    rows = [{"text": line} for line in demo_lines[:32]]
    arguments = vd.DistillTrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-3, logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    before = [p.detach().clone() for p in model.parameters()]
    trainer = DistillTrainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:8], data_collator=collator,
        objective=objective,
    )  # fmt: skip
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 2 and all(row["mlm"] > 0 and row["logits_kl"] > 0 for row in logged)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert trainer.evaluate()["eval_loss"] > 0
