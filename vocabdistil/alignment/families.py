"""Reads what the alignments need out of a Hugging Face tokenizer."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tokenizers

__all__ = [
    "ROLES",
    "TokenizerInfo",
    "backend_of",
    "check_room",
    "chunks",
    "encode",
    "pairs_by_role",
    "plain_settings",
    "read_tokenizer",
    "template_ends",
]

if hasattr(os, "register_at_fork"):

    def _one_thread() -> None:
        """A forked child has none of its parent's threads; where parallel work was asked for, ``tokenizers`` would wait
        for them."""
        if "TOKENIZERS_PARALLELISM" in os.environ:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"

    os.register_at_fork(after_in_child=_one_thread)

# Of a token that has several (GPT-2's <|endoftext|> is eos, bos and unk) the first that the other side has counts.
ROLES = ("eos", "sep", "bos", "cls", "mask", "pad", "unk")
# Roles that stand in for one that a tokenizer does not have.
_SUBSTITUTE = {"cls": "bos", "bos": "cls", "sep": "eos", "eos": "sep"}
# What a bare tokenizers.Tokenizer does not say is taken from the strings that everybody uses.
_CONVENTION = {
    "[UNK]": "unk",
    "<unk>": "unk",
    "[PAD]": "pad",
    "<pad>": "pad",
    "[MASK]": "mask",
    "<mask>": "mask",
    "[CLS]": "cls",
    "[SEP]": "sep",
    "<s>": "bos",
    "<bos>": "bos",
    "<|begin_of_text|>": "bos",
    "<|startoftext|>": "bos",
    "<｜begin▁of▁sentence｜>": "bos",
    "</s>": "eos",
    "<eos>": "eos",
    "<|end_of_text|>": "eos",
    "<|endoftext|>": "eos",
    "<｜end▁of▁sentence｜>": "eos",
    "<|finetune_right_pad_id|>": "pad",
    "<|padding|>": "pad",
}


@dataclass(frozen=True)
class TokenizerInfo:
    """One tokenizer, read once.

    Attributes:
        backend: the ``tokenizers.Tokenizer`` behind it.
        kind: the name of its model, such as ``"WordPiece"``.
        tokens: the token string of each id, ``None`` for a hole; ``len(tokens)`` is the largest id + 1.
        pieces: the same for the model alone, without added tokens.
        prefix: what marks a token that continues a word (``"##"``), or ``""``.
        max_chars: the longest word in characters that the model segments, or ``None``.
        roles: ids of the special tokens by role (``unk pad mask cls sep bos eos``), those that exist.
        special: ids of special tokens by string, with and without a role.
        added: ids of the other added tokens by string.
        keeps_last: whether texts that are too long lose their beginning (``truncation_side="left"``).
    """

    backend: tokenizers.Tokenizer
    kind: str
    tokens: list[str | None]
    pieces: list[str | None]
    prefix: str
    max_chars: int | None
    roles: dict[str, int]
    special: dict[str, int]
    added: dict[str, int]
    keeps_last: bool = False

    @property
    def unk_id(self) -> int | None:
        return self.roles.get("unk")

    @property
    def pad_id(self) -> int | None:
        return self.roles.get("pad")

    def ids(self) -> dict[str, int]:
        """Token string to id, added tokens included."""
        return {token: i for i, token in enumerate(self.tokens) if token is not None}


def backend_of(tokenizer: Any, name: str) -> tokenizers.Tokenizer:
    """The ``tokenizers.Tokenizer`` of a fast tokenizer.

    Raises:
        TypeError: a slow tokenizer, or none at all; the message names the argument.
    """
    for candidate in (
        tokenizer,
        getattr(tokenizer, "backend_tokenizer", None),
        getattr(tokenizer, "_tokenizer", None),
    ):
        if isinstance(candidate, tokenizers.Tokenizer):
            return candidate
    slow = " (a slow tokenizer)" if getattr(tokenizer, "is_fast", None) is False else ""
    raise TypeError(
        f"{name}: expected a fast tokenizer of transformers or a tokenizers.Tokenizer, "
        f"got {type(tokenizer).__name__}{slow}"
    )


def _by_id(vocab: dict[str, int]) -> list[str | None]:
    tokens: list[str | None] = [None] * (max(vocab.values(), default=-1) + 1)
    for token, i in vocab.items():
        tokens[i] = token
    return tokens


def read_tokenizer(tokenizer: Any, name: str) -> TokenizerInfo:
    """Reads a ``transformers`` fast tokenizer or a ``tokenizers.Tokenizer``; ``name`` is the argument's name.

    Raises:
        TypeError: not a fast tokenizer.
    """
    backend = backend_of(tokenizer, name)
    model = backend.model
    vocab = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    special = {token.content: i for i, token in added.items() if token.special}

    roles: dict[str, int] = {}
    if tokenizer is not backend:
        for role in ROLES:
            token = getattr(tokenizer, f"{role}_token", None)
            if token is not None and str(token) in vocab:
                roles[role] = vocab[str(token)]
    for content in (getattr(model, "unk_token", None), *_CONVENTION):
        if content and content in vocab:
            roles.setdefault(_CONVENTION.get(content, "unk"), vocab[content])

    tokens = _by_id(vocab)
    special.update({token: i for i in roles.values() if (token := tokens[i]) is not None})
    return TokenizerInfo(
        backend=backend,
        kind=type(model).__name__,
        tokens=tokens,
        pieces=_by_id(backend.get_vocab(with_added_tokens=False)) if added else tokens,
        prefix=getattr(model, "continuing_subword_prefix", None) or "",
        max_chars=getattr(model, "max_input_chars_per_word", None),
        roles=roles,
        special=special,
        added={token.content: i for i, token in added.items() if not token.special},
        keeps_last=keeps_last(tokenizer, backend),
    )


def keeps_last(tokenizer: Any, backend: tokenizers.Tokenizer) -> bool:
    """Whether the tokenizer cuts long texts off at their beginning."""
    side = getattr(tokenizer, "truncation_side", None)
    if side is None:
        # While a reader has switched the settings off, they are there.
        with _settings_lock:
            _, truncation, _ = _readers.get(id(backend), (0, backend.truncation, None))
        side = (truncation or {}).get("direction", "right")
    return str(side).lower() == "left"


# The backends that are being read: how many readers each has, and the settings to give back after the last of them.
_readers: dict[int, tuple[int, Any, Any]] = {}
_settings_lock = threading.Lock()


def pairs_by_role(source: TokenizerInfo, target: TokenizerInfo) -> list[tuple[int, int]]:
    """A special token of one side and that of the same role, or of the one in its place, on the other; the pairs that
    count most first."""
    pairs = []
    for role in ROLES:
        i, j = source.roles.get(role), target.roles.get(role, target.roles.get(_SUBSTITUTE.get(role, "")))
        if i is not None and j is not None:
            pairs.append((i, j))
    return pairs


@contextmanager
def plain_settings(backend: tokenizers.Tokenizer) -> Iterator[None]:
    """No padding and no truncation: a tokenizer file may bring its own of both.

    Several threads may read one tokenizer: the first switches its settings off, the last gives them back.
    """
    with _settings_lock:
        count, truncation, padding = _readers.get(id(backend), (0, backend.truncation, backend.padding))
        if not count:
            # A tokenizer without settings is left alone: who encodes with it elsewhere is not disturbed.
            if truncation is not None:
                backend.no_truncation()
            if padding is not None:
                backend.no_padding()
        _readers[id(backend)] = count + 1, truncation, padding
    try:
        yield
    finally:
        with _settings_lock:
            count, truncation, padding = _readers.pop(id(backend))
            if count > 1:
                _readers[id(backend)] = count - 1, truncation, padding
            else:
                if truncation is not None:
                    backend.enable_truncation(**truncation)
                if padding is not None:
                    backend.enable_padding(**padding)


def template_ends(backend: tokenizers.Tokenizer, encodings: list[Any]) -> tuple[int, int]:
    """How many special tokens the template puts before and after a text."""
    count = backend.num_special_tokens_to_add(is_pair=False)
    if not count:
        return 0, 0
    probes = (backend.encode(text) for text in ("a", "0 .", "я", "字"))
    for encoding in itertools.chain(encodings[:8], probes):
        mask = encoding.special_tokens_mask
        if 0 in mask:
            lead = mask.index(0)
            return lead, mask[::-1].index(0)
    return count, 0


def chunks(texts: Iterable[str], count: int, characters: int) -> Iterator[list[str]]:
    """Texts in lists of ``count`` at most, that end earlier where they hold so many characters."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if len(chunk) == count or size >= characters:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def check_room(backend: tokenizers.Tokenizer, name: str, max_length: int | None) -> None:
    """Raises ValueError for a ``max_length`` without room for the special tokens."""
    specials = backend.num_special_tokens_to_add(is_pair=False)
    if max_length is not None and max_length < specials:
        raise ValueError(
            f"max_length: expected at least the {specials} special tokens of {name}, got {max_length}"
        )


def check_template(info: TokenizerInfo, name: str) -> None:
    """Raises ValueError if the template puts tokens around a text that the vocabulary does not have."""
    with plain_settings(info.backend):
        ids = info.backend.encode("").ids
    for i in ids:
        if i >= len(info.tokens) or info.tokens[i] is None:
            raise ValueError(
                f"{name}: expected a tokenizer whose template puts tokens of its vocabulary around a text, got id {i}, "
                "which it does not have"
            )


def encode(
    tokenizer: Any, texts: list[str], name: str, max_length: int | None = None, keep_last: bool | None = None
) -> list[list[int]]:
    """Token ids of each text with special tokens, cut to ``max_length``, not padded.

    ``keep_last``: what is too long loses its beginning; None: as the tokenizer says.

    Raises:
        ValueError: ``max_length`` without room for the special tokens.
    """
    backend = backend_of(tokenizer, name)
    check_room(backend, name, max_length)
    with plain_settings(backend):
        encodings = backend.encode_batch_fast(texts)
        rows = [encoding.ids for encoding in encodings]
        # Not by the tokenizer's own truncation: another thread may want another length of it.
        if max_length is not None and any(len(row) > max_length for row in rows):
            lead, trail = template_ends(backend, encodings)
            if keep_last is None:
                keep_last = keeps_last(tokenizer, backend)
            ends = (lead, max_length - lead) if keep_last else (max_length - trail, trail)
            rows = [row[: ends[0]] + row[len(row) - ends[1] :] if len(row) > max_length else row for row in rows]
    return rows
