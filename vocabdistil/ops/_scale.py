"""``scale=`` of a loss: the weight that its user gives it. As a part of the loss it reaches the gradient that forward
forms, where a product outside would be an upstream gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

from ..core import checks
from ..core.checks import Scale

_P = ParamSpec("_P")


def scalable(loss: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """For a loss with a keyword ``scale``: looks at it first, and multiplies from outside by one that is learned."""

    @functools.wraps(loss)
    def checked(*args: _P.args, **options: _P.kwargs) -> Tensor:
        scale = checks.check_scale(options.get("scale", 1.0))
        if isinstance(scale, Tensor) and scale.requires_grad and torch.is_grad_enabled():
            options["scale"] = 1.0
            return scaled(loss(*args, **options), scale)
        return loss(*args, **options)

    return checked


def scaled(x: Tensor, scale: Scale) -> Tensor:
    """``scale x`` in the dtype of x.

    Raises:
        ValueError: the scale lies neither where x does nor in host memory.
    """
    if not isinstance(scale, Tensor):
        return x if scale == 1 else x * scale
    if scale.device != x.device and scale.device.type != "cpu":
        raise ValueError(f"scale: expected device {x.device} as the inputs, or cpu, got {scale.device}")
    return x * scale.to(x.dtype)
