"""The interpreter of PTX (tests/ptx) on small kernels: what instructions do, and what it must not let pass."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from tests.ptx import machine
from tests.ptx.machine import Machine, Program
from tests.ptx.memory import Failure, Tensors
from tests.ptx.parser import parse

HEAD = """
.version 8.0
.target sm_90
.visible .entry kernel(.param .u64 .ptr .global .align 16 kernel_param_0, .param .u64 kernel_param_1)
{
  .reg .pred %p<9>;
  .reg .b16 %rs<9>;
  .reg .b32 %r<20>;
  .reg .b64 %rd<20>;
  .shared .align 16 .b8 parts[256];
  ld.param.u64 %rd1, [kernel_param_0];
  ld.param.u64 %rd2, [kernel_param_1];
  cvta.to.global.u64 %rd1, %rd1;
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd3, %r1, 4;
  add.s64 %rd4, %rd1, %rd3;  // of the first, a thread's word
  add.s64 %rd5, %rd2, %rd3;  // and of the second
  cvt.u32.u64 %r2, %rd3;
  mov.u32 %r3, parts;
  add.u32 %r3, %r3, %r2;
"""


def run(body: str, source: torch.Tensor, out: torch.Tensor, threads: int = 32, blocks: int = 1) -> None:
    program = Program(parse(HEAD + body + "\n ret;\n}\n")["kernel"])
    tensors = Tensors()
    tensors.add(source, False)
    tensors.add(out, True)
    params = struct.pack("<2Q", source.data_ptr(), out.data_ptr())
    Machine(program, (blocks, 1, 1), (threads, 1, 1), 0, params, tensors).run()


def unary(body: str, source: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(source)
    run(f"ld.global.b32 %r4, [%rd4];\n{body}\nst.global.b32 [%rd5], %r5;", source, out)
    return out


FLOATS = torch.randn(32, generator=torch.Generator().manual_seed(0))
FLOATS[:5] = torch.tensor([0.0, -0.0, 1e-40, 3e38, 1])


def test_numbers():
    x = FLOATS
    ints = x.view(torch.int32)
    assert torch.equal(unary("add.f32 %r5, %r4, 0f3F800000;", x), x + 1)
    assert torch.equal(unary("fma.rn.f32 %r5, %r4, %r4, 0fBF800000;", x), (x.double() ** 2 - 1).float())
    assert torch.equal(unary("mul.ftz.f32 %r5, %r4, 0f3F800000;", x), torch.where(x.abs() < 1e-38, x * 0, x))
    assert torch.equal(unary("shr.s32 %r5, %r4, 3;", ints), ints >> 3)
    assert torch.equal(unary("bfe.u32 %r5, %r4, 23, 8;", ints), (ints >> 23) & 255)
    assert torch.equal(unary("not.b32 %r5, %r4;", ints), ~ints)
    turned = unary("prmt.b32 %r5, %r4, 0, 0x0123;", ints)
    assert torch.equal(turned.view(torch.uint8).view(-1, 4), ints.view(torch.uint8).view(-1, 4).flip(1))
    signs = unary("setp.lt.f32 %p1, %r4, 0f00000000; selp.b32 %r5, 1, 2, %p1;", x)
    assert torch.equal(signs.view(torch.int32), 2 - (x < 0).int())
    whole = unary("cvt.rni.s32.f32 %r5, %r4;", x * 10).view(torch.int32)
    assert torch.equal(whole.double(), (x * 10).double().round().clamp(-(2**31), 2**31 - 1))
    half = unary("cvt.rn.bf16.f32 %rs1, %r4; mov.b32 %r5, {0, %rs1};", x)
    assert torch.equal(half, x.bfloat16().float())
    assert torch.equal(unary("cvt.rn.f16.f32 %rs1, %r4; cvt.f32.f16 %r5, %rs1;", x), x.half().float())
    assert torch.equal(unary("mul.hi.s32 %r5, %r4, 1431655766;", ints).long(), (ints.long() * 1431655766) >> 32)
    assert torch.equal(unary("div.s32 %r5, %r4, -7;", ints), torch.div(ints, -7, rounding_mode="trunc"))


@pytest.mark.parametrize(("waits", "there"), [("0", True), ("1", False), (None, False)])
def test_a_copy_is_there_once_its_group_was_waited_for(waits, there):
    out = torch.zeros_like(FLOATS)
    wait = "" if waits is None else f"cp.async.wait_group {waits};"
    copy = "cp.async.ca.shared.global [ %r3 + 0 ], [ %rd4 + 0 ], 0x4, %r5;\ncp.async.commit_group;"
    run(
        f"setp.lt.u32 %p1, %r1, 20; selp.b32 %r5, 4, 0, %p1;\n{copy}\n{wait}\n"
        "ld.shared.b32 %r6, [%r3];\nst.global.b32 [%rd5], %r6;", FLOATS, out,
    )  # fmt: skip
    want = torch.where(torch.arange(32) < 20, FLOATS, 0.0)  # the rest is filled with nothing
    assert torch.equal(out, want) == there


def test_another_warp_has_to_wait_for_a_copy():
    copy = "cp.async.ca.shared.global [ %r3 + 0 ], [ %rd4 + 0 ], 0x4;\ncp.async.commit_group;\ncp.async.wait_group 0;"
    read = "xor.b32 %r6, %r2, 128;\nmov.u32 %r7, parts;\nadd.u32 %r7, %r7, %r6;\nld.shared.b32 %r8, [%r7];"
    source = torch.arange(64, dtype=torch.float32)
    for barrier in ("", "bar.sync 0;"):
        out = torch.zeros_like(source)
        body = f"{copy}\n{barrier}\n{read}\nst.global.b32 [%rd5], %r8;"
        if barrier:
            run(body, source, out, threads=64)
            assert torch.equal(out, source.roll(32))
        else:
            with pytest.raises(Failure, match="a race of warps"):
                run(body, source, out, threads=64)


def test_threads_part_and_meet_again():
    source, out = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    body = """
      mov.u32 %r5, 0;
      mov.u32 %r6, %r1;
    $again:
      setp.eq.u32 %p1, %r6, 0;
      @%p1 bra $done;
      add.u32 %r5, %r5, %r6;
      sub.u32 %r6, %r6, 1;
      bra $again;
    $done:
      shfl.sync.bfly.b32 %r7|%p2, %r5, 1, 31, -1;
      st.global.b32 [%rd5], %r7;
    """
    run(body, source, out, threads=64)
    i = np.arange(64) ^ 1
    assert out.tolist() == (i * (i + 1) // 2).tolist()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r4, [%rd4+4];", "out of bounds.*thread 31 of block 0"),
        ("ld.global.b32 %r4, [%rd4+-4];", "out of bounds.*thread 0"),
        ("ld.global.v2.b32 {%r4, %r5}, [%rd4+4];", "misaligned.*thread 0"),
        ("st.global.b32 [%rd4], %r1;", "what is only read was written"),
        ("st.global.b32 [%rd2], %r1;", "two threads write one place"),
        ("ld.shared.b32 %r4, [%r3+200];", "out of bounds.*shared"),
        ("st.shared.b8 [parts], %r1;", "race of threads"),
        ("st.shared.b32 [%r3], %r1; xor.b32 %r4, %r3, 4; ld.shared.b32 %r5, [%r4];", "race of threads"),
        ("setp.lt.u32 %p1, %r1, 16; @%p1 shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;", "shfl.*"),
        ("setp.lt.u32 %p1, %r1, 16; @%p1 ret; shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;", "lacks threads"),
        ("setp.lt.u32 %p1, %r1, 16; @%p1 bar.sync 0;", "never come"),
        ("$l: bra $l;", "no end in sight"),
    ],
)  # fmt: skip
def test_what_is_a_failure(body, message, monkeypatch):
    monkeypatch.setattr(machine, "MOST_STEPS", 1000)
    source, out = (torch.zeros(32, dtype=torch.int32) for _ in range(2))
    with pytest.raises(Failure, match=message):
        run(body, source, out)


WARPS = "st.shared.b32 [%r3], %r1; {} xor.b32 %r4, %r3, 128; ld.shared.b32 %r5, [%r4]; st.global.b32 [%rd5], %r5;"


def test_a_barrier_orders_warps():
    source, out = (torch.zeros(64, dtype=torch.int32) for _ in range(2))
    run(WARPS.format("bar.sync 0;"), source, out, threads=64)
    assert out.tolist() == [*range(32, 64), *range(32)]
    with pytest.raises(Failure, match="race of warps"):
        run(WARPS.format(""), source, out, threads=64)
    with pytest.raises(Failure, match="race of warps"):
        run(WARPS.format("bar.warp.sync -1;"), source, out, threads=64)


def test_a_barrier_orders_what_a_block_writes_and_not_what_others_do():
    source, out = (torch.zeros(64, dtype=torch.int32) for _ in range(2))
    own = "st.global.b32 [%rd5], %r1; bar.sync 0; xor.b32 %r6, %r1, 32; mul.wide.u32 %rd6, %r6, 4;"
    own += "add.s64 %rd6, %rd2, %rd6; ld.global.b32 %r5, [%rd6];"
    with pytest.raises(Failure, match="a thread reads what another writes"):
        run(own.replace("bar.sync 0;", ""), source, out, threads=64)
    run(own, source, out, threads=64)
    other = "mov.u32 %r6, %ctaid.x; add.u32 %r7, %r6, %r1; st.global.b32 [%rd5], %r7;"
    with pytest.raises(Failure, match="two threads write one place"):
        run(other, source, out, threads=32, blocks=2)


def test_an_unknown_instruction_is_refused():
    with pytest.raises(NotImplementedError, match="atom.global.add"):
        run("atom.global.add.u32 %r4, [%rd4], 1;", torch.zeros(32), torch.zeros(32))
