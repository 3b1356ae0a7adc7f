"""Texts as two tokenizers read them, aligned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .batch import AlignedBatch
from .coverage import Coverage
from .methods import align_texts
from .remap import RemapTable
from .surfaces import known
from .vocab import MatchedVocab

__all__ = ["align"]


def align(
    texts: Sequence[str | Sequence[str]],
    teacher: Any,
    student: Any,
    method: str = "boundary",
    max_length: int | Sequence[int | None] | None = None,
    *,
    table: RemapTable | None = None,
    matched: MatchedVocab | None = None,
) -> AlignedBatch:
    """Tokenizes texts for both sides and aligns them.

    Args:
        texts: the texts; one in words, a list of strings, is these with spaces between them.
        teacher, student: ``transformers`` fast tokenizers or ``tokenizers.Tokenizer``, or names of models or folders
            that have one.
        method: ``"boundary"``: the student reads its own tokenization, and both are cut at every byte of the
            text where both have a token boundary; the tokens between two cuts are a pair (M:N). White space
            that a side drops, or that became a space there, belongs to no token; other text that it drops
            (accents, control characters) to the token right before it, or, after white space, to the next one.
            Special tokens pair by role: CLS or BOS with CLS or BOS, SEP or EOS with SEP or EOS. ``"word"``: the
            same for pre-tokenized words, merged where they differ; where a tokenizer has no pre-tokenizer, words
            are what white space separates.
            ``"match"``: the student reads its own tokenization, pairs are equal tokens in order;
            ``"reduce"``: the student reads the teacher's tokens through the remap table, pairs are each
            teacher token and its pieces (both arXiv 2205.02340).
        max_length: tokens of each side at most, special tokens included; or two numbers: those of the teacher
            and those of the student. A tokenizer with ``truncation_side="left"`` keeps the end of what is too long.
        table: the remap table of the two tokenizers, if there is one already (``reduce``).
        matched: their matched vocabulary, if there is one already (``match``).

    Returns:
        Both sides padded to their longest sequence, the span pairs and their coverage, on the CPU: the same mapping as
        that of an :class:`AlignmentCollator`.

    Raises:
        TypeError: texts that are not strings, a tokenizer that is not fast, a table or a matched vocabulary that is
            none.
        ValueError: an unknown method, ``max_length < 1`` or without room for the special tokens, a tokenizer whose
            template has tokens that its vocabulary lacks.
        VocabdistilError: a name or folder without a tokenizer.
    """
    sources = known(teacher, "teacher"), known(student, "student")
    left, right, pairs, counted = align_texts(texts, teacher, student, method, max_length, table, matched, sources)
    found = Coverage.of(left, right, pairs, sources, counted)
    return AlignedBatch(teacher=AlignedBatch(left), student=AlignedBatch(right), pairs=pairs, coverage=found)
