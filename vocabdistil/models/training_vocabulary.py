"""New tokens for a text, in the teacher's own family of tokenizers or in another one."""

from __future__ import annotations

import io
import json
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ..alignment.families import backend_of
from ..core.errors import need
from ..core.options import FAMILIES, listed
from .counting import frequent_characters
from .rebuilding import Vocabulary, contains_step, rebuild, special_strings, tokenizer_state
from .trimming_vocabulary import trim_vocabulary

__all__ = ["family_of", "train_vocabulary", "train_wordpiece"]

_MARK = "▁"
_BYTE_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
# A private character: no text has it, so it parts the copies of a word that a trainer counts.
_PART = "\U0010fffd"
_MOST_WORDS, _MOST_DISTINCT = 20_000_000, 2_000_000
# What the tokens of a Unigram model are chosen from: parts of so many words, so long, so many (the last two as in
# SentencePiece).
_SEED_WORDS, _LONGEST, _MOST_SEEDS = 200_000, 16, 1_000_000
_MARKED = re.compile(f"{_MARK}?[^{_MARK}]+|{_MARK}")
# The share of a grown vocabulary that is new, one of so many; how much likelier a token is than its parts together;
# private characters that stand for the teacher's tokens while it grows.
_NEW_SHARE, _JOINED = 16, 0.01
_FIRST_SYMBOL, _MOST_SYMBOLS = 0xF0000, 0xFFFE
# What would break a line of words and counts.
_UNSAFE = re.compile(r"[\0\t\r\n ]")
_SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True, "id": 0}


def family_of(state: dict[str, Any]) -> str | None:
    """The family of a tokenizer's state: one of :data:`FAMILIES`; ``None`` for another kind of model."""
    kind = state["model"]["type"]
    if kind == "BPE":
        return "byte-bpe" if contains_step([state["normalizer"], state["pre_tokenizer"]], "ByteLevel") else "bpe"
    return {"WordPiece": "wordpiece", "Unigram": "unigram"}.get(kind)


# How a family that is not the teacher's cuts texts into words and puts them together again.
_METASPACE = {"type": "Metaspace", "replacement": _MARK, "prepend_scheme": "always", "split": True}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_WORDS = {
    "wordpiece": ({"type": "BertPreTokenizer"}, {"type": "WordPiece", "prefix": "##", "cleanup": True}),
    "byte-bpe": (_BYTE_LEVEL, _BYTE_LEVEL),
    "bpe": (_METASPACE, _METASPACE),
    "unigram": (_METASPACE, _METASPACE),
}
_MODELS: dict[str, dict[str, Any]] = {
    "wordpiece": {"type": "WordPiece", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
    "byte-bpe": {"type": "BPE"},
    "bpe": {"type": "BPE", "fuse_unk": True},
    "unigram": {"type": "Unigram", "byte_fallback": False},
}


def _without_marks(normalizer: dict[str, Any] | None) -> dict[str, Any] | None:
    """The normalizer without the steps that spell words as another family does: spaces as marks, bytes."""
    if normalizer is None:
        return None
    if normalizer["type"] == "Sequence":
        parts = [part for part in map(_without_marks, normalizer["normalizers"]) if part is not None]
        return normalizer | {"normalizers": parts} if parts else None
    spells = normalizer["type"] in ("Prepend", "ByteLevel") or normalizer.get("content") == _MARK
    return None if spells else normalizer


def _in_family(state: dict[str, Any], family: str) -> dict[str, Any]:
    """The state with the rules of a family; those of the teacher's own stay."""
    if family != family_of(state):
        pre_tokenizer, decoder = _WORDS[family]
        return state | {
            "normalizer": _without_marks(state["normalizer"]),
            "pre_tokenizer": pre_tokenizer,
            "decoder": decoder,
            "model": _MODELS[family],
        }
    if family == "wordpiece" and len(_words(_word_maker(state), "a.b")) == 1:
        # Else every word would be learned once more with each mark behind it.
        steps = [step for step in (state["pre_tokenizer"], {"type": "Punctuation", "behavior": "Isolated"}) if step]
        return state | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    return state


def _word_maker(state: dict[str, Any]) -> Tokenizer:
    """A tokenizer that only normalizes and cuts words."""
    empty = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    plain: dict[str, Any] = {"model": empty, "added_tokens": [], "post_processor": None, "decoder": None}
    return Tokenizer.from_str(json.dumps(state | plain))


def _words(tokenizer: Tokenizer, text: str) -> list[str]:
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [text]
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@lru_cache(maxsize=1 << 16)
def _kind(character: str) -> str:
    """L for letters with their marks, N for numbers, P for the rest."""
    return {"L": "L", "M": "L", "N": "N"}.get(unicodedata.category(character)[0], "P")


def _one_kind(word: str) -> list[str]:
    """A word cut where letters, numbers and punctuation meet; the mark of a space stays with what follows it."""
    mark = _MARK if word.startswith(_MARK) else ""
    first, *rest = ("".join(part) for _, part in groupby(word[len(mark) :], _kind)) if word != mark else ("",)
    return [mark + first, *rest]


def _affixes(model: dict[str, Any]) -> tuple[str, str]:
    """What marks a token inside a word, and one at a word's end."""
    return model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""


def _count_words(state: dict[str, Any], family: str, texts: Iterable[str]) -> Counter[str]:
    """How often each word of the pre-tokenizer stands in the texts.

    Words of SentencePiece's families are cut further, as its trainers do: before every space, and those of BPE where
    letters, numbers and punctuation meet. No token then runs across, whatever a pre-tokenizer leaves in one piece.
    Of more than two million words the rarest are forgotten, to bound the memory.
    """
    maker, counts, rare = _word_maker(state), Counter[str](), 1
    marked = family in ("bpe", "unigram")
    for text in texts:
        words = _words(maker, text)
        counts.update(chain.from_iterable(map(_MARKED.findall, words)) if marked else words)
        while len(counts) > _MOST_DISTINCT:
            counts = Counter({word: times for word, times in counts.items() if times > rare})
            rare += 1
    counts.pop("", None)
    if family != "bpe" or any(_affixes(state["model"])):
        return counts
    parts: Counter[str] = Counter()
    for word, times in counts.items():
        for part in _one_kind(word):
            parts[part] += times
    return parts


def _alphabet(words: Mapping[str, int]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for word, times in words.items():
        for character in word:
            counts[character] += times
    return counts


def _without(words: Mapping[str, int], characters: set[str]) -> Mapping[str, int]:
    """The words cut where one of the characters stands."""
    if not characters:
        return words
    cut = re.compile(f"[{re.escape(''.join(sorted(characters)))}]")
    parts: Counter[str] = Counter()
    for word, times in words.items():
        for part in cut.split(word):
            if part:
                parts[part] += times
    return parts


def _merges(
    words: Mapping[str, int], vocab_size: int, first: Sequence[str], prefix: str = "", suffix: str = ""
) -> tuple[list[str], list[list[str]]]:
    """Byte pair encoding: the tokens ``first`` and those that merges make of them, and the merges.

    ``first`` holds every form of every character: the trainer would number those with a prefix or a suffix as they
    come out of a hash table, in another order on every run, and ties between merges go by number.
    """
    # The trainer takes texts only, so a word comes as often as it is counted. Of very long texts it comes less often,
    # in proportion.
    less = max(1.0, sum(words.values()) / _MOST_WORDS)
    copies = (_PART.join([word] * max(1, round(words[word] / less))) for word in sorted(words) if _PART not in word)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(_PART)
    affixes: dict[str, Any] = {"continuing_subword_prefix": prefix, "end_of_word_suffix": suffix}
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(first),
        show_progress=False,
        **{name: affix for name, affix in affixes.items() if affix},
    )
    tokenizer.train_from_iterator(copies, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), model["merges"]


def _forms(words: Iterable[str], prefix: str = "", suffix: str = "") -> list[str]:
    """Every character of the words, in every form that a word begins to be read with, sorted."""
    forms: set[str] = set()
    for word in words:
        forms.update(word)
        spelled = [word[0], *(prefix + character for character in word[1:])]
        spelled[-1] += suffix
        forms.update(spelled)
    return sorted(forms)


def _seeds(words: Mapping[str, int]) -> dict[str, int]:
    """The parts of words that a Unigram model may choose from, with how often they stand in the text.

    SentencePiece's trainer counts them itself, but in words with counts it would count each once.
    """
    counts: Counter[str] = Counter()
    for word in sorted(words, key=lambda word: (-words[word], word))[:_SEED_WORDS]:
        for start in range(len(word)):
            for end in range(start + 2, min(len(word), start + _LONGEST) + 1):
                counts[word[start:end]] += words[word]
    found = (token for token, n in counts.items() if n > 1 and not _UNSAFE.search(token))
    order = sorted(found, key=lambda token: (-counts[token] * len(token), token))
    return {token: counts[token] for token in order[:_MOST_SEEDS]}


def _unigram(words: Mapping[str, int], alphabet: Iterable[str], size: int) -> list[tuple[str, float]]:
    """At most ``size`` tokens with their logarithmic probabilities, by SentencePiece's trainer, most probable first.

    The trainer of ``tokenizers`` adds up in the order of a hash table, which changes the result from run to run; this
    one reads words with their counts in the order in which they come, on one thread.
    """
    file = io.BytesIO()
    lines = [f"{word}\t{words[word]}" for word in sorted(words) if not _UNSAFE.search(word)]
    if lines:
        with tempfile.TemporaryDirectory() as folder:
            seeds = Path(folder, "seeds.tsv")
            rows = (f"{token}\t{count}\n" for token, count in _seeds(words).items())
            seeds.write_text("".join(rows), encoding="utf-8")
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                input_format="tsv",
                model_writer=file,
                model_type="unigram",
                vocab_size=size + 1,
                hard_vocab_limit=False,
                character_coverage=1.0,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                max_sentence_length=1 << 16,
                num_threads=1,
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                minloglevel=3,
                seed_sentencepieces_file=str(seeds),
            )
    model: Any = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue()) if lines else ()
    found = {model.id_to_piece(i): model.get_score(i) for i in range(1, len(model))}
    lowest = min(found.values(), default=0.0)
    single = {character: found.get(character, lowest) for character in alphabet}
    longer = sorted((token for token in found if token not in single), key=lambda token: (-found[token], token))
    tokens = single | {token: found[token] for token in longer[: size - len(single)]}
    return sorted(tokens.items(), key=lambda item: (-item[1], item[0]))


def _covers(words: Mapping[str, int], cut: Mapping[str, Sequence[Any]], unk: str) -> bool:
    """Whether a teacher's model reads all but a hundredth of the words without its unknown token."""
    unknown = sum(words[word] for word, tokens in cut.items() if any(token.value == unk for token in tokens))
    return unknown <= 0.01 * sum(words.values())


def _runs(words: Mapping[str, int], cut: Mapping[str, Sequence[Any]], symbols: Mapping[str, str]) -> Counter[str]:
    """Neighbouring tokens inside words, spelled in symbols, with how often they stand in the text; none joins letters
    and a mark of punctuation."""
    runs: Counter[str] = Counter()
    for word, tokens in cut.items():
        spelled = "".join(symbols.get(t.value, " ") if any(map(str.isalnum, t.value)) else " " for t in tokens)
        for run in spelled.split():
            if len(run) > 1:
                runs[run] += words[word]
    return runs


def _grown(
    teacher: Any, words: Mapping[str, int], cut: Mapping[str, Sequence[Any]], vocab_size: int
) -> Vocabulary:
    """A Unigram teacher's most frequent tokens, and new ones that join neighbours.

    A model trained from nothing cuts words where the teacher never does, and rows of such tokens, however they are
    put together, say little. Here a new token is two or more of the teacher's inside a word, found by byte pair
    encoding over its tokens; as likely as these together, and a little more, it takes their place wherever they stand
    side by side, and no other cut moves. On Russian, with 8,000 tokens for multilingual-e5-small and no training, that
    keeps 0.966 of its score on STS-B dev in as many tokens as its own; a model trained from nothing keeps 0.84. A
    sixteenth of the tokens is new: an eighth shortens texts by another 0.5% and keeps 0.955.

    Args:
        cut: each word's tokens, as the teacher's model reads it.
    """
    counts = torch.zeros(max(backend_of(teacher, "teacher").get_vocab().values()) + 1, dtype=torch.int64)
    for word, tokens in cut.items():
        for token in tokens:
            counts[token.id] += words[word]
    characters, known = _alphabet(words), backend_of(teacher, "teacher").get_vocab()
    missing = [c for c in frequent_characters(characters, vocab_size) if c not in known]
    trimmed = trim_vocabulary(teacher, counts, vocab_size, spare=vocab_size // _NEW_SHARE + len(missing))
    state = tokenizer_state(trimmed.tokenizer)
    scores: dict[str, float] = dict(state["model"]["vocab"])
    lowest, room = min(scores.values()), vocab_size - len(trimmed)
    for character in missing[: max(room, 0)]:
        scores[character], room = lowest, room - 1

    symbols = {token: chr(_FIRST_SYMBOL + i) for i, token in enumerate(list(scores)[:_MOST_SYMBOLS])}
    tokens_of = {symbol: token for token, symbol in symbols.items()}
    runs = _runs(words, cut, symbols)
    # Several ways to join tokens may spell one text: more are tried than there is room for.
    joined, _ = _merges(runs, len(symbols) + 3 * room, list(tokens_of)) if runs and room > 0 else ([], [])
    for run in joined:
        parts = [tokens_of[symbol] for symbol in run]
        token = "".join(parts)
        if room > 0 and len(parts) > 1 and token not in scores:
            scores[token], room = sum(scores[part] for part in parts) + _JOINED, room - 1
    notes = [f"The text supports only {vocab_size - room:,} tokens, not {vocab_size:,}."] if room > 0 else []
    notes += _lost(characters, characters.keys() - scores.keys())
    model = state["model"] | {"vocab": [[token, score] for token, score in scores.items()]}
    return Vocabulary(rebuild(teacher, state | {"model": model}), "train", notes=tuple(notes))


def _lost(characters: Mapping[str, int], lost: Collection[str]) -> list[str]:
    """A note on the characters that have no token of their own, if there are any."""
    if not lost:
        return []
    share = sum(characters[character] for character in lost) / sum(characters.values())
    return [f"{len(lost):,} rare characters, {share:.3%} of the text, have no token of their own."]


def _need_room(vocab_size: int, least: int) -> None:
    expected = f"at least the {least} special tokens and characters of the text"
    need(vocab_size >= least, "vocab_size", expected, vocab_size)


def _trained_model(
    model: dict[str, Any],
    family: str,
    words: Mapping[str, int],
    first: list[str],
    unk: str,
    vocab_size: int,
) -> dict[str, Any]:
    """The state of a model with the tokens ``first`` and those learned from the words."""
    if model.get("byte_fallback"):
        first = [*first, *(token for token in _BYTE_TOKENS if token not in first)]
    if family == "unigram":
        alphabet = sorted(set().union(*words) - {*first})
        _need_room(vocab_size, len(first) + len(alphabet))
        scored = [item for item in _unigram(words, alphabet, vocab_size - len(first)) if item[0] not in first]
        lowest = min((score for _, score in scored), default=0.0)
        # Bytes are not looked for in texts; specials score 0 as those of converted SentencePiece models do.
        opening = [(token, lowest if token in _BYTE_TOKENS else 0.0) for token in first]
        return model | {"vocab": [*opening, *scored], "unk_id": first.index(unk)}
    prefix, suffix = _affixes(model)
    alphabet = _forms(words, prefix, suffix)
    if family == "byte-bpe":
        alphabet = sorted({*alphabet, *_BYTE_ALPHABET, *(character + suffix for character in _BYTE_ALPHABET)})
    first = list(dict.fromkeys([*first, *alphabet]))
    _need_room(vocab_size, len(first))
    tokens, merges = _merges(words, vocab_size, first, prefix, suffix)
    model = model | {"vocab": {token: i for i, token in enumerate(tokens)}, "unk_token": unk or None}
    return model if family == "wordpiece" else model | {"merges": merges}


def train_vocabulary(teacher: Any, texts: Iterable[str], vocab_size: int, family: str | None = None) -> Vocabulary:
    """New tokens for a text, read by the teacher's rules.

    Normalizer, pre-tokenizer, decoder, template, added tokens (special or not, by the teacher's ids: they come first)
    and settings are the teacher's; for another family the normalizer stays and words are cut as that family does.
    Every character of the text gets a token, but for the rarest where those would take more than a quarter of the
    vocabulary (:func:`frequent_characters`). The result is the same on every run, for any number of threads.

    Args:
        teacher: a fast tokenizer of ``transformers`` or a ``tokenizers.Tokenizer``.
        texts: read once.
        vocab_size: tokens of the result; fewer, with a note, where the text supports no more.
        family: one of :data:`FAMILIES`; ``None`` for the teacher's own.

    Raises:
        VocabdistilError: ``vocab_size`` has no room for the special tokens and the characters; an unknown family; the
            tokenizer cannot be taken apart, or has a model of no family (``family`` was not given).
    """
    state = tokenizer_state(teacher)
    family = family or family_of(state)
    expected = listed(FAMILIES)
    need(family is not None, "family", f"{expected} for a teacher of another kind", state["model"]["type"])
    need(family in FAMILIES, "family", expected, repr(family))
    assert family is not None
    first = list(special_strings(teacher, state))
    unk, roles = _unk_token(teacher, state, family)
    if unk and unk not in first:
        first.append(unk)
        state["added_tokens"].append(_SPECIAL | {"content": unk})
    state = _in_family(state, family)

    words: Mapping[str, int] = _count_words(state, family, texts)
    reads_all = state["model"].get("unk_id") is not None or state["model"].get("byte_fallback")
    if words and family == "unigram" and "vocab" in state["model"] and reads_all:
        model = backend_of(teacher, "teacher").model
        cut = {word: model.tokenize(word) for word in sorted(words)}
        if _covers(words, cut, unk):
            return _grown(teacher, words, cut, vocab_size)
    counts = _alphabet(words)
    rare = set(counts) - set(counts if family == "byte-bpe" else frequent_characters(counts, vocab_size))
    model = _trained_model(state["model"], family, _without(words, rare), first, unk, vocab_size)
    notes = []
    if len(model["vocab"]) < vocab_size:
        notes.append(f"The text supports only {len(model['vocab']):,} tokens, not {vocab_size:,}.")
    notes += _lost(counts, rare)
    return Vocabulary(rebuild(teacher, state | {"model": model}, roles), "train", notes=tuple(notes))


def _unk_token(teacher: Any, state: dict[str, Any], family: str) -> tuple[str, dict[str, str]]:
    """The token for what cannot be read, and its role where the teacher has none but the family needs it."""
    model = state["model"]
    if model["type"] == "Unigram":
        own = model["vocab"][model["unk_id"]][0] if model["unk_id"] is not None else None
    else:
        own = model["unk_token"]
    unk = own or getattr(teacher, "unk_token", None)
    if unk or family == "byte-bpe":
        return str(unk or ""), {}
    return "[UNK]" if family == "wordpiece" else "<unk>", {"unk_token": "[UNK]" if family == "wordpiece" else "<unk>"}


def train_wordpiece(
    texts: Iterable[str], vocab_size: int, base: Tokenizer, special_tokens: Sequence[str], unk_token: str
) -> dict[str, int]:
    """A WordPiece vocabulary for the normalizer and the pre-tokenizer of ``base``.

    The special tokens come first, then the alphabet, then merges in the order in which they were learned.

    Returns:
        Token -> id, of exactly ``vocab_size`` tokens.

    Raises:
        VocabdistilError: the text supports fewer tokens, or its alphabet alone needs more.
    """
    words = _count_words(json.loads(base.to_str()), "wordpiece", texts)
    model = _trained_model(_MODELS["wordpiece"], "wordpiece", words, list(special_tokens), unk_token, vocab_size)
    vocab = model["vocab"]
    need(len(vocab) == vocab_size, "vocab_size", f"at most the {len(vocab)} tokens that this text supports", vocab_size)
    return vocab
