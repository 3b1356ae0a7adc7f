"""Draft heads: which tokens they predict, and the maps as speculative decoders read them."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import vocabdistil as vd
from tests._families import plain_text
from tests.models.tiny_decoders import DECODERS, rare_token, tiny_decoder
from tests.models.tiny_teachers import tiny_teacher
from vocabdistil.cli import main
from vocabdistil.core.errors import VocabdistilError
from vocabdistil.models.draft_vocabulary import draft_ids, draft_maps

TEXTS = plain_text()[:60]


def test_maps_by_hand():
    d2t, t2d = draft_maps(torch.tensor([0, 3, 4, 7]), 9)
    assert d2t.tolist() == [0, 2, 2, 4] and d2t.dtype == torch.int64
    assert t2d.tolist() == [True, False, False, True, True, False, False, True, False]


def test_special_tokens_come_first_then_the_most_frequent():
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder("qwen2"))
    counts = torch.zeros(len(tokenizer), dtype=torch.int64)
    counts[[100, 200, 300]] = torch.tensor([5, 9, 5])
    always = {i for i, token in tokenizer.added_tokens_decoder.items()} | {50}
    assert draft_ids(tokenizer, counts, len(always) + 2, [50]).tolist() == sorted(always | {100, 200})
    whole = draft_ids(tokenizer, counts, 10_000)
    assert whole.tolist() == list(range(len(tokenizer)))
    with pytest.raises(VocabdistilError, match=f"vocab_size: expected at least the {len(always)} special tokens"):
        draft_ids(tokenizer, counts, len(always) - 1, [50])


@pytest.mark.parametrize("name", ["llama-3", "gemma2", "gpt2", "mistral"])
def test_the_rows_are_the_target_s(name, tmp_path):
    target = tiny_decoder(name)
    made = vd.trim(teacher=target, text=TEXTS, out=tmp_path / "head", vocab_size=220, draft=True, quiet=True)
    files = {"model.safetensors", "config.json", "metrics.json", "README.md"}
    assert {path.name for path in made.path.iterdir()} == files == set(made.metrics["files"])
    tensors, model = load_file(made.path / "model.safetensors"), AutoModelForCausalLM.from_pretrained(target)
    tokenizer, weight = AutoTokenizer.from_pretrained(target), model.get_output_embeddings().weight
    assert tensors.keys() == {"lm_head.weight", "d2t", "t2d"}
    assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].dtype == torch.bool
    ids = torch.arange(220) + tensors["d2t"]
    assert torch.equal(tensors["lm_head.weight"], weight[ids])
    assert tensors["t2d"].shape == (len(weight),) and torch.equal(tensors["t2d"].nonzero()[:, 0], ids)
    ends = {*model.generation_config.eos_token_id, rare_token(tokenizer)}
    assert ends | set(tokenizer.added_tokens_decoder) <= set(ids.tolist())
    config = json.loads((made.path / "config.json").read_text())
    assert (config["draft_vocab_size"], config["vocab_size"], config["hidden_size"]) == (220, *weight.shape)
    assert len(weight) == len(tokenizer) + DECODERS[name].padded


def test_what_is_covered_is_that_of_text_that_was_not_counted(tmp_path):
    seen, other = ["the cat sat on the mat"] * 30, "Ünïcödé žluťoučký kůň 漢字"
    # Which of both is held out, the seed says.
    for seed in range(4):
        options = {"vocab_size": 30, "draft": True, "quiet": True, "seed": seed}
        made = vd.trim(teacher=tiny_decoder("gpt2"), text=[*seen, other], out=tmp_path / str(seed), **options)
        assert made.metrics["held_out_texts"] == 1
        tokenizer = AutoTokenizer.from_pretrained(tiny_decoder("gpt2"))
        tensors = load_file(made.path / "model.safetensors")
        ids = set((torch.arange(30) + tensors["d2t"]).tolist())
        shares = []
        for text in (seen[0], other):
            tokens = Counter(tokenizer(text)["input_ids"])
            shares.append(sum(n for i, n in tokens.items() if i in ids) / tokens.total())
        assert made.metrics["draft"]["covered"] in [pytest.approx(share, abs=1e-5) for share in shares]
        assert made.metrics["draft"]["covered"] == pytest.approx(min(shares), abs=1e-5)


def test_the_command_says_what_is_covered(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS), encoding="utf-8")
    options = ["--teacher", str(tiny_decoder("llama-2")), "--text", str(text), "--vocab-size", "200", "--draft"]
    assert main(["trim", *options, "--out", str(tmp_path / "head")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    size = len(AutoTokenizer.from_pretrained(tiny_decoder("llama-2")))
    assert f"predicts 200 of {size} tokens" in told and "of the tokens of 6 held-out texts" in told
    card = (tmp_path / "head" / "README.md").read_text()
    assert "--draft" in card and "d2t" in card


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        ("bert", {}, "draft: expected a decoder to make a draft head of, got bert"),
        ("gpt2", {"vocab_size": 1}, "vocab_size: expected at least the "),
        ("gpt2", {"text": ["one text"] * 3}, "text: expected at least 2 different texts"),
        ("gpt2", {"layers": 1}, "layers: expected none for a decoder"),
        ("phi", {}, "draft: expected a decoder whose output layer has no bias, got phi"),
    ],
)
def test_bad_input(teacher, options, message, tmp_path):
    folder = tiny_decoder(teacher) if teacher in DECODERS else tiny_teacher(teacher)
    with pytest.raises(VocabdistilError, match=message):
        vd.trim(**{"teacher": folder, "text": TEXTS, "out": tmp_path / "head", "draft": True, "quiet": True} | options)
    assert list(tmp_path.iterdir()) == []
