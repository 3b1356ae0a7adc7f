"""The job of decoders."""

import json
import math
import os
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vocabdistil as vd
from tests.models.tiny_decoders import tiny_decoder
from tests.models.tiny_teachers import texts, tiny_teacher
from tests.runs import at_step
from vocabdistil.cli import main
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.distillation.causal_job import _bits_of_learned
from vocabdistil.distillation.run_folder import Interrupted

LINES = [f"{text} {n}" for n in range(8) for text in texts()]
CHATS = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": line}]}
    for n, line in enumerate(LINES)
]


ENCODER = {"teacher": lambda: tiny_teacher("bert"), "student": None}


def options(out, **changes):
    small = {"text": LINES, "steps": 6, "batch_size": 4, "max_length": 48, "held_out": 0.2, "save_every": 2}
    sides = {"teacher": tiny_decoder("llama-3"), "student": tiny_decoder("gemma"), "lr": 1e-2}
    return {**sides, **small, "out": out, "quiet": True, **changes}


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_student_of_its_own_vocabulary(tmp_path):
    given = options(tmp_path / "out")
    made = vd.distill(**given)
    bits = made.metrics["bits_per_byte"]
    assert bits["after"] < bits["before"]
    assert made.metrics["recipe"] == "next-token" and made.metrics["steps"] == 6
    held = {row["step"]: row["loss"] for row in made.metrics["checkups"]}
    assert list(held) == [0, 2, 4, 6] and held[made.metrics["best_step"]] == min(held.values())
    student, tokenizer = AutoModelForCausalLM.from_pretrained(made.path), AutoTokenizer.from_pretrained(made.path)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(given["student"]).get_vocab()
    assert student.num_parameters() == AutoModelForCausalLM.from_pretrained(given["student"]).num_parameters()
    card = (made.path / "README.md").read_text(encoding="utf-8")
    assert "text-generation" in card and f"{bits['after']:.4f}" in card
    assert not (tmp_path / "out.partial").exists()


def test_resumed_it_is_the_same(tmp_path, monkeypatch):
    whole = vd.distill(**options(tmp_path / "whole"))
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted):
        vd.distill(**options(tmp_path / "cut"))
    cut = vd.distill(**options(tmp_path / "cut", resume=True))
    for name, value in weights_of(whole.path).items():
        torch.testing.assert_close(weights_of(cut.path)[name], value, rtol=0, atol=0)
    assert cut.metrics["checkups"] == whole.metrics["checkups"]


def test_killed_it_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die():
        raise Killed

    whole = vd.distill(**options(tmp_path / "whole"))
    at_step(monkeypatch, 3, die)
    with pytest.raises(Killed):
        vd.distill(**options(tmp_path / "cut"))
    assert (tmp_path / "cut.partial" / "checkpoint-2").exists()
    with pytest.raises(VocabdistilError, match="^weights: .* differs"):
        vd.distill(**options(tmp_path / "cut", resume=True, weights="lm=1,gold=1"))
    cut = vd.distill(**options(tmp_path / "cut", resume=True))
    for name, value in weights_of(whole.path).items():
        torch.testing.assert_close(weights_of(cut.path)[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("packed_in", ["file", "list"])
def test_conversations(tmp_path, packed_in):
    text = CHATS
    if packed_in == "file":
        text = tmp_path / "chats.jsonl"
        text.write_text("\n".join(json.dumps(row | {"source": "x"}) for row in CHATS), encoding="utf-8")
    made = vd.distill(**options(tmp_path / "out", text=text, recipe="likelihood"))
    bits = made.metrics["bits_per_byte"]
    assert bits["after"] < bits["before"] and all(map(math.isfinite, bits.values()))
    assert made.metrics["weights"] == {"lm": 1.0, "likelihood": 100.0, "matched": 0.0, "remapped": 0.0, "gold": 0.0}


def test_as_much_is_read_as_most_rows_have(tmp_path, capsys):
    """Nine of ten rows are short, the others too long for any model here."""
    rows = [{"prompt": "I walk ", "completion": f"home {n}"} for n in range(180)]
    rows += [{"text": f"they walked {n} times " * 60} for n in range(6)]
    made = vd.distill(**options(tmp_path / "out", text=rows, max_length=None, quiet=False, steps=1))
    assert made.metrics["max_length"] == [32, 32]
    assert "Read are 32 teacher and 32 student tokens of a row, 9" in " ".join(capsys.readouterr().out.split())
    made = vd.distill(**options(tmp_path / "more", text=rows[180:] * 8 + rows, max_length=None, steps=1))
    assert made.metrics["max_length"] == [96, 96]  # positions
    made = vd.distill(**options(tmp_path / "said", text=rows, max_length=None, student_max_length=40, steps=1))
    assert made.metrics["max_length"] == [32, 40]


def test_rows_in_which_nothing_is_learned(tmp_path):
    rows = [{"prompt": f"I walk home {n}", "completion": ""} for n in range(80)]
    with pytest.raises(VocabdistilError, match="^text: expected held-out rows in which something is learned, got none"):
        vd.distill(**options(tmp_path / "out", text=rows))
    assert not (tmp_path / "out.partial").exists()


def test_bits_are_of_what_is_learned(tmp_path):
    """Worked out from all logits of a row, whose prompt and template count nothing."""
    folder = tiny_decoder("llama-3")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = CHATS[:3]
    found = _bits_of_learned(model, tokenizer, rows, 96, torch.device("cpu"), "student")
    bits = size = 0
    for row in rows:
        ids = torch.tensor([tokenizer.apply_chat_template(row["messages"], return_dict=False)])
        said = row["messages"][1]["content"]
        wanted = len(tokenizer(said, add_special_tokens=False)["input_ids"]) + 1  # and what ends it
        log_p = model(input_ids=ids).logits[0].log_softmax(-1)
        bits -= sum(float(log_p[k - 1, ids[0, k]]) for k in range(ids.shape[1] - wanted, ids.shape[1])) / math.log(2)
        size += len(said.encode())
    assert found == pytest.approx(bits / size, rel=1e-5)


def test_on_the_command_line(tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text("\n".join(LINES), encoding="utf-8")
    sides = ["--teacher", str(tiny_decoder("llama-3")), "--student", str(tiny_decoder("gpt2"))]
    rest = ["--text", str(file), "--out", str(tmp_path / "out"), "--steps", "2", "--weights", "likelihood=50"]
    rest += ["--held-out", "0.2"]
    assert main(["distill", *sides, *rest, "--batch-size", "4", "--max-length", "48"]) == 0
    said = capsys.readouterr().out
    lines = "Held-out bits per byte (", "step 0: ", "Training: 2 steps of 4 texts", "The student is in"
    for words in ("in both", *lines):
        assert words in said
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["weights"] == {"lm": 1.0, "likelihood": 50.0, "matched": 1.0, "remapped": 0.0, "gold": 0.0}
    assert main(["distill", *sides, *rest, "--quiet", "--overwrite", "--batch-size", "4"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"student": None}, "^student: expected the folder of a decoder, as the teacher is a decoder"),
        ({"student": lambda: tiny_teacher("bert")}, "^student: expected a decoder, as the other side is one"),
        (ENCODER | {"recipe": "likelihood"}, r"^recipe: expected one of an encoder \(bert\)"),
        (ENCODER | {"weights": "lm=1"}, r"^weights: expected those of an encoder \(bert\)"),
        ({"recipe": "embedding"}, "^recipe: expected next-token or likelihood"),
        ({"weights": "kl=1"}, "^weights: expected lm, likelihood, matched, remapped, gold"),
        ({"whiten": 0.3}, "^whiten: expected none for a decoder"),
        ({"prompt": "q: "}, "^prompt: expected none for a decoder"),
        ({"student": lambda: tiny_decoder("gemma2")}, "^student: expected a model whose logits are those"),
        ({"text": [{"words": "x"}] * 20}, "^text: expected strings, or rows"),
        ({"text": CHATS, "student": lambda: tiny_decoder("gpt2")}, "^text: student: expected a tokenizer with a chat"),
    ],
)
def test_bad_input(tmp_path, changes, said):
    changes = {name: value() if callable(value) else value for name, value in changes.items()}
    with pytest.raises(VocabdistilError, match=said):
        vd.distill(**options(tmp_path / "out", **changes))
    assert not list(tmp_path.iterdir())
