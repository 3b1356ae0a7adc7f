"""linear_matched_kl against the reference, whose logits are those of the matched rows only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import vocabdistil as vd
from benchmarks._losses import forward_backward, randn
from benchmarks.matched_kl import make_matched

# rows, V_t, V_s, matched, D_t, D_s
SIZES = ((512, 30522, 5000, 4500, 384, 264), (512, 119547, 5031, 4700, 768, 264))


def rows() -> Iterator[dict[str, Any]]:
    for n, v_t, v_s, v_m, d_t, d_s in SIZES:
        hidden, teacher = randn(n, d_s, seed=1, learned=True), randn(n, d_t, seed=2)
        weight = (randn(v_s, d_s, seed=3) / d_s**0.5).requires_grad_()
        teacher_weight = randn(v_t, d_t, seed=4) / d_t**0.5
        arguments = (hidden, weight, teacher, teacher_weight, make_matched(v_s, v_t, v_m))
        providers = {
            name: lambda m=m, a=arguments: m.linear_matched_kl(*a)
            for name, m in (("vocabdistil", vd), ("reference", vd.reference))
        }
        size = 4 * (2 * n * d_s + n * d_t + v_m * (d_t + d_s) + v_s * d_s)
        case = f"{n} rows, {v_t} x {d_t} -> {v_s} x {d_s}, {v_m} matched"
        yield from forward_backward(case, providers, [hidden, weight], n, size)
