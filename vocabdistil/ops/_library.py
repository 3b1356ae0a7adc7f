"""The torch.library fragment in which every private op is defined."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("vocabdistil", "DEF")


def without_autocast(impl: Callable) -> Callable:
    """Products are to be as precise as the kernels beside them: autocast would round them to half."""

    @functools.wraps(impl)
    def exact(*args: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return impl(*args)

    return exact


def define(schema: str, impl: Callable, fake: Callable) -> Callable:
    """Defines ``vocabdistil::<schema>``, one implementation for all devices and one for shapes alone."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, impl, key)
    torch.library.register_fake(f"vocabdistil::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.vocabdistil, name).default
