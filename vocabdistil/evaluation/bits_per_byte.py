"""What causal models are worth on a text, whatever their vocabularies: :func:`bits_per_byte`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..alignment.collator import pad
from ..alignment.families import backend_of, plain_settings
from ..core.errors import need

__all__ = ["LOGITS_AT_ONCE", "bits_per_byte", "need_start", "rows_from_start", "start_token"]

# Logits that exist at a time: 512 MiB of float32.
LOGITS_AT_ONCE = 1 << 27


@torch.no_grad()
def bits_per_byte(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    max_length: int = 512,
    batch: int = 8,
    advance: Callable[[int], None] = lambda count: None,
) -> float:
    """``sum_texts sum_i -log2 p(token_i | the tokens before it) / bytes of the texts in UTF-8``.

    Models with different vocabularies can be compared, as each predicts every byte of the texts: the first token too,
    after the token that begins a text (see :func:`start_token`), and all of a text that is longer than
    ``max_length``, in windows that begin with half a window of what was predicted before. The end of a text has no
    bytes and is not predicted. An unknown token counts as if it spelled its bytes, so a tokenizer that has one may
    seem better than it is.

    Args:
        model: a causal model, whose output has ``logits``; its mode is given back.
        tokenizer: its own fast tokenizer of ``transformers``.
        texts: as they are read: no template, no prompt is put around them.
        max_length: tokens that are read at once; fewer if the model has fewer positions.
        batch: windows at once; fewer where their logits would take more than 512 MiB.
        advance: called with how many more windows are done.

    Raises:
        TypeError: not a fast tokenizer.
        ValueError: no bytes in the texts, a tokenizer without a token to begin with, ``max_length`` below 2.
    """
    total = sum(len(text.encode()) for text in texts)
    if not total:
        raise ValueError("texts: expected at least one byte of text, got none")
    if max_length < 2:
        raise ValueError(f"max_length: expected at least 2, the first token and one to predict, got {max_length}")
    length = min(max_length, getattr(getattr(model, "config", None), "max_position_embeddings", None) or max_length)
    windows = [window for row in rows_from_start(tokenizer, texts) for window in _windows(row, length)]
    # Windows of a batch are alike in length, so that little padding is read.
    windows.sort(key=lambda window: len(window[0]))
    device, training = next(model.parameters()).device, model.training
    model.eval()
    bits, done, pad_id = 0.0, 0, tokenizer.pad_token_id or 0
    at_once = max(1, min(batch, LOGITS_AT_ONCE // (length * len(tokenizer))))
    try:
        while done < len(windows):
            chosen = windows[done : done + at_once]
            ids, mask = (x.to(device) for x in pad([row for row, _ in chosen], pad_id))
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for row, z, (tokens, first) in zip(ids, logits, chosen, strict=True):
                z = z[first - 1 : len(tokens) - 1]
                z = z.double() if z.dtype == torch.float64 else z.float()
                wanted = row[first : len(tokens), None]
                surprise = z.logsumexp(-1) - z.gather(-1, wanted)[:, 0]
                bits += float(surprise.sum(dtype=torch.float64)) / math.log(2)
            done += len(chosen)
            advance(len(chosen))
    finally:
        model.train(training)
    return bits / total


def start_token(tokenizer: Any) -> int | None:
    """The id of the token after which a text begins: BOS, else EOS, which ends the text before; None without either."""
    return next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)


def need_start(tokenizer: Any, argument: str) -> None:
    """Raises VocabdistilError where the tokenizer of a decoder has no :func:`start_token`."""
    found = start_token(tokenizer) is not None
    need(found, argument, "a decoder whose tokenizer has a bos_token or an eos_token", "neither")


def rows_from_start(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text after :func:`start_token`, without the tokenizer's template.

    Raises:
        TypeError: not a fast tokenizer.
        ValueError: it has neither token.
    """
    backend = backend_of(tokenizer, "tokenizer")
    start = start_token(tokenizer)
    if start is None:
        raise ValueError("tokenizer: expected a bos_token or an eos_token, after which a text begins, got neither")
    with plain_settings(backend):
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [[start, *encoding.ids] for encoding in encodings]


def _windows(row: list[int], length: int) -> Iterator[tuple[list[int], int]]:
    """Parts of a row, and in each the place of the first token to predict, so that each but the row's first is
    predicted once."""
    if len(row) > 1:
        yield row[:length], 1
    end, context = length, length // 2
    while end < len(row):
        start = end - context
        yield row[start : start + length], context
        end = start + length
