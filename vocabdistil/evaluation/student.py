"""What a finished student is worth beside its teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..alignment.collator import pad
from ..alignment.families import encode
from ..core.errors import VocabdistilError
from ..models.teachers import Teacher
from .loyalty import mean_over_tokens, pairwise_cosine, regression

__all__ = ["embedding_loyalty", "pooled"]


@torch.no_grad()
def pooled(model: Teacher, texts: Sequence[str], max_length: int, batch: int = 32) -> torch.Tensor:
    """Mean last hidden state over the tokens of each text: ``[N, D]`` float32."""
    found = []
    for start in range(0, len(texts), batch):
        length = min(max_length, model.max_positions)
        rows = encode(model.tokenizer, list(texts[start : start + batch]), "tokenizer", length)
        ids, mask = pad(rows, model.tokenizer.pad_token_id)
        hidden = model.read(ids, mask).layers[0]
        found.append(mean_over_tokens(hidden, mask))
    return torch.cat(found)


def embedding_loyalty(teacher: Teacher, student: Teacher, texts: Sequence[str], max_length: int) -> dict[str, float]:
    """Regression loyalty of the cosine similarities of all pairs of texts: ``pearson`` and ``spearman``.

    Raises:
        VocabdistilError: fewer than three texts.
    """
    if len(texts) < 3:
        raise VocabdistilError(f"--text: expected at least 3 distinct texts, got {len(texts)}")
    ours, theirs = (pairwise_cosine(pooled(model, texts, max_length)) for model in (student, teacher))
    pearson, spearman = regression(ours, theirs)
    return {"pearson": float(pearson), "spearman": float(spearman)}
