"""Every Triton kernel compiles to machine code for the GPUs that matter, without one being there."""

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from vocabdistil.triton_kernels import matched_kl, span_mean  # noqa: E402

SPANS = {"start": "*i32", "end": "*i32"}
KERNELS = {
    "span_mean_fwd": (
        span_mean.fwd_kernel,
        lambda t: {"x": t, **SPANS, "out": t, "rows": "i64", "row_stride": "i64", "dim": "i32"},
    ),
    "span_mean_bwd": (
        span_mean.bwd_kernel,
        lambda t: {"grad": t, **SPANS, "out": t, "pairs": "i32", "rows": "i64", "grad_stride": "i64", "dim": "i32"},
    ),
}

MATCHED_KL = {
    **dict.fromkeys(("student_start", "student_end", "teacher_start", "teacher_end", "teacher_of"), "*i32"),
    "teacher_matched": "*i8",
    **dict.fromkeys(("pairs", "s_rows", "t_rows", "s_stride", "t_stride", "v_s", "v_t"), "i32"),
}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16", "fp16"])
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_compiles(name, dtype, capability):
    kernel, arguments = KERNELS[name]
    accumulator = triton.language.float64 if dtype == "fp64" else triton.language.float32
    constants = {"MEAN": True, "ACC": accumulator, "BLOCK": 1024}
    signature = {**arguments(f"*{dtype}"), **{key: "constexpr" for key in constants}}
    compiled = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constants), target=GPUTarget("cuda", capability, 32)
    )
    assert len(compiled.asm["cubin"]) > 1000
    assert "atom" not in compiled.asm["ptx"] and "red." not in compiled.asm["ptx"]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("spans", [False, True])
@pytest.mark.parametrize("unmatched", [0, 1])
def test_matched_kl_compiles(unmatched, spans, dtype, capability):
    accumulator = "fp64" if dtype == "fp64" else "fp32"
    constants = {
        "SPANS": spans, "MEAN": True, "UNMATCHED": unmatched, "GRAD": True, "BLOCK": 1024,
        "ACC": triton.language.float64 if dtype == "fp64" else triton.language.float32,
    }  # fmt: skip
    types = {
        **MATCHED_KL, **dict.fromkeys(("student", "teacher", "grad"), f"*{dtype}"),
        **dict.fromkeys(("temperature", "scale", "loss"), f"*{accumulator}"), **dict.fromkeys(constants, "constexpr"),
    }  # fmt: skip
    kernel = matched_kl.kernel
    signature = {name: types[name] for name in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constants), target=GPUTarget("cuda", capability, 32)
    )
    assert len(compiled.asm["cubin"]) > 1000
    assert not re.search(r"\b(atom|red)\.", compiled.asm["ptx"])
