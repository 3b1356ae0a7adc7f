"""Every loss as a function of the same arguments, for what all of them must do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

import vocabdistil as vd
from tests.vocabularies import make_matched, randn

WIDTH = 12  # of hidden states and logits alike

Loss = Callable[[Tensor, Tensor, vd.SpanPairs], Tensor]


def _maps(module, student, teacher, pairs):
    return module.attention_loss(*((x @ x.t())[None, None] for x in (student, teacher)), pairs)


def _pooled(module, student, teacher, pairs, **options):
    masks = (torch.ones(1, len(x), dtype=torch.bool) for x in (student, teacher))
    return module.pooled_loss(student[None], teacher[None], *masks, **options)


def losses(module: ModuleType = vd) -> dict[str, Loss]:
    """Name -> loss of hidden states or logits ``[N_s, WIDTH]``, ``[N_t, WIDTH]`` and pairs, a scalar."""
    # Made once: a compiled function makes no generators.
    matched, many = make_matched(WIDTH, WIDTH, 7), make_matched(20, 20, 11)
    table = vd.RemapTable([0, 2, 2, 5], [0, 3, 1, 1, 4], student_vocab_size=WIDTH, unk_id=0, pad_id=0)
    square, ours, theirs = randn(WIDTH, WIDTH), randn(20, WIDTH, seed=4), randn(20, WIDTH, seed=6)
    about_their_own = {"student_shift": 0, "teacher_shift": 0, "temperature": 2.0}
    return {
        **{
            divergence: partial(module.span_loss, divergence=divergence)
            for divergence in ("kl", "reverse_kl", "jsd", "mse", "cosine")
        },
        "layers": lambda s, t, pairs, **options: module.span_loss(
            [s, 2 * s], [t, 3 * t], pairs, student_layer_weights=[1.0, 2.0], **options
        ),
        "projected": lambda s, t, pairs, **options: module.span_loss(s, t, pairs, weight=square.to(s.dtype), **options),
        "matched_kl": lambda s, t, pairs, **options: module.matched_kl(s, t, matched, pairs=pairs, **options),
        "matched_rest": lambda s, t, pairs, **options: module.matched_kl(
            s, t, matched, pairs=pairs, unmatched="rest", **options
        ),
        "linear_matched_kl": lambda s, t, pairs, **options: module.linear_matched_kl(
            s, ours.to(s.dtype), t, theirs.to(t.dtype), many, pairs=pairs, **options
        ),
        "remapped_kl": lambda s, t, pairs, **options: module.remapped_kl(s, t, table, pairs=pairs, **options),
        "linear_remapped_kl": lambda s, t, pairs, **options: module.linear_remapped_kl(
            s, ours.to(s.dtype), t, theirs.to(t.dtype), table, pairs=pairs, top_k=2, **options
        ),
        "span_likelihood": lambda s, t, pairs: module.span_likelihood(
            s, torch.arange(len(s)) % WIDTH, t, torch.arange(len(t)) % 7, pairs, **about_their_own
        ),
        "linear_span_likelihood": lambda s, t, pairs: module.linear_span_likelihood(
            s, ours.to(s.dtype), torch.arange(len(s)) % 20, t, theirs.to(t.dtype), torch.arange(len(t)) % 20, pairs,
            **about_their_own,
        ),
        "contrastive": module.contrastive,
        "relation_loss": lambda s, t, pairs, **options: module.relation_loss(
            s[None], t[None], pairs, heads=3, **options
        ),
        "attention_loss": partial(_maps, module),
        "pooled_loss": partial(_pooled, module),
        "similarity_loss": lambda s, t, pairs: module.similarity_loss(s[:5], t[:5]),
    }  # fmt: skip


LOSSES = losses()
# Those with a `scale`, and those that follow the spans of pairs.
SCALABLE = sorted(set(LOSSES) - {"attention_loss", "similarity_loss", "span_likelihood", "linear_span_likelihood"})
SPANNING = sorted(set(LOSSES) - {"pooled_loss", "similarity_loss"})
