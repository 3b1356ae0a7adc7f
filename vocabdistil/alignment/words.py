"""How byte-level tokenizers cut texts into words: the regular expressions that the native code knows."""

from __future__ import annotations

import functools
from typing import Any

import tokenizers

from ..core.native import module as _native_module

__all__ = ["PATTERNS", "char_classes", "word_pattern"]

_GPT2, _CL100K, _QWEN35, _O200K = range(4)  # the styles of csrc/remap/words.h
# That of GPT-2 and its followers, which the library has built in.
_BUILT_IN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PREFIX, _SPACES = r"[^\r\n\p{L}\p{N}]?", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD, _TAIL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# Regular expression -> style, whether contractions are apart, most digits in a word.
PATTERNS: dict[str | None, tuple[int, bool, int]] = {
    _BUILT_IN: (_GPT2, True, 0),
    # GPT-4, Llama 3
    rf"{_CONTRACTIONS}|{_PREFIX}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}": (_CL100K, True, 3),
    # Qwen 2 and 3
    rf"{_CONTRACTIONS}|{_PREFIX}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}": (_CL100K, True, 1),
    # Qwen 3.5
    rf"{_CONTRACTIONS}|{_PREFIX}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}": (
        _QWEN35, True, 1
    ),
    # GPT-4o, gpt-oss, Llama 4
    rf"{_PREFIX}{_HEAD}*{_TAIL}+{_CONTRACTIONS}?|{_PREFIX}{_HEAD}+{_TAIL}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}": (_O200K, True, 3),
    # Mistral
    rf"{_PREFIX}{_HEAD}*{_TAIL}+|{_PREFIX}{_HEAD}+{_TAIL}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}": (
        _O200K, False, 1
    ),
}  # fmt: skip


def word_pattern(steps: list[Any]) -> Any:
    """The native code's matcher for what the steps of a pre-tokenizer do, each with its settings; None if it does not
    know that."""
    pattern = _pattern(steps)
    return _native_module().WordPattern(*PATTERNS[pattern], char_classes()) if pattern in PATTERNS else None


def _pattern(steps: list[Any]) -> str | None:
    """The regular expression whose matches are the words; None if it is not so simple."""
    types = [step.get("type") if isinstance(step, dict) else None for step in steps]
    if types == ["ByteLevel"]:
        return _BUILT_IN if steps[0].get("use_regex", True) else None
    if types != ["Split", "ByteLevel"]:
        return None
    split, byte_level = steps
    isolates = split.get("behavior") == "Isolated" and not split.get("invert")
    # A space put before each word is not there when the words are cut.
    plain = not byte_level.get("use_regex", True) and not byte_level.get("add_prefix_space", True)
    return split["pattern"].get("Regex") if isolates and plain else None


# The bits of csrc/remap/words.h.
_CLASSES = {r"[\p{Lu}\p{Lt}]": 1, r"\p{Ll}": 2, r"[\p{Lm}\p{Lo}]": 4, r"\p{M}": 8, r"\p{N}": 16, r"\s": 32}
_NEWLINE, _OTHER = 64, 128
# Characters from here on are rare or private: words with them are asked for. Those before take 50 ms, once.
_END = 0x34000


@functools.lru_cache(maxsize=1)
def char_classes() -> bytes:
    """The class of each character, as the regular expressions of ``tokenizers`` have it: their Unicode is another one
    than Python's. 0 for surrogates, which are no characters."""
    classes = bytearray(_END)
    any_class = tokenizers.Regex("|".join(f"{pattern}+" for pattern in _CLASSES))
    for first, end in ((0, 0xD800), (0xE000, _END)):
        text = tokenizers.NormalizedString("".join(map(chr, range(first, end))))
        runs = [run.normalized for run in text.split(any_class, "isolated")]
        # Which of the classes a run is of, its first character tells.
        heads = dict.fromkeys((run[0] for run in runs), _OTHER)
        for pattern, value in _CLASSES.items():
            left = tokenizers.NormalizedString("".join(heads)).split(tokenizers.Regex(pattern), "removed")
            heads.update(dict.fromkeys(heads.keys() - {c for part in left for c in part.normalized}, value))
        for run in runs:
            start = ord(run[0])
            classes[start : start + len(run)] = bytes([heads[run[0]]]) * len(run)
    classes[ord("\r")] = classes[ord("\n")] = _NEWLINE
    return bytes(classes)
