"""The numbers of PTX in numpy: registers hold bits, an instruction says by its types what they are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .memory import UNSIGNED
from .parser import Immediate, Operand, Register, Symbol

KINDS = {
    **{f"{kind}{8 * size}": dtype for size, dtype in UNSIGNED.items() for kind in "bu"},
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64, "f32": np.float32, "f64": np.float64,
    "tf32": np.float32,
}  # fmt: skip
HALVES = ("f16", "bf16", "f16x2", "bf16x2")  # computed in float32, and rounded where they are written
Registers = list[np.ndarray]


def bits_of(kind: str) -> int:
    return 32 if kind.endswith("x2") or kind == "tf32" else 16 if kind == "bf16" else int(kind[1:])


def is_float(kind: str) -> bool:
    return kind in HALVES or kind in ("f32", "f64", "tf32")


def from_bfloat16(raw: np.ndarray) -> np.ndarray:
    return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """To the nearest, ties to even."""
    raw = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def decode(raw: np.ndarray, kind: str) -> np.ndarray:
    """Bits, of the width of the kind or a wider register, as numbers; of pairs ``[..., 2]``, the lower first."""
    unsigned = UNSIGNED[bits_of(kind) // 8]
    if raw.dtype != unsigned:
        raw = raw.astype(unsigned)
    if kind in HALVES:
        if kind.endswith("x2"):
            raw = raw.reshape(*raw.shape, 1).view(np.uint16)
        return from_bfloat16(raw) if kind.startswith("bf16") else raw.view(np.float16).astype(np.float32)
    return raw.view(KINDS[kind])


def encode(value: np.ndarray, kind: str) -> np.ndarray:
    if kind in HALVES:
        raw = to_bfloat16(value) if kind.startswith("bf16") else np.asarray(value, np.float16).view(np.uint16)
        return np.ascontiguousarray(raw).view(np.uint32)[..., 0] if kind.endswith("x2") else raw
    return np.asarray(value, KINDS[kind])


def reader(operand: Operand, kind: str) -> Callable[[Registers], np.ndarray]:
    """What gives the numbers of an operand, one per thread, or one for all."""
    if isinstance(operand, Register):
        slot = operand.slot
        if operand.bits == 1:
            return (lambda registers: ~registers[slot]) if operand.negated else (lambda registers: registers[slot])
        if kind in KINDS and operand.bits == bits_of(kind):
            dtype = KINDS[kind]
            return lambda registers: registers[slot].view(dtype)
        return lambda registers: decode(registers[slot], kind)
    if isinstance(operand, Symbol):
        operand = Immediate(operand.offset)
    assert isinstance(operand, Immediate), operand
    if kind == "pred":
        flag = np.array(bool(operand.value))
        return lambda registers: flag
    bits = bits_of(kind)
    if operand.bits and operand.bits != bits:  # 0f of an operand of 64 bits, or the reverse
        size = operand.bits // 8
        number = np.array([operand.value], UNSIGNED[size]).view(KINDS[f"f{operand.bits}"])
        value = number.astype(KINDS[kind]) if kind in KINDS else number.astype(np.float32)
    else:
        value = decode(np.array([operand.value & ((1 << bits) - 1)], UNSIGNED[bits // 8]), kind)
    value = np.asarray(value[0])
    return lambda registers: value


def writer(operand: Operand, kind: str) -> Callable[[Registers, np.ndarray, np.ndarray], None]:
    """What writes numbers to the register of the threads of a mask, extended as the kind says where it is wider."""
    if operand is None:
        return lambda registers, mask, value: None
    assert isinstance(operand, Register), operand
    slot = operand.slot
    if operand.bits == 1:
        return lambda registers, mask, value: np.copyto(registers[slot], value, where=mask)
    wider = operand.bits > bits_of(kind) and kind[0] == "s"
    signed = KINDS[f"s{operand.bits}"]

    def write(registers: Registers, mask: np.ndarray, value: np.ndarray) -> None:
        raw = encode(value, kind)
        if wider:
            raw = raw.astype(signed)
        np.copyto(registers[slot], raw.view(UNSIGNED[raw.dtype.itemsize]), where=mask)

    return write


def flush(x: np.ndarray) -> np.ndarray:
    """``.ftz``: a subnormal number is 0."""
    return np.where(np.abs(x) < np.float32(1.17549435e-38), np.copysign(np.float32(0), x), x)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a b + c`` in float64 with a product that is not rounded: its error is added after the sum's."""
    product, split = a * b, 134217729.0
    high_a, high_b = a * split, b * split
    high_a, high_b = high_a - (high_a - a), high_b - (high_b - b)
    low_a, low_b = a - high_a, b - high_b
    error = ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b
    total = product + c
    moved = total - product
    rest = (product - (total - moved)) + (c - moved)
    exact = total + (rest + error)
    return np.where(np.isfinite(exact), exact, total)


def towards(wide: np.ndarray, mode: str) -> np.ndarray:
    """A float64 as float32, rounded down (rm), up (rp) or to 0 (rz)."""
    near = wide.astype(np.float32)
    back = near.astype(np.float64)
    down, up = np.nextafter(near, np.float32(-np.inf)), np.nextafter(near, np.float32(np.inf))
    low, high = np.where(back > wide, down, near), np.where(back < wide, up, near)
    return low if mode == "rm" else high if mode == "rp" else np.where(wide < 0, high, low)


def to_integer(x: np.ndarray, kind: str, mode: str) -> np.ndarray:
    """Of a floating-point number: the nearest of what the kind holds, 0 of a NaN."""
    rounded = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x.astype(np.float64))
    limits = np.iinfo(KINDS[kind])
    inside = (rounded > limits.min) & (rounded < limits.max)
    whole = np.where(inside, rounded, 0).astype(KINDS[kind])
    return np.where(inside | np.isnan(x), whole, np.where(rounded > 0, limits.max, limits.min).astype(KINDS[kind]))
