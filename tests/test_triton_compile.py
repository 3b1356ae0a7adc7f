"""Every Triton kernel compiles to machine code for the GPUs that matter, without one being there."""

from __future__ import annotations

import inspect
import re

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from vocabdistil.triton_kernels import contrastive, relation_loss, rows, span_loss, span_mean  # noqa: E402

from vocabdistil.core import native  # noqa: E402

CAPABILITIES = [80, 90, 100]
SPANS = {"start": "*i32", "end": "*i32"}


def compile(kernel, signature, constants, capability, num_warps=4, odd=(), even=("dim",), **more):
    """``constants``: the compile-time arguments, None among them. Pointers, strides and what ``even`` names are
    multiples of 16, as Triton finds them at the usual sizes, but for those named in ``odd``. Returns the PTX."""
    if "constexprs" not in inspect.signature(ASTSource).parameters:
        pytest.skip("this triton takes sources in another way")
    multiples = [k for k, v in signature.items() if v.startswith("*") or k in even or k.endswith("stride")]
    multiples = [k for k in multiples if k not in odd]
    source = ASTSource(
        kernel,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in multiples},
    )
    options = {"num_warps": num_warps, "enable_fp_fusion": True, **more}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(compiled.asm["cubin"]) > 1000
    assert not re.search(r"\b(atom|red)\.", compiled.asm["ptx"])
    return compiled.asm["ptx"]


@pytest.mark.parametrize(
    ("dtype", "layers", "capability"),
    [("bf16", 1, 80), ("bf16", 1, 90), ("bf16", 1, 100), ("fp16", 3, 80), ("fp32", 3, 90), ("fp64", 3, 90)],
)
@pytest.mark.parametrize("name", ["fwd_kernel", "bwd_kernel"])
def test_span_mean(name, dtype, layers, capability):
    source, target = ("x", "out") if name == "fwd_kernel" else ("grad", "out")
    table = "x_table" if name == "fwd_kernel" else "out_table"
    stride = "row_stride" if name == "fwd_kernel" else "grad_stride"
    sizes = {"pairs": "i32", "rows": "i64", stride: "i64", "dim": "i32"}
    signature = {source: f"*{dtype}", target: f"*{dtype}", **SPANS, **sizes}
    accumulator = tl.float64 if dtype == "fp64" else tl.float32
    constants = {"ALIGNED": True, "MEAN": True, "ACC": accumulator, "ROWS": 2, "BLOCK": 512, "LAYERS": layers}
    if layers == 1:
        constants |= {table: None, "coef": None}
    else:
        signature |= {table: "*i64", "coef": "*fp64"}
    kernel = getattr(span_mean, name)
    compile(kernel, {k: signature[k] for k in kernel.arg_names if k in signature}, constants, capability, num_warps=1)


LOSS = {
    "student_rows": "i64", "student_stride": "i64", "student_start": "*i32", "student_end": "*i32",
    "teacher_rows": "i64", "teacher_stride": "i64", "teacher_start": "*i32", "teacher_end": "*i32",
    "loss": "*fp32", "pairs": "i32", "dim": "i32", "base": "fp32", "temperature": "fp32", "beta": "fp32",
}  # fmt: skip
TABLES = {
    "student_table": "*i64", "student_coef": "*fp64", "teacher_table": "*i64", "teacher_coef": "*fp64",
    "grad_table": "*i64", "weights": "*fp32", "upstream": "*fp32", "formed": "*fp32",
}  # fmt: skip


def compile_span_loss(divergence, dtypes, dim, capability, layered=False):
    signature = LOSS | dict(zip(("student", "teacher", "grad"), (f"*{dtypes[i]}" for i in (0, 1, 0)), strict=True))
    tile = rows.tile(dim, 16384, heavy=divergence == native.DIVERGENCE_CODES["jsd"])
    layers = 3 if layered else 1
    constants = {
        "DIVERGENCE": divergence, "MEAN": True, "STUDENT_LAYERS": layers, "TEACHER_LAYERS": layers, "ALIGNED": True,
        "ROWS": tile["ROWS"], "BLOCK": tile["BLOCK"],
    }  # fmt: skip
    if layered:
        signature = signature | TABLES
    else:
        constants |= dict.fromkeys(TABLES)
    kernel = span_loss.loss_kernel
    signature = {k: signature[k] for k in kernel.arg_names if k in signature}
    odd = ("dim", "student_stride", "teacher_stride") if dim % 16 else ()
    ptx = compile(kernel, signature, constants, capability, tile["num_warps"], odd)
    if dim % 16 == 0:  # accesses of 16 bytes, to layer lists too
        assert re.search(r"ld\.global\.v4", ptx) and re.search(r"st\.global\.v[24]", ptx)
        assert not re.search(r"(ld|st)\.global\.b16", ptx)


@pytest.mark.parametrize(
    ("divergence", "capability"),
    [("kl", 80), ("kl", 90), ("kl", 100), ("reverse_kl", 90), ("jsd", 90), ("mse", 90), ("cosine", 90)],
)
def test_span_loss(divergence, capability):
    compile_span_loss(native.DIVERGENCE_CODES[divergence], ("bf16", "bf16"), 768, capability)


@pytest.mark.parametrize(
    ("dim", "dtypes"),
    [(1, ("fp32", "fp32")), (264, ("fp16", "fp16")), (4096, ("fp16", "fp32")), (16384, ("fp32", "fp32"))],
)
def test_span_loss_of_other_sizes_dtypes_and_of_layer_lists(dtypes, dim):
    compile_span_loss(native.DIVERGENCE_CODES["kl"], dtypes, dim, 90, layered=True)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_small_kernels(capability):
    total = {"loss": "*fp32", "weights": "*fp32", "total": "*fp32", "pairs": "i32", "per": "i32", "base": "fp32"}
    compile(span_loss.total_kernel, total, {"BLOCK": 2048}, capability)
    compile(rows.table_kernel, {"out": "*i64", **{f"a{i}": "i64" for i in range(8)}}, {}, capability)


RELATIONS = {
    **dict.fromkeys(("student", "teacher", "scale", "losses", "tops", "factors", "grad"), "*fp32"),
    **dict.fromkeys(("first", "last"), "*i32"),
    **dict.fromkeys(("pairs", "s_width", "t_width", "s_dim", "t_dim"), "i32"),
    **dict.fromkeys(("s_root", "t_root", "weight"), "fp32"),
}


@pytest.mark.parametrize(("dim", "capability"), [(22, 80), (64, 90), (64, 100), (1024, 90)])
@pytest.mark.parametrize("name", ["sums_kernel", "grad_kernel"])
def test_relation_loss(name, dim, capability):
    kernel, options = getattr(relation_loss, name), relation_loss.tile(dim)
    constants = {k: options.pop(k) for k in ("ROWS", "BLOCK", "OUT")}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    signature = {k: RELATIONS[k] for k in kernel.arg_names if k in RELATIONS}
    ptx = compile(kernel, signature, constants, capability, **options)
    assert re.search(r"\b(mma|wgmma|tcgen05)\S*tf32", ptx)  # on tensor cores, not term by term


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("wanted", [None, "whole", "bf16", "fp32"])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("columns", [500, 8192, 20000])
def test_contrastive(columns, masks, wanted, capability):
    options = contrastive.tile(columns)
    constants = {name: options.pop(name) for name in ("WHOLE", "BLOCK")} | {"SPLIT": wanted in ("bf16", "fp32")}
    constants |= {} if masks else {"valid": None, "left_out": None}
    constants |= {} if wanted else {"slopes": None}
    types = {
        **dict.fromkeys(("scores", "scale", "loss"), "*fp32"), **dict.fromkeys(("valid", "left_out"), "*u8"),
        **dict.fromkeys(("first", "columns", "stride"), "i32"), "inverse": "fp32",
        "slopes": "*bf16" if wanted == "bf16" else "*fp32",
    }  # fmt: skip
    signature = {name: types[name] for name in contrastive.kernel.arg_names if name in types and name not in constants}
    ptx = compile(contrastive.kernel, signature, constants, capability, **options)
    assert re.search(r"ld\.global\.v4\.b32", ptx)
    assert not wanted or re.search(r"st\.global\.v4\.b32", ptx)
