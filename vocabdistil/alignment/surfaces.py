"""What the tokens of a vocabulary stand for, whatever family of tokenizers it belongs to."""

from __future__ import annotations

import functools
import json
import re
import threading
import unicodedata
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import tokenizers

from ..core.native import module as _native_module
from .families import ROLES, TokenizerInfo, backend_of, check_template, keeps_last, read_tokenizer
from .loading import tokenizer_of
from .words import word_pattern

__all__ = ["Known", "Surfaces", "known", "read_surfaces"]

UNKNOWN, TEXT, BYTES = 0, 1, 2  # the kinds of csrc/remap/boundary.h
BEGINS, CONTINUES, ALONE, UNTOLD, SPELLS = range(5)  # the places of csrc/remap/words.h
_MARK = "▁"
_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level tokens (Radford et al. 2019, their encoder)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


BYTE_OF = _byte_alphabet()
CHAR_OF = {b: c for c, b in BYTE_OF.items()}


_PAGE = 256  # characters, that of csrc/remap/layout.h
_BETWEEN = "."  # what no character composes with
_WHITE_SPACE = [
    *range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000
]  # fmt: skip
# What may go with the character that it stands after.
_MAY_VANISH = frozenset(("Cc", "Cf", "Co", "Cn", "Mn", "Me"))


class Folding:
    """What a tokenizer makes of single characters before its model sees them: it is asked."""

    def __init__(self, backend: tokenizers.Tokenizer, mark: str, byte_level: bool) -> None:
        self.normalizer, self.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
        self.mark, self.byte_level = mark, byte_level
        self.needed = self.normalizer is not None or bool(mark)
        self.in_bytes = any(part.get("type") == "ByteLevel" for part in _parts(_state(self.normalizer)))

    def spaces(self) -> dict[int, str]:
        """White space that is not itself to the model: what it becomes, nothing or a space."""
        found = {}
        for code in _WHITE_SPACE:
            text = f"a{chr(code)}a"
            if self.normalizer is not None:
                text = self.normalizer.normalize_str(text)
            words = [text] if self.pre_tokenizer is None else [w for w, _ in self.pre_tokenizer.pre_tokenize_str(text)]
            became = "".join(words)
            if self.byte_level:
                became = _from_bytes(became)
            # A space may have been put before the first word.
            _, *between = (became.replace(self.mark, " ") if self.mark else became).split("a")
            if len(between) == 2 and between[0] != chr(code) and between[0] in ("", " "):
                found[code] = between[0]
        return found

    def page(self, number: int) -> list[tuple[list[str], str]]:
        """Of each of 256 characters what it becomes, as alternatives, none if it stays what it is; and its canonical
        decomposition."""
        chars = [chr(code) for code in range(number * _PAGE, (number + 1) * _PAGE)]
        if "\ud800" <= chars[0] <= "\udfff":
            return [([], "")] * _PAGE
        return [
            (self._alternatives(c, became), "" if (apart := unicodedata.normalize("NFD", c)) == c else apart)
            for c, became in zip(chars, self._normalized(chars), strict=True)
        ]

    def _alternatives(self, char: str, became: str) -> list[str]:
        if self.mark:
            became = became.replace(self.mark, " ")
        if not char.isspace() and became.strip(" "):
            became = became.strip(" ")  # as around Chinese characters
        if became != char:
            return [became]
        return [char, ""] if self.normalizer is not None and unicodedata.category(char) in _MAY_VANISH else []

    def _normalized(self, chars: list[str]) -> list[str]:
        if self.normalizer is None:
            return chars
        text = _BETWEEN.join(("", *chars, ""))
        became = self._normalize(text).split(_BETWEEN)
        if len(became) == len(chars) + 2:
            return became[1:-1]
        if len(chars) > 1:
            half = len(chars) // 2
            return self._normalized(chars[:half]) + self._normalized(chars[half:])
        return [self._normalize(chars[0])]

    def _normalize(self, text: str) -> str:
        assert self.normalizer is not None
        became = self.normalizer.normalize_str(text)
        return _from_bytes(became) if self.in_bytes else became


def _from_bytes(text: str) -> str:
    """What is spelled in the byte alphabet."""
    return bytes(BYTE_OF[c] for c in text if c in BYTE_OF).decode(errors="replace")


@dataclass(frozen=True)
class Surfaces:
    """The text behind each token of one tokenizer.

    Attributes:
        byte_level: tokens are spelled in the byte alphabet.
        marks_words: whether a token at the start of a word begins with a space.
        mark: what a space is inside tokens (``"▁"``), or ``""``.
        prefix, suffix: what marks a token inside a word (``"##"``), and one at a word's end (``"</w>"``).
        texts: the bytes that each id stands for, spaces as spaces.
        kinds: one of UNKNOWN, TEXT, BYTES for each id.
        byte_ids: the ids of single bytes by value, for tokenizers that fall back to bytes.
        types: the types of the normalizer, the pre-tokenizer and the decoder and of what they consist of.
        native: the same, for the native code.
        folds: what the native code asks of characters, see :class:`Folding`.
    """

    byte_level: bool
    marks_words: bool
    mark: str
    prefix: str
    suffix: str
    texts: list[bytes]
    kinds: bytes
    byte_ids: dict[int, int]
    types: frozenset[str]
    native: Any
    folds: Folding


def _state(component: Any) -> Any:
    """A component of a tokenizer as JSON values; None where there is none, or it is made in Python."""
    try:
        return json.loads(component.__getstate__()) if component is not None else None
    except Exception:
        return None


def _parts(state: Any) -> list[dict[str, Any]]:
    """All components inside a state."""
    if isinstance(state, list):
        return [part for item in state for part in _parts(item)]
    if not isinstance(state, dict):
        return []
    return [state, *(part for value in state.values() for part in _parts(value))]


def _without(token: str, suffix: str) -> str:
    return token[: -len(suffix)] if suffix and len(token) > len(suffix) and token.endswith(suffix) else token


def read_surfaces(info: TokenizerInfo) -> Surfaces:
    """Reads what the tokens of a tokenizer stand for."""
    backend = info.backend
    normalizer, pre_tokenizer = _state(backend.normalizer), _state(backend.pre_tokenizer)
    parts = [*_parts(normalizer), *_parts(pre_tokenizer), *_parts(_state(backend.decoder))]
    types = frozenset(part["type"] for part in parts if isinstance(part.get("type"), str))
    byte_level = "ByteLevel" in types
    mark = ""
    if not byte_level:
        marks = [part["replacement"] for part in parts if part.get("type") == "Metaspace"]
        marks += [_MARK for part in parts if part.get("type") == "Replace" and part.get("content") == _MARK]
        marks += [_MARK for part in parts if part.get("type") == "Prepend" and part.get("prepend") == _MARK]
        mark = marks[0] if marks else ""
    model = backend.model
    suffix = getattr(model, "end_of_word_suffix", None) or ""
    prefix = info.prefix
    # A Unigram model does not tell.
    falls_back = getattr(model, "byte_fallback", None)
    if falls_back is None:
        falls_back = info.kind == "Unigram" and all(
            backend.token_to_id(f"<0x{b:02X}>") is not None for b in range(256)
        )
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    texts, kinds, byte_ids = [], bytearray(), {}
    for i, token in enumerate(info.tokens):
        kind, text = TEXT, b""
        if token is None or i == info.unk_id:
            kind = UNKNOWN
        elif token in added:
            found = _BYTE_TOKEN.fullmatch(token) if falls_back else None
            kind, text = (BYTES, bytes([int(found[1], 16)])) if found else (TEXT, token.encode())
        elif byte_level:
            inner = _without(token, suffix)
            try:
                kind, text = BYTES, bytes([BYTE_OF[c] for c in inner])
            except KeyError:
                text = inner.encode()
        elif falls_back and (found := _BYTE_TOKEN.fullmatch(token)):
            kind, text = BYTES, bytes([int(found[1], 16)])
        else:
            if prefix and len(token) > len(prefix) and token.startswith(prefix):
                token = token[len(prefix) :]
            token = _without(token, suffix)
            text = (token.replace(mark, " ") if mark else token).encode()
        if kind == BYTES and falls_back and not byte_level:
            byte_ids[text[0]] = i
        texts.append(text)
        kinds.append(kind)
    folds = Folding(backend, mark, byte_level)
    spaces = folds.spaces()
    no_unknown = info.kind == "BPE" and getattr(model, "unk_token", None) is None and not falls_back
    native = _native_module().Surfaces(
        texts, bytes(kinds), list(spaces.items()), byte_level, folds.needed, no_unknown,
        info.kind in ("WordPiece", "WordLevel"),
    )  # fmt: skip
    marks_words = bool(mark) or (byte_level and spaces.get(ord(" ")) != "")
    return Surfaces(
        byte_level, marks_words, mark, prefix, suffix, texts, bytes(kinds), byte_ids, types, native, folds
    )


def convention(known: Known) -> tuple:
    """How a tokenizer spells: tokens of two that agree on it are equal when their strings are."""
    surfaces = known.surfaces
    return surfaces.byte_level, surfaces.mark, surfaces.prefix, surfaces.suffix


def word_form(known: Known, i: int) -> tuple[bool, bytes] | None:
    """Whether token ``i`` starts a word, and its text without the space before it; None if that is not known.

    A tokenizer that drops white space does not tell whether there was some before a closing or an ambiguous
    punctuation mark or a Chinese character: there is none.
    """
    surfaces, token = known.surfaces, known.info.tokens[i]
    text = surfaces.texts[i]
    if token is None or surfaces.kinds[i] == UNKNOWN:
        return None
    if surfaces.marks_words:
        return (True, text[1:]) if len(text) > 1 and text[:1] == b" " else (False, text)
    if surfaces.prefix and len(token) > len(surfaces.prefix) and token.startswith(surfaces.prefix):
        return False, text
    char = text.decode(errors="replace")
    apart = len(char) == 1 and (unicodedata.category(char) in ("Pe", "Pf", "Po") or _CHINESE.match(char))
    return not apart, text


def ends_word(known: Known, i: int) -> bool:
    """Whether token ``i`` may stand at the end of a word: not where word ends are marked and it is not."""
    suffix, token = known.surfaces.suffix, known.info.tokens[i]
    return not suffix or token is None or token.endswith(suffix)


def runs(text: bytes) -> list[str | int]:
    """The longest runs of valid UTF-8, and the bytes between them."""
    runs: list[str | int] = []
    while text:
        try:
            runs.append(text.decode())
            break
        except UnicodeDecodeError as error:
            if error.start:
                runs.append(text[: error.start].decode())
            runs.extend(text[error.start : error.end])
            text = text[error.end :]
    return runs


class Speller:
    """Spells texts with the tokens of one tokenizer, its normalizer left out."""

    def __init__(self, known: Known) -> None:
        self.known, self.surfaces = known, known.surfaces
        self.model = known.info.backend.model

    def spell(self, starts: bool, text: bytes, ends: bool = True) -> list[int] | None:
        """The ids whose surfaces are ``text``, at the start of a word or not, at its end or not; None if there are
        none."""
        surfaces = self.surfaces
        want = (b" " if starts and surfaces.marks_words else b"") + text
        ids: list[int] = []
        if surfaces.byte_level:
            ids += self._tokenize("".join(CHAR_OF[b] for b in want), ends)
        else:
            cut = runs(want)
            for k, run in enumerate(cut):
                if isinstance(run, str):
                    marked = run.replace(" ", surfaces.mark) if surfaces.mark else run
                    ids += self._tokenize(marked, ends and k == len(cut) - 1)
                elif run in surfaces.byte_ids:
                    ids.append(surfaces.byte_ids[run])
                else:
                    return None
        unknown = any(surfaces.kinds[i] == UNKNOWN for i in ids)
        return None if unknown or b"".join(surfaces.texts[i] for i in ids) != want else ids

    def _tokenize(self, text: str, ends: bool) -> list[int]:
        suffix = self.surfaces.suffix
        if not suffix or ends:
            return [token.id for token in self.model.tokenize(text)]
        # The model reads whole words only: of the last token that which does not end one.
        whole = self.model.token_to_id(text)
        if whole is not None:
            return [whole]
        tokens = self.model.tokenize(text)
        ids = [token.id for token in tokens]
        inner = self.model.token_to_id(_without(tokens[-1].value, suffix)) if tokens else None
        return ids if inner is None else [*ids[:-1], inner]


class Words:
    """Cuts texts into the words that a WordPiece model is given, its normalizer left out."""

    def __init__(self, known: Known) -> None:
        backend = known.info.backend
        self.pre_tokenizer = backend.pre_tokenizer
        spaced = any(part.get("handle_chinese_chars") for part in _parts(_state(backend.normalizer)))
        # Chinese characters are words of their own; it is the normalizer that puts spaces around them.
        self.spacer = (
            tokenizers.normalizers.BertNormalizer(
                clean_text=False, handle_chinese_chars=True, strip_accents=False, lowercase=False
            )
            if spaced
            else None
        )

    def split(self, starts: bool, text: str) -> list[tuple[bool, str]]:
        """Words, each with whether it starts one (only the first may continue the word before)."""
        before = "" if starts else "a"
        if self.spacer is not None:
            text = self.spacer.normalize_str(before + text)
        else:
            text = before + text
        if self.pre_tokenizer is None:
            words = [text]
        else:
            words = [word for word, _ in self.pre_tokenizer.pre_tokenize_str(text)]
        if starts:
            return [(True, word) for word in words]
        first = [(False, words[0][1:])] if len(words[0]) > 1 else []
        return first + [(True, word) for word in words[1:]]


class Known:
    """A tokenizer with what has been read of it."""

    def __init__(self, info: TokenizerInfo) -> None:
        self.info = info
        # Whether many of the texts seen last could not be laid out without the tokenizer's offsets. Either way the
        # result is the same.
        self.needs_offsets = False
        # By the tokenizer on the other side.
        self.matched: weakref.WeakKeyDictionary[Known, Any] = weakref.WeakKeyDictionary()
        self.few_added = len(info.added) + len(info.special) <= _FEW_ADDED
        self.short_normalizer = len(_sign(info.backend.normalizer)) <= _SHORT_NORMALIZER

    @functools.cached_property
    def surfaces(self) -> Surfaces:
        return read_surfaces(self.info)

    @functools.cached_property
    def word_pattern(self) -> Any:
        """What cuts the text that byte-level tokens spell into words, for the native code; None if the tokenizer is of
        another kind, or cuts in a way that the native code does not know."""
        info = self.info
        names = "continuing_subword_prefix", "end_of_word_suffix"
        marked = any(getattr(info.backend.model, name, None) for name in names)
        # With a token for every byte, what the tokens between two added ones spell is what was cut.
        if info.kind != "BPE" or marked or not BYTE_OF.keys() <= {*info.pieces}:
            return None
        return word_pattern(_steps(_state(info.backend.pre_tokenizer)))

    @functools.cached_property
    def word_places(self) -> bytes:
        """For each id BEGINS a word, CONTINUES the one before it, ALONE if it is one by itself (an added token), SPELLS
        if ``word_pattern`` tells, UNTOLD if nothing does; empty where token strings do not tell words.

        They do where there is a ``word_pattern``; in WordPiece after BERT's pre-tokenizer, which leaves no ``##`` in a
        word for a first piece to begin with; and where the pre-tokenizer puts a mark before every word, and nowhere
        else, that the model has a token for. In the last two an unknown token is a part of a word; or the token of that
        name in a text, unless that is spelled with characters of the vocabulary: an unknown token whose place is found
        without the tokenizer's offsets stands for none of these."""
        info = self.info
        state = _state(info.backend.pre_tokenizer)
        if self.word_pattern is not None:
            return self._spelling_places()
        if info.kind == "WordPiece" and info.prefix == "##" and _type(state) == "BertPreTokenizer":
            inside = [token is not None and len(token) > 2 and token.startswith("##") for token in info.tokens]
            unknown = BEGINS
        elif info.kind in ("BPE", "Unigram") and not info.prefix and (mark := _word_mark(state, info.pieces)):
            inside = [token is None or not token.startswith(mark) for token in info.tokens]
            named = [char.encode() for char in info.tokens[info.unk_id] or ""] if info.unk_id is not None else []
            unknown = CONTINUES if any(c in text for text in self.surfaces.texts for c in named) else UNTOLD
        else:
            return b""
        apart = {*info.added, *info.special}
        places = bytearray(
            ALONE if token in apart else CONTINUES if within else BEGINS
            for token, within in zip(info.tokens, inside, strict=True)
        )
        if info.unk_id is not None:
            places[info.unk_id] = unknown
        return bytes(places)

    def _spelling_places(self) -> bytes:
        info, surfaces = self.info, self.surfaces
        places = bytearray(SPELLS if kind == BYTES else UNTOLD for kind in surfaces.kinds)
        model = info.backend.model
        for i in info.backend.get_added_tokens_decoder():
            piece = info.pieces[i] if i < len(info.pieces) else None
            # A token that merges make in a text they also make of its own string: nothing around it takes part.
            made = piece is not None and (model.dropout or [token.id for token in model.tokenize(piece)] == [i])
            places[i] = UNTOLD if made else ALONE
        return bytes(places)


def _type(state: Any) -> str:
    return state.get("type", "") if isinstance(state, dict) else ""


def _steps(state: Any) -> list[Any]:
    return state.get("pretokenizers", []) if _type(state) == "Sequence" else [state]


def _word_mark(state: Any, pieces: list[str | None]) -> str | None:
    """What stands at the beginning of every word but the first, and nowhere else, after this pre-tokenizer; None if
    there is no such mark, or no piece of the model for it."""
    steps = _steps(state)
    last = steps[-1] if steps else {}
    if _type(last) != "Metaspace" or not last.get("split", True) or last["replacement"] not in pieces:
        return None
    # White space that was cut away before leaves words that only get a mark where every word gets one.
    alone = len(steps) == 1
    spaces_cut = [_type(step) for step in steps] == ["WhitespaceSplit", "Metaspace"]
    return last["replacement"] if alone or (spaces_cut and last.get("prepend_scheme") == "always") else None


# What is known of a tokenizer of transformers goes with it. One of tokenizers is a part of what is known of it, so the
# last ones are kept.
_KEPT = 64
_cache: OrderedDict[int, tuple[Any, tuple, Known]] = OrderedDict()
_lock = threading.RLock()
# What would take longer to look at than a text takes to align is not looked at: thousands of added tokens, and a
# normalizer with a map of all characters. Of these only the number and the type count.
_FEW_ADDED, _SHORT_NORMALIZER = 512, 1 << 14
# Tokens of a vocabulary that are looked at in each call: two that were made from other texts do not agree on these.
_SAMPLES = 16
_MODEL_SETTINGS = (
    "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "max_input_chars_per_word", "byte_fallback",
    "dropout", "ignore_merges",
)  # fmt: skip


def _sign(component: Any) -> str:
    """What tells a component of a tokenizer from another."""
    try:
        return repr(component)
    except Exception:  # made in Python
        return type(component).__name__


def _signs(tokenizer: Any, of: Known) -> tuple:
    """What changes with a tokenizer, as far as it can be told in microseconds: of the vocabulary samples."""
    backend = of.info.backend
    size, model, normalizer = backend.get_vocab_size(), backend.model, backend.normalizer
    return (
        size,
        tuple(backend.id_to_token(i) for i in range(0, size, size // _SAMPLES + 1)),
        tuple(str(getattr(tokenizer, f"{role}_token", None)) for role in ROLES),
        type(model),
        tuple(getattr(model, name, None) for name in _MODEL_SETTINGS),
        tuple((i, token.content, token.special) for i, token in backend.get_added_tokens_decoder().items())
        if of.few_added
        else (),
        _sign(normalizer) if of.short_normalizer else type(normalizer),
        _sign(backend.pre_tokenizer),
        _sign(backend.decoder),
        keeps_last(tokenizer, backend),
        _sign(backend.post_processor),
    )


def known(tokenizer: Any, name: str) -> Known:
    """``read_tokenizer``, once per tokenizer: again only if the tokenizer has changed. The name of a model and a folder
    stand for the tokenizer there.

    Raises:
        TypeError: not a fast tokenizer.
        ValueError: one that puts tokens around a text that it does not have.
        VocabdistilError: no such tokenizer.
    """
    tokenizer = tokenizer_of(tokenizer, name)
    backend = backend_of(tokenizer, name)
    key = id(tokenizer)
    with _lock:
        entry = _cache.get(key)
        if entry is not None:
            _cache.move_to_end(key)
    if entry is not None and entry[2].info.backend is backend and entry[1] == _signs(tokenizer, entry[2]):
        return entry[2]
    result = Known(read_tokenizer(tokenizer, name))
    check_template(result.info, name)
    signs = _signs(tokenizer, result)
    # Held one way or the other, so that no other tokenizer can take its id.
    held = tokenizer if tokenizer is backend else weakref.ref(tokenizer, lambda _: _forget(key))
    with _lock:
        _cache[key] = held, signs, result
        kept = [other for other, (held, _, of) in _cache.items() if held is of.info.backend]
        for other in kept[: len(kept) - _KEPT]:
            del _cache[other]
    return result


def _forget(key: int) -> None:
    with _lock:
        _cache.pop(key, None)
