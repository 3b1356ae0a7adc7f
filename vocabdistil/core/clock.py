"""When what somebody waits for began."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["begun", "one_clock"]

_begun: ContextVar[float | None] = ContextVar("begun", default=None)


@contextmanager
def one_clock() -> Iterator[None]:
    """What begins meanwhile counts from now, or from where this stands in another: several jobs are one to who waits
    for them."""
    token = _begun.set(begun())
    try:
        yield
    finally:
        _begun.reset(token)


def begun() -> float:
    """When that was, on the monotonic clock; outside of :func:`one_clock` now."""
    since = _begun.get()
    return time.monotonic() if since is None else since
