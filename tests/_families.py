"""Tokenizers of every family, trained on a little text in many scripts."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator

import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests._wordpiece import small_text, train

BYTES = [f"<0x{b:02X}>" for b in range(256)]
SCRIPTS = [
    "Я шёл домой, и снег шёл тоже.",
    "Ǎ café, naïve œuvre: «déjà vu» — 42 %",
    "東京は日本の首都です。我们在这里。",
    "السلام عليكم يا صديقي",
    "สวัสดีชาวโลก ภาษาไทย",
    "नमस्ते दुनिया",
    "한국어 문장입니다",
    "👩‍👩‍👧 😀 🎉 family",
    "def f(x):\n\treturn  x + 1",
]

# How they cut texts into words before the byte-level alphabet.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MISTRAL = GPT4O.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace("{1,3}", "")


_lines: list[str] | None = None


@contextlib.contextmanager
def trained_on(lines: list[str]) -> Iterator[None]:
    """Whatever is trained meanwhile is trained on these lines instead of on made-up text."""
    global _lines
    _lines = lines
    try:
        yield
    finally:
        _lines = None


def plain_text() -> list[str]:
    return small_text(150) if _lines is None else _lines


def many_scripts() -> list[str]:
    return plain_text() + SCRIPTS * 4


def byte_level(size: int = 500, **options: object) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = options.get("normalizer")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(options.get("prefix")))
    if pattern := options.get("split"):
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>", "<pad>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(many_scripts(), trainer)
    if options.get("roberta"):
        tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
        tokenizer.add_tokens([AddedToken("walking home", single_word=True), AddedToken("été", rstrip=True)])
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=True)
    return tokenizer


def sentencepiece_bpe(size: int = 700, fallback: bool = True, prepend: bool = False) -> Tokenizer:
    """With ``prepend`` as Llama 2: no pre-tokenizer, spaces replaced and one put first by the normalizer."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=fallback, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, limit_alphabet=80, show_progress=False
    )
    tokenizer.train_from_iterator(many_scripts(), trainer)
    if fallback:  # bytes as plain tokens of the model, as the converted tokenizers have them
        state = json.loads(tokenizer.to_str())
        vocab = state["model"]["vocab"]
        vocab.update({token: len(vocab) + n for n, token in enumerate(BYTES)})
        tokenizer = Tokenizer.from_str(json.dumps(state))
    if prepend:
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def unigram(size: int = 500, fallback: bool = False, nfkc: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    if nfkc:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(plain_text() + SCRIPTS[:3] * 4 if fallback else many_scripts(), trainer)
    if fallback:
        state = json.loads(tokenizer.to_str())
        state["model"]["byte_fallback"] = True
        state["model"]["vocab"] += [[token, -20.0] for token in BYTES]
        tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


FAMILIES = {
    "wordpiece": lambda size=600: train(many_scripts(), size),
    "wordpiece uncased": lambda size=500: train(many_scripts(), size, lowercase=True),
    "byte-level": byte_level,
    "byte-level small": lambda size=300: byte_level(size),
    "byte-level NFC": lambda size=450: byte_level(size, normalizer=normalizers.NFC()),
    "byte-level lower": lambda size=420: byte_level(
        size, normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])
    ),
    "byte-level split": lambda size=400: byte_level(size, split=LLAMA3),
    "roberta": lambda size=480: byte_level(size, prefix=True, roberta=True),
    "llama": lambda size=700: sentencepiece_bpe(size, prepend=True),
    "sentencepiece BPE": lambda size=500: sentencepiece_bpe(size, fallback=False),
    "unigram": unigram,
    "unigram NFKC": lambda size=450: unigram(size, nfkc=True),
    "unigram bytes": lambda size=400: unigram(size, fallback=True),
}


@functools.cache
def family(name: str) -> tokenizers.Tokenizer:
    return FAMILIES[name]()
