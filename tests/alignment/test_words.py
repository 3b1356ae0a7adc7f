"""Words of byte-level tokenizers, which the native code cuts, against those that the tokenizers report."""

from __future__ import annotations

import functools
import itertools
import json
import os
from importlib import import_module
from pathlib import Path

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, NormalizedString, Regex, Tokenizer, models, normalizers, pre_tokenizers

import vocabdistil as vd
from tests._families import GPT4O, LLAMA3, MISTRAL, QWEN2, QWEN35, byte_level, family
from tests.alignment.test_boundary import HARD
from vocabdistil.alignment.families import read_tokenizer
from vocabdistil.alignment.surfaces import ALONE, SPELLS, UNTOLD, Known
from vocabdistil.alignment.words import PATTERNS, char_classes
from vocabdistil.core import native

module = import_module("vocabdistil.alignment.methods")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTIONS = "'s 'S 't 'T 'm 'd 're 'RE 'rE 've 'Ve 'll 'lL 'l 'r ’s 'ſ 'ſs 'K ''s x's 's's '\u0301s 'é".split()
# Of every class, of one to four bytes each, and on both sides of what is asked for.
CHARS = [
    *"aZsſKİßéЯяabǅʰªⅧ½١9८०語ა한ก_/.-—…'’\"!$¤№😀☃", *" \t\n\r\v\f\x85\xa0\u1680\u2003\u2028\u3000", "\x00", "\x1f",
    "\xad", "\u0301", "\u0903", "\u20e3", "\u200d", "\ufe0f", "\ufeff", "\u0378", "\ue000", "\ufffd", "\uffff",
    "\U00010428", "\U0001d7d8", "\U00020000", "\U00033fff", "\U00034000", "\U000e0067", "\U0010ffff",
]  # fmt: skip
pieces = st.sampled_from([*CHARS, *CONTRACTIONS, "  ", " \n", "\r\n", "123", "١٢٣٤", "walk", " Home", "ЧТО", "iPhone"])
texts = st.one_of(
    st.lists(pieces, max_size=20).map("".join),
    st.text(max_size=30),
    st.text(st.characters(max_codepoint=0x33FFF, exclude_categories=["Cs"]), max_size=30),
)
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=map(str, PATTERNS.values()))


def cut(pattern: str, text: str) -> list[int]:
    """Where the words of a text end, in bytes, by the library."""
    words = NormalizedString(text).split(Regex(pattern), "isolated") if text else []
    return list(itertools.accumulate(len(word.normalized.encode()) for word in words))


@functools.cache
def matcher(pattern: str):
    return native.module().WordPattern(*PATTERNS[pattern], char_classes())


def test_patterns_are_those_of_the_tokenizers() -> None:
    assert PATTERNS.keys() - {LLAMA3, QWEN2, QWEN35, GPT4O, MISTRAL} == {GPT2}
    assert PATTERNS.keys() > {LLAMA3, QWEN2, QWEN35, GPT4O, MISTRAL}


@each_pattern
@settings(max_examples=500, deadline=None)
@given(texts)
def test_any_text_is_cut_as_by_the_regular_expression(pattern: str, text: str) -> None:
    got = matcher(pattern).cut(text)
    if any(ord(c) >= len(char_classes()) for c in text):
        assert got is None
    else:
        assert got == cut(pattern, text)


@each_pattern
def test_every_character_is_cut_as_by_the_regular_expression(pattern: str) -> None:
    for first in range(0, len(char_classes()), 0x800):
        if first == 0xD800:
            continue  # surrogates
        block = "".join(f"a{c}{c} {c}A1'{c}e " for c in map(chr, range(first, first + 0x800)))
        assert matcher(pattern).cut(block) == cut(pattern, block)


@each_pattern
def test_long_runs_take_linear_time(pattern: str) -> None:
    # Quadratic steps over a million characters would not end.
    for run in ("A", "a", "Aa", "語", "語A", "\u0301", "\u0301A", " ", " \n", "\n ", "1", "/", "!\n", "'", "'s"):
        ends = matcher(pattern).cut(run * 1_000_000)
        assert ends[-1] == len(run.encode()) * 1_000_000


def _gpt2() -> Tokenizer:
    tokenizer = byte_level(600)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    # One that merges make too.
    piece = next(piece for piece in ("ing", "er", "st", "ed") if tokenizer.token_to_id(piece) is not None)
    tokenizer.add_tokens([piece, AddedToken("walk", single_word=True), AddedToken("été", rstrip=True), "\n\n", "'s"])
    return tokenizer


def _llama3() -> Tokenizer:
    tokenizer = byte_level(600, split=LLAMA3)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|eot|>"])
    return tokenizer


def _qwen2() -> Tokenizer:
    tokenizer = byte_level(600, split=QWEN2, normalizer=normalizers.NFC())
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("Ünder", normalized=True)])
    return tokenizer


def _lower() -> Tokenizer:
    tokenizer = byte_level(
        500, split=LLAMA3, normalizer=normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()])
    )
    tokenizer.add_tokens([AddedToken("Home", normalized=True)])
    return tokenizer


def _transformers() -> transformers.PreTrainedTokenizerFast:
    """As GPT-2's: the unknown token is there for texts to be set apart by, and a piece of the model."""
    end = "<|endoftext|>"
    tokenizer = byte_level(600)
    state = json.loads(tokenizer.to_str())
    state["model"]["vocab"][end] = len(state["model"]["vocab"])
    tokenizer = Tokenizer.from_str(json.dumps(state))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=end, bos_token=end, eos_token=end)


TOKENIZERS = {
    "GPT-2": functools.cache(_gpt2),
    "Llama 3": functools.cache(_llama3),
    "Qwen 2": functools.cache(_qwen2),
    "Qwen 3.5": functools.cache(functools.partial(byte_level, 600, split=QWEN35, normalizer=normalizers.NFC())),
    "GPT-4o": functools.cache(functools.partial(byte_level, 600, split=GPT4O)),
    "Mistral": functools.cache(functools.partial(byte_level, 600, split=MISTRAL)),
    "lower case": functools.cache(_lower),
    "transformers": functools.cache(_transformers),
    "roberta": functools.partial(family, "roberta"),
    "bytes": functools.partial(family, "byte-level small"),
}
names = st.sampled_from(sorted(TOKENIZERS))
ADDED = [
    "<|endoftext|>", "<|eot|>", "<|im_end|>", "<mask>", " <mask>", "<s>", "</s>", "walk", "ing", "été ", "\n\n",
    "U\u0308nder",
]  # fmt: skip
added_texts = st.lists(pieces | st.sampled_from(ADDED), max_size=16).map("".join) | texts


@functools.cache
def both_ways(name: str) -> tuple[Known, Known]:
    """The tokenizer, and the same with its words asked for."""
    told, asked = (Known(read_tokenizer(TOKENIZERS[name](), "teacher")) for _ in range(2))
    asked.__dict__["word_places"] = b""
    return told, asked


def words_of(source: Known, lines: list[str], max_length: int | None = None) -> list[tuple]:
    side, _ = module.locate(lines, source, "teacher", max_length, True)
    return [side.row(b) for b in range(len(lines))]


@settings(max_examples=600, deadline=None)
@given(st.lists(added_texts, min_size=1, max_size=4), names, st.none() | st.integers(3, 9))
def test_words_are_those_of_the_tokenizer(lines: list[str], name: str, max_length: int | None) -> None:
    told, asked = both_ways(name)
    assert SPELLS in told.word_places
    told.needs_offsets = asked.needs_offsets = False
    assert words_of(told, lines, max_length) == words_of(asked, lines, max_length)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_words_of_hard_texts(name: str) -> None:
    told, asked = both_ways(name)
    lines = HARD + [f"It{c} {c}\n{c}  12345 {c}" for c in CONTRACTIONS]
    assert words_of(told, lines) == words_of(asked, lines)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("file", ["shakespeare_en.txt", "war_and_peace_ru.txt"])
def test_words_of_real_text(name: str, file: str) -> None:
    path = Path(os.environ.get("VOCABDISTIL_DATA", ""), file)
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    text = path.read_text(encoding="utf-8")[:400_000]
    lines = [text[at : at + 1000] for at in range(0, len(text), 1000)]  # with what stands between lines
    told, asked = both_ways(name)
    told.needs_offsets = False
    assert words_of(told, lines) == words_of(asked, lines)


@pytest.mark.parametrize("name", ["GPT-2", "Llama 3", "Qwen 2", "Qwen 3.5", "GPT-4o", "Mistral", "roberta", "bytes"])
def test_plain_text_is_encoded_once_without_offsets(name: str) -> None:
    told, _ = both_ways(name)
    told.needs_offsets = False
    backend = TOKENIZERS[name]()
    lines = ["It's  quiet here:\n\tdéjà-vu 東京 12345 homes", "снег <|eot|> 😀"] * 8
    side = module.new_side(told, len(lines), (0, 0), places=told.word_places)
    encodings = backend.encode_batch_fast(lines, add_special_tokens=False)
    assert side.read(lines, range(len(lines)), encodings, False, True, False, 1) == []


def test_words_are_the_same_for_any_number_of_threads(monkeypatch) -> None:
    told, asked = both_ways("Llama 3")
    want = words_of(asked, HARD * 3)
    for threads in (1, 4):
        monkeypatch.setattr(module, "thread_count", lambda size, threads=threads: threads)
        assert words_of(told, HARD * 3) == want


def test_added_tokens_in_words() -> None:
    told, _ = both_ways("GPT-2")
    piece = next(token for token in ("ing", "er", "st", "ed") if token in told.info.added)
    backend = told.info.backend
    # It stands for text of its own or for a part of a word: the tokenizer has to say which.
    assert told.word_places[backend.token_to_id(piece)] == UNTOLD
    # Pieces by name, but no merges make them.
    assert {told.word_places[backend.token_to_id(token)] for token in ("<s>", "<mask>", "été")} == {ALONE}


def _changed(**parts: object) -> Tokenizer:
    tokenizer = Tokenizer.from_str(family("byte-level").to_str())
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def _sequence(split: pre_tokenizers.PreTokenizer, **options: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | options)])


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pre_tokenizers.ByteLevel(use_regex=False),
        _sequence(pre_tokenizers.Split(Regex(LLAMA3), "isolated"), use_regex=True),
        _sequence(pre_tokenizers.Split(Regex(LLAMA3), "isolated"), use_regex=False, add_prefix_space=True),
        _sequence(pre_tokenizers.Split(Regex(LLAMA3), "removed", invert=True), use_regex=False),
        _sequence(pre_tokenizers.Split(Regex(LLAMA3 + "|x"), "isolated"), use_regex=False),
        _sequence(pre_tokenizers.Split(LLAMA3, "isolated"), use_regex=False),
        _sequence(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
        pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
    ],
)
def test_other_pre_tokenizers_are_asked(pre_tokenizer) -> None:
    tokenizer = _changed(pre_tokenizer=pre_tokenizer)
    assert not Known(read_tokenizer(tokenizer, "teacher")).word_places
    line = "It's  a 12345\n\nx's"
    assert vd.align([line], tokenizer, family("byte-level"), "word").coverage.covered_bytes


def test_a_vocabulary_without_all_bytes_is_asked() -> None:
    # What it drops is not there for the words to be told by.
    tokenizer = Tokenizer(models.BPE({"a": 0, "Ġ": 1, "b": 2}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert Known(read_tokenizer(tokenizer, "teacher")).word_pattern is None
