"""What a finished student is worth beside its teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..alignment.collator import pad
from ..alignment.families import encode
from ..core.errors import VocabdistilError
from ..models.sentence import SentenceSettings, pool
from ..models.teachers import Teacher
from .loyalty import pairwise_cosine, regression

__all__ = ["embedding_loyalty", "pooled"]


@torch.no_grad()
def pooled(
    model: Teacher, texts: Sequence[str], max_length: int, settings: SentenceSettings | None = None, batch: int = 32
) -> Tensor:
    """A vector for each text: ``[N, D]`` float32, pooled over its tokens as ``settings`` say, by default their mean."""
    length = min(max_length, model.max_positions)
    rows = encode(model.tokenizer, list(texts), "tokenizer", length)
    # Texts of a batch are alike in length, so that little padding is read.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = []
    for start in range(0, len(rows), batch):
        chosen = [rows[i] for i in order[start : start + batch]]
        ids, mask = (x.to(model.model.device) for x in pad(chosen, model.tokenizer.pad_token_id or 0))
        found.append(pool(model.read(ids, mask).layers[0], mask, settings).float().cpu())
    return torch.cat(found)[torch.tensor(order).argsort()]


def embedding_loyalty(
    teacher: Teacher,
    student: Teacher,
    texts: Sequence[str],
    max_length: int,
    settings: SentenceSettings | None = None,
    projection: Tensor | None = None,
    bias: Tensor | None = None,
) -> dict[str, float]:
    """How the student's vectors of texts agree with the teacher's.

    Args:
        texts: with the prompt that both expect.
        settings: how both pool.
        projection, bias: ``[D_t, D_s]``, ``[D_t]``, from the student's hidden states to the teacher's.

    Returns:
        ``pearson`` and ``spearman``: regression loyalty of the cosine similarities of all pairs of texts; and
        ``cosine``, the mean cosine of both vectors of a text, where they are equally wide or there is a projection.

    Raises:
        VocabdistilError: fewer than three texts.
    """
    if len(texts) < 3:
        raise VocabdistilError(f"--text: expected at least 3 distinct texts, got {len(texts)}")
    ours, theirs = (pooled(model, texts, max_length, settings) for model in (student, teacher))
    pearson, spearman = regression(pairwise_cosine(ours), pairwise_cosine(theirs))
    found = {"pearson": float(pearson), "spearman": float(spearman)}
    mapped = ours
    if projection is not None:
        mapped = F.linear(ours, projection.float().cpu()) + (0 if bias is None else bias.float().cpu())
    if mapped.shape == theirs.shape:
        found["cosine"] = float(F.cosine_similarity(mapped, theirs).mean())
    return found
