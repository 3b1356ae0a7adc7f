"""What the tokens of a vocabulary stand for, whatever family of tokenizers it belongs to."""

from __future__ import annotations

import functools
import json
import re
import threading
import unicodedata
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import tokenizers

from ..core.native import module as _native_module
from .families import ROLES, TokenizerInfo, backend_of, read_tokenizer
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


@functools.lru_cache(maxsize=1)
def _folds() -> list[tuple[int, list[str]]]:
    """What normalizers make of single characters: lower case, compatibility forms, accents apart or none, nothing."""
    folds = []
    for code in range(0x10000):
        if 0xD800 <= code < 0xE000:
            continue
        c = chr(code)
        category = unicodedata.category(c)
        if category in ("Cc", "Cf", "Co", "Cn", "Mn"):
            folds.append((code, [""]))
            continue
        if code < 0x80:
            if c.isupper():
                folds.append((code, [c.lower()]))
            continue
        lower, compatible = c.lower(), unicodedata.normalize("NFKC", c)
        apart = [unicodedata.normalize(form, lower) for form in ("NFD", "NFKD")]
        stripped = ["".join(d for d in form if unicodedata.category(d) != "Mn") for form in apart]
        # Whole forms before those that are the beginning of one.
        options = dict.fromkeys((lower, compatible, compatible.lower(), *apart, *stripped))
        options.pop(c, None)
        options.pop("", None)
        if options:
            folds.append((code, list(options)))
    return folds


def _without(token: str, suffix: str) -> str:
    return token[: -len(suffix)] if suffix and len(token) > len(suffix) and token.endswith(suffix) else token


def _keeps_spaces(backend: tokenizers.Tokenizer) -> bool:
    """Whether white space reaches a byte-level model: CLIP tells words by their ends and drops it."""
    if backend.pre_tokenizer is None:
        return True
    return any(CHAR_OF[0x20] in word for word, _ in backend.pre_tokenizer.pre_tokenize_str("a a"))


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
    folds = _folds() if normalizer is not None else []
    keeps = byte_level and (not suffix or _keeps_spaces(backend))
    # Spaces that are marks and nothing else reach the model, if nothing but that happens to a text.
    kept = keeps or (normalizer is None and _type(pre_tokenizer) == "Metaspace")
    native = _native_module().Surfaces(texts, bytes(kinds), not kept, folds, mark)
    return Surfaces(byte_level, keeps or bool(mark), mark, prefix, suffix, texts, bytes(kinds), byte_ids, types, native)


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
    last = steps[-1] if steps else None
    if _type(last) != "Metaspace" or not last.get("split", True) or last["replacement"] not in pieces:
        return None
    # White space that was cut away before leaves words that only get a mark where every word gets one.
    alone = len(steps) == 1
    spaces_cut = [_type(step) for step in steps] == ["WhitespaceSplit", "Metaspace"]
    return last["replacement"] if alone or (spaces_cut and last.get("prepend_scheme") == "always") else None


_CACHE_SIZE = 8
_cache: OrderedDict[int, tuple[Any, tuple, Known]] = OrderedDict()
_lock = threading.Lock()
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
    )


def known(tokenizer: Any, name: str) -> Known:
    """``read_tokenizer``, once per tokenizer: again only if the tokenizer has changed.

    Raises:
        TypeError: not a fast tokenizer.
    """
    backend = backend_of(tokenizer, name)
    with _lock:
        entry = _cache.get(id(tokenizer))
        if entry is not None:
            _cache.move_to_end(id(tokenizer))
    if entry is not None and entry[2].info.backend is backend and entry[1] == _signs(tokenizer, entry[2]):
        return entry[2]
    result = Known(read_tokenizer(tokenizer, name))
    state = _signs(tokenizer, result)
    with _lock:
        # The tokenizer itself is kept, so that no other can take its id.
        _cache[id(tokenizer)] = tokenizer, state, result
        while len(_cache) > _CACHE_SIZE:
            _cache.popitem(last=False)
    return result
