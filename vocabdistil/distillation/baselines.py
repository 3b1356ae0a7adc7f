"""What a student must beat to be worth its training: its teacher trimmed, and a mean of input embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..models.architectures import body_of, move
from ..models.bodies import build_body
from ..models.shrinking import shrink
from ..models.teachers import Reading, Teacher

__all__ = ["mean_of_embeddings", "trimmed_teacher"]


@dataclass
class _Embeddings(Teacher):
    """A model whose hidden states are its input embeddings.

    Attributes:
        table: ``[V, E]``, a row for every token.
    """

    table: Tensor = torch.empty(0)

    def read(self, input_ids: Tensor, attention_mask: Tensor, *args: object, **kwargs: object) -> Reading:
        return Reading([self.table.to(input_ids.device)[input_ids]])


def mean_of_embeddings(
    teacher: Teacher, rows: Callable[[Tensor], Tensor], tokenizer: PreTrainedTokenizerBase
) -> Teacher:
    """A model without layers: a text's vector is the mean of its tokens' input embeddings.

    Args:
        rows: ``[V_t, E]`` -> ``[V_s, E]``, rows for the student's tokens out of the teacher's.
        tokenizer: the student's.
    """
    weight = teacher.embedding.detach().float().cpu()
    return _Embeddings("mean of input embeddings", teacher.model, tokenizer, prompt=teacher.prompt, table=rows(weight))


def trimmed_teacher(
    teacher: Teacher,
    kept: Sequence[int],
    rows: Callable[[Tensor], Tensor],
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
) -> Teacher:
    """What ``vocabdistil trim`` makes of a teacher for this vocabulary and so many layers.

    Args:
        kept: the teacher's layers that stay.
        texts: what they are fitted to.
    """
    device = teacher.model.device
    move(teacher.whole, "cpu")
    try:
        model = build_body(shrink(teacher, kept, texts).teacher, rows, tokenizer, range(len(kept)))
    finally:
        move(teacher.whole, device)
    model = move(body_of(model), device)
    return replace(teacher, name="trimmed teacher", model=model, tokenizer=tokenizer, masked_lm=None)
