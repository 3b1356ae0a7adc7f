"""Hidden states and output layers for the tests of divergences that read these."""

from __future__ import annotations

import pytest
import torch

from tests.vocabularies import randn


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are so small that waking a second thread takes most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(n_s, n_t, v_s=50, v_t=90, d_s=12, d_t=20, dtype=torch.float32, bias=True):
    tensors = {
        "student_hidden": randn(n_s, d_s, seed=1), "student_weight": randn(v_s, d_s, seed=2, scale=0.4),
        "teacher_hidden": randn(n_t, d_t, seed=3), "teacher_weight": randn(v_t, d_t, seed=4, scale=0.4),
    }  # fmt: skip
    if bias:
        tensors |= {"student_bias": randn(v_s, seed=5), "teacher_bias": randn(v_t, seed=6)}
    return {k: v.to(dtype) for k, v in tensors.items()}


def loss_and_grads(loss_of, tensors, **options):
    """Loss and gradients of all that can have one."""
    tensors = {k: v.detach().clone().requires_grad_() for k, v in tensors.items()}
    loss = loss_of(**tensors, **options)
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
    (loss * upstream).sum().backward()
    assert all(v.grad is None for k, v in tensors.items() if k.startswith("teacher"))
    return {"loss": loss.detach(), **{k: v.grad for k, v in tensors.items() if k.startswith("student")}}
