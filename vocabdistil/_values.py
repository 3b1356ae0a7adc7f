"""Checks of plain values and vectors that a user passes, shared by tables, vocabularies, spans and alignments.

A wrong type raises ``TypeError``, everything else ``ValueError``; each message names the argument, what was expected
and what came.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["check_kind", "integer"]


def check_kind(value: object, name: str, kind: type) -> None:
    """Raises TypeError unless ``value`` is a ``kind``."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")


def integer(value: Any, name: str) -> int:
    """An ``int`` of anything that is an integer, numpy's too; TypeError for others, ``bool`` among them."""
    # A tensor may be of any shape and lie anywhere, and to read it may wait for a device.
    if not isinstance(value, (bool, np.bool_, Tensor)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
