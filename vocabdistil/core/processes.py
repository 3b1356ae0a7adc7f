"""Several processes that do one job together, as ``torchrun`` and ``accelerate launch`` start them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from .errors import VocabdistilError, one_line

__all__ = ["FirstFailed", "Processes", "follows", "have_met", "launched", "leave"]

_T = TypeVar("_T")
# How long one process may wait for another: the first one whitens, fits and evaluates alone.
_PATIENCE = timedelta(days=7)
_TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class FirstFailed(VocabdistilError):
    """What the first process could not do, and said; the others end too."""


def launched() -> int:
    """How many processes a launcher started for the job; 1 if none did."""
    return int(os.environ["WORLD_SIZE"]) if all(os.environ.get(name) for name in _TOLD) else 1


def follows() -> bool:
    """Whether this is one of several processes, and not the first."""
    return launched() > 1 and int(os.environ["RANK"]) > 0


def have_met() -> bool:
    """Whether the processes know of each other. Until then each of them finds the same faults, which the first one
    says."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def leave(code: int) -> None:
    """Ends this one of several processes. A thread that ``torch.distributed`` left behind may abort an interpreter that
    shuts down in the usual way."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


class Processes:
    """The processes of a job. The first of them makes folders and files, measures and prints; all of them train.

    Attributes:
        rank: from 0; ``main`` is the first.
        size: how many there are.
        local_rank: of those on this machine; the number of its GPU.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, group: Any = None) -> None:
        self.rank, self.size, self.local_rank, self._group = rank, size, local_rank, group

    @classmethod
    def join(cls, device: str = "auto") -> Processes:
        """Meets the others that a launcher started, if it started any; waits until all are there.

        Args:
            device: ``"cpu"``, ``"cuda"`` or ``"auto"``: what they are to train on.
        """
        import torch
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized() and launched() == 1:
            return cls()
        local = int(os.environ.get("LOCAL_RANK", 0))
        if not dist.is_initialized():
            on_gpu = device != "cpu" and torch.cuda.is_available()
            if on_gpu:
                torch.cuda.set_device(local)
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        # What is agreed on beside the training must not wait for a device, and may wait for long.
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size(), local, group)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def lead(self, stage: Callable[[], _T], send: bool = True) -> _T:
        """Runs a stage in the first process, for which the others wait; returns what it returned, in all of them.

        Args:
            send: else the others get None.

        Raises:
            FirstFailed: in the others, whatever the stage raised in the first.
        """
        if self.size == 1:
            return stage()
        if not self.main:
            done, value = self._broadcast(None)
            if not done:
                raise FirstFailed(value)
            return value
        try:
            value = stage()
        except BaseException as error:
            self._broadcast((False, one_line(str(error))))
            raise
        self._broadcast((True, value if send else None))
        return value

    def any(self, flag: bool) -> bool:
        """Whether it is so in one of them."""
        if self.size == 1:
            return flag
        import torch
        import torch.distributed as dist

        count = torch.tensor(int(flag))
        self._waiting(lambda: dist.all_reduce(count, group=self._group))
        return bool(count)

    def _broadcast(self, value: Any) -> Any:
        import torch.distributed as dist

        held = [value]
        self._waiting(lambda: dist.broadcast_object_list(held, src=0, group=self._group))
        return held[0]

    def _waiting(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except RuntimeError as error:
            raise VocabdistilError(f"process {self.rank} of {self.size} lost the others: {error}") from None
