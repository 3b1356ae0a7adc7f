"""The row kernel of `linear_matched_kl` in PyTorch, for devices and installations that have none."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import native


def dense_rows(
    student: Tensor, teacher: Tensor, student_bias: Tensor | None, teacher_bias: Tensor | None,
    student_lengths: Tensor | None, teacher_lengths: Tensor | None, teacher_rest: Tensor | None, scale: Tensor,
    unmatched: int, temperature: float, loss: Tensor, grad: Tensor | None,
) -> None:  # fmt: skip
    """``triton_kernels.matched_kl.dense_rows``: logits of the student ``[R, V]``, the matched columns first, and of the
    teacher ``[R, V_m]`` in, loss ``[R]`` out; overwrites the logits, the student's with their gradient."""
    for z, bias, lengths in ((student, student_bias, student_lengths), (teacher, teacher_bias, teacher_lengths)):
        if bias is not None:
            part = bias[: z.shape[1]]
            z.add_(part if lengths is None else lengths[:, None] * part)
    student.mul_(1 / temperature)
    matched_s, matched_t = student[:, : teacher.shape[1]], teacher / temperature
    if teacher_rest is None:
        log_r, log_q = matched_s.log_softmax(-1), matched_t.log_softmax(-1)
        r = log_r.exp()
    else:
        log_s = student.logsumexp(-1, keepdim=True)
        log_t = torch.logaddexp(matched_t.logsumexp(-1), teacher_rest)[:, None]
        log_r, log_q = matched_s - log_s, matched_t - log_t
        r = log_r.exp()
    q = log_q.exp()
    torch.sum(q * torch.where(q > 0, log_q - log_r, 0.0), -1, out=loss)
    factor = temperature * scale[:, None]
    if teacher_rest is not None:
        matched_s.fill_(float("-inf"))
        rest_r, rest_q = student.logsumexp(-1) - log_s[:, 0], teacher_rest - log_t[:, 0]
        student.sub_(log_s + rest_r.nan_to_num(neginf=0.0)[:, None]).exp_()  # shares of the unmatched mass
        if unmatched == native.UNMATCHED_CODES["drop"]:
            mass = q.sum(-1, keepdim=True)
            r = mass * r
            student.mul_(factor * mass * rest_r.exp()[:, None])
        else:
            loss += rest_q.exp() * torch.where(rest_q > float("-inf"), rest_q - rest_r, 0.0)
            student.mul_(factor * (rest_r.exp() - rest_q.exp())[:, None])
    matched_s.copy_(factor * (r - q))
    loss.mul_(temperature**2)
    loss.masked_fill_(scale == 0, 0.0)  # what counts for nothing may be infinite
    if grad is not None:
        grad.copy_(student)
