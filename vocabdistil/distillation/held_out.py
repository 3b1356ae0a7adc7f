"""The student on held-out text: its losses, and how it agrees with its teachers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.progress import counted
from ..core.seeds import mix_seed
from ..evaluation.loyalty import mean_over_tokens, pairwise_cosine, regression
from ..evaluation.predictions import agreement, pseudo_perplexity
from ..models.teachers import Teacher
from .batches import DistillCollator, to_device
from .model import DistillModel
from .objective import Objective

__all__ = ["evaluate", "held_out_loss"]


@torch.no_grad()
def held_out_loss(
    model: DistillModel, objective: Objective, collator: DistillCollator, texts: Sequence[str], batch_size: int
) -> float:
    """What checkpoints are compared by: the span KL on the student's own tokenization, nothing masked; where that is
    not learned, the loss of training, with the same masks every time."""
    device = next(model.parameters()).device
    total, count, texts = 0.0, 0, sorted(texts, key=len)
    for start in range(0, len(texts), batch_size):
        batch = to_device(collator(texts[start : start + batch_size]), device)
        if objective.weights.kl:
            student, _ = model(batch["student_ids"], batch["student_mask"])
            value = objective.compare(model, student, objective.teach(model, batch), batch, "kl")["own"]
            weight = sum(pairs.num_nonempty for pairs in batch["own_pairs"])
        else:
            value, weight = objective.loss(model, batch, start)[0], len(batch["student_ids"])
        total, count = total + float(value) * weight, count + weight
    return total / max(count, 1)


@torch.no_grad()
def evaluate(
    model: DistillModel,
    objective: Objective,
    collator: DistillCollator,
    texts: Sequence[str],
    excerpts: Sequence[str],
    batch_size: int,
    seed: int,
    quiet: bool = True,
) -> dict[str, Any]:
    """Losses and loyalty on held-out texts; dropout off, masks the same on every call with the same seed.

    Args:
        excerpts: what pseudo-perplexity is measured on, see :func:`vocabdistil.evaluation.predictions.choose_excerpts`.
        quiet: show no progress.

    Returns:
        ``kl_own`` and, with ``reduce`` rows, ``kl_reduce`` (nothing masked); with an MLM head ``mlm`` and
        ``masked_accuracy`` (of the student's own masked tokens);
        of the embeddings pooled over tokens (the student's from its own tokenization) ``cosine`` (mean cosine between
        student, projected, and first teacher) and ``pearson``, ``spearman`` (regression loyalty of the cosine
        similarities of all pairs of texts; no projection takes part in these); ``pseudo_perplexity`` per character,
        unless there are no excerpts; and of :func:`vocabdistil.evaluation.predictions.agreement`, a mean over teachers
        with an MLM head if there is one, ``logits_kl``, ``label`` and ``probability``.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    # Texts of a batch are alike in length, so that little padding is read.
    texts = sorted(texts, key=len)
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}

    def add(name: str, value: Tensor, count: int) -> None:
        sums[name] = sums.get(name, 0.0) + float(value) * count
        counts[name] = counts.get(name, 0) + count

    ours, theirs = [], []
    batches = range(0, len(texts), batch_size)
    for b, start in enumerate(counted(batches, "Evaluating, batches", quiet)):
        batch = to_device(collator(texts[start : start + batch_size]), device)
        size = batch["teacher_ids"][0].shape[0]
        taught = objective.teach(model, batch)
        student, _ = model(batch["student_ids"], batch["student_mask"])
        for which, value in objective.compare(model, student, taught, batch, "kl").items():
            add(f"kl_{which}", value, sum(p.num_nonempty for p in batch[f"{which}_pairs"]))
        masked = objective.mask(batch, mix_seed(seed, b))
        if masked["labels"] is not None:
            labels = masked["labels"][-size:]
            guesses, _ = model(masked["student_ids"][-size:], batch["student_mask"][-size:])
            logits = model.logits(guesses.last[labels != -100]).float()
            labels = labels[labels != -100]
            if len(labels):
                add("mlm", F.cross_entropy(logits, labels), len(labels))
                add("masked_accuracy", (logits.argmax(-1) == labels).float().mean(), len(labels))
        ours.append(mean_over_tokens(student.last[-size:], batch["student_mask"][-size:]).float().cpu())
        theirs.append(mean_over_tokens(taught[0].last, batch["teacher_mask"][0]).float().cpu())
    pooled, teacher = torch.cat(ours), torch.cat(theirs)
    projection = model.projection(0)
    bias = None if model.bias is None else model.bias.float().cpu()
    projected = pooled if projection is None else F.linear(pooled, projection.detach().float().cpu(), bias)
    pearson, spearman = regression(pairwise_cosine(pooled), pairwise_cosine(teacher))
    found = {
        **{name: value / max(counts[name], 1) for name, value in sums.items()},
        "cosine": float(F.cosine_similarity(projected, teacher).mean()),
        "pearson": float(pearson),
        "spearman": float(spearman),
    }
    # A student that diverged has nothing to be read.
    if all(map(math.isfinite, found.values())):
        reader = model.as_teacher(collator.student)
        if objective.mask_id is not None:
            if excerpts:
                found["pseudo_perplexity"] = pseudo_perplexity(reader, excerpts, quiet)
            found |= _mean_agreement(objective, reader, collator, texts, batch_size, seed)
    model.train(training)
    return found


def _mean_agreement(
    objective: Objective, student: Teacher, collator: DistillCollator, texts: Sequence[str], batch_size: int, seed: int
) -> dict[str, float]:
    """:func:`agreement` with every teacher that has an MLM head, averaged by the teachers' weights."""
    lengths = (collator.max_length, collator.student_max_length)
    found, shares = [], []
    for t, teacher in enumerate(objective.teachers):
        if teacher.masked_lm is not None:
            found.append(
                agreement(
                    teacher, student, objective.matched[t], texts, lengths, batch_size, seed, objective.temperature
                )
            )
            shares.append(objective.teacher_weights[t])
    names = set.intersection(*map(set, found)) if found else set()
    return {
        name: sum(share * row[name] for share, row in zip(shares, found, strict=True)) / sum(shares)
        for name in ("logits_kl", "label", "probability")
        if name in names
    }
