"""How often tokens stand in a text, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch import Tensor

from ..alignment.families import backend_of, chunks, encode

__all__ = ["count_tokens", "frequent_characters"]

_T = TypeVar("_T")
_R = TypeVar("_R")
_CHUNK_TEXTS, _CHUNK_CHARACTERS = 4096, 1 << 20
# The share of characters that SentencePiece's trainer gives tokens of their own by default.
_COVERAGE = 0.9995


def _one_ahead(function: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
    """The results in order; the next one is made while one is used, as a tokenizer needs no lock of Python's."""
    with ThreadPoolExecutor(1) as worker:
        pending: Future[_R] | None = None
        for item in items:
            following = worker.submit(function, item)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def _size(backend: Tokenizer) -> int:
    """The largest id + 1."""
    if isinstance(backend.model, models.Unigram):  # a list, without holes; as a dictionary 250,000 tokens take 0.1 s
        added = max(backend.get_added_tokens_decoder(), default=-1)
        return max(backend.get_vocab_size(with_added_tokens=False), added + 1)
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def count_tokens(tokenizer: Any, texts: Iterable[str], max_length: int | None = None) -> Tensor:
    """How often each id occurs in ``texts``, the special tokens around each of them included.

    Args:
        texts: read once, a chunk at a time.
        max_length: tokens that are read of each text, ``None`` for all.

    Returns:
        int64 ``[V]``, ``V`` the largest id + 1.
    """
    counts = np.zeros(_size(backend_of(tokenizer, "tokenizer")), dtype=np.int64)
    parts = chunks(texts, _CHUNK_TEXTS, _CHUNK_CHARACTERS)
    for rows in _one_ahead(lambda chunk: encode(tokenizer, chunk, "tokenizer", max_length), parts):
        read = np.fromiter(chain.from_iterable(rows), dtype=np.int64)
        counts += np.bincount(read, minlength=len(counts))
    return torch.from_numpy(counts)


def frequent_characters(counts: Mapping[str, int], vocab_size: int) -> list[str]:
    """The characters that get a token of their own, the most frequent first.

    All of them while they take a quarter of the vocabulary at most. Of more, the rarest go without: as many as lie
    beyond that quarter and make up less than 0.05% of the text together (SentencePiece's ``character_coverage``).
    """
    order = sorted(counts, key=lambda character: (-counts[character], character))
    read = np.cumsum([counts[character] for character in order], dtype=np.float64)
    if not order:
        return []
    return order[: max(vocab_size // 4, 1 + int(np.searchsorted(read, _COVERAGE * read[-1])))]
