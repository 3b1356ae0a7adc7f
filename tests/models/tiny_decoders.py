"""Tiny random decoders of every architecture, each with a tokenizer of the kind that it comes with."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from tests._families import LLAMA3, QWEN2, byte_level, plain_text, sentencepiece_bpe, unigram
from tests.models.tiny_teachers import gemma_bpe

POSITIONS = 96
SHAPE = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "intermediate_size": 32, "max_position_embeddings": POSITIONS,
}  # fmt: skip
PLAIN = {name: value for name, value in SHAPE.items() if name not in ("head_dim", "num_key_value_heads")}
GPT2 = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": POSITIONS}

LLAMA3_CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools\n\nYou may call functions.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else ' ' + m['content'] + eos_token }}{% endfor %}"
)


def _wrapped(tokenizer: Tokenizer, chat: str | None = None, **roles: str) -> PreTrainedTokenizerFast:
    names = {f"{role}_token": token for role, token in roles.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=POSITIONS, chat_template=chat, **names
    )


def _ending(tokenizer: Tokenizer, *tokens: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    return tokenizer


def llama3_bytes() -> PreTrainedTokenizerFast:
    """Words that are tokens are read whole, whatever the merges; special tokens at the end."""
    state = json.loads(byte_level(460, split=LLAMA3).to_str())
    state["model"]["ignore_merges"] = True
    vocab = state["model"]["vocab"]
    vocab["Ġharbour"] = len(vocab)  # which no merges lead to
    specials = ["<|begin|>", "<|end_of_text|>", "<|start|>", "<|end|>", "<|eot|>", "<|reserved|>"]
    state["added_tokens"] = []
    tokenizer = _ending(Tokenizer.from_str(json.dumps(state)), *specials)
    first = ("<|begin|>", tokenizer.token_to_id("<|begin|>"))
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[first]),
        ]
    )
    return _wrapped(tokenizer, LLAMA3_CHAT, bos="<|begin|>", eos="<|eot|>")


def qwen_bytes() -> PreTrainedTokenizerFast:
    """Without a token to begin with."""
    tokenizer = _ending(byte_level(480, split=QWEN2), "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    return _wrapped(tokenizer, CHATML, eos="<|im_end|>", pad="<|endoftext|>")


def gpt2_bytes() -> PreTrainedTokenizerFast:
    tokenizer = _ending(byte_level(480), "<|endoftext|>")
    return _wrapped(tokenizer, **dict.fromkeys(("bos", "eos", "unk"), "<|endoftext|>"))


def llama2_bpe() -> PreTrainedTokenizerFast:
    return _wrapped(sentencepiece_bpe(600, prepend=True), INST, bos="<s>", eos="</s>", unk="<unk>")


def gemma() -> PreTrainedTokenizerFast:
    tokenizer = gemma_bpe()
    tokenizer.backend_tokenizer.add_special_tokens(["<start_of_turn>", "<end_of_turn>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    chat = CHATML.replace("<|im_start|>", "<start_of_turn>").replace("<|im_end|>", "<end_of_turn>")
    roles = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "unk": "<unk>"}
    return _wrapped(tokenizer.backend_tokenizer, "{{ bos_token }}" + chat, **roles)


def mistral_unigram() -> PreTrainedTokenizerFast:
    tokenizer = unigram(420, fallback=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return _wrapped(tokenizer, INST, bos="<s>", eos="</s>", pad="<pad>", unk="<unk>")


class Decoder(NamedTuple):
    """An architecture: its tokenizer, its name in transformers, what its configuration says besides the usual, and the
    rows of its embeddings that stand for no token."""

    tokenizer: Callable[[], PreTrainedTokenizerFast]
    name: str
    options: dict[str, Any] = {}
    shape: dict[str, Any] = SHAPE
    padded: int = 0


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
_ALTERNATE = ["sliding_attention", "full_attention", "sliding_attention"]

DECODERS = {
    "llama-3": Decoder(llama3_bytes, "Llama", UNTIED, padded=7),
    "llama-3-tied": Decoder(llama3_bytes, "Llama", TIED),
    "llama-2": Decoder(llama2_bpe, "Llama", {**UNTIED, "attention_bias": True}),
    "qwen2": Decoder(qwen_bytes, "Qwen2", TIED, padded=9),
    "qwen3": Decoder(qwen_bytes, "Qwen3", UNTIED),
    "gemma": Decoder(gemma, "Gemma", TIED),
    "gemma2": Decoder(gemma, "Gemma2", {**TIED, "sliding_window": 8, "final_logit_softcapping": 3.0}),
    "gemma3": Decoder(gemma, "Gemma3Text", {**TIED, "sliding_window": 8, "layer_types": _ALTERNATE}, padded=5),
    "gpt2": Decoder(gpt2_bytes, "GPT2", TIED, GPT2),
    "gpt2-untied": Decoder(gpt2_bytes, "GPT2", UNTIED, GPT2),
    "mistral": Decoder(mistral_unigram, "Mistral", {**UNTIED, "sliding_window": 8}),
    "phi": Decoder(gpt2_bytes, "Phi", UNTIED, padded=3),
    "phi3": Decoder(llama2_bpe, "Phi3", UNTIED),
    "smollm3": Decoder(qwen_bytes, "SmolLM3", TIED),
    "olmo2": Decoder(gpt2_bytes, "Olmo2", UNTIED),
    "gpt_neox": Decoder(gpt2_bytes, "GPTNeoX", UNTIED, PLAIN),
}
_CLASSES = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}
WITH_CHAT = [name for name, kind in DECODERS.items() if kind.tokenizer is not gpt2_bytes]


@functools.cache
def _root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="tiny-decoders-")


@functools.cache
def tiny_decoder(name: str, dtype: torch.dtype = torch.float32) -> Path:
    """The folder of a decoder, made once per process. No weight or bias is a constant: what is forgotten in a copy
    shows. It stops at two tokens, the second an ordinary one."""
    kind = DECODERS[name]
    if not hasattr(transformers, f"{kind.name}Config"):
        pytest.skip(f"this version of transformers has no {kind.name}")
    tokenizer = kind.tokenizer()
    ends = [tokenizer.eos_token_id, rare_token(tokenizer)]
    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends}
    options = {**kind.shape, **kind.options, **ids, "vocab_size": len(tokenizer) + kind.padded}
    config = getattr(transformers, f"{kind.name}Config")(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name))
        model = getattr(transformers, _CLASSES.get(kind.name, f"{kind.name}ForCausalLM"))(config)
        for parameter in model.parameters():
            centre = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
            torch.nn.init.normal_(parameter, centre, 0.25)
    path = Path(_root().name) / f"{name}-{dtype}"
    model.generation_config.eos_token_id = ends
    model.to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def rare_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """The last ordinary token of several characters."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    vocab = tokenizer.get_vocab().items()
    return max(i for token, i in vocab if i not in special and len(token) > 1 and not token.startswith("<0x"))


def lines() -> list[str]:
    """Few different words, so that small vocabularies hold all of them."""
    return plain_text()[:6]
