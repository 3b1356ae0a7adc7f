"""Sizes of models, and how long they take on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..alignment.families import encode
from ..core.errors import VocabdistilError
from ..models.architectures import move
from ..models.teachers import Teacher, model_inputs

__all__ = ["bench_models", "compare_models", "cpu_time", "describe_model", "timing_texts"]


def describe_model(model: nn.Module, vocab_size: int) -> dict[str, int | float]:
    """``parameters`` (tied ones once), ``vocab`` (tokens), ``mb`` (10^6 bytes of the weights)."""
    parameters = {p.data_ptr(): p for p in model.parameters()}.values()
    return {
        "parameters": sum(p.numel() for p in parameters),
        "vocab": vocab_size,
        "mb": round(sum(p.numel() * p.element_size() for p in parameters) / 1e6, 2),
    }


def timing_texts(texts: Sequence[str], tokenizers: Sequence[Any], batch: int, length: int) -> list[str]:
    """``batch`` texts that every tokenizer reads in at most ``length`` tokens, as long as they can be.

    Texts are joined by spaces, from the first on and around again if there are too few, then cut at a word.
    """
    made, position = [], 0
    for _ in range(batch):
        words: list[str] = []
        # A word is a token at least, so this many are enough.
        while len(words) < length:
            words += texts[position % len(texts)].split()
            position += 1
        low, high = 1, min(len(words), length)
        while low < high:
            middle = (low + high + 1) // 2
            text = " ".join(words[:middle])
            fits = all(len(encode(tokenizer, [text], "tokenizer")[0]) <= length for tokenizer in tokenizers)
            low, high = (middle, high) if fits else (low, middle - 1)
        made.append(" ".join(words[:low]))
    return made


@torch.no_grad()
def cpu_time(
    model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], length: int, repeats: int = 3
) -> dict[str, float | int]:
    """Seconds of one forward pass over ``texts`` as one batch, cut to ``length`` tokens, tokenizing left out: median,
    and the token count."""
    rows = encode(tokenizer, list(texts), "tokenizer", length)
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id or 0)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = torch.tensor(row)
        mask[b, : len(row)] = 1
    device = next(model.parameters()).device
    move(model, "cpu").eval()
    inputs, seconds = model_inputs(model, ids, mask), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        model(**inputs)
        seconds.append(time.perf_counter() - start)
    move(model, device)
    return {"seconds": round(statistics.median(seconds[1:]), 4), "tokens": int(mask.sum())}


def compare_models(
    teacher: Teacher, student: Teacher, texts: Sequence[str], batch: int, length: int
) -> dict[str, Any]:
    """Sizes of teacher and student, and the CPU time of their bodies on the same text, each with its own tokenizer."""
    length = min(length, teacher.max_positions, student.max_positions)
    sides = {"teacher": teacher, "student": student}
    texts = timing_texts(texts, [side.tokenizer for side in sides.values()], batch, length)
    rows = {
        name: describe_model(side.whole, len(side.tokenizer)) | cpu_time(side.model, side.tokenizer, texts, length)
        for name, side in sides.items()
    }
    return {
        **rows,
        "time_batch": batch,
        "time_length": length,
        "threads": torch.get_num_threads(),
        "compression": round(rows["teacher"]["mb"] / rows["student"]["mb"], 2),
        "speedup": round(rows["teacher"]["seconds"] / rows["student"]["seconds"], 2),
    }


def bench_models(models: Sequence[Teacher], texts: Sequence[str], batch: int, length: int) -> list[dict[str, Any]]:
    """One row per model: name, ``describe_model``, ``cpu_time`` on the same texts with its own tokenizer.

    Raises:
        VocabdistilError: a model cannot read ``length`` tokens.
    """
    for model in models:
        if model.max_positions < length:
            most = f"{model.name} reads at most {model.max_positions} tokens"
            raise VocabdistilError.of("length", f"{most}, got {length}")
    texts = timing_texts(texts, [model.tokenizer for model in models], batch, length)
    return [
        {"model": model.name, **describe_model(model.model, len(model.tokenizer))}
        | cpu_time(model.model, model.tokenizer, texts, length)
        for model in models
    ]
