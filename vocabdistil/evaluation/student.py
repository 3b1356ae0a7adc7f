"""Vectors of texts, as a finished model makes them, and how a student's agree with its teacher's."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..alignment.collator import pad
from ..alignment.families import encode
from ..core.errors import VocabdistilError, need_place
from ..models.sentence import (
    SentenceSettings,
    expected_prompt,
    finish,
    lowered,
    pool,
    projected,
    prompt_length,
    read_sentence_settings,
)
from ..models.teachers import Teacher, load_teacher
from .loyalty import pairwise_cosine, regression

__all__ = ["Embedder", "embed", "embedding_loyalty", "load_embedder", "pooled"]


class Embedder(NamedTuple):
    """A model, and what its folder says of the use of its vectors.

    Attributes:
        model: with the prompt that its texts get.
        settings: of a sentence-transformers folder; None: the mean of the last hidden states.
    """

    model: Teacher
    settings: SentenceSettings | None


def load_embedder(
    source: str | os.PathLike,
    argument: str = "models",
    prompt: str | None = None,
    trust_remote_code: bool = False,
    head: bool = False,
) -> Embedder:
    """Loads a model and the sentence-transformers settings of its folder, if there are any.

    Args:
        source: a folder or a model's name on the Hugging Face Hub.
        argument: what an error names.
        prompt: what stands before every text; None: what the folder says.
        trust_remote_code, head: see :func:`vocabdistil.models.teachers.load_teacher`.

    Raises:
        VocabdistilError: the model cannot be loaded, or what its folder says cannot be done with it.
    """
    need_place(source, argument, "a folder or a model's name")
    name = os.fspath(source)
    settings = read_sentence_settings(name, argument)
    folder = name if settings is None else settings.transformer_folder
    model = load_teacher(folder, argument, head, expected_prompt(prompt, settings), trust_remote_code)
    model.name = name
    if settings is not None:
        try:
            finish(torch.zeros(1, model.width * len(settings.pooling)), settings)
        except (KeyError, RuntimeError, ValueError) as error:
            line = f"it has no {error}" if isinstance(error, KeyError) else error
            raise VocabdistilError.of(argument, f"cannot make vectors as the folder {name} says: {line}") from None
    return Embedder(model, settings)


@torch.no_grad()
def pooled(
    model: Teacher,
    texts: Sequence[str],
    max_length: int,
    settings: SentenceSettings | None = None,
    batch: int = 32,
    advance: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """A vector for each text: ``[N, D]`` float32, pooled over its tokens as ``settings`` say, by default their mean.

    Args:
        texts: with the model's prompt before each.
        max_length: tokens of a text at most; fewer if the model or the settings allow fewer.
        batch: texts at once.
        advance: called with how many more texts are done.
    """
    limits = [max_length, model.max_positions]
    if settings is not None and settings.max_seq_length is not None:
        limits.append(settings.max_seq_length)
    rows = encode(model.tokenizer, lowered(texts, settings), "tokenizer", min(limits))
    leading = prompt_length(model.tokenizer, model.prompt, settings)
    # What reads alike is read once.
    numbers: dict[tuple[int, ...], int] = {}
    which = [numbers.setdefault(tuple(row), len(numbers)) for row in rows]
    rows = list(map(list, numbers))
    advance(len(which) - len(rows))
    # Texts of a batch are alike in length, so that little padding is read.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = []
    for start in range(0, len(rows), batch):
        chosen = [rows[i] for i in order[start : start + batch]]
        ids, mask = (x.to(model.model.device) for x in pad(chosen, model.tokenizer.pad_token_id or 0))
        found.append(pool(model.read(ids, mask).layers[0], mask, settings, leading).float().cpu())
        advance(len(chosen))
    return torch.cat(found)[torch.tensor(order).argsort()][torch.tensor(which)]


@torch.no_grad()
def embed(
    model: Teacher,
    texts: Sequence[str],
    max_length: int,
    settings: SentenceSettings | None = None,
    projection: Tensor | None = None,
    bias: Tensor | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """The vectors that a user of the model gets, ``[N, E]`` float32: :func:`pooled`, and the modules that follow.

    With the settings of its own folder it is what ``SentenceTransformer(folder).encode`` gives.

    Args:
        texts: without the model's prompt, which is put before each.
        settings: of the model's own folder; or, with a projection, of its teacher's.
        projection, bias: ``[D_t, D_s]``, ``[D_t]``, from the model's hidden states to its teacher's.
    """
    vectors = pooled(model, [model.prompt + text for text in texts], max_length, settings, advance=advance)
    if projection is None:
        return finish(vectors, settings)
    if settings is None:
        projection, bias = projection.float().cpu(), None if bias is None else bias.float().cpu()
        return F.linear(vectors, projection, bias)
    return finish(vectors, projected(settings, projection, bias))


def embedding_loyalty(
    ours: Tensor, theirs: Tensor, projection: Tensor | None = None, bias: Tensor | None = None
) -> dict[str, float]:
    """How a student's vectors of texts agree with its teacher's.

    Args:
        ours, theirs: ``[N, n D_s]``, ``[N, n D_t]``, of the same texts, each of n poolings.
        projection, bias: ``[D_t, D_s]``, ``[D_t]``, from the student's vectors to the teacher's.

    Returns:
        ``pearson`` and ``spearman``: regression loyalty of the cosine similarities of all pairs of texts; and
        ``cosine``, the mean cosine of both vectors of a text, where they are equally wide or there is a projection.

    Raises:
        VocabdistilError: fewer than three texts.
    """
    if len(ours) < 3:
        raise VocabdistilError.of("text", f"expected at least 3 distinct texts, got {len(ours)}")
    pearson, spearman = regression(pairwise_cosine(ours), pairwise_cosine(theirs))
    found = {"pearson": float(pearson), "spearman": float(spearman)}
    mapped = ours
    if projection is not None:
        # Each of several poolings on its own.
        each = ours.unflatten(-1, (-1, projection.shape[1]))
        mapped = F.linear(each, projection.float().cpu(), None if bias is None else bias.float().cpu()).flatten(1)
    if mapped.shape == theirs.shape:
        found["cosine"] = float(F.cosine_similarity(mapped, theirs).mean())
    return found
