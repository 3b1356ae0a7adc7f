"""What masked language models say of hidden tokens: how well one predicts a text, how far two agree."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..alignment.collator import pad
from ..alignment.families import encode
from ..alignment.methods import match_pairs
from ..alignment.vocab import MatchedVocab
from ..core.progress import counting
from ..core.seeds import mix_seed
from ..models.teachers import Teacher
from ..ops import linear_matched_kl
from .loyalty import label, probability

__all__ = ["agreement", "choose_excerpts", "compare_predictions", "pseudo_perplexity"]

_EXCERPT_CHARACTERS = 128
_TOKENS_READ = 1 << 15
_TOKENS_AT_ONCE = 2048
# Probabilities that exist at a time: 32 MiB of float64, several times.
_PROBABILITIES_AT_ONCE = 1 << 22


def choose_excerpts(
    texts: Sequence[str], tokenizers: Sequence, max_length: int, seed: int, tokens: int = _TOKENS_READ
) -> list[str]:
    """The beginnings of some texts that :func:`pseudo_perplexity` can compare models on, drawn with ``seed``.

    Each has at most 128 characters (fewer if ``max_length`` is smaller: no token has less than one), ends with a
    word, has no UNK for any of the ``tokenizers`` and at most ``max_length`` tokens. There are so many that the one
    with the most tokens reads about ``tokens`` of them, as each text is read once per token.
    """
    limit = min(_EXCERPT_CHARACTERS, max_length - 2)
    chosen: list[str] = []
    cost = 0
    for text in random.Random(seed).sample(list(texts), len(texts)):
        if len(text) > limit:
            text = text[:limit].rsplit(maxsplit=1)[0] if " " in text[:limit].strip() else text[:limit]
        rows = [encode(tokenizer, [text], "tokenizer")[0] for tokenizer in tokenizers]
        if any(t.unk_token_id in row for t, row in zip(tokenizers, rows, strict=True)):
            continue
        longest = max(map(len, rows))
        if longest > max_length:
            continue
        cost += longest**2
        if cost > tokens and chosen:
            break
        chosen.append(text)
    return chosen


@torch.no_grad()
def pseudo_perplexity(model: Teacher, texts: Sequence[str], quiet: bool = True) -> float:
    """``exp(-sum_texts sum_i log p(token_i | the text with token_i masked) / characters)``.

    The pseudo-log-likelihood of Salazar et al., arXiv 1910.14659 (special tokens are not scored), per character (code
    point, white space included) instead of per token: models with different vocabularies can be compared.

    Args:
        model: with an MLM head.
        texts: short enough for it; see :func:`choose_excerpts`.
        quiet: show no progress.

    Raises:
        ValueError: no texts, or no characters in them.
    """
    characters = sum(map(len, texts))
    if not characters:
        raise ValueError("texts: expected at least one character, got none")
    tokenizer, device = model.tokenizer, next(model.whole.parameters()).device
    special = set(tokenizer.all_special_ids)
    hidden: list[tuple[list[int], int]] = []
    for row in sorted(encode(tokenizer, list(texts), "tokenizer"), key=len):
        hidden += [(row, i) for i, token in enumerate(row) if token not in special]
    weight, bias = model.output_layer
    total = torch.zeros((), dtype=torch.float64)
    start = 0
    with counting("Pseudo-perplexity, tokens", len(hidden), quiet) as advance:
        while start < len(hidden):
            # Rows come by length, so the first of a batch says how many fit.
            fit = min(_TOKENS_AT_ONCE // len(hidden[start][0]), _PROBABILITIES_AT_ONCE // len(weight))
            end = start + max(1, fit)
            ids, mask = (x.to(device) for x in pad([row for row, _ in hidden[start:end]], tokenizer.pad_token_id))
            at = torch.tensor([i for _, i in hidden[start:end]], device=device)
            rows = torch.arange(len(at), device=device)
            truth = ids[rows, at]
            ids[rows, at] = tokenizer.mask_token_id
            before_output = _before_output(model, ids, mask)[rows, at]
            log_p = linear(before_output, weight, bias).log_softmax(-1)
            total += log_p[rows, truth].double().sum().cpu()
            advance(len(at))
            start = end
    return math.exp(-float(total) / characters)


def _before_output(model: Teacher, ids: Tensor, mask: Tensor) -> Tensor:
    """``[B, L, E]``: what the output layer of a model with an MLM head reads."""
    head = model.read(ids, mask, head=True).head
    assert head is not None
    return head


@torch.no_grad()
def agreement(
    teacher: Teacher,
    student: Teacher,
    matched: MatchedVocab,
    texts: Sequence[str],
    max_lengths: tuple[int, int],
    batch_size: int = 32,
    seed: int = 0,
    temperature: float = 1.0,
    share: float = 0.15,
) -> dict[str, float]:
    """How alike two masked language models with different vocabularies fill the same gaps.

    Of the tokens that ``match`` aligns 1:1 (specials left out) a ``share`` of each batch is drawn; both models read
    MASK in their places, each in its own tokenization, and predict over the matched vocabulary.

    Args:
        teacher, student: with MLM heads, on one device.
        max_lengths: tokens of a text that the teacher and the student read.
        seed: of the draw; the same one hides the same tokens.

    Returns:
        Means over the hidden tokens, empty if there are none: ``logits_kl`` (nats, times ``temperature`` squared),
        ``label`` and ``probability`` (loyalty as in :mod:`vocabdistil.evaluation.loyalty`).
    """
    device = next(student.whole.parameters()).device
    sides = (teacher, student)
    specials = torch.tensor(teacher.tokenizer.all_special_ids)
    sums = dict.fromkeys(("logits_kl", "label", "probability"), 0.0)
    count = 0
    for b, start in enumerate(range(0, len(texts), batch_size)):
        chunk = list(texts[start : start + batch_size])
        (teacher_ids, teacher_mask), (student_ids, student_mask) = (
            pad(encode(side.tokenizer, chunk, "tokenizer", length), side.tokenizer.pad_token_id)
            for side, length in zip(sides, max_lengths, strict=True)
        )
        ids, masks = (teacher_ids, student_ids), (teacher_mask, student_mask)
        pairs = match_pairs(teacher_ids, student_ids, matched, teacher_mask, student_mask)
        aligned = torch.stack([pairs.teacher_start, pairs.student_start]).long()
        aligned = aligned[:, ~torch.isin(ids[0].flatten()[aligned[0]], specials)]
        drawn = torch.randperm(aligned.shape[1], generator=torch.Generator().manual_seed(mix_seed(seed, b)))
        positions = aligned[:, drawn[: math.ceil(share * len(drawn))]]
        if not positions.numel():
            continue
        heads = []
        for side, own_ids, mask, at in zip(sides, ids, masks, positions, strict=True):
            own_ids.view(-1)[at] = side.tokenizer.mask_token_id
            heads.append(_before_output(side, own_ids.to(device), mask.to(device)).flatten(0, 1)[at.to(device)])
        count += positions.shape[1]
        step = max(1, _PROBABILITIES_AT_ONCE // len(matched))
        for rows in zip(*(head.split(step) for head in heads), strict=True):
            for name, value in _scores(sides, rows, matched, temperature).items():
                sums[name] += float(value) * len(rows[0])
    return {name: value / count for name, value in sums.items()} if count else {}


def _scores(
    sides: tuple[Teacher, Teacher], heads: tuple[Tensor, ...], matched: MatchedVocab, temperature: float
) -> dict[str, Tensor]:
    """Means over ``heads``, what the output layers of teacher and student read at hidden tokens, ``[P, D]`` each."""
    (teacher_weight, teacher_bias), (student_weight, student_bias) = (side.output_layer for side in sides)
    kl = linear_matched_kl(
        heads[1], student_weight, heads[0], teacher_weight, matched, student_bias=student_bias,
        teacher_bias=teacher_bias, temperature=temperature,
    )  # fmt: skip

    def logits(rows: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
        ids = ids.to(rows.device)
        return linear(rows, weight[ids], None if bias is None else bias[ids])

    z_t = logits(heads[0], teacher_weight, teacher_bias, matched.teacher_ids)
    z_s = logits(heads[1], student_weight, student_bias, matched.student_ids)
    return {"logits_kl": kl, "label": label(z_s, z_t), "probability": probability(z_s, z_t)}


def compare_predictions(
    teacher: Teacher, student: Teacher, texts: Sequence[str], max_length: int, seed: int = 0
) -> dict[str, float]:
    """:func:`agreement`, and :func:`pseudo_perplexity` of both on the same excerpts, of finished models.

    Returns:
        ``logits_kl``, ``label``, ``probability``, ``pseudo_perplexity`` (the student's) and
        ``teacher_pseudo_perplexity``, as far as there is text for them; empty if a model has no MLM head.
    """
    if teacher.masked_lm is None or student.masked_lm is None:
        return {}
    tokenizers = [teacher.tokenizer, student.tokenizer]
    lengths = min(max_length, teacher.max_positions), min(max_length, student.max_positions)
    found = agreement(teacher, student, MatchedVocab.from_tokenizers(*tokenizers), texts, lengths, seed=seed)
    if excerpts := choose_excerpts(texts, tokenizers, min(lengths), seed):
        found["pseudo_perplexity"] = pseudo_perplexity(student, excerpts)
        found["teacher_pseudo_perplexity"] = pseudo_perplexity(teacher, excerpts)
    return found
