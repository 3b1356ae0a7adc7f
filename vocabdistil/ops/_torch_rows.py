"""The row kernel of `linear_matched_kl` in PyTorch, for devices and installations that have none. In float64, where the
device has it: what the sides differ by is little beside their logits where they are close or the temperature is high.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import native
from ..reference._common import excess_rows, kl_rows, log_softmax


def _wide(z: Tensor) -> Tensor:
    return z if z.device.type == "mps" else z.double()


def _add_bias(z: Tensor, bias: Tensor | None, lengths: Tensor | None) -> None:
    if bias is not None:
        part = bias[: z.shape[1]]
        z.add_(part if lengths is None else lengths[:, None] * part)


def dense_rows(
    student: Tensor, teacher: Tensor, student_bias: Tensor | None, teacher_bias: Tensor | None,
    student_lengths: Tensor | None, teacher_lengths: Tensor | None, teacher_rest: Tensor | None, scale: Tensor,
    unmatched: int, temperature: float, loss: Tensor, grad: Tensor | None,
) -> None:  # fmt: skip
    """``triton_kernels.matched_kl.dense_rows``: logits of the student ``[R, V]``, the matched columns first, and of the
    teacher ``[R, V_m]`` in, loss ``[R]`` out; overwrites the logits."""
    _add_bias(student, student_bias, student_lengths)
    _add_bias(teacher, teacher_bias, teacher_lengths)
    count, drop = teacher.shape[1], unmatched == native.UNMATCHED_CODES["drop"]
    s, t = _wide(student) / temperature, _wide(teacher) / temperature
    others = s[:, count:]
    if teacher_rest is not None:  # a class of its own
        s = torch.cat([s[:, :count], others.logsumexp(-1, keepdim=True)], -1)
        t = torch.cat([t, teacher_rest[:, None]], -1)
    log_r, log_q = log_softmax(s, 1.0), log_softmax(t, 1.0)
    value = excess_rows(log_q[:, :count], log_r[:, :count]) if drop else kl_rows(log_q, log_r)
    # What counts for nothing may be infinite.
    loss.copy_((temperature**2 * value).masked_fill_(scale == 0, 0.0))
    if grad is None:
        return
    q = log_q.exp()
    if drop:
        q[:, count:] = 0
    slope = (temperature * scale)[:, None] * (q.sum(-1, keepdim=True) * log_r.exp() - q)
    grad[:, :count] = slope[:, :count]
    if teacher_rest is not None:
        grad[:, count:] = slope[:, count:] * log_softmax(others, 1.0).exp()


def add_rest(
    z: Tensor, bias: Tensor | None, lengths: Tensor | None, left_out: Tensor, temperature: float, rest: Tensor | None
) -> Tensor:
    """``triton_kernels.matched_kl.add_rest``: here ``[R]``, log sum exp(. / T); overwrites z."""
    _add_bias(z, bias, lengths)
    more = (_wide(z) / temperature).masked_fill_(left_out.bool(), float("-inf")).logsumexp(-1)
    return more if rest is None else torch.logaddexp(rest, more)
