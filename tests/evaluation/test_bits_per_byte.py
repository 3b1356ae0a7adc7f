"""Bits per byte of causal models: by hand, by the formula, and across vocabularies."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tests._families import byte_level, many_scripts
from vocabdistil.evaluation import bits_per_byte as module
from vocabdistil.evaluation.bits_per_byte import bits_per_byte

TEXTS = ["Я шёл домой, и снег шёл тоже.", "naïve œuvre", "a", "", *many_scripts()[:6]]


def bytes_alone() -> PreTrainedTokenizerFast:
    """A token for every byte, and one to begin with."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def subwords(**roles: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(400), **({"bos_token": "<s>"} | roles))


class Uniform(nn.Module):
    """Every token is as probable, whatever comes before."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.weight = size, nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.weight.expand(*input_ids.shape, self.size))


@pytest.fixture(scope="module")
def gpt() -> GPT2LMHeadModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=400, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
        return GPT2LMHeadModel(config).double().eval()


def by_the_formula(model, tokenizer, texts, length) -> float:
    """One token at a time, each after what its window has of the text before it."""
    bits = 0.0
    for text in texts:
        row = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        begin, end = 0, length
        for i in range(1, len(row)):
            if i == end:
                begin = end - length // 2
                end = begin + length
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row[begin:i]])).logits[0, -1]
            bits -= float(logits.log_softmax(-1)[row[i]]) / math.log(2)
    return bits / sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("tokenizer", [bytes_alone(), subwords()], ids=["bytes", "subwords"])
def test_a_model_that_knows_nothing_pays_the_same_for_each_token(tokenizer):
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS)
    found = bits_per_byte(Uniform(512), tokenizer, TEXTS, max_length=16)
    assert found == pytest.approx(9 * tokens / sum(len(text.encode()) for text in TEXTS))
    if len(tokenizer) == 257:
        assert found == pytest.approx(9)


@pytest.mark.parametrize("length", [2, 3, 8, 64])
@pytest.mark.parametrize("batch", [1, 5])
def test_every_token_is_predicted_once_after_its_window(gpt, length, batch):
    tokenizer = subwords()
    found = bits_per_byte(gpt, tokenizer, TEXTS, length, batch)
    assert found == pytest.approx(by_the_formula(gpt, tokenizer, TEXTS, length), rel=1e-9)


def test_no_more_positions_are_read_than_the_model_has(gpt):
    text = [" ".join(many_scripts()[:20])]
    assert bits_per_byte(gpt, subwords(), text, 4096) == pytest.approx(bits_per_byte(gpt, subwords(), text, 64))


def test_fewer_at_once_where_logits_are_many(gpt, monkeypatch):
    whole, widths = bits_per_byte(gpt, subwords(), TEXTS, batch=5), []
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 2 * 64 * 400)
    hook = gpt.register_forward_pre_hook(lambda _, __, given: widths.append(len(given["input_ids"])), with_kwargs=True)
    assert bits_per_byte(gpt, subwords(), TEXTS, batch=5) == pytest.approx(whole, rel=1e-12)
    hook.remove()
    assert max(widths) == 2


def test_the_text_begins_after_eos_where_there_is_no_bos(gpt):
    with_eos = PreTrainedTokenizerFast(tokenizer_object=renamed(), eos_token="[B]")
    assert bits_per_byte(gpt, with_eos, TEXTS) == pytest.approx(bits_per_byte(gpt, subwords(), TEXTS))
    with pytest.raises(ValueError, match="tokenizer: expected a bos_token or an eos_token"):
        bits_per_byte(gpt, PreTrainedTokenizerFast(tokenizer_object=renamed()), TEXTS)


def renamed() -> Tokenizer:
    """The same with a first token whose name says nothing of its role."""
    return Tokenizer.from_str(byte_level(400).to_str().replace('"<s>"', '"[B]"').replace('"</s>"', '"[E]"'))


def test_the_mode_is_given_back(gpt):
    gpt.train()
    assert bits_per_byte(gpt, subwords(), TEXTS) == bits_per_byte(gpt.eval(), subwords(), TEXTS)
    gpt.train()
    bits_per_byte(gpt, subwords(), TEXTS)
    assert gpt.training
    gpt.eval()


def test_bad_input(gpt):
    for texts in ([], [""]):
        with pytest.raises(ValueError, match="texts: expected at least one byte"):
            bits_per_byte(gpt, subwords(), texts)
    with pytest.raises(ValueError, match="max_length: expected at least 2"):
        bits_per_byte(gpt, subwords(), TEXTS, 1)
    with pytest.raises(TypeError, match="tokenizer: expected a fast tokenizer"):
        bits_per_byte(gpt, "gpt2", TEXTS)
