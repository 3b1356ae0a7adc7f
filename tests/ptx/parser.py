"""PTX text, of nvcc or of Triton, to kernels that the machine (machine.py) can run: registers become numbered slots,
variables get places in their memory, labels become positions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Register:
    slot: int
    bits: int  # 1: a predicate
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    value: int  # as bits, where `bits` says how many: 32 or 64 of a floating-point number, 0 of an integer
    bits: int = 0


@dataclass(frozen=True)
class Symbol:
    space: str
    offset: int


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int = 0


@dataclass(frozen=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Two:
    """``%r1|%p1``: what an instruction writes besides."""

    first: Operand
    second: Operand


SINK = None  # `_`
Operand = Register | Immediate | Symbol | Address | Vector | Two | str | None


@dataclass(frozen=True)
class Instruction:
    text: str
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]  # a str: a label
    guard: Register | None = None


@dataclass
class Kernel:
    name: str
    params: list[tuple[int, int]] = field(default_factory=list)  # offset and bytes of each
    registers: list[int] = field(default_factory=list)  # bits of each slot
    special: dict[int, str] = field(default_factory=dict)  # slot -> %tid.x
    bytes: dict[str, int] = field(default_factory=lambda: {"param": 0, "shared": 0, "local": 0})
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of branches
    max_threads: int | None = None


VARIABLE = re.compile(
    r"\.(shared|local|param|global|const)\b.*?(?:\.align\s+(\d+)\s+)?\.([bsuf]\d+)\s+([\w$%]+)((?:\[\d*\])*)"
)
POINTER = re.compile(r"\.ptr(\s+\.(global|const|shared|local))?(\s+\.align\s+\d+)?")  # of a parameter


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a module, by their names."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    text = re.sub(r"^\s*\.(loc|file)\b.*$", "", text, flags=re.M)
    text = re.sub(r"//.*$", "", text, flags=re.M)
    text = re.sub(r"\.section\s+\.debug\w*\s*\{.*?\}", "", text, flags=re.S)
    entry = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{;]*)\{", re.S)
    outside, at, bodies = "", 0, []
    while match := entry.search(text, at):
        outside += text[at : match.start()]
        at = _closing(text, match.end())
        bodies.append((match[1], match[2], match[3], text[match.end() : at - 1]))
    outside += text[at:]
    return {name: _Reader(name, *rest[:2], outside, rest[2]).kernel for name, *rest in bodies}


def _closing(text: str, at: int) -> int:
    """The position behind the brace that closes the one before ``at``."""
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if match[0] == "{" else -1
        if not depth:
            return match.end()
    raise ValueError("a brace is not closed")


def _split(text: str) -> list[str]:
    """Operands: commas count outside brackets and braces."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if part.strip()]


class _Reader:
    def __init__(self, name: str, params: str, directives: str, outside: str, body: str) -> None:
        self.kernel = Kernel(name)
        self.scopes: list[dict[str, Register]] = [{}]
        self.symbols: dict[str, Symbol] = {}
        for declaration in _split(POINTER.sub("", params)):
            symbol = self.declare(declaration)
            self.kernel.params.append((symbol.offset, self.kernel.bytes["param"] - symbol.offset))
        if found := re.search(r"\.(?:maxntid|reqntid)\s+([\d,\s]+)", directives):
            self.kernel.max_threads = 1
            for size in found[1].split(","):
                self.kernel.max_threads *= int(size)
        variables = [x for x in outside.split(";") if VARIABLE.search(x) and x.split("[")[0].split()[-1] in body]
        # Shared memory of the size that a launch says lies behind that of the kernel.
        variables += re.findall(r"(?m)^\s*(\.shared\b[^;]*)", body)
        for statement in sorted(variables, key=lambda x: ".extern" in x):
            self.declare(statement)
        self.read(body)

    def declare(self, text: str) -> Symbol:
        match = VARIABLE.search(text)
        assert match, text
        space, align, kind, name, dims = match.groups()
        if name in self.symbols:
            return self.symbols[name]
        assert space in self.kernel.bytes, f"{text.strip()}: no {space} variables"
        item = int(kind[1:]) // 8
        size, align = item, int(align or item)
        for dim in re.findall(r"\[(\d*)\]", dims):
            size *= int(dim or 0)
        at = -(-self.kernel.bytes[space] // align) * align
        self.kernel.bytes[space] = at + size
        self.symbols[name] = Symbol(space, at)
        return self.symbols[name]

    def read(self, body: str) -> None:
        """Labels, the braces of scopes, and statements."""
        token = r"\s*(?:([\w$]+):(?!:)|([{}])|([^\s;{}](?:[^;{}]|\{[^}]*\})*);)"
        for label, brace, statement in re.findall(token, body):
            if label:
                self.label = label
                self.kernel.labels[label] = len(self.kernel.instructions)
            elif brace == "{":
                self.scopes.append({})
            elif brace:
                self.scopes.pop()
            else:
                self.statement(" ".join(statement.split()))

    def statement(self, text: str) -> None:
        if match := re.match(r"\.reg \.(\w+) (.*)", text):
            bits = 1 if match[1] == "pred" else int(match[1][1:])
            for name in match[2].split(","):
                many = re.match(r"([\w$%]+)<(\d+)>", name.strip())
                for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]:
                    self.scopes[-1][one] = self.slot(bits)
        elif match := re.match(r"\.branchtargets (.*)", text):
            self.kernel.tables[self.label] = tuple(_split(match[1]))
        elif re.match(r"\.(shared|local)\b", text):
            self.declare(text)
        elif text and not text.startswith("."):
            match = re.match(r"(?:@(!?)([\w$%]+) )?([\w.:]+)\s*(.*)", text)
            assert match, text
            guard = None
            if match[2]:
                found = self.register(match[2])
                guard = Register(found.slot, found.bits, match[1] == "!")
            opcode, *modifiers = match[3].split(".")
            operands = tuple(self.operand(part) for part in _split(match[4]))
            instruction = Instruction(text, opcode, tuple(modifiers), operands, guard)
            self.kernel.instructions.append(instruction)

    def slot(self, bits: int) -> Register:
        self.kernel.registers.append(bits)
        return Register(len(self.kernel.registers) - 1, bits)

    def register(self, name: str) -> Register | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        if re.match(r"%(n?tid|n?ctaid|laneid|warpid|envreg|lanemask|clock|globaltimer)", name):
            new = self.scopes[0][name] = self.slot(64 if "64" in name else 32)
            self.kernel.special[new.slot] = name
            return new
        return None

    def operand(self, text: str) -> Operand:
        if text == "_":
            return SINK
        if text.startswith("{"):
            return Vector(tuple(self.operand(part) for part in _split(text[1:-1])))
        if text.startswith("["):
            match = re.match(r"\[\s*([\w$%]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
            assert match, text
            return Address(self.operand(match[1]), int(match[2] or "0", 0))
        if "|" in text:
            return Two(*(self.operand(part.strip()) for part in text.split("|")))
        if text.startswith("!"):
            found = self.register(text[1:])
            return Register(found.slot, found.bits, True)
        if found := self.register(text):
            return found
        if text in self.symbols:
            return self.symbols[text]
        if match := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text):
            return Immediate(int(match[2], 16), 32 if match[1] in "fF" else 64)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return Immediate(int(text.rstrip("U"), 0))
        return text
