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

from . import _C
from ._tokenizers import ROLES, TokenizerInfo, backend_of, read_tokenizer

__all__ = ["Known", "Surfaces", "known", "read_surfaces", "template_ends"]

UNKNOWN, TEXT, BYTES = 0, 1, 2  # the kinds of csrc/remap/boundary.h
_MARK = "▁"
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
        mark: what a space is inside tokens (``"▁"``), or ``""``.
        prefix, suffix: what marks a token inside a word (``"##"``), and one at a word's end (``"</w>"``).
        texts: the bytes that each id stands for, spaces as spaces.
        kinds: one of UNKNOWN, TEXT, BYTES for each id.
        byte_ids: the ids of single bytes by value, for tokenizers that fall back to bytes.
        types: the types of the normalizer, the pre-tokenizer and the decoder and of what they consist of.
        native: the same, for the native code.
    """

    byte_level: bool
    mark: str
    prefix: str
    suffix: str
    texts: list[bytes]
    kinds: bytes
    byte_ids: dict[int, int]
    types: frozenset[str]
    native: Any

    @property
    def marks_words(self) -> bool:
        """Whether a token at the start of a word begins with a space."""
        return self.byte_level or bool(self.mark)


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
    """What normalizers make of single characters: lower case, compatibility forms, no accents, nothing."""
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
        stripped = [
            "".join(d for d in unicodedata.normalize(form, lower) if unicodedata.category(d) != "Mn")
            for form in ("NFD", "NFKD")
        ]
        options = dict.fromkeys((lower, compatible, compatible.lower(), *stripped))
        options.pop(c, None)
        options.pop("", None)
        if options:
            folds.append((code, list(options)))
    return folds


def read_surfaces(info: TokenizerInfo) -> Surfaces:
    """Reads what the tokens of a tokenizer stand for."""
    backend = info.backend
    normalizer = _state(backend.normalizer)
    parts = [*_parts(normalizer), *_parts(_state(backend.pre_tokenizer)), *_parts(_state(backend.decoder))]
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
        falls_back = info.kind == "Unigram" and all(backend.token_to_id(f"<0x{b:02X}>") is not None for b in range(256))
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
            try:
                kind, text = BYTES, bytes([BYTE_OF[c] for c in token])
            except KeyError:
                text = token.encode()
        elif falls_back and (found := _BYTE_TOKEN.fullmatch(token)):
            kind, text = BYTES, bytes([int(found[1], 16)])
        else:
            if prefix and len(token) > len(prefix) and token.startswith(prefix):
                token = token[len(prefix) :]
            if suffix and token.endswith(suffix):
                token = token[: -len(suffix)]
            text = (token.replace(mark, " ") if mark else token).encode()
        if kind == BYTES and falls_back and not byte_level:
            byte_ids[text[0]] = i
        texts.append(text)
        kinds.append(kind)
    folds = _folds() if normalizer is not None and not byte_level else []
    native = _C.Surfaces(texts, bytes(kinds), not byte_level, folds)
    return Surfaces(byte_level, mark, prefix, suffix, texts, bytes(kinds), byte_ids, types, native)


def template_ends(backend: tokenizers.Tokenizer, encodings: list[Any]) -> tuple[int, int]:
    """How many special tokens the template puts before and after a text."""
    count = backend.num_special_tokens_to_add(is_pair=False)
    if not count:
        return 0, 0
    for encoding in (*encodings[:8], *(backend.encode(text) for text in ("a", "0 .", "я", "字"))):
        mask = encoding.special_tokens_mask
        if 0 in mask:
            lead = mask.index(0)
            return lead, mask[::-1].index(0)
    return count, 0


class Known:
    """A tokenizer with what has been read of it."""

    def __init__(self, info: TokenizerInfo) -> None:
        self.info = info

    @functools.cached_property
    def surfaces(self) -> Surfaces:
        return read_surfaces(self.info)


_CACHE_SIZE = 8
_cache: OrderedDict[int, tuple[Any, tuple, Known]] = OrderedDict()
_lock = threading.Lock()


def known(tokenizer: Any, name: str) -> Known:
    """``read_tokenizer``, once per tokenizer: again only if its vocabulary or its special tokens have changed.

    Raises:
        TypeError: not a fast tokenizer.
    """
    backend = backend_of(tokenizer, name)
    size = backend.get_vocab_size()
    samples = tuple(backend.id_to_token(i) for i in range(0, size, size // 16 + 1))
    roles = tuple(str(getattr(tokenizer, f"{role}_token", None)) for role in ROLES)
    state = size, samples, roles
    with _lock:
        entry = _cache.get(id(tokenizer))
        if entry is not None and entry[1] == state:
            _cache.move_to_end(id(tokenizer))
            return entry[2]
    result = Known(read_tokenizer(tokenizer, name))
    with _lock:
        # The tokenizer itself is kept, so that no other can take its id.
        _cache[id(tokenizer)] = tokenizer, state, result
        while len(_cache) > _CACHE_SIZE:
            _cache.popitem(last=False)
    return result
