"""What the threads of a kernel read and write: the tensors of a call, and memory that the threads share. Accesses
outside and races are failures."""

from __future__ import annotations

import ctypes

import numpy as np
import torch


class Failure(AssertionError):
    """What would be an error, or undefined, on a GPU."""


UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# The memory of this process as arrays. Only addresses that Tensors has found are used as an index.
_FIRST = 1 << 12
_PROCESS = np.frombuffer((ctypes.c_uint8 * ((1 << 47) - _FIRST)).from_address(_FIRST), dtype=np.uint8)
_WORDS = {size: _PROCESS.view(dtype) for size, dtype in UNSIGNED.items()}


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Where the elements of a tensor begin and end."""
    first = tensor.data_ptr()
    if not tensor.numel():
        return first, first
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (last + 1) * tensor.element_size()


class Tensors:
    """The tensors that a launch may touch."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int, bool]] = []  # first, end, whether they may be written
        self._index()

    def add(self, tensor: torch.Tensor, writable: bool) -> None:
        first, end = extent(tensor)
        if first == end:
            return
        apart = []
        for a, b, may in self.ranges:
            if a < end and first < b:  # views of one memory
                first, end, writable = min(first, a), max(end, b), writable or may
            else:
                apart.append((a, b, may))
        self.ranges = sorted([*apart, (first, end, writable)])
        self._index()

    def overlap(self, tensor: torch.Tensor) -> bool:
        first, end = extent(tensor)
        return any(a < end and first < b for a, b, _ in self.ranges)

    def _index(self) -> None:
        self.firsts, self.ends, self.writable = (
            np.array([r[i] for r in self.ranges], dtype=np.int64) for i in range(3)
        )

    def begin(self, block: int) -> None:
        """Another launch, with blocks of so many threads: forgets which thread wrote what."""
        self.block = block
        self.writers: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # of each byte of a range, and at which epoch

    def find(self, address: np.ndarray, size: int, write: bool) -> np.ndarray:
        """The range of each access."""
        if not len(self.firsts):
            raise Failure("out of bounds: no memory was given")
        found = np.searchsorted(self.firsts, address, "right") - 1
        outside = (found < 0) | (address + size > self.ends[found])
        if outside.any():
            at = int(np.flatnonzero(outside)[0])
            near = max(int(found[at]), 0)
            raise Failure(
                f"out of bounds: {size} bytes at {int(address[at]) - int(self.firsts[near]):+d} of a range of "
                f"{int(self.ends[near] - self.firsts[near])} bytes", at
            )  # fmt: skip
        if write and not self.writable[found].all():
            raise Failure("what is only read was written", int(np.flatnonzero(self.writable[found] == 0)[0]))
        return found

    def load(
        self, address: np.ndarray, size: int, count: int, threads: np.ndarray, blocks: np.ndarray, epochs: np.ndarray
    ) -> np.ndarray:
        found = self.find(address, size * count, False)
        for r, (owner, when) in self.writers.items():
            here = np.flatnonzero(found == r)
            if here.size:
                at = (address[here] - self.firsts[r])[:, None] + np.arange(size * count)
                other = owner[at]
                # A barrier of the block orders what its threads do, and nothing orders blocks.
                alike = (other // self.block == blocks[here, None]) & (when[at] < epochs[here, None])
                bad = (other >= 0) & (other != threads[here, None]) & ~alike
                if bad.any():
                    raise Failure("a thread reads what another writes", int(here[np.flatnonzero(bad.any(1))[0]]))
        index = (address - _FIRST) // size
        return _WORDS[size][index[:, None] + np.arange(count)]

    def store(
        self, address: np.ndarray, values: np.ndarray, threads: np.ndarray, blocks: np.ndarray, epochs: np.ndarray
    ) -> None:
        size, count = values.dtype.itemsize, values.shape[1]
        found = self.find(address, size * count, True)
        index = ((address - _FIRST) // size)[:, None] + np.arange(count)
        for r in np.unique(found).tolist():
            if r not in self.writers:
                length = int(self.ends[r] - self.firsts[r])
                self.writers[r] = np.full(length, -1, np.int64), np.zeros(length, np.int64)
            owner, when = self.writers[r]
            here = found == r
            at = (address[here] - self.firsts[r])[:, None] + np.arange(size * count)
            other = owner[at]
            alike = (other // self.block == blocks[here, None]) & (when[at] < epochs[here, None])
            foreign = ((other >= 0) & (other != threads[here, None]) & ~alike).any(1)
            if foreign.any() and (_WORDS[size][index[here][foreign]] != values[here][foreign]).any():
                raise Failure("two threads write one place", int(np.flatnonzero(here)[np.flatnonzero(foreign)[0]]))
            owner[at], when[at] = threads[here, None], epochs[here, None]
        _WORDS[size][index] = values
        if (_WORDS[size][index] != values).any():
            raise Failure("two threads write one place at once")


class Race(Failure):
    """Between instructions of these positions."""

    def __init__(self, name: str, places: tuple[int, int]) -> None:
        super().__init__(f"a race of {name} in shared memory")
        self.places = places


class Accesses:
    """What threads did to shared memory, to be looked at for races when it is over: two threads at one place, one of
    them writing, with no barrier of their block (within a warp: of their warp) in between. Several threads may write
    one value."""

    def __init__(self, granule: int) -> None:
        self.granule = granule
        self.clear()

    def clear(self) -> None:
        self.parts: list[tuple[np.ndarray, ...]] = []
        self.count = 0

    def add(
        self, instruction: int, places: np.ndarray, size: int, threads: np.ndarray, epochs: np.ndarray,
        warp_epochs: np.ndarray, values: np.ndarray | None,
    ) -> None:  # fmt: skip
        """places: byte positions over the shared memories of all blocks; values ``[threads, n]``: what was written."""
        cells = places[:, None] // self.granule + np.arange(size // self.granule)
        shape = cells.shape
        what = np.zeros(shape, np.uint64)
        if values is not None:
            raw = np.ascontiguousarray(values).view(np.uint8).reshape(shape[0], -1)
            what = raw.view(UNSIGNED[self.granule]).astype(np.uint64)
        each = (np.broadcast_to(x[:, None], shape) for x in (epochs, threads, warp_epochs))
        same = np.full(shape, values is not None), np.full(shape, instruction)
        self.parts.append(tuple(x.reshape(-1) for x in (cells, *each, *same, what)))
        self.count += cells.size

    def check(self) -> None:
        if not self.parts:
            return
        cells, epochs, threads, warp_epochs, *access = map(np.concatenate, zip(*self.parts, strict=True))
        self.clear()
        warps = threads // 32
        self._compare([epochs, cells], warps, *access, "warps")
        self._compare([warp_epochs, warps, epochs, cells], threads, *access, "threads")

    @staticmethod
    def _compare(
        keys: list[np.ndarray], who: np.ndarray, written: np.ndarray, by: np.ndarray, what: np.ndarray, name: str
    ) -> None:
        """Among the accesses that have all keys in common."""
        order = np.lexsort(keys)
        keys, (who, written, by, what) = [k[order] for k in keys], (x[order] for x in (who, written, by, what))
        starts = np.flatnonzero(np.r_[True, np.any([k[1:] != k[:-1] for k in keys], axis=0)])
        several = np.minimum.reduceat(who, starts) != np.maximum.reduceat(who, starts)
        writes, reads = np.logical_or.reduceat(written, starts), np.logical_or.reduceat(~written, starts)
        differ = np.minimum.reduceat(what, starts) != np.maximum.reduceat(what, starts)
        races = several & writes & (reads | differ)
        if races.any():
            at = int(np.flatnonzero(races)[0])
            here = slice(starts[at], [*starts, len(who)][at + 1])
            raise Race(name, (int(by[here].min()), int(by[here].max())))
