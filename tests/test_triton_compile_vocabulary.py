"""The vocabulary kernels in Triton compile to machine code for the GPUs that matter, without one being there."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402
from vocabdistil.triton_kernels import matched_kl  # noqa: E402

from tests.test_triton_compile import CAPABILITIES, compile  # noqa: E402

ARGUMENTS = {
    **dict.fromkeys(("student_start", "student_end", "teacher_start", "teacher_end", "teacher_of"), "*i32"),
    "teacher_matched": "*i8",
    **dict.fromkeys(("pairs", "s_rows", "t_rows", "s_stride", "t_stride", "v_s", "v_t"), "i32"),
}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("spans", [False, True])
@pytest.mark.parametrize("unmatched", [0, 1])
def test_matched_kl(unmatched, spans, dtype, capability):
    accumulator = "fp64" if dtype == "fp64" else "fp32"
    constants = {"SPANS": spans, "MEAN": True, "UNMATCHED": unmatched, "GRAD": True, "BLOCK": 1024}
    constants["ACC"] = tl.float64 if dtype == "fp64" else tl.float32
    types = {
        **ARGUMENTS,
        **dict.fromkeys(("student", "teacher", "grad"), f"*{dtype}"),
        **dict.fromkeys(("temperature", "scale", "loss"), f"*{accumulator}"),
    }
    signature = {name: types[name] for name in matched_kl.kernel.arg_names if name not in constants}
    compile(matched_kl.kernel, signature, constants, capability)
