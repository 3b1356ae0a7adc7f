"""Tokenizers and texts that the alignment tests share, and the rules in plain Python."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def small_text(lines: int = 400) -> list[str]:
    rng = random.Random(7)
    stems = ["river", "stone", "walk", "quiet", "марш", "снег", "город", "light", "morn", "été", "straße"]
    ends = ["", "s", "ing", "ed", "er", "ами", "ов", "ly", "ness", "42"]
    words = [stem + end for stem in stems for end in ends]
    return [" ".join(rng.choices(words, k=rng.randint(3, 14))) + rng.choice(".!?") for _ in range(lines)]


def russian_text(lines: int = 2000) -> list[str]:
    folder = os.environ.get("VOCABDISTIL_DATA")
    if not folder:
        pytest.skip("VOCABDISTIL_DATA is not set")
    path = Path(folder) / "war_and_peace_ru.txt"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    with path.open(encoding="utf-8") as file:
        return [line.strip() for _, line in zip(range(2 * lines), file, strict=False) if line.strip()][:lines]


def train(texts: list[str], size: int, lowercase: bool = False) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIALS, show_progress=False)
    )
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    return tokenizer


def wordpiece(tokens: list[str], **options: object) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    return tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", **options))


def row_rule(token: str, vocab: dict[str, int], prefix: str = "##", max_chars: int = 100) -> list[int]:
    """The row of a token that is not special."""
    unk = [vocab["[UNK]"]]
    inside = token.startswith("##") and token != "##"
    text = token[2:] if inside else token
    if re.fullmatch(r"\[unused\d+\]", token) or not text or len(text) > max_chars:
        return unk
    row, start = [], 0
    while start < len(text):
        lead = prefix if inside or start else ""
        end = next((e for e in range(len(text), start, -1) if lead + text[start:e] in vocab), None)
        if end is None:
            return unk
        row.append(vocab[lead + text[start:end]])
        start = end
    return row


def match_rule(teacher: list[str | None], student: list[str | None]) -> list[tuple[int, int]]:
    """Pairs (student position, teacher position) of equal tokens, taken greedily; None equals nothing."""
    pairs, last = [], -1
    for i, token in enumerate(teacher):
        j = next(
            (j for j in range(last + 1, len(student)) if token is not None and student[j] == token), None
        )
        if j is not None:
            pairs.append((j, i))
            last = j
    return pairs
