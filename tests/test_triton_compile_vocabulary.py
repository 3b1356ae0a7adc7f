"""The vocabulary kernels in Triton compile to machine code for the GPUs that matter, without one being there."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from vocabdistil.triton_kernels import linear_matched_kl, log_prob, matched_kl, remapped_kl  # noqa: E402

from benchmarks import static  # noqa: E402
from tests.test_triton_compile import CAPABILITIES, compile  # noqa: E402

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
SPANS = ("student_start", "student_end", "teacher_start", "teacher_end")
DENSE = ("teacher_rest", "s_bias", "t_bias", "s_lengths", "t_lengths")


def compile_matched_kl(
    columns, dtype, capability, unmatched=0, spans=False, dense=False, upstream=None, grad=None
):  # fmt: skip
    """``dense``: as the rows of linear_matched_kl; ``upstream``: "guessed", as in forward, or "met", as in backward."""
    accumulator = "fp64" if dtype == "fp64" else "fp32"
    options = matched_kl.tile(columns, DTYPES[accumulator])
    constants = {
        "SPANS": spans, "MEAN": spans, "UNMATCHED": unmatched, "PADDED": dense, "ACC": matched_kl.accumulator(
            DTYPES[accumulator]
        ), **{name: options.pop(name) for name in ("BLOCK", "TAIL", "WHOLE", "STREAM")},
    }  # fmt: skip
    absent = [] if spans else [*SPANS]
    absent += ["teacher_of", "teacher_matched"] if dense else DENSE
    absent += [] if unmatched else ["teacher_matched", "teacher_rest"]
    absent += {None: ["upstream", "formed"], "guessed": ["formed"], "met": ["loss"]}[upstream]
    constants |= dict.fromkeys(absent)
    types = {
        **dict.fromkeys((*SPANS, "teacher_of", "s_lengths", "t_lengths"), "*i32"),
        "teacher_matched": "*i8",
        **dict.fromkeys(("pairs", "s_rows", "t_rows", "s_stride", "t_stride", "g_stride", "v_s", "v_t"), "i32"),
        **dict.fromkeys(("student", "teacher"), f"*{dtype}"),
        "grad": f"*{grad or dtype}",
        **dict.fromkeys(("teacher_rest", "s_bias", "t_bias", "scale", "loss", "upstream", "formed"), f"*{accumulator}"),
        "temperature": "*fp64" if dtype == "fp64" else "fp32",
    }
    signature = {name: types[name] for name in matched_kl.kernel.arg_names if name not in constants}
    odd = ("s_stride", "t_stride", "g_stride") if columns % 16 and not dense else ()
    return compile(matched_kl.kernel, signature, constants, capability, odd=odd, **options)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("unmatched", [0, 1])
@pytest.mark.parametrize(("columns", "dtype"), [(5031, "bf16"), (5031, "fp64"), (32000, "fp32")])
def test_matched_kl(columns, dtype, unmatched, capability):
    compile_matched_kl(columns, dtype, capability, unmatched)


@pytest.mark.parametrize(
    "options",
    [{"spans": True}, {"upstream": "guessed"}, {"upstream": "met"}, {"spans": True, "unmatched": 2}],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_matched_kl_over_spans_and_with_an_upstream_gradient(dtype, options):
    compile_matched_kl(5031, dtype, 90, **options)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("unmatched", [0, 1])
@pytest.mark.parametrize("columns", [4700, 28000])
def test_rows_of_linear_matched_kl_are_read_16_bytes_at_a_time(columns, unmatched, capability):
    ptx = compile_matched_kl(columns, "fp32", capability, unmatched, dense=True, grad="bf16")
    scalars = re.findall(r"ld\.global[.\w]*\.b32", ptx)
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= 4 and re.search(r"st\.global\.v[24]\.b32", ptx)
    assert len([x for x in scalars if ".v" not in x]) <= 5 + 3 * unmatched  # of the row
    assert not re.search(r"ld\.global\.b16", ptx)


def compile_linear(name, dtype, capability, options, odd=(), **given):
    """A kernel of linear_matched_kl, which spills nothing; its strides and sizes are in units of 8 elements. ``given``:
    compile-time arguments, None among them."""
    kernel = getattr(linear_matched_kl, name)
    sizes = [n for n in kernel.arg_names if n.endswith(("stride", "dim"))]
    sizes += ["rows", "columns", "tiles", "s_parts", "t_parts", "matched", "turns", "per"]
    types = {
        **dict.fromkeys(kernel.arg_names, "*fp32"), **dict.fromkeys(sizes, "i32"),
        **dict.fromkeys(("student", "teacher", "s_weight", "t_weight", "x", "weight"), f"*{dtype}"),
        **dict.fromkeys(("g", "h"), "*fp16"), **dict.fromkeys(("t_ids", "ids"), "*i64"),
        **dict.fromkeys(("s_lengths", "t_lengths", "lengths"), "*i32"), "temperature": "fp32",
    }  # fmt: skip
    constants = {"WIDE": False, "TILE": linear_matched_kl.TILE, **options, **given}
    more = {n: constants.pop(n) for n in ("num_warps", "num_stages") if n in constants}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    signature = {n: types[n] for n in kernel.arg_names if n not in constants}
    ptx = compile(kernel, signature, constants, capability, odd=odd, even=("matched",), **more)
    known = static.read_spills(static.TRITON_SPILLS, static.triton_release())
    if known is not None:  # of this compiler, as another spills otherwise
        with tempfile.TemporaryDirectory() as folder:
            (path := Path(folder) / "kernel.ptx").write_text(ptx, encoding="utf-8")
            target = re.search(r"\.target (\w+)", ptx)[1]
            ((_, told),) = static.assemble(path, target, get_ptxas(capability).path).items()
        assert not told["spilled"]
    return ptx


COPY = r"cp\.async\.cg\S* \[.*\], \[.*\], 0x10"  # 16 bytes at a time, while others multiply
PRODUCTS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
KINDS = [("bf16", True, None), ("fp16", True, "*i32"), ("bf16", False, None)]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("dtype", "write", "lengths"), KINDS)
def test_tiles_of_linear_matched_kl(dtype, write, lengths, capability):
    """Of 264 columns, 33 times 8, of the student, and 768 of the teacher."""
    options = linear_matched_kl.tile("tiles", capability)
    absent = () if lengths else ("s_lengths", "t_lengths", "t_ids")
    given = {"S_UNIT": 8, "T_UNIT": 8, "WRITE": write, **dict.fromkeys(absent)}
    given |= {} if write else dict.fromkeys(("g", "h", "s_bias", "t_bias"))
    ptx = compile_linear("tiles_kernel", dtype, capability, options, odd=("s_stride", "sw_stride"), **given)
    assert len(re.findall(COPY, ptx)) >= 4 and PRODUCTS[capability] in ptx
    assert not re.search(r"ld\.global\S*\.b16", ptx)
    assert not write or re.search(r"st\.global\S*\.v4\.b32", ptx)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("write", [True, False])
def test_columns_of_linear_matched_kl_without_a_partner(write, capability):
    options = linear_matched_kl.tile("masses", capability)
    given = {"UNIT": 8, "WRITE": write, "lengths": None, "BLOCK_V": 64 if write else 128, "TURNS": 1 if write else 8}
    given["ids" if write else "h"] = None
    ptx = compile_linear("masses_kernel", "bf16", capability, options, **given)
    assert re.search(COPY, ptx) and not re.search(r"ld\.global\S*\.b16", ptx)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("unmatched", [0, 1, 2])
@pytest.mark.parametrize("wanted", [True, False])
def test_what_tiles_of_linear_matched_kl_are_brought_together_by(wanted, unmatched, capability):
    absent = (() if wanted else ("factors",)) + (() if unmatched else ("s_rest", "t_rest"))
    options = linear_matched_kl.tile("combine", capability)
    compile_linear("combine_kernel", "bf16", capability, options, UNMATCHED=unmatched, **dict.fromkeys(absent))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dim", [264, 384, 768])
@pytest.mark.parametrize("name", ["hidden_kernel", "weight_kernel"])
def test_products_of_the_gradient_of_linear_matched_kl(name, dim, capability):
    options = dict(linear_matched_kl.tile("products", capability))
    _, main, tail = linear_matched_kl.widths(dim, options.pop("widest"))
    given = {"UNIT": 8, "MAIN": main, "TAIL": tail, "ADD": True, "BLOCK_V": linear_matched_kl.STEP}
    given |= {"BLOCK_R": linear_matched_kl.STEP if name == "weight_kernel" else linear_matched_kl.TILE}
    given |= {"lengths": None, "bias_out": None} if dim == 384 and name == "weight_kernel" else {}
    odd = ("w_stride", "x_stride") if dim % 128 else ()
    ptx = compile_linear(name, "bf16", capability, options, odd=odd, **given)
    assert len(re.findall(COPY, ptx)) >= 6 and PRODUCTS[capability] in ptx
    assert not re.search(r"ld\.global\S*\.b16", ptx)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("lengths", [None, "*i32"])
def test_unmatched_mass(lengths, capability):
    signature = {"z": "*fp32", "rest": "*fp32", "left_out": "*u8", "bias": "*fp32", "temperature": "fp32"}
    constants = {"ACC": matched_kl.accumulator(torch.float32), "BLOCK": 2048}
    signature |= {"columns": "i32", "stride": "i32", "lengths": lengths}
    if lengths is None:
        constants["lengths"] = signature.pop("lengths")
    signature = {name: signature[name] for name in matched_kl.rest_kernel.arg_names if name in signature}
    ptx = compile(matched_kl.rest_kernel, signature, constants, capability, num_warps=8)
    assert re.search(r"ld\.global\.v4\.b32", ptx)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("matched", [None, "*i8"])
@pytest.mark.parametrize("ids", ["*i32", "*i64"])
def test_tables(ids, matched, capability):
    signature = {"student_ids": ids, "teacher_ids": ids, "teacher_of": "*i32", "teacher_matched": matched}
    constants = {"BLOCK": 1024} if matched else {"BLOCK": 1024, "teacher_matched": signature.pop("teacher_matched")}
    signature |= {"count": "i32", "v_s": "i32", "v_t": "i32"}
    signature = {name: signature[name] for name in matched_kl.tables_kernel.arg_names if name in signature}
    compile(matched_kl.tables_kernel, signature, constants, capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("columns", "dtype", "bias"),
    [(128256, "bf16", False), (50257, "fp16", False), (128256, "fp32", True), (151936, "fp64", True)],
)
@pytest.mark.parametrize("name", ["odds_kernel", "slope_kernel"])
def test_log_prob(name, columns, dtype, bias, capability):
    kernel, accumulator = getattr(log_prob, name), "fp64" if dtype == "fp64" else "fp32"
    options = log_prob.tile(columns, DTYPES[accumulator])
    constants = {"ACC": matched_kl.accumulator(DTYPES[accumulator]), "BLOCK": options.pop("BLOCK")}
    constants |= {} if bias else {"bias": None}
    types = {
        **dict.fromkeys(("logits", "grad"), f"*{dtype}"), "ids": "*i64", "needed": "*u8",
        **dict.fromkeys(("bias", "log_prob", "shift", "share", "upstream"), f"*{accumulator}"),
        **dict.fromkeys(("stride", "g_stride", "columns"), "i32"),
    }  # fmt: skip
    signature = {name: types[name] for name in kernel.arg_names if name not in constants}
    sizes = ("stride", "g_stride", "columns")
    ptx = compile(
        kernel, signature, constants, capability, odd=sizes if columns % 16 else (), even=("columns",), **options
    )
    if columns % 16 == 0:  # 16 bytes at a time, but for the token's own logit
        assert re.search(r"ld\.global\.v[24]\.b(32|64)", ptx) and len(re.findall(r"ld\.global\.b16", ptx)) <= 1


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("spans", "upstream", "remainder", "pairs", "dtype"),
    [
        (False, False, None, 4, "fp32"), (True, True, None, 4, "bf16"), (True, False, None, 4, "fp64"),
        (False, True, 1, 4, "bf16"), (True, True, 2, 2, "fp32"), (False, False, 0, 4, "fp64"),
    ],
)  # fmt: skip
def test_remapped_kl(spans, upstream, remainder, pairs, dtype, capability):
    kernel = remapped_kl.kernel
    accumulator = "fp64" if dtype == "fp64" else "fp32"
    constants = {
        "ACC": matched_kl.accumulator(DTYPES[accumulator]), "PAIRS": pairs, "SLICE": remapped_kl.SLICE,
        "SEARCH": remapped_kl.SEARCH, "LOGSUMEXP": not spans, "REMAINDER": remainder,
    }  # fmt: skip
    absent = [] if spans else ["s_start", "s_end", "t_start", "t_end"]
    absent += [] if upstream else ["upstream", "formed"]
    absent += [] if remainder else ["weights", "use_weights"]
    constants |= dict.fromkeys(absent)
    sizes = ("pairs", "s_rows", "t_rows", "s_stride", "t_stride", "columns", "slices", "segment_slices", "top_k")
    floats = ("weights", "use_weights", "scratch", "scale", "loss", "upstream", "formed")
    types = {
        **dict.fromkeys(kernel.arg_names, "*i32"), **dict.fromkeys(sizes, "i32"),
        **dict.fromkeys(floats, f"*{accumulator}"), **dict.fromkeys(("student", "teacher", "grad"), f"*{dtype}"),
        "temperature": "*fp64" if dtype == "fp64" else "fp32",
    }  # fmt: skip
    signature = {n: types[n] for n in kernel.arg_names if n not in constants}
    ptx = compile(kernel, signature, constants, capability, num_warps=8, maxnreg=remapped_kl.REGISTERS)
    if dtype == "fp32" and pairs == 4:  # what an id of the table fetches
        assert re.search(r"ld\.global\.v4\.b32", ptx)
