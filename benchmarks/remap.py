"""Remap table and match alignment against plain Python, on made-up vocabularies by default."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import tokenizers
import torch

from vocabdistil.align import match_pairs
from vocabdistil.remap import RemapTable
from vocabdistil.vocab import MatchedVocab

_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"


def wordpiece(size: int) -> tokenizers.Tokenizer:
    """A WordPiece tokenizer of ``size`` tokens: letters first, then all strings of letters by length."""
    tokens = [*_SPECIALS, *_LETTERS, *("##" + letter for letter in _LETTERS)]
    longer = ("".join(c) for n in itertools.count(2) for c in itertools.product(_LETTERS, repeat=n))
    for i, text in enumerate(itertools.islice(longer, size - len(tokens))):
        tokens.append(text if i % 2 else "##" + text)
    model = tokenizers.models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]")
    return tokenizers.Tokenizer(model)


def zipf_ids(batch: int, length: int, vocab: int, seed: int = 0) -> torch.Tensor:
    """int64 [batch, length]: id r about as often as 1 / (r + 1)."""
    uniform = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (vocab**uniform).long().clamp_(max=vocab) - 1


def _measure(run: Callable[[], Any], repeats: int = 30) -> tuple[float, float, float]:
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    cuts = statistics.quantiles(times, n=10)
    return cuts[1], statistics.median(times), cuts[7]


def _row(
    provider: str, case: str, times: tuple[float, float, float], tokens: int, size: int
) -> dict[str, Any]:
    return {
        "provider": provider,
        "case": case,
        "p20": times[0],
        "p50": times[1],
        "p80": times[2],
        "tokens_per_s": tokens / times[1],
        "bytes": size,
    }


def rows(
    teacher: Any = None,
    student: Any = None,
    ids: torch.Tensor | None = None,
    own_ids: torch.Tensor | None = None,
) -> Iterator[dict[str, Any]]:
    """One row per provider and case.

    Args:
        teacher, student: WordPiece tokenizers; made-up ones of 120,000 and 5,000 tokens by default.
        ids: int64 ``[B, L]`` teacher ids; 1,000 x 512 by default.
        own_ids: int64 ``[B, L']`` student ids of the same texts, for the match; the remapped ids by default.
    """
    teacher, student = teacher or wordpiece(120_000), student or wordpiece(5_000)
    build = _measure(lambda: RemapTable.from_tokenizers(teacher, student), repeats=5)
    table = RemapTable.from_tokenizers(teacher, student)
    nbytes = 4 * (table.indptr.numel() + table.ids.numel())
    yield _row("vocabdistil", f"build {len(table)} rows", build, len(table), nbytes)

    ids = zipf_ids(1000, 512, len(table)) if ids is None else ids
    mask = torch.ones_like(ids)
    out = table.remap(ids, mask)
    nbytes = 8 * (ids.numel() + mask.numel() + 2 * out.input_ids.numel()) + 16 * len(out.pairs)
    case = f"remap {ids.shape[0]}x{ids.shape[1]}"
    yield _row("vocabdistil", case, _measure(lambda: table.remap(ids, mask)), ids.numel(), nbytes)
    by_id = {t: table.rows(t) for t in range(len(table))}
    lists = ids.tolist()
    loop = _measure(lambda: [[piece for t in row for piece in by_id[t]] for row in lists], repeats=5)
    yield _row("python dict", case, loop, ids.numel(), nbytes)

    matched = MatchedVocab.from_tokenizers(teacher, student)
    own_ids = out.input_ids if own_ids is None else own_ids
    tokens = ids.numel() + own_ids.numel()
    case = f"match {ids.shape[0]}x{ids.shape[1]}"
    yield _row("vocabdistil", case, _measure(lambda: match_pairs(ids, own_ids, matched)), tokens, 8 * tokens)
