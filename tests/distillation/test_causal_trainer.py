"""The trainer of causal students."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments

import vocabdistil as vd
from tests.chats import BRACKETS, TURNS, chat_tokenizer, small_gpt2, small_llama
from tests.spans import pairs_list
from vocabdistil.core.errors import VocabdistilError

EVERY = "lm=0.5,likelihood=100,matched=2,remapped=1.5,gold=3"
TEXTS = ["I walk home.", "they walked home and I too", "東 he walks", "who are you walking with?"]
CHATS = [
    {"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": text}]} for text in TEXTS
]
ROWS = [{"text": text} for text in TEXTS]


@pytest.fixture(scope="module")
def sides():
    teacher, student = chat_tokenizer("byte-level split", TURNS), chat_tokenizer("llama", BRACKETS)
    # A model may have more rows than its tokenizer tokens.
    return teacher, student, small_llama(len(teacher) + 5), small_gpt2(len(student))


def trainer_of(sides, folder, rows=ROWS, model=None, **options):
    teacher_tokenizer, student_tokenizer, teacher, student = sides
    own = {"eval_dataset", "max_length", "packed", "temperature", "unmatched", "weights"}
    own |= {"teacher", "teacher_tokenizer"}
    given = {name: options.pop(name) for name in own & options.keys()}
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
    settings |= {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), **settings | options)
    return vd.CausalDistillTrainer(
        copy.deepcopy(student) if model is None else model,
        arguments,
        processing_class=student_tokenizer,
        train_dataset=rows,
        **{"teacher": teacher, "teacher_tokenizer": teacher_tokenizer, "weights": EVERY, **given},
    )


def direct(batch, student, teacher, matched, table):
    """The losses by their definitions, from all logits, one pair after the other."""
    z_s = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    taught = batch["teacher"]
    with torch.no_grad():
        z_t = teacher(input_ids=taught["input_ids"], attention_mask=taught["attention_mask"]).logits.log_softmax(-1)
    lm = cross_entropy(z_s[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    sides = [(z_s, batch["input_ids"]), (z_t, taught["input_ids"])]
    first_piece = [(v, table.rows(v)[0]) for v in range(len(table)) if table.rows(v)]
    known = [v for v, _ in first_piece]
    likelihood, kl, remapped = [], [], []
    for spans in pairs_list(batch["pairs"]):
        logs, firsts = [], []
        for (z, ids), (start, end) in zip(sides, (spans[:2], spans[2:]), strict=True):
            row, first = divmod(start, ids.shape[1])
            logs.append(sum(z[row, k - 1, ids[row, k]] for k in range(first, first + end - start)) / 100)
            firsts.append(z[row, first - 1])
        r, q = logs[0].exp(), logs[1].exp()
        likelihood.append(q * (q / r).log() + (1 - q) * ((1 - q) / (1 - r)).log())
        p_s, p_t = firsts[0][matched.student_ids].softmax(0), firsts[1][matched.teacher_ids].softmax(0)
        kl.append((p_t * (p_t / p_s).log()).sum())
        # The student's probability of a piece, in equal parts to the teacher's tokens that begin with it.
        pieces = torch.tensor([j for _, j in first_piece])
        r = firsts[0].exp()[pieces] / pieces.bincount()[pieces]
        q = firsts[1][known].softmax(0)
        remapped.append((q * (q * r.sum() / r).log()).sum())
    means = {"likelihood": likelihood, "matched": kl, "remapped": remapped}
    return {"lm": lm, **{name: torch.stack(values).mean() for name, values in means.items()}}


@pytest.mark.parametrize("rows", [ROWS, CHATS], ids=["text", "chat"])
def test_a_step_is_what_all_logits_say(sides, tmp_path, rows):
    sides = (*sides[:2], *(copy.deepcopy(model).double().eval() for model in sides[2:]))
    student = sides[3]
    trainer = trainer_of(sides, tmp_path, model=student, weights="lm=0.5,likelihood=100,matched=2,remapped=3")
    batch = trainer.data_collator(rows)
    loss, found = trainer.compute_loss(student.eval(), batch, return_outputs=True)
    terms = direct(batch, student, sides[2], trainer.objective.matched, trainer.objective.table)
    for name, value in terms.items():
        torch.testing.assert_close(found["terms"][name], value, rtol=1e-9, atol=1e-12)
    expected = 0.5 * terms["lm"] + 100 * terms["likelihood"] + 2 * terms["matched"] + 3 * terms["remapped"]
    weights = [p for p in student.parameters() if p.requires_grad]
    for ours, theirs in zip(*(torch.autograd.grad(x, weights) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


def test_logits_in_parts(sides, tmp_path, monkeypatch):
    trainer = trainer_of(sides, tmp_path, weights="lm=1")
    batch = trainer.data_collator(ROWS)
    found = []
    for budget in (1 << 24, 3 * len(sides[1])):
        monkeypatch.setattr("vocabdistil.distillation.causal_objective._BUDGET", budget)
        loss = trainer.compute_loss(trainer.model.eval(), batch)
        found.append([loss, *torch.autograd.grad(loss, list(trainer.model.parameters()))])
    torch.testing.assert_close(*found)


def test_a_teacher_that_is_the_student_has_nothing_to_teach(sides, tmp_path):
    """The case in which a shift that is off by one shows."""
    same = chat_tokenizer("llama")
    model = small_llama(len(same))
    trainer = trainer_of((same, same, model, model), tmp_path, weights="likelihood=1,matched=1,remapped=1,gold=1")
    # Without the tokens of bytes, which share their letter with another token.
    ids = torch.arange(len(same) + 1)
    table = vd.RemapTable(ids, ids[:-1], student_vocab_size=len(same), unk_id=0, pad_id=0)
    trainer.objective = replace(trainer.objective, table=table)
    student = copy.deepcopy(model).eval()
    terms = trainer.compute_loss(student, trainer.data_collator(ROWS), return_outputs=True)[1]["terms"]
    assert terms.keys() == {"likelihood", "matched", "remapped", "gold"}
    assert all(abs(value.item()) < 1e-6 for value in terms.values())


def test_text_alone_needs_no_teacher(sides, tmp_path):
    trainer = vd.CausalDistillTrainer(
        copy.deepcopy(sides[3]), TrainingArguments(str(tmp_path), report_to="none", use_cpu=True),
        processing_class=sides[1], weights="lm=1",
    )  # fmt: skip
    batch = trainer.data_collator(TEXTS)
    loss = trainer.compute_loss(trainer.model.eval(), batch)
    expected = trainer.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
    ).loss
    torch.testing.assert_close(loss, expected)


def losses_of(trainer):
    trainer.train()
    names = ("lm", "likelihood", "matched", "remapped", "gold")
    return [[log["loss"], *(log[name] for name in names)] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_is_the_same_however_it_is_cut(sides, tmp_path, packed):
    """Texts of other lengths: the mean is over tokens and pairs of the step, not of batches."""
    cuts = [(8, 1), (4, 2), (1, 8)]
    found = [
        losses_of(
            trainer_of(
                sides, tmp_path, ROWS * 4, packed=packed, per_device_train_batch_size=size,
                gradient_accumulation_steps=count,
            )  # fmt: skip
        )
        for size, count in cuts
    ]
    for other in found[1:]:
        assert all(a == pytest.approx(b, rel=2e-4, abs=2e-5) for a, b in zip(other, found[0], strict=True))


def test_packed_is_padded_without_padding(sides, tmp_path):
    padded, packed = (losses_of(trainer_of(sides, tmp_path, packed=packed)) for packed in (False, True))
    assert all(a == pytest.approx(b, rel=2e-4, abs=2e-5) for a, b in zip(packed, padded, strict=True))


def test_it_learns_and_the_teacher_does_not(sides, tmp_path):
    before = {name: value.clone() for name, value in sides[2].state_dict().items()}
    trainer = trainer_of(sides, tmp_path, max_steps=30, learning_rate=1e-2, weights="likelihood=100,matched=1")
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["likelihood"] < 0.5 * logs[0]["likelihood"] and logs[-1]["matched"] < 0.5 * logs[0]["matched"]
    assert all(torch.equal(value, before[name]) for name, value in sides[2].state_dict().items())


def test_resumed_it_is_the_same(sides, tmp_path):
    """Saving and resuming are the Trainer's own: a plain model lies in the checkpoint."""
    whole = trainer_of(sides, tmp_path / "whole", ROWS * 4, max_steps=4)
    whole.train()
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    first = trainer_of(sides, tmp_path / "cut", ROWS * 4, **options)
    first.train()
    again = trainer_of(sides, tmp_path / "cut", ROWS * 4, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    saved = type(sides[3]).from_pretrained(tmp_path / "cut" / "checkpoint-4")
    torch.testing.assert_close(saved.state_dict()["transformer.wte.weight"], again.model.transformer.wte.weight.data)
    assert vd.CausalCollator(sides[0], tmp_path / "cut" / "checkpoint-4")(ROWS)["counts"]["pairs"]


def test_data_sets_of_trl(sides, tmp_path):
    """A column that the model does not know stays, one that nobody reads is dropped."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([row | {"source": "x"} for row in CHATS])
    trainer = trainer_of(sides, tmp_path, rows, eval_dataset=rows, eval_strategy="steps", eval_steps=1)
    trainer.train()
    evaluated = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluated) == 2 and evaluated[1] < evaluated[0]


@pytest.mark.parametrize("bf16", [False, True])
def test_a_teacher_in_half(sides, tmp_path, bf16):
    """Beside a student in float32, and under autocast."""
    teacher = copy.deepcopy(sides[2]).to(torch.bfloat16)
    plain, half = (losses_of(trainer_of(sides, tmp_path, teacher=one, bf16=bf16)) for one in (sides[2], teacher))
    assert next(teacher.parameters()).dtype == torch.bfloat16
    assert half[0] == pytest.approx(plain[0], rel=0.05, abs=0.01)
    if not bf16:
        assert half[0][1] == plain[0][1]  # of the text alone


def _counted(forward, ran):
    def counted(self, *args, **kwargs):
        ran.append(self)
        return forward(self, *args, **kwargs)

    return counted


@pytest.mark.parametrize("packed", [False, True])
def test_checkpoints_of_gradients_change_nothing(sides, tmp_path, packed, monkeypatch):
    ran = []
    inner = sides[3].transformer.h[0].mlp
    monkeypatch.setattr(type(inner), "forward", _counted(type(inner).forward, ran))
    plain, checkpointed = [], []
    for found, on in ((plain, False), (checkpointed, True)):
        trainer = trainer_of(sides, tmp_path, packed=packed, gradient_checkpointing=on)
        ran.clear()
        found += losses_of(trainer)
        assert len(ran) == (1 + on) * 4, "two layers, two steps, again where gradients come back"
        found.append([p.detach().clone() for p in trainer.model.parameters()])
    torch.testing.assert_close(checkpointed[-1], plain[-1])
    assert all(a == pytest.approx(b, rel=1e-5) for a, b in zip(checkpointed[:-1], plain[:-1], strict=True))


def test_adapters(sides, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(sides[3]), settings)
    trainer = trainer_of(
        sides, tmp_path, model=model, max_steps=10, learning_rate=1e-2, save_strategy="steps", save_steps=10
    )
    losses = losses_of(trainer)
    assert losses[-1][0] < losses[0][0]
    assert (tmp_path / "checkpoint-10" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "checkpoint-10" / "model.safetensors").exists()


def test_no_more_is_read_than_a_model_can(sides, tmp_path):
    trainer = trainer_of(sides, tmp_path)
    assert trainer.data_collator.max_length == [1024, 64]  # of the student 64 positions
    trainer.compute_loss(trainer.model, trainer.data_collator([{"text": "they walked " * 99}]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": "mlm=1"}, "^weights: unknown loss 'mlm'; expected lm, likelihood, matched, remapped, gold"),
        ({"weights": "lm=0"}, "^weights: expected numbers of at least 0, one above, got lm=0"),
        ({"teacher": small_llama(3000), "teacher_tokenizer": None}, "^teacher_tokenizer: expected that of the teacher"),
        ({"weights": 3}, "^weights: expected CausalWeights or their text form, got int"),
        ({"unmatched": "none"}, "^unmatched: expected one of"),
        ({"temperature": 0.0}, "^temperature: expected"),
        ({"teacher": small_llama(9)}, "^teacher: expected an output layer for the"),
        ({"teacher": None}, "^teacher: expected a model, as CausalWeights"),
        ({"model": torch.nn.Linear(1, 1)}, "^model: expected a causal language model, got Linear"),
    ],
)
def test_bad_input(sides, tmp_path, options, said):
    with pytest.raises((VocabdistilError, ValueError), match=said):
        trainer_of(sides, tmp_path, **options)
