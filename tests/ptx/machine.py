"""Runs a kernel: all threads of all blocks at once, as numpy arrays with a mask.

Of threads at several places those at the first go on, so that branches meet again where they do on a GPU. Whatever
needs a whole warp, a shuffle or a barrier, waits for it; if the rest never comes, that is a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from . import instructions
from .memory import UNSIGNED, Accesses, Failure, Race, Tensors
from .parser import Kernel

Step = Callable[["Machine", np.ndarray], None]
MOST_STEPS = 500_000


class Program:
    """A kernel whose instructions have become functions of the machine and a mask."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    @cached_property
    def steps(self) -> list[tuple[Step | None, Callable[[Machine], np.ndarray] | None]]:
        """What each instruction does (None: what the machine does itself, branches and barriers), and which threads
        must do it at once (None: it makes no difference)."""
        steps = []
        for instruction in self.kernel.instructions:
            try:
                steps.append(instructions.compile(instruction))
            except Exception as error:
                raise NotImplementedError(f"{self.kernel.name}: {instruction.text}: {error!r}") from error
        return steps

    @cached_property
    def granule(self) -> int:
        """Bytes of the smallest access to shared memory."""
        words = (instructions.word(x) for x in self.kernel.instructions if "shared" in x.modifiers)
        return min(words, default=1)

    @cached_property
    def targets(self) -> list[list[int]]:
        """Where the instructions lead that branch."""
        labels, targets = self.kernel.labels, []
        for x in self.kernel.instructions:
            names = [x.operands[0]] if x.opcode == "bra" else []
            if x.opcode == "brx":
                names = self.kernel.tables[x.operands[1]]
            targets.append([labels[name] for name in names])
        return targets


SECTOR = 32  # bytes that memory moves at a time


class Counts:
    """What launches have cost, as far as PTX tells: instructions, once for each warp, and the sectors of memory that
    were read and written, once each, as a cache without end would have it."""

    def __init__(self) -> None:
        self.instructions = 0
        self._sectors: dict[bool, list[np.ndarray]] = {False: [], True: []}

    def note(self, address: np.ndarray, size: int, written: bool) -> None:
        first, last = address // SECTOR, (address + size - 1) // SECTOR
        self._sectors[written].append(np.unique(np.concatenate([first, last])))

    @property
    def bytes(self) -> int:
        return sum(SECTOR * len(np.unique(np.concatenate(parts))) for parts in self._sectors.values() if parts)


class Machine:
    def __init__(
        self, program: Program, grid: tuple[int, int, int], block: tuple[int, int, int], shared: int, params: bytes,
        tensors: Tensors, counts: Counts | None = None,
    ) -> None:  # fmt: skip
        """shared: bytes of shared memory besides what the kernel declares."""
        kernel = self.kernel = program.kernel
        self.program, self.tensors, self.counts = program, tensors, counts
        if len(params) != kernel.bytes["param"]:
            raise Failure(f"{kernel.name} takes {kernel.bytes['param']} bytes of arguments, got {len(params)}")
        size, blocks = int(np.prod(block)), int(np.prod(grid))
        if size % 32 or size > (kernel.max_threads or 1024):
            raise Failure(f"{kernel.name}: blocks of {size} threads")
        self.count = size * blocks
        self.lanes = np.arange(self.count)
        self.blocks = self.lanes // size
        self.size = size
        thread = self.lanes % size
        special = {"laneid": thread % 32, "warpid": thread // 32}
        for i, axis in enumerate("xyz"):
            special[f"tid.{axis}"] = thread // int(np.prod(block[:i])) % block[i]
            special[f"ctaid.{axis}"] = self.blocks // int(np.prod(grid[:i])) % grid[i]
            special[f"ntid.{axis}"] = np.full(self.count, block[i])
            special[f"nctaid.{axis}"] = np.full(self.count, grid[i])
        # What nobody has written is NaN, or a number that is no use as an address.
        self.registers = [
            np.zeros(self.count, bool) if bits == 1 else np.full(self.count, -1).astype(UNSIGNED[bits // 8])
            for bits in kernel.registers
        ]
        for slot, name in kernel.special.items():
            self.registers[slot] = special[name[1:]].astype(self.registers[slot].dtype)
        self.tensors.begin(size)
        self.spaces = {
            "param": (np.frombuffer(params + bytes(16), np.uint8), len(params), np.zeros(self.count, np.int64)),
            "shared": self._own(kernel.bytes["shared"] + shared, blocks, self.blocks),
            "local": self._own(kernel.bytes["local"], self.count, self.lanes),
        }
        self.accesses = Accesses(program.granule)
        self.epochs = np.zeros(self.count, np.int64)  # barriers that the block has passed
        self.warp_epochs = np.zeros(self.count, np.int64)  # and the warp
        self.groups = np.zeros(self.count, np.int64)  # of copies, that each thread has closed
        self.copies: list[tuple[np.ndarray, ...]] = []  # under way: threads, their groups, addresses, values
        self.live = np.ones(self.count, bool)
        self.ready: dict[int, np.ndarray] = {0: self.live.copy()}
        self.held: dict[int, np.ndarray] = {}  # where a part of a warp waits for the rest
        self.arrived: dict[int, np.ndarray] = {}  # at barriers
        self.here = 0  # the instruction

    def _own(self, size: int, count: int, owner: np.ndarray) -> tuple[np.ndarray, int, np.ndarray]:
        stride = -(-size // 16) * 16
        return np.full(stride * count, 0xFF, np.uint8), size, owner * stride

    def run(self) -> None:
        try:
            with np.errstate(all="ignore"):
                self._run()
                self.accesses.check()
        except Race as race:
            raise Failure(f"{self.kernel.name}: {race.args[0]}: {self._text(race.places)}") from None
        except Failure as failure:
            where = self._who(*failure.args[1:])
            raise Failure(f"{self.kernel.name}: {failure.args[0]}{where}: {self._text([self.here])}") from None

    def _run(self) -> None:
        steps = 0
        while self.ready or self._release():
            here = min(self.ready)
            mask = self.ready.pop(here)
            if here in self.held:
                mask = mask | self.held.pop(here)
            stop = min((*self.ready, *(p for p in self.held if p > here)), default=len(self.program.steps))
            while here < stop and mask is not None:
                self.here = here
                here, mask = self._step(here, mask)
                steps += 1
                if here <= self.here:  # others may be first now
                    break
            if mask is not None:
                self._go(here, mask)
            if steps > MOST_STEPS:
                raise Failure("no end in sight")

    def _text(self, places: Sequence[int]) -> str:
        return "; ".join(self.kernel.instructions[place].text for place in places)

    def _who(self, thread: int | None = None) -> str:
        if thread is None:
            return ""
        return f" (thread {thread % self.size} of block {thread // self.size})"

    def _go(self, place: int, mask: np.ndarray) -> None:
        self.ready[place] = self.ready[place] | mask if place in self.ready else mask

    def _step(self, here: int, mask: np.ndarray) -> tuple[int, np.ndarray | None]:
        """Where the threads of the mask are afterwards; None: in several places."""
        instruction, (step, together) = self.kernel.instructions[here], self.program.steps[here]
        active = mask
        if (guard := instruction.guard) is not None:
            predicate = self.registers[guard.slot]
            active = mask & (~predicate if guard.negated else predicate)
        if self.counts is not None:
            self.counts.instructions += np.count_nonzero(mask.reshape(-1, 32).any(1))
        if step is None:
            return self._control(here, mask, active)
        if together is not None:
            active = self._whole_warps(here, active, together(self))
            if active is not mask:
                held = self.held.get(here)
                mask = mask if held is None else mask & ~held
                if not mask.any():
                    return here, None
        step(self, active)
        return here + 1, mask

    def _whole_warps(self, here: int, active: np.ndarray, need: np.ndarray) -> np.ndarray:
        """Those of whose warps all are here that must be; the others are held."""
        warps = active.reshape(-1, 32).any(1)
        missing = (need & ~active).reshape(-1, 32).any(1) & warps
        if not missing.any():
            return active
        if (need & ~self.live & np.repeat(warps, 32)).any():
            raise Failure("a warp lacks threads that have ended", int(self.lanes[need & ~self.live][0]))
        held = active & np.repeat(missing, 32)
        self.held[here] = self.held[here] | held if here in self.held else held
        return active & ~held

    def _control(self, here: int, mask: np.ndarray, active: np.ndarray) -> tuple[int, np.ndarray | None]:
        instruction = self.kernel.instructions[here]
        if instruction.opcode in ("ret", "exit"):
            self.live &= ~active
            rest = mask & ~active
            return here + 1, rest if rest.any() else None
        if instruction.opcode == "bra":
            count = np.count_nonzero(active)
            target = self.program.targets[here][0]
            if count == np.count_nonzero(mask):
                return target, mask
            if count:
                self._go(target, active)
                self._go(here + 1, mask & ~active)
                return here, None
            return here + 1, mask
        if instruction.opcode == "brx":
            index = self.registers[instruction.operands[0].slot]
            for i, target in enumerate(self.program.targets[here]):
                if (there := active & (index == i)).any():
                    self._go(target, there)
            if (rest := mask & ~active).any():
                self._go(here + 1, rest)
            return here, None
        assert instruction.opcode in ("bar", "barrier")
        active = self._whole_warps(here, active, np.ones(self.count, bool))
        held = self.held.get(here)
        rest = mask & ~active if held is None else mask & ~active & ~held
        if active.any():
            self.arrived[here] = self.arrived[here] | active if here in self.arrived else active
        return here + 1, rest if rest.any() else None

    def _release(self) -> bool:
        """Lets blocks go of which all threads are at a barrier. False: all is done."""
        if not self.live.any():
            return False
        waiting = np.zeros(self.count, bool)
        for mask in self.arrived.values():
            waiting |= mask
        free = waiting.reshape(-1, self.size).all(1)
        if not free.any():
            where = next(iter((*self.held, *self.arrived)), 0)
            text = self.kernel.instructions[where].text
            raise Failure(f"threads wait at `{text}` for others that never come")
        released = np.repeat(free, self.size)
        for place, mask in list(self.arrived.items()):
            if (going := mask & released).any():
                self._go(place + 1, going)
            self.arrived[place] = mask & ~released
        self.arrived = {place: mask for place, mask in self.arrived.items() if mask.any()}
        self.epochs += released
        if self.accesses.count > 1 << 22 and free.all():
            self.accesses.check()
        return True

    # What instructions ask of memory. `active`: indices of threads.

    def place(self, space: str, address: np.ndarray, size: int, active: np.ndarray) -> np.ndarray:
        """Positions in the bytes of a space."""
        self._aligned(address, size, active)
        _, limit, offset = self.spaces[space]
        outside = (address < 0) | (address + size > limit)
        if outside.any():
            at = int(np.flatnonzero(outside)[0])
            raise Failure(f"out of bounds: {size} bytes at {int(address[at])} of {limit} ({space})", int(active[at]))
        return address + offset[active]

    def load(self, space: str, address: np.ndarray, size: int, count: int, active: np.ndarray) -> np.ndarray:
        """``[active, count]`` words of ``size`` bytes."""
        if space == "global":
            self._global(address, size * count, active, False)
            return self._tensors(self.tensors.load, active, address, size, count)
        at = self.place(space, address, size * count, active)
        self._note(space, at, size * count, active, None)
        return self._words(space, size)[(at // size)[:, None] + np.arange(count)]

    def store(self, space: str, address: np.ndarray, values: np.ndarray, active: np.ndarray) -> None:
        size, count = values.dtype.itemsize, values.shape[1]
        if space == "global":
            self._global(address, size * count, active, True)
            self._tensors(self.tensors.store, active, address, values)
            return
        at = self.place(space, address, size * count, active)
        self._note(space, at, size * count, active, values)
        self._words(space, size)[(at // size)[:, None] + np.arange(count)] = values

    def copy_later(self, address: np.ndarray, values: np.ndarray, active: np.ndarray) -> None:
        """A copy into shared memory that is there once its group was waited for, and may be there before."""
        at = self.place("shared", address, values.shape[1], active)
        self._note("shared", at, values.shape[1], active, values.view(np.uint32))
        self.copies.append((active, self.groups[active], address, values))

    def wait_for_copies(self, mask: np.ndarray, most: int) -> None:
        """Until no more than the last so many groups of each thread are under way."""
        left = []
        for active, group, address, values in self.copies:
            done = mask[active] & (group < self.groups[active] - most)
            if done.any():
                self.store("shared", address[done], values[done].view(np.uint32), active[done])
            if not done.all():
                left.append(tuple(x[~done] for x in (active, group, address, values)))
        self.copies = left

    def _note(self, space: str, at: np.ndarray, size: int, active: np.ndarray, values: np.ndarray | None) -> None:
        if space == "shared":
            epochs = self.epochs[active], self.warp_epochs[active]
            self.accesses.add(self.here, at, size, active, *epochs, values)

    def _words(self, space: str, size: int) -> np.ndarray:
        memory = self.spaces[space][0]
        return memory[: len(memory) // 8 * 8].view(UNSIGNED[size])

    def _global(self, address: np.ndarray, size: int, active: np.ndarray, written: bool) -> None:
        self._aligned(address, size, active)
        if self.counts is not None:
            self.counts.note(address, size, written)

    def _aligned(self, address: np.ndarray, align: int, active: np.ndarray) -> None:
        if (address % align != 0).any():
            at = int(np.flatnonzero(address % align)[0])
            raise Failure(f"misaligned: {align} bytes at {int(address[at]):#x}", int(active[at]))

    def _tensors(self, call: Callable, active: np.ndarray, *access: object) -> np.ndarray:
        try:
            return call(*access, active, self.blocks[active], self.epochs[active])
        except Failure as failure:
            raise Failure(failure.args[0], *(int(active[i]) for i in failure.args[1:])) from None
