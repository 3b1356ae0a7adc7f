"""The student's vocabulary: new tokens, some of the teacher's, or those of another tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..core.errors import need, spell
from .counting import count_tokens
from .rebuilding import Vocabulary, save_tokenizer
from .teachers import load_tokenizer
from .training_vocabulary import train_vocabulary, train_wordpiece
from .trimming_vocabulary import trim_vocabulary

__all__ = [
    "Vocabulary",
    "count_tokens",
    "save_tokenizer",
    "train_vocabulary",
    "train_wordpiece",
    "trim_vocabulary",
    "vocabulary_from",
]


def vocabulary_from(
    source: str | os.PathLike,
    teacher: Any,
    texts: Iterable[str] | None = None,
    vocab_size: int | None = None,
    family: str | None = None,
    embedding: Tensor | None = None,
    keep: Iterable[int] = (),
) -> Vocabulary:
    """What the option ``vocabulary`` names.

    Args:
        source: ``"train"``: new tokens for the texts; ``"trim"``: those of the teacher's tokens that the texts need
            most; else the folder or the name of a fast tokenizer, which is taken as it is.
        teacher: the teacher's tokenizer.
        texts: read once, for ``"train"`` and ``"trim"`` only.
        vocab_size: tokens of the result, for the same two.
        family: for ``"train"``: another family of tokenizers than the teacher's, one of ``core.options.FAMILIES``.
        embedding: the teacher's input embeddings, for ``"trim"``: see :func:`trim_vocabulary`.
        keep: ids of the teacher that are kept whatever the texts, for ``"trim"``.

    Raises:
        VocabdistilError: options that ``source`` needs and lacks, or has no use for; as :func:`train_vocabulary`,
            :func:`trim_vocabulary` and :func:`load_tokenizer`.
    """
    asked = spell("vocabulary", os.fspath(source))
    if source not in ("train", "trim"):
        need(vocab_size is None, "vocab_size", f"nothing beside {asked}", vocab_size)
        need(family is None, "family", f"nothing beside {asked}", family)
        return Vocabulary(load_tokenizer(source, "vocabulary"), "given")
    need(texts is not None, "text", f"a text for {asked}", texts)
    need(vocab_size is not None and vocab_size > 0, "vocab_size", f"a number for {asked}", vocab_size)
    assert texts is not None and vocab_size is not None
    if source == "train":
        return train_vocabulary(teacher, texts, vocab_size, family)
    need(family is None, "family", f"nothing beside {asked}", family)
    return trim_vocabulary(teacher, texts, vocab_size, embedding=embedding, keep=keep)
