"""A draft head: a decoder's output layer for the tokens that a text needs most, for speculative decoding."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..core.console import Reporter
from ..core.errors import need
from ..core.files import write_json
from ..core.options import names_of
from ..evaluation.bits_per_byte import rows_from_start
from ..evaluation.card import draft_card
from ..evaluation.report import draft_line
from ..models.draft_vocabulary import draft_ids, draft_maps
from ..models.named_tokens import named_ids
from ..models.vocabularies import count_tokens
from .folder import DistillResult, write_card
from .options import VOCAB_SIZE, TrimConfig
from .run_folder import RunFolder
from .student import Source
from .text import Digested, Prefixed, sample_text
from .text_store import watched

__all__ = ["make_draft_head"]

# Texts that are not counted, to see how much of their tokens the head can predict: this share of all, at most so many.
_HELD_SHARE, _MOST_HELD = 0.1, 1024


def make_draft_head(
    config: TrimConfig, source: Source, text: Iterable[str], folder: RunFolder
) -> DistillResult:
    """What :func:`vocabdistil.trim` does if it is asked for a draft head.

    ``model.safetensors`` of the folder holds ``lm_head.weight`` ``[N, D]``, the teacher's rows of N tokens, and the
    maps ``d2t`` and ``t2d`` of :func:`vocabdistil.models.draft_vocabulary.draft_maps`; ``config.json`` their sizes.
    Input embeddings stay the teacher's.

    Raises:
        VocabdistilError: an output layer with a bias, for which such heads have no place; fewer than two different
            texts; no room for the special tokens.
    """
    say, teacher = Reporter(config.quiet), source.teacher
    weight, bias = teacher.output_layer
    kind = teacher.model.config.model_type
    need(bias is None, "draft", "a decoder whose output layer has no bias", kind)
    say.status("Reading the text")
    read = Digested(watched(text, config.quiet))
    sample = sample_text(Prefixed(read, teacher.prompt), config.seed)
    distinct = list(dict.fromkeys(sample))
    need(len(distinct) > 1, "text", "at least 2 different texts, one of them not to be counted", len(distinct))
    count = min(_MOST_HELD, max(1, int(_HELD_SHARE * len(distinct))))
    held = set(random.Random(config.seed).sample(distinct, count))
    say.status("Counting tokens")
    counts = count_tokens(teacher.tokenizer, (text for text in sample if text not in held))
    size = VOCAB_SIZE if config.vocab_size is None else config.vocab_size
    ids = draft_ids(teacher.tokenizer, counts, size, named_ids(teacher))
    d2t, t2d = draft_maps(ids, len(weight))
    metrics: dict[str, Any] = {
        "teacher": config.teacher,
        "command": "trim",
        "settings": config.settings(),
        "texts": read.seen,
        "text": read.digest,
        "held_out_texts": len(held),
        "prompt": teacher.prompt,
        "draft": {
            "tokens": len(ids),
            "target_tokens": len(teacher.tokenizer),
            "covered": _covered(teacher.tokenizer, sorted(held), t2d),
            "mb": round(len(ids) * weight[0].nbytes / 1e6, 2),
            "target_mb": round(weight.nbytes / 1e6, 2),
        },
    }
    final = folder.begin_result()
    tensors = {"lm_head.weight": weight[ids.to(weight.device)].cpu().contiguous(), "d2t": d2t, "t2d": t2d}
    save_file(tensors, final / "model.safetensors", metadata={"format": "pt"})
    write_json(final / "config.json", _settings(config, source, len(ids), weight))
    write_card(final, config, metrics, draft_card, names_of(config.teacher))
    out = folder.publish(final, metrics)
    say.print(draft_line(metrics["draft"], len(held)), f"The draft head is {folder.place}")
    return DistillResult(out, metrics)


def _settings(config: TrimConfig, source: Source, size: int, weight: Tensor) -> dict[str, Any]:
    """What the file of the tensors is, by the names that configurations of draft models have for it."""
    return {
        "draft_vocab_size": size,
        "vocab_size": weight.shape[0],
        "hidden_size": weight.shape[1],
        "torch_dtype": str(weight.dtype).removeprefix("torch."),
        "target_model": source.teacher.name,
        "target_model_type": source.teacher.model.config.model_type,
    }


def _covered(tokenizer: Any, texts: list[str], inside: Tensor) -> float:
    """The share of the tokens of texts, without those of a template, that are among those of the draft."""
    read = torch.tensor([i for row in rows_from_start(tokenizer, texts) for i in row[1:]])
    return round(float(inside[read].double().mean()), 6)
