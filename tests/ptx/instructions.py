"""What each instruction of PTX does, as a function of the machine and the mask of the threads that do it. One that
stands not here is refused when a kernel is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .memory import UNSIGNED, Failure
from .parser import Address, Immediate, Instruction, Register, Symbol, Two, Vector
from .values import (
    KINDS,
    Registers,
    bits_of,
    flush,
    fused,
    is_float,
    reader,
    to_integer,
    towards,
    writer,
)

if TYPE_CHECKING:
    from .machine import Machine

Step = Callable[["Machine", np.ndarray], None]
Values = Callable[..., np.ndarray]
CONTROL = ("bra", "brx", "ret", "exit", "bar", "barrier")
NOTHING = ("membar", "fence", "griddepcontrol", "createpolicy", "nanosleep", "pmevent")
ROUNDINGS = ("rz", "rm", "rp")


def compile(x: Instruction) -> tuple[Step | None, Callable[[Machine], np.ndarray] | None]:
    """What an instruction does, None for what the machine does itself; and which threads must do it at once."""
    if x.opcode == "bar" and x.modifiers[:2] == ("warp", "sync"):
        return _warp_barrier, _members(x.operands[0])
    if x.opcode in CONTROL:
        assert x.opcode not in ("bar", "barrier") or x.modifiers[-1] in ("sync", "aligned", "0")
        return None, None
    if x.opcode in NOTHING:
        return (lambda machine, mask: None), None
    if x.opcode in ("shfl", "vote", "redux"):
        return WHOLE_WARPS[x.opcode](x), _members(x.operands[-1])
    if x.opcode == "wgmma":
        return (_product(x) if x.modifiers[0] == "mma_async" else lambda machine, mask: None), _all
    if x.opcode == "cp":
        assert x.modifiers[0] == "async", x.modifiers
        return ASYNC.get(x.modifiers[1], _copy_later)(x), None
    if x.opcode in MATRICES:
        return MATRICES[x.opcode](x), _all
    if x.opcode in MEMORY:
        return MEMORY[x.opcode](x), None
    return MOVES[x.opcode](x) if x.opcode in MOVES else _arithmetic(x), None


def word(x: Instruction) -> int:
    """Bytes of what a load or a store takes at a time."""
    if x.opcode == "cp":
        return x.operands[2].value
    return bits_of(x.modifiers[-1]) // 8


# Arithmetic: the last modifier says the type.


def _arithmetic(x: Instruction) -> Step:
    kind, mods = x.modifiers[-1], x.modifiers
    result, kinds = kind, [kind] * (len(x.operands) - 1)
    if is_float(kind) and x.opcode in FLOATS:
        f = _float(FLOATS[x.opcode], x.opcode, mods, kind)
    else:
        f = INTEGERS[x.opcode]
        if x.opcode in ("mul", "mad"):
            if mods[0] == "wide":
                result = f"{kind[0]}{2 * bits_of(kind)}"
                kinds[2:] = [result] * (len(kinds) - 2)
            f = partial(f, PRODUCTS[mods[0]])
        elif x.opcode == "shf":
            f = partial(f, *mods[:2])
        elif "relu" in mods:
            f = partial(_positive, f)
        else:
            assert not mods[:-1], mods
        for i in COUNTS.get(x.opcode, ()):
            kinds[i] = "u32"
        if x.opcode in ("popc", "clz"):
            result = "u32"
    read = [reader(o, k) for o, k in zip(x.operands[1:], kinds, strict=True)]
    write = writer(x.operands[0], result)
    dtype = KINDS.get(result)

    def step(machine: Machine, mask: np.ndarray) -> None:
        value = f(*(r(machine.registers) for r in read))
        if dtype is not None and value.dtype != dtype:
            value = value.astype(dtype)
        write(machine.registers, mask, value)

    return step


# The operands that are counts, whatever the type.
COUNTS = {"shl": (1,), "shr": (1,), "bfe": (1, 2), "bfi": (2, 3), "shf": (2,), "lop3": (3,)}


def _float(f: Values, opcode: str, mods: tuple[str, ...], kind: str) -> Values:
    """With what the modifiers say of rounding, saturation and subnormal numbers."""
    unknown = set(mods[:-1]) - {"rn", "ftz", "approx", "full", "sat", "NaN", "relu", *ROUNDINGS}
    assert not unknown, unknown
    mode = next((m for m in mods if m in ROUNDINGS), None)
    assert not mode or kind == "f32"
    if "NaN" in mods:
        f = {"min": np.minimum, "max": np.maximum}[opcode]
    if opcode == "fma" and kind == "f64":
        f = fused

    def rounded(*values: np.ndarray) -> np.ndarray:
        if "ftz" in mods:
            values = tuple(map(flush, values))
        if kind != "f64" and (mode or opcode == "fma"):  # whose product must not be rounded
            wide = f(*(v.astype(np.float64) for v in values))
            result = towards(wide, mode) if mode else wide.astype(np.float32)
        else:
            result = f(*values)
        if "ftz" in mods:
            result = flush(result)
        if "sat" in mods:
            result = _saturated(result)
        return np.fmax(result, np.float32(0)) if "relu" in mods else result

    return rounded


def _saturated(x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), 0, np.clip(x, 0, 1)).astype(x.dtype)


FLOATS: dict[str, Values] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "min": np.fmin, "max": np.fmax,
    "fma": lambda a, b, c: a * b + c, "mad": lambda a, b, c: a * b + c, "neg": np.negative, "abs": np.abs,
    "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a), "rcp": lambda a: 1 / a, "ex2": np.exp2, "lg2": np.log2,
    "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "copysign": lambda a, b: np.copysign(b, a),
}  # fmt: skip


def _positive(f: Values, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.maximum(f(a, b), 0)


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cut towards 0; all ones of a division by 0."""
    by = np.where(b == 0, 1, b).astype(a.dtype)
    q = a // by
    if a.dtype.kind == "i":
        q = q + ((q < 0) & (q * by != a))
    return np.where(b == 0, np.array(-1).astype(a.dtype), q)


def _high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}8")
        return (a.astype(wide) * b.astype(wide)) >> wide.type(bits)
    return np.asarray((a.astype(object) * b.astype(object)) >> 64).astype(a.dtype)


def _wide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    wide = f"{a.dtype.kind}{2 * a.dtype.itemsize}"
    return a.astype(wide) * b.astype(wide)


PRODUCTS: dict[str, Values] = {"lo": np.multiply, "hi": _high, "wide": _wide}


def _shift(a: np.ndarray, by: np.ndarray, left: bool) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    inside = np.minimum(by, bits - 1).astype(a.dtype)
    if left:
        return np.where(by >= bits, a.dtype.type(0), a << inside)
    return np.where((by >= bits) & (a.dtype.kind == "u"), a.dtype.type(0), a >> inside)


def _funnel(side: str, mode: str, low: np.ndarray, high: np.ndarray, by: np.ndarray) -> np.ndarray:
    by = (by & 31 if mode == "wrap" else np.minimum(by, 32)).astype(np.uint64)
    both = (high.astype(np.uint64) << np.uint64(32)) | low
    return ((both << by) >> np.uint64(32) if side == "l" else both >> by).astype(np.uint64) & np.uint64(0xFFFFFFFF)


def _ones(length: np.ndarray) -> np.ndarray:
    return np.where(length >= 64, np.uint64(2**64 - 1), (np.uint64(1) << np.minimum(length, 63)) - np.uint64(1))


def _extract(a: np.ndarray, at: np.ndarray, length: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    at, length = at.astype(np.uint64) & np.uint64(255), length.astype(np.uint64) & np.uint64(255)
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    wide = a.view(unsigned).astype(np.uint64)
    field = np.where(at >= bits, np.uint64(0), (wide >> np.minimum(at, 63))) & _ones(length)
    if a.dtype.kind == "u":
        return field.astype(unsigned)
    last = np.minimum(at + length - np.uint64(1), np.uint64(bits - 1))
    negative = (length > 0) & (((wide >> last) & np.uint64(1)) == 1)
    return np.where(negative, field | ~_ones(length), field).astype(unsigned).view(a.dtype)


def _insert(a: np.ndarray, b: np.ndarray, at: np.ndarray, length: np.ndarray) -> np.ndarray:
    at, length = at.astype(np.uint64) & np.uint64(255), length.astype(np.uint64) & np.uint64(255)
    at = np.minimum(at, 63)
    ones = _ones(length) << at
    return ((b.astype(np.uint64) & ~ones) | ((a.astype(np.uint64) << at) & ones)).astype(a.dtype)


def _permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both, result = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32)), np.uint64(0)
    for i in range(4):
        nibble = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> (np.uint64(8) * (nibble & np.uint64(7)))) & np.uint64(255)
        sign = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
        result = result | (np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * i))
    return result.astype(np.uint32)


def _logic(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    result = np.uint32(0)
    for i in range(8):
        term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        result = result | np.where(table >> i & 1, term, np.uint32(0))
    return result


def _length(a: np.ndarray) -> np.ndarray:
    """Bits up to the highest that is set."""
    rest, length = a.astype(np.uint64), np.zeros(a.shape, np.uint32)
    for step in (32, 16, 8, 4, 2, 1):
        more = rest >> np.uint64(step) != 0
        length = length + np.where(more, np.uint32(step), np.uint32(0))
        rest = np.where(more, rest >> np.uint64(step), rest)
    return (length + (rest != 0)).astype(np.uint32)


def _population(a: np.ndarray) -> np.ndarray:
    raw = np.ascontiguousarray(a).reshape(*a.shape, 1).view(np.uint8)
    return np.unpackbits(raw, axis=-1).sum(-1).astype(np.uint32)


def _reversed(a: np.ndarray) -> np.ndarray:
    raw = np.ascontiguousarray(a).reshape(*a.shape, 1).view(np.uint8)
    turned = np.packbits(np.unpackbits(raw, axis=-1, bitorder="little"), axis=-1)[..., ::-1]
    return np.ascontiguousarray(turned).view(a.dtype)[..., 0]


INTEGERS: dict[str, Values] = {
    "add": np.add, "sub": np.subtract, "div": _quotient, "mul": lambda product, a, b: product(a, b),
    "mad": lambda product, a, b, c: product(a, b) + c, "rem": lambda a, b: a - _quotient(a, b) * b,
    "min": np.minimum, "max": np.maximum, "neg": np.negative,
    "abs": np.abs, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.bitwise_not,
    "shl": lambda a, by: _shift(a, by, True), "shr": lambda a, by: _shift(a, by, False), "shf": _funnel,
    "bfe": _extract, "bfi": _insert, "prmt": _permute, "lop3": _logic, "popc": _population, "brev": _reversed,
    "clz": lambda a: (8 * a.dtype.itemsize - _length(a)).astype(np.uint32),
}  # fmt: skip


# What takes types of its own.


def _compare(x: Instruction) -> Step:
    mods, kind = x.modifiers, x.modifiers[-1]
    how = mods[0]
    joins = [m for m in mods if m in ("and", "or", "xor")]
    a, b = (reader(o, kind) for o in x.operands[1:3])
    both = x.operands[0] if isinstance(x.operands[0], Two) else Two(x.operands[0], None)
    first, second = writer(both.first, "pred"), writer(both.second, "pred")
    other = reader(x.operands[3], "pred") if joins else None
    join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[joins[0]] if joins else None
    how = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(how, how)
    compare = COMPARISONS["unequal" if how == "ne" and is_float(kind) else how]

    def step(machine: Machine, mask: np.ndarray) -> None:
        p, q = a(machine.registers), b(machine.registers)
        if "ftz" in mods:
            p, q = flush(p), flush(q)
        found = compare(p, q)
        if join:
            flag = other(machine.registers)
            first(machine.registers, mask, join(found, flag))
            second(machine.registers, mask, join(~found, flag))
        else:
            first(machine.registers, mask, found)
            second(machine.registers, mask, ~found)

    return step


COMPARISONS: dict[str, Values] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "equ": lambda a, b: ~((a < b) | (a > b)), "neu": np.not_equal, "ltu": lambda a, b: ~(a >= b),
    "unequal": lambda a, b: (a < b) | (a > b),  # which a NaN is not
    "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
}  # fmt: skip


def _select(x: Instruction) -> Step:
    kind = x.modifiers[-1].replace("f", "b")
    a, b, which = reader(x.operands[1], kind), reader(x.operands[2], kind), reader(x.operands[3], "pred")
    write = writer(x.operands[0], kind)
    return lambda machine, mask: write(
        machine.registers, mask, np.where(which(machine.registers), a(machine.registers), b(machine.registers))
    )


def _move(x: Instruction) -> Step:
    target, source = x.operands[:2]
    kind = x.modifiers[-1]
    if kind != "pred":
        kind = f"b{bits_of(kind)}"
    if isinstance(target, Vector):
        part = bits_of(kind) // len(target.items)
        read = reader(source, kind)
        writes = [writer(item, f"b{part}") for item in target.items]

        def unpack(machine: Machine, mask: np.ndarray) -> None:
            whole = read(machine.registers)
            for i, write in enumerate(writes):
                piece = (whole >> whole.dtype.type(i * part)).astype(UNSIGNED[part // 8])
                write(machine.registers, mask, piece)

        return unpack
    write = writer(target, kind)
    if isinstance(source, Vector):
        part = bits_of(kind) // len(source.items)
        reads = [reader(item, f"b{part}") for item in source.items]
        wide = KINDS[kind]

        def pack(machine: Machine, mask: np.ndarray) -> None:
            whole = wide(0)
            for i, read in enumerate(reads):
                whole = whole | (read(machine.registers).astype(wide) << wide(i * part))
            write(machine.registers, mask, whole)

        return pack
    read = reader(source, kind)
    return lambda machine, mask: write(machine.registers, mask, read(machine.registers))


def _convert(x: Instruction) -> Step:
    to, source = x.modifiers[-2:]
    mods = x.modifiers[:-2]
    read = [reader(o, source) for o in x.operands[1:]]
    write = writer(x.operands[0], to)
    mode = next((m for m in mods if m in ("rni", "rzi", "rmi", "rpi")), None)
    cut = next((m for m in mods if m in ROUNDINGS), None)
    assert not set(mods) - {"rn", "rna", "rni", "rzi", "rmi", "rpi", "ftz", "sat", *ROUNDINGS}, mods
    assert not cut or (source, to) in (("f64", "f32"), ("s32", "f32"), ("u32", "f32"), ("f32", "tf32")), x.text

    def step(machine: Machine, mask: np.ndarray) -> None:
        values = [r(machine.registers) for r in read]
        if "ftz" in mods and source == "f32":
            values = [flush(v) for v in values]
        if len(values) == 2:  # the first operand is the upper half
            write(machine.registers, mask, np.stack(np.broadcast_arrays(values[1], values[0]), -1))
            return
        (value,) = values
        if to == "tf32":
            raw = np.ascontiguousarray(value).view(np.uint32)
            value = ((raw + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
        elif is_float(source) and not is_float(to):
            value = to_integer(value, to, mode or "rzi")
        elif not is_float(to):
            if "sat" in mods:
                limits = np.iinfo(KINDS[to])
                value = np.clip(value, limits.min, limits.max)
            value = value.astype(KINDS[to])
        elif cut:
            value = towards(value.astype(np.float64), cut)
        else:
            if mode:
                value = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](value)
            value = value.astype(KINDS.get(to, np.float32))
            if "sat" in mods:
                value = _saturated(value)
        write(machine.registers, mask, value)

    return step


def _copy(x: Instruction) -> Step:
    """``cvta``: a generic address of global memory is its own; of others only those are made that are taken back."""
    read, write = reader(x.operands[1], "u64"), writer(x.operands[0], "u64")
    return lambda machine, mask: write(machine.registers, mask, read(machine.registers))


MOVES: dict[str, Callable[[Instruction], Step]] = {
    "setp": _compare, "selp": _select, "mov": _move, "cvt": _convert, "cvta": _copy,
}  # fmt: skip


# Memory.

SPACES = ("global", "shared", "local", "param")


def _space(x: Instruction) -> str:
    found = [m.split("::")[0] for m in x.modifiers if m.split("::")[0] in SPACES]
    assert found, "a generic address"
    return found[0]


def _address(operand: Address) -> Callable[[Registers, np.ndarray], np.ndarray]:
    """Addresses of the threads of given indices."""
    base = operand.base
    if isinstance(base, Register):
        slot, offset = base.slot, np.int64(operand.offset)
        return lambda registers, active: registers[slot][active].astype(np.int64) + offset
    assert isinstance(base, Symbol | Immediate), base
    at = operand.offset + (base.offset if isinstance(base, Symbol) else base.value)
    return lambda registers, active: np.full(len(active), at, np.int64)


def _items(operand: object) -> tuple:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _load(x: Instruction) -> Step:
    space, size, kind = _space(x), word(x), x.modifiers[-1]
    address, items = _address(x.operands[1]), _items(x.operands[0])
    signed = KINDS[kind] if kind[0] == "s" else None
    slots = [(i, item.slot, UNSIGNED[item.bits // 8]) for i, item in enumerate(items) if item is not None]
    count = len(items)

    def step(machine: Machine, mask: np.ndarray) -> None:
        active = np.flatnonzero(mask)
        if not active.size:
            return
        values = machine.load(space, address(machine.registers, active), size, count, active)
        for i, slot, wide in slots:
            value = values[:, i]
            if signed:
                value = value.view(signed).astype(f"i{wide().itemsize}").view(wide)
            machine.registers[slot][active] = value

    return step


def _store(x: Instruction) -> Step:
    space, kind = _space(x), f"b{8 * word(x)}"
    address = _address(x.operands[0])
    reads = [reader(item, kind) for item in _items(x.operands[1])]

    def step(machine: Machine, mask: np.ndarray) -> None:
        active = np.flatnonzero(mask)
        if not active.size:
            return
        values = np.stack([np.broadcast_to(r(machine.registers), mask.shape)[active] for r in reads], 1)
        machine.store(space, address(machine.registers, active), values, active)

    return step


def _prefetch(x: Instruction) -> Step:
    address = _address(x.operands[0])

    def step(machine: Machine, mask: np.ndarray) -> None:
        active = np.flatnonzero(mask)
        if active.size:
            machine.load("global", address(machine.registers, active), 1, 1, active)

    return step


def _copy_later(x: Instruction) -> Step:
    """``cp.async``: from global to shared memory; what is not read of it, by the last operand, is 0."""
    size, known = word(x), x.operands[3:]
    target, source = _address(x.operands[0]), _address(x.operands[1])
    read = reader(known[0], "u32") if known else None

    def step(machine: Machine, mask: np.ndarray) -> None:
        active = np.flatnonzero(mask)
        if not active.size:
            return
        values = np.zeros((active.size, size), np.uint8)
        there = np.ones(active.size, bool)
        if read is not None:
            given = np.broadcast_to(read(machine.registers), mask.shape)[active]
            assert np.isin(given, (0, size)).all(), "a copy of a part"
            there = given > 0
        if there.any():
            loaded = machine.load("global", source(machine.registers, active[there]), 4, size // 4, active[there])
            values[there] = np.ascontiguousarray(loaded).view(np.uint8)
        machine.copy_later(target(machine.registers, active), values, active)

    return step


def _commit(x: Instruction) -> Step:
    def step(machine: Machine, mask: np.ndarray) -> None:
        machine.groups += mask

    return step


def _wait(x: Instruction) -> Step:
    most = x.operands[0].value

    def step(machine: Machine, mask: np.ndarray) -> None:
        machine.wait_for_copies(mask, most)

    return step


ASYNC: dict[str, Callable[[Instruction], Step]] = {"commit_group": _commit, "wait_group": _wait}

MEMORY: dict[str, Callable[[Instruction], Step]] = {"ld": _load, "st": _store, "prefetch": _prefetch}


# Warps.


def _members(operand: object) -> Callable[[Machine], np.ndarray]:
    """The threads that a mask of a warp's names."""
    read = reader(operand, "u32")
    return lambda machine: (read(machine.registers) >> (machine.lanes % 32).astype(np.uint32)) & np.uint32(1) == 1


def _warp_barrier(machine: Machine, mask: np.ndarray) -> None:
    machine.warp_epochs += mask


def _shuffle(x: Instruction) -> Step:
    how = x.modifiers[1]
    assert x.modifiers[0] == "sync" and x.modifiers[2] == "b32", x.modifiers
    both = x.operands[0] if isinstance(x.operands[0], Two) else Two(x.operands[0], None)
    write, flag = writer(both.first, "b32"), writer(both.second, "pred")
    value, by, clamp = reader(x.operands[1], "b32"), reader(x.operands[2], "u32"), reader(x.operands[3], "u32")

    def step(machine: Machine, mask: np.ndarray) -> None:
        if not mask.any():
            return
        lane = machine.lanes % 32
        b, c = (read(machine.registers).astype(np.int64) for read in (by, clamp))
        segment, most = (c >> 8) & 31, c & 31
        lowest, highest = lane & segment, (lane & segment) | (most & ~segment)
        source = {
            "up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | (b & ~segment),
        }[how]  # fmt: skip
        inside = source >= highest if how == "up" else source <= highest
        source = np.where(inside, source, lane)
        whole = machine.lanes - lane + source
        if (alone := mask & ~mask[whole]).any():
            raise Failure("a shuffle reads from a thread that takes no part", int(np.flatnonzero(alone)[0]))
        write(machine.registers, mask, np.broadcast_to(value(machine.registers), mask.shape)[whole])
        flag(machine.registers, mask, inside)

    return step


def _vote(x: Instruction) -> Step:
    how, kind = x.modifiers[1:3]
    read, write = reader(x.operands[1], "pred"), writer(x.operands[0], kind)

    def step(machine: Machine, mask: np.ndarray) -> None:
        flags = (np.broadcast_to(read(machine.registers), mask.shape) & mask).reshape(-1, 32)
        if how == "ballot":
            result = (flags * (np.uint64(1) << np.arange(32, dtype=np.uint64))).sum(1).astype(np.uint32)
        elif how == "any":
            result = flags.any(1)
        else:
            assert how == "all", how
            result = (flags | ~mask.reshape(-1, 32)).all(1)
        write(machine.registers, mask, np.repeat(result, 32))

    return step


def _reduce(x: Instruction) -> Step:
    how, kind = x.modifiers[1:3]
    read, write = reader(x.operands[1], kind), writer(x.operands[0], kind)
    f = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
         "xor": np.bitwise_xor}[how]  # fmt: skip

    def step(machine: Machine, mask: np.ndarray) -> None:
        assert (mask.reshape(-1, 32).all(1) == mask.reshape(-1, 32).any(1)).all()
        values = np.broadcast_to(read(machine.registers), mask.shape).reshape(-1, 32)
        write(machine.registers, mask, np.repeat(f.reduce(values, axis=1, dtype=values.dtype), 32))

    return step


WHOLE_WARPS: dict[str, Callable[[Instruction], Step]] = {"shfl": _shuffle, "vote": _vote, "redux": _reduce}


def _all(machine: Machine) -> np.ndarray:
    return np.ones(machine.count, bool)


def _matrices(x: Instruction) -> tuple[int, bool]:
    """How many matrices of 8 rows of 16 bytes, and whether they are turned. The first 8 threads of a warp tell where
    the rows of the first lie, the next those of the second; threads 4 r to 4 r + 3 hold row r of each, two words a
    thread."""
    count = next(int(m[1:]) for m in x.modifiers if m in ("x1", "x2", "x4"))
    assert "m8n8" in x.modifiers and x.modifiers[-1] == "b16" and _space(x) == "shared", x.modifiers
    return count, "trans" in x.modifiers


def _store_matrices(x: Instruction) -> Step:
    count, turned = _matrices(x)
    address, reads = _address(x.operands[0]), [reader(item, "b32") for item in _items(x.operands[1])]

    def step(machine: Machine, mask: np.ndarray) -> None:
        active = np.flatnonzero(mask & (machine.lanes % 32 < 8 * count))
        held = np.stack([np.broadcast_to(r(machine.registers), mask.shape) for r in reads], 1).view(np.uint16)
        rows = held.reshape(-1, 8, 4, count, 2).transpose(0, 3, 1, 2, 4).reshape(-1, count, 8, 8)
        if turned:
            rows = rows.swapaxes(2, 3)
        values = np.zeros((machine.count // 32, 32, 8), np.uint16)
        values[:, : 8 * count] = rows.reshape(-1, 8 * count, 8)
        machine.store("shared", address(machine.registers, active), values.reshape(-1, 8)[active], active)

    return step


def _load_matrices(x: Instruction) -> Step:
    count, turned = _matrices(x)
    address, writes = _address(x.operands[1]), [writer(item, "b32") for item in _items(x.operands[0])]

    def step(machine: Machine, mask: np.ndarray) -> None:
        active = np.flatnonzero(mask & (machine.lanes % 32 < 8 * count))
        values = np.zeros((machine.count, 8), np.uint16)
        values[active] = machine.load("shared", address(machine.registers, active), 2, 8, active)
        rows = values.reshape(-1, 32, 8)[:, : 8 * count].reshape(-1, count, 8, 8)
        if turned:
            rows = rows.swapaxes(2, 3)
        held = np.ascontiguousarray(rows.reshape(-1, count, 8, 4, 2).transpose(0, 2, 3, 1, 4))
        for i, write in enumerate(writes):
            write(machine.registers, mask, held.reshape(-1, 2 * count).view(np.uint32)[:, i])

    return step


GROUP = 128  # the threads of four warps that form a product together


def _tile(machine: Machine, descriptor: np.ndarray, threads: np.ndarray, rows: int, turned: bool) -> np.ndarray:
    """``[descriptors, rows, 32]``: the bytes of the tile in shared memory that each descriptor tells of, or, turned,
    ``[descriptors, 16, 2 rows]`` of one that lies the other way round. Its rows of 32 to 128 bytes, whose pieces of 16
    are permuted, lie in groups of 8; turned ones longer than that go on further behind."""
    fields = ((0, 0x3FFF), (16, 0x3FFF), (32, 0x3FFF), (62, 3))
    start, leading, stride, mode = ((descriptor >> shift & most)[:, None, None] for shift, most in fields)
    assert (mode > 0).all(), "a tile that is not permuted"
    width, count, length = 256 >> mode, 16 if turned else rows, 2 * rows if turned else 32
    row, byte = np.arange(count)[:, None], np.arange(0, length, 16)
    address = start * 16 + row // 8 * (stride * 16) + row % 8 * width
    address = address + (byte // width * (leading * 16) + byte % width if turned else byte)
    address ^= ((address >> 7) & (width // 16 - 1)) << 4
    owners = np.repeat(threads, count * length // 16)
    values = machine.load("shared", address.reshape(-1), 4, 4, owners)
    return np.ascontiguousarray(values).view(np.uint8).reshape(-1, count, length)


FACTORS = {  # of products: as float32, of their bytes
    "tf32": lambda x: _cut(x.view(np.float32)),
    "f16": lambda x: x.view(np.float16).astype(np.float32),
    "bf16": lambda x: (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32),
}


def _product(x: Instruction) -> Step:
    """D += A B^T of 32 bytes of each row, done at once: that it is waited for is not looked at."""
    shape, kinds = x.modifiers[3], x.modifiers[4:]
    assert kinds[0] == "f32" and kinds[1] == kinds[2] and kinds[1] in FACTORS, x.modifiers
    size = 4 if kinds[1] == "tf32" else 2
    columns, depth = (int(n) for n in re.fullmatch(r"m64n(\d+)k(\d+)", shape).groups())
    assert depth * size == 32, x.modifiers
    left, right, scale, *more = x.operands[1:]
    signs, turns = more[:2], [bool(m.value) for m in more[2:]]
    assert all(sign.value == 1 for sign in signs)
    reads, writes = ([f(item, "f32") for item in _items(x.operands[0])] for f in (reader, writer))
    parts = [reader(item, "b32") for item in left.items] if isinstance(left, Vector) else None
    a, b = (None if parts else reader(left, "u64")), reader(right, "u64")
    turned_b = bool(turns) and turns.pop()
    turned_a = bool(turns) and turns.pop()
    keep = reader(scale, "pred")

    def step(machine: Machine, mask: np.ndarray) -> None:
        groups = mask.reshape(-1, GROUP)
        if (groups.any(1) != groups.all(1)).any():
            raise Failure("a product lacks some of its four warps")
        first = np.flatnonzero(mask)[::GROUP]

        def held(parts: list) -> np.ndarray:
            values = np.stack([np.broadcast_to(r(machine.registers), mask.shape) for r in parts], 1)
            return values.reshape(-1, GROUP, len(parts))[groups.all(1)]

        def described(read: Callable, rows: int, turned: bool) -> np.ndarray:
            tile = _tile(machine, read(machine.registers)[first].astype(np.int64), first, rows, turned)
            return FACTORS[kinds[1]](tile).swapaxes(1, 2) if turned else FACTORS[kinds[1]](tile)

        # Thread (warp, row, four) holds of D rows row and row + 8, columns 2 four and 2 four + 1 of every 8; of A words
        # four and four + 4 of those rows.
        if parts:
            tile = held(parts).reshape(-1, 4, 8, 4, 2, 2).transpose(0, 1, 5, 2, 4, 3).reshape(-1, 64, 8)
            tile = FACTORS[kinds[1]](np.ascontiguousarray(tile).view(np.uint8))
        else:
            tile = described(a, 64, turned_a)
        product = tile.astype(np.float64) @ described(b, columns, turned_b).astype(np.float64).swapaxes(1, 2)
        before = held(reads)
        product = product.reshape(-1, 4, 2, 8, columns // 8, 4, 2).transpose(0, 1, 3, 5, 4, 2, 6).reshape(before.shape)
        kept = np.broadcast_to(keep(machine.registers), mask.shape)[mask].reshape(*before.shape[:2], 1)
        after = np.zeros((machine.count, len(writes)), np.float32)
        after[mask] = (product + np.where(kept, before, 0)).astype(np.float32).reshape(-1, len(writes))
        for i, write in enumerate(writes):
            write(machine.registers, mask, np.ascontiguousarray(after[:, i]))

    return step


def _cut(x: np.ndarray) -> np.ndarray:
    """What a product sees of a float32."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


MATRICES: dict[str, Callable[[Instruction], Step]] = {"stmatrix": _store_matrices, "ldmatrix": _load_matrices}
