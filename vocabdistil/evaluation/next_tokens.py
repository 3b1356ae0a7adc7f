"""How a student that is a decoder follows its teacher on a text: the next tokens that both expect."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..alignment.align import align
from ..alignment.vocab import MatchedVocab
from ..models.teachers import Teacher
from .bits_per_byte import LOGITS_AT_ONCE, bits_per_byte

__all__ = ["compare_decoders"]

# Places whose distributions over the matched vocabulary exist in float64 at a time, as numbers: 64 MiB.
_PROBABILITIES_AT_ONCE = 1 << 23


@torch.no_grad()
def compare_decoders(
    teacher: Teacher, student: Teacher, texts: Sequence[str], max_length: int, batch: int = 8
) -> dict[str, float]:
    """What two decoders expect after the same beginnings of texts, and what they are worth on these texts.

    Compared is where both have read the same bytes: at the last tokens of the span pairs of ``boundary``, each side in
    its own tokenization with its own template; special tokens are no such places. The distributions are those over the
    matched vocabulary.

    Args:
        teacher, student: decoders on one device.
        texts: some with at least one token.
        max_length: tokens of a text that each reads, at most as many as it can.
        batch: texts at once; fewer where logits would take too much memory.

    Returns:
        ``agreement``: the share of places at which both expect the same token most; ``next_token_kl``: of the student's
        distribution from the teacher's, nats; ``kept_probability``: what the teacher gives to the matched vocabulary;
        ``places``: how many there were (the first three are left out if none); ``bits_per_byte`` and
        ``teacher_bits_per_byte``: see :func:`vocabdistil.bits_per_byte`.
    """
    sides, device = (teacher, student), next(student.whole.parameters()).device
    matched = MatchedVocab.from_tokenizers(teacher.tokenizer, student.tokenizer).to(device)
    lengths = [min(max_length, side.max_positions) for side in sides]
    rows = max(side.whole.get_output_embeddings().weight.shape[0] for side in sides)
    at_once = max(1, min(batch, LOGITS_AT_ONCE // (max(lengths) * rows)))
    sums, places = torch.zeros(3, dtype=torch.float64), 0
    for start in range(0, len(texts), at_once):
        read = align(texts[start : start + at_once], teacher.tokenizer, student.tokenizer, "boundary", lengths)
        read = read.to(device)
        pairs = read["pairs"]
        ends = torch.stack([pairs.teacher_end, pairs.student_end]).long() - 1
        # Of a side that has no token there the end is where it begins.
        both = (pairs.teacher_end > pairs.teacher_start) & (pairs.student_end > pairs.student_start)
        for side, inputs, at in zip(sides, (read["teacher"], read["student"]), ends, strict=True):
            special = torch.tensor(side.tokenizer.all_special_ids, device=device)
            both &= ~torch.isin(inputs["input_ids"].flatten()[at.clamp(min=0)], special)
        ends = ends[:, both]
        z_t, z_s = (
            side.whole(**inputs, use_cache=False).logits.flatten(0, 1)[at]
            for side, inputs, at in zip(sides, (read["teacher"], read["student"]), ends, strict=True)
        )
        places += ends.shape[1]
        step = max(1, _PROBABILITIES_AT_ONCE // max(1, z_t.shape[-1]))
        for theirs, ours in zip(z_t.split(step), z_s.split(step), strict=True):
            sums += _compared(theirs, ours, matched).cpu()
    found = dict(zip(("agreement", "next_token_kl", "kept_probability"), (sums / places).tolist(), strict=True))
    worth = {
        name: bits_per_byte(side.whole, side.tokenizer, texts, length, batch)
        for name, side, length in zip(("teacher_bits_per_byte", "bits_per_byte"), sides, lengths, strict=True)
    }
    return (found if places else {}) | {"places": places} | worth


def _compared(theirs: Tensor, ours: Tensor, matched: MatchedVocab) -> Tensor:
    """Sums over rows ``[P, V_t]`` and ``[P, V_s]`` of logits: equal guesses, KL, and the matched tokens' probability;
    float64 ``[3]``."""
    theirs, ours = theirs.double(), ours.double()
    kept = theirs[:, matched.teacher_ids]
    probability = (kept.logsumexp(-1) - theirs.logsumexp(-1)).exp()
    log_t, log_s = kept.log_softmax(-1), ours[:, matched.student_ids].log_softmax(-1)
    kl = torch.where(log_t.isfinite(), log_t.exp() * (log_t - log_s), 0).sum(-1)
    return torch.stack([(log_t.argmax(-1) == log_s.argmax(-1)).double().sum(), kl.sum(), probability.sum()])
