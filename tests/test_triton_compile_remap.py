"""The remap kernels in Triton compile to machine code for the GPUs that matter, without one being there."""

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from vocabdistil.triton_kernels import remap  # noqa: E402

from tests.test_triton_compile import CAPABILITIES, compile  # noqa: E402

TYPES = {
    "indptr": "*i32", "pieces": "*i32", "measured": "*i32", "first_pair": "*i64", "input_ids": "*i64",
    "attention": "*i64", "spans": "*i32", "nonempty": "*i32", "out": "*i32", "mask_stride": "i64", "ids_stride": "i64",
    **dict.fromkeys(("length", "chunks", "rows", "width", "pairs", "unk_id", "pad_id", "size"), "i32"),
}  # fmt: skip


def compile_remap(kernel, ids, mask, absent, capability, block=512):
    types = TYPES | {"ids": f"*{ids}", "mask": f"*{mask}"}
    constants = {"BLOCK": block, **dict.fromkeys(absent)}
    signature = {name: types[name] for name in kernel.arg_names if name not in constants}
    return compile(kernel, signature, constants, capability, block // 128)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("ids", "mask"), [("i64", "i64"), ("i64", None), ("i32", "u8")])
def test_of_a_fixed_width(ids, mask, capability):
    absent = {"measured", "first_pair"} | ({"mask"} if mask is None else set())
    ptx = compile_remap(remap.write_kernel, ids, mask, absent, capability)
    # A lane takes every 32nd token: with several adjacent ones, its stores of pieces would lie apart.
    assert not re.search(r"(ld|st)\.global\S*\.v[24]", ptx)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_of_measured_sequences(capability):
    compile_remap(remap.measure_kernel, "i64", "i64", set(), capability, 2048)
    compile_remap(remap.write_kernel, "i64", "i64", set(), capability, 2048)
    compile_remap(remap.write_kernel, "i32", "i32", {"first_pair"}, capability, 2048)
