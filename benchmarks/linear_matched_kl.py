"""KL over the matched vocabulary from hidden states (`vocabdistil.linear_matched_kl`).

The reference takes the matched rows of the weights first, ``full-logits`` does not. ``row-kernel`` is ours as it is for
float32 hidden states, with logits in memory: what the fused kernels for half precision are to beat. Rivals know one
vocabulary only: they get the teacher's matched rows beforehand, the student's in each call, as its weight changes from
step to step.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

import vocabdistil as vd

from ._losses import loss_problem, randn
from .harness import Case, Problem
from .matched_kl import make_matched

OPERATION = "linear_matched_kl"


def build(
    device: torch.device, rows: int, v_t: int, v_s: int, v_m: int, d_t: int, d_s: int, dtype: torch.dtype
) -> Problem:
    make = functools.partial(randn, device=device, dtype=dtype)
    tensors = [make(rows, d_s, seed=1), make(v_s, d_s, seed=3) / d_s**0.5]
    tensors += [make(rows, d_t, seed=2), make(v_t, d_t, seed=4) / d_t**0.5]
    size = dtype.itemsize * (2 * rows * d_s + rows * d_t + v_m * (d_t + d_s) + v_s * d_s)
    matched = make_matched(v_s, v_t, v_m).to(device)
    others = functools.partial(rivals, matched=matched)
    return loss_problem(OPERATION, tensors, 2, [matched], {}, size, rowwise=(0, 2), rivals=others)


def rivals(tensors: list[Tensor], matched: vd.MatchedVocab) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """What computes the same loss, and why others cannot."""
    x, w, y, v = tensors
    v_matched = v.detach()[matched.teacher_ids]
    cuda = x.is_cuda

    def full_logits() -> Tensor:
        return vd.reference.matched_kl(x @ w.t(), y @ v.t(), matched)

    def row_kernel() -> Callable[[], Tensor]:
        """Ours with float32 logits in memory, formed by torch, and a kernel that reads them, as of float32 inputs."""
        module = importlib.import_module("vocabdistil.ops.linear_matched_kl")

        def call() -> Tensor:
            with mock.patch.object(module, "HALF", ()):
                return vd.linear_matched_kl(x, w, y, v, matched, backend="triton")

        return call

    def rows() -> Tensor:
        return w.index_select(0, matched.student_ids)

    def liger_jsd() -> Callable[[], Tensor]:
        from liger_kernel.transformers import LigerFusedLinearJSD

        loss = LigerFusedLinearJSD(jsd_beta=0.0)  # the KL of the student from the teacher
        return lambda: loss(x, rows(), y, v_matched, None)

    def liger_kl() -> Callable[[], Tensor]:
        from liger_kernel.transformers import LigerFusedLinearKLDivLoss

        loss = LigerFusedLinearKLDivLoss()  # takes the teacher's probabilities
        return lambda: loss(x, rows(), (y @ v_matched.t()).softmax(-1))

    def fla() -> Callable[[], Tensor]:
        from fla.modules.fused_kl_div import fused_kl_div_loss

        return lambda: fused_kl_div_loss(x, y, rows(), v_matched)

    def orda() -> Callable[[], Tensor]:
        from orda_kernel import SeparateTeacher, distillation_loss

        labels, teacher = torch.zeros(len(x), dtype=torch.int64, device=x.device), SeparateTeacher(y, v_matched)
        weights = {"student_ce_weight": 0.0, "teacher_ce_weight": 0.0, "kl_weight": 1.0}
        return lambda: distillation_loss(x, rows(), labels, teacher, **weights).loss

    here, missing = {"full-logits": full_logits}, {}
    gpu_only = {"row-kernel": row_kernel, "liger-jsd": liger_jsd, "liger-kl": liger_kl, "fla": fla}
    for name, make in {**gpu_only, "orda": orda}.items():
        if name in gpu_only and not cuda:
            missing[name] = "needs a CUDA device"
            continue
        try:
            here[name] = make()
        except ImportError as error:
            missing[name] = str(error)
    return here, missing


def cases(device: torch.device) -> Iterator[Case]:
    sizes = [(512, 30522, 5000, 4500, 384, 264, torch.float32)]
    if device.type == "cuda":
        half = torch.bfloat16
        sizes = [(4096, 119547, 5031, 4700, 768, 264, half), (8192, 151936, 32000, 28000, 768, 264, half)]
    for rows, v_t, v_s, v_m, d_t, d_s, dtype in sizes:
        make = functools.partial(build, rows=rows, v_t=v_t, v_s=v_s, v_m=v_m, d_t=d_t, d_s=d_s, dtype=dtype)
        yield Case(f"{rows}-{v_t}-{v_s}-{v_m}", make, dtype, ("fwd+bwd",))
