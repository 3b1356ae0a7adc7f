"""The row kernel of `matched_kl` in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native


def torch_rows(
    student: Tensor, teacher: Tensor, student_ids: Tensor, unmatched: int, temperature: float,
    teacher_rest: Tensor | None, scale: Tensor, loss: Tensor,
) -> None:  # fmt: skip
    """The row kernel in PyTorch, for devices that have none: student [R, V], teacher [R, V_m] logits in, loss [R] out;
    the student's logits are overwritten with scale * d loss / d logit."""
    student.mul_(1 / temperature)
    matched_s, matched_t = student[:, student_ids], teacher / temperature
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
    if teacher_rest is None:
        student.zero_()
    else:
        student.index_fill_(1, student_ids, float("-inf"))
        rest_r, rest_q = student.logsumexp(-1) - log_s[:, 0], teacher_rest - log_t[:, 0]
        student.sub_(log_s + rest_r.nan_to_num(neginf=0.0)[:, None]).exp_()  # shares of the unmatched mass
        if unmatched == _native.UNMATCHED_CODES["drop"]:
            mass = q.sum(-1, keepdim=True)
            r = mass * r
            student.mul_(factor * mass * rest_r.exp()[:, None])
        else:
            loss += rest_q.exp() * torch.where(rest_q > float("-inf"), rest_q - rest_r, 0.0)
            student.mul_(factor * (rest_r.exp() - rest_q.exp())[:, None])
    student.index_copy_(1, student_ids, factor * (r - q))
    loss.mul_(temperature**2)
