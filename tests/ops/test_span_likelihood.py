"""span_likelihood and linear_span_likelihood on CPU against the float64 reference."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd
from tests.vocabularies import randn

V_S, V_T, L_S, L_T = 50, 90, 9, 7


def make(dtype=torch.float32, linear=False, bias=True, d_s=12, d_t=20, batch=3):
    """Arguments by name: texts of 9 and of 7 tokens, spans of one to three, gaps, beginnings, an empty span."""
    g = torch.Generator().manual_seed(0)
    if linear:
        tensors = {
            "student_hidden": randn(batch, L_S, d_s, seed=1), "student_weight": randn(V_S, d_s, seed=2, scale=0.4),
            "teacher_hidden": randn(batch, L_T, d_t, seed=3), "teacher_weight": randn(V_T, d_t, seed=4, scale=0.4),
        }  # fmt: skip
        if bias:
            tensors |= {"student_bias": randn(V_S, seed=5), "teacher_bias": randn(V_T, seed=6)}
    else:
        tensors = {
            "student_logits": randn(batch, L_S, V_S, seed=1, scale=2),
            "teacher_logits": randn(batch, L_T, V_T, seed=2, scale=2),
        }  # fmt: skip
    tensors = {k: v.to(dtype) for k, v in tensors.items()}
    spans = [(0, 1, 0, 1), (1, 3, 1, 2), (3, 6, 2, 4), (6, 6, 4, 5), (7, 9, 5, 7)]
    at = [(b * L_S + a, b * L_S + c, b * L_T + d, b * L_T + e) for b in range(batch) for a, c, d, e in spans]
    return tensors | {
        "student_ids": torch.randint(V_S, (batch, L_S), generator=g),
        "teacher_ids": torch.randint(V_T, (batch, L_T), generator=g).int(),
        "pairs": vd.SpanPairs(*torch.tensor(at).T),
    }


def function(module, arguments):
    return module.linear_span_likelihood if "student_hidden" in arguments else module.span_likelihood


LOGITS = [
    ({"student_logits": [1]}, TypeError, "student_logits: expected a tensor"),
    ({"student_logits": torch.zeros(V_S)}, ValueError, r"student_logits: expected shape \[..., V\]"),
    ({"student_logits": torch.zeros(27, V_S)}, ValueError, r"student_logits: expected shape \[B, L, .\] beside"),
    ({"teacher_logits": torch.zeros(3, L_T, V_T, dtype=torch.int32)}, TypeError, "teacher_logits: expected float32"),
    ({"student_ids": None}, TypeError, "student_ids: expected a tensor, got NoneType"),
    ({"student_ids": torch.zeros(3, L_S)}, TypeError, "student_ids: expected int32 or int64, got float32"),
    ({"teacher_ids": torch.zeros(3, 6).long()}, ValueError, r"teacher_ids: expected shape \(3, 7\) as teacher_logits"),
    ({"student_ids": torch.full((3, L_S), V_S)}, ValueError, "student_ids: expected ids from 0 to 49, got 50"),
    ({"teacher_ids": torch.full((3, L_T), -100)}, ValueError, "teacher_ids: expected ids from 0 to 89, got -100"),
    ({"student_ids": torch.full((3, L_S), 2**32)}, ValueError, "student_ids: expected ids from 0 to 49, got 42949"),
    ({"pairs": None}, TypeError, "pairs: expected SpanPairs, got NoneType"),
    ({"pairs": vd.SpanPairs([1], [2], [1], [22])}, ValueError, "pairs: expected teacher positions up to 21"),
    ({"temperature": 0.0}, ValueError, "temperature"),
    ({"divergence": "mse"}, ValueError, "divergence: expected one of 'kl', 'total_variation', got 'mse'"),
    ({"pair_weights": torch.ones(3)}, ValueError, r"pair_weights: expected shape \(15,\)"),
    ({"student_shift": 2}, ValueError, "student_shift: expected 0 or 1"),
    ({"reduction": "mean"}, ValueError, "reduction"),
    ({"backend": "cuda"}, ValueError, "backend"),
]  # fmt: skip
LINEAR = [
    ({"student_hidden": torch.zeros(27, 12)}, ValueError, r"student_hidden: expected shape \[B, L, .\] beside"),
    ({"student_weight": torch.randn(V_S, 13)}, ValueError, r"student_weight: expected shape \(V, 12\)"),
    ({"student_weight": torch.nn.ReLU(), "student_bias": None}, TypeError, "student_weight: expected a tensor"),
    ({"teacher_weight": torch.randn(V_T, 20).double()}, TypeError, "teacher_weight"),
    ({"teacher_bias": torch.randn(V_S)}, ValueError, "teacher_bias"),
    ({"student_ids": torch.full((3, L_S), V_S)}, ValueError, "student_ids: expected ids from 0 to 49, got 50"),
    ({"teacher_ids": torch.zeros(3, 6).long()}, ValueError, r"teacher_ids: expected shape \(3, 7\) as teacher_hidden"),
]  # fmt: skip


@pytest.mark.parametrize("module", [vd, vd.reference], ids=["kernels", "reference"])
@pytest.mark.parametrize(
    ("linear", "change", "error", "text"), [(False, *b) for b in LOGITS] + [(True, *b) for b in LINEAR]
)
def test_bad_input_is_named(linear, change, error, text, module):
    arguments = make(linear=linear)
    with pytest.raises(error, match=f"^{text}"):
        function(module, arguments)(**{**arguments, **change})
