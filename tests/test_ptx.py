"""The PTX of the CUDA kernels, as nvcc makes it for sm_90, run in an interpreter (tests/ptx) with the launches of the
host code: against the float64 reference, and with every access looked at."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import vocabdistil as vd
from benchmarks import static
from benchmarks.matched_kl import sectors
from benchmarks.static import find_tool
from tests import cuda_on_host
from tests.cuda_on_host.fixtures import *  # noqa: F403
from tests.matched_kl_backend import (  # noqa: F401
    UNMATCHED,
    test_a_gradient_of_logits_that_is_there_is_left_alone,
    test_classes_of_one_size_at_any_temperature,
    test_divergences_over_a_matched_vocabulary_at_any_temperature,
    test_every_element_of_the_results_is_written,
    test_few_columns_and_all_mass_on_one,
    test_ids_out_of_range_are_not_followed,
    test_minus_infinity_and_far_apart,
    test_no_pairs_clear_the_gradient,
    test_one_vocabulary_within_the_other,
    test_spans_of_logits_that_make_no_sense_stay_inside,
    test_strides_and_no_rows,
)
from tests.matched_kl_backend import compare as compare_logits
from tests.ptx.launch import ROOT, compile_cuda, launching, span_loss_cost
from tests.ptx.machine import Counts
from tests.ptx.memory import Failure
from tests.remap_backend import *  # noqa: F403
from tests.remap_backend import make_table
from tests.span_loss_backend import (  # noqa: F401
    DIVERGENCES,
    compare,
    rows,
    test_a_gradient_that_was_formed_with_the_same_upstream_is_left_alone,
    test_cosines_of_rows_of_any_size,
    test_divergences_of_rows_of_any_size,
    test_every_row_is_written_and_none_outside_is_touched,
    test_gradient_is_zero_where_the_means_are_equal,
    test_jsd_where_a_share_is_subnormal,
    test_long_gaps_are_cleared,
    test_no_mass_where_the_other_side_has_some,
    test_spans_that_make_no_sense_stay_inside,
    test_strides_and_three_dimensions,
    test_the_upstream_gradient_is_guessed,
    test_zero_pairs_clear_the_gradient,
)
from tests.span_mean_backend import *  # noqa: F403
from tests.spans import make_pairs
from tests.tolerances import assert_norm_close
from tests.vocabularies import make_matched, randn
from vocabdistil.core import native
from vocabdistil.ops.span_mean import pooled_rows

pytestmark = [
    pytest.mark.skipif(find_tool("nvcc") is None, reason="nvcc is neither on the PATH nor in CUDA_HOME"),
    pytest.mark.skipif(cuda_on_host.COMPILER is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(not all(map(shutil.which, ("nm", "c++filt"))), reason="there are no binutils"),
]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return compile_cuda(ROOT / "csrc/cuda/kernels.cu", tmp_path_factory.mktemp("ptx"))


@pytest.fixture(autouse=True)
def launches(module, programs, monkeypatch):
    yield from launching(module, programs, monkeypatch)


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Every way to lay a row out: 24 or 32 columns to each of 8 or 16 threads or of a warp, blocks, column by column.
SIZES = [
    (7, F32), (7, F16), (72, BF16), (256, F32), (264, F32), (264, BF16), (512, F16), (600, BF16), (768, F16),
    (1000, F32), (1024, BF16), (2056, F16), (4104, BF16), (8200, BF16),
]  # fmt: skip


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("dim", "dtype"), SIZES, ids=str)
def test_span_loss(dim, dtype, divergence, backend, device):
    pairs, n_s, n_t = make_pairs(5 if dim < 1000 else 3, seed=dim, gaps=True, empty=True)
    options = {"divergence": divergence, "temperature": 1.7, "beta": 0.3}
    compare(backend, device, [rows(n_s, dim, 1, dtype)], [rows(n_t, dim, 2, dtype)], pairs, **options)


@pytest.mark.parametrize("dim", [7, 264, 2056])
def test_a_student_in_half_precision_and_a_teacher_that_is_not(dim, backend, device):
    pairs, n_s, n_t = make_pairs(4, seed=dim, gaps=True)
    compare(backend, device, [rows(n_s, dim, 1, BF16)], [rows(n_t, dim, 2, F32)], pairs)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("dim", [7, 264])
def test_layers_weights_and_an_upstream_gradient(dim, reduction, backend, device):
    pairs, n_s, n_t = make_pairs(6, seed=6, gaps=True, empty=True)
    students = [rows(n_s, (1 + (i == 1)) * dim, i, BF16)[:, :dim] for i in range(3)]  # two row strides
    teachers = [rows(n_t, dim, 5 + i, BF16) for i in range(4)]
    upstream = torch.linspace(0.5, 2, 6) if reduction == "none" else torch.tensor(-3.0)
    compare(
        backend, device, students, teachers, pairs, upstream, reduction=reduction, divergence="reverse_kl",
        student_layer_weights=[1.0, 2.0, 0.5], pair_weights=torch.rand(6),
    )  # fmt: skip


# Packs of both sides, of the student's alone, and no packs; rows of one turn of a block and of more.
COLUMNS = [(24, 64, 20), (24, 61, 20), (19, 64, 13), (600, 700, 500), (2800, 40, 30)]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("unmatched", UNMATCHED)
@pytest.mark.parametrize(("v_s", "v_t", "v_m"), COLUMNS)
def test_matched_kl(v_s, v_t, v_m, unmatched, dtype, backend, device):
    student, teacher = randn(2, v_s, seed=1, dtype=dtype, scale=2), randn(2, v_t, seed=2, dtype=dtype, scale=2)
    compare_logits(student, teacher, make_matched(v_s, v_t, v_m), backend, device, unmatched=unmatched, temperature=1.7)


@pytest.mark.parametrize("unmatched", UNMATCHED)
@pytest.mark.parametrize(("v_s", "v_t", "pooling"), [(40, 64, "mean"), (37, 50, "sum")])
def test_matched_kl_of_pairs(v_s, v_t, pooling, unmatched, backend, device):
    pairs, n_s, n_t = make_pairs(5, seed=3, gaps=True, empty=True)
    student, teacher = randn(n_s, v_s, seed=1, dtype=BF16), randn(n_t, v_t, seed=2)
    options = {"pairs": pairs, "pooling": pooling, "unmatched": unmatched, "reduction": "none"}
    compare_logits(student, teacher, make_matched(v_s, v_t, 30), backend, device, **options)


@pytest.mark.parametrize("unmatched", UNMATCHED)
@pytest.mark.parametrize("columns", [296, 300])
def test_matched_kl_of_close_rows(columns, unmatched, backend, device):
    student = randn(2, columns, seed=1)
    teacher, matched = student + 1e-3 * randn(2, columns, seed=2), vd.MatchedVocab(*[torch.arange(200)] * 2)
    compare_logits(student, teacher, matched, backend, device, unmatched=unmatched)


@pytest.mark.parametrize(("dim", "dtype"), [(264, BF16), (768, BF16), (1024, BF16), (768, F32), (4096, BF16)], ids=str)
def test_every_byte_crosses_the_memory_once(dim, dtype, launches):
    counts = span_loss_cost(launches, dim, dtype, 48)
    assert counts.bytes < 1.02 * 48 * (3 * dim * dtype.itemsize + 64)


@pytest.mark.parametrize("unmatched", ["renormalize", "rest"])
@pytest.mark.parametrize(("v_s", "v_t"), [(600, 4000), (603, 4001)])
def test_every_byte_of_logits_crosses_the_memory_once(v_s, v_t, unmatched, launches, backend):
    """The student's row and its gradient, of the teacher the sectors that hold a matched column, or the whole row."""
    pairs, matched = 24, make_matched(v_s, v_t, 500)
    student, teacher = randn(pairs, v_s, seed=1, dtype=BF16), randn(pairs, v_t, seed=2, dtype=BF16)
    counts = launches.counts = Counts()
    vd.matched_kl(student.requires_grad_(), teacher, matched, unmatched=unmatched, backend=backend)
    launches.counts = None
    columns = matched.teacher_ids if unmatched == "renormalize" else torch.arange(v_t)
    each = 2 * 2 * v_s + 32 * sectors(columns, 2)
    tables = 4 * v_s + (5 * v_t if unmatched == "rest" else 0)  # read and, the first time, written
    assert counts.bytes < 1.1 * pairs * each + 3 * tables


@pytest.mark.parametrize(("dim", "dtype"), [(264, BF16), (768, BF16), (1024, F32)], ids=str)
def test_rows_that_belong_to_no_span_cost_little(dim, dtype, launches):
    """Little more than a store for each 16 bytes of a lane, and what it takes to find them."""
    without, more = (span_loss_cost(launches, dim, dtype, 48, padding) for padding in (0, 2048))
    stores = -(-dim * dtype.itemsize // 512)
    assert more.instructions - without.instructions < 2048 * (25 + 12 * stores)
    assert more.bytes - without.bytes < 1.02 * 2048 * dim * dtype.itemsize


def test_both_stages_of_a_total(launches, backend, monkeypatch):
    """As of many pairs, of few: one part."""
    monkeypatch.setattr(native, "total_parts", launches.made(lambda loss: loss.new_empty(1), written=True))
    pairs, n_s, n_t = make_pairs(40, seed=2, gaps=True)
    student, teacher, weights = rows(n_s, 8, 1), rows(n_t, 8, 2), torch.rand(40)
    got = vd.span_loss(student, teacher, pairs, pair_weights=weights, backend=backend)
    want = vd.reference.span_loss(student.double(), teacher.double(), pairs, pair_weights=weights.double())
    torch.testing.assert_close(got.double(), want)
    assert launches.count["finish_kernel"] == 2


def test_the_tables_of_costs(launches, monkeypatch):
    monkeypatch.setattr(static, "COSTS", ((8, "float32"),))
    *_, line = static.pair_costs(launches).splitlines()
    name, instructions, moved, least, close, padding = line.strip("| ").split(" | ")
    assert name == "8 float32" and least == "96"
    assert int(close) > int(instructions) > 100 and int(moved) >= 96 and 0 < int(padding) < 40
    calls = [call for call in static.calls_of(50, 60, 40, 24, 48) if call.operation.endswith("matched_kl")]
    *_, first, _, last = static.call_costs(launches, "cuda", calls).splitlines()
    for line, unmatched in ((first, "renormalize"), (last, "drop")):
        name, instructions, moved, tensors, each = line.strip("| ").split(" | ")
        assert name == f"matched_kl {unmatched}" and int(tensors) == 4 * 64 * (2 * 50 + 60)
        assert int(moved) > 4 * 64 * 2 * 50 and float(each) == round(int(tensors) / int(instructions), 1)


def test_a_loss_without_a_gradient(launches, backend):
    pairs, n_s, n_t = make_pairs(40, seed=2, gaps=True)
    student, teacher = rows(n_s, 8, 1), rows(n_t, 8, 2)
    got = vd.span_loss(student, teacher, pairs, backend=backend)
    torch.testing.assert_close(got.double(), vd.reference.span_loss(student.double(), teacher.double(), pairs))
    assert sum(launches.count.values()) == 2


def test_rows_that_are_close(backend, device):
    """Whose averages are formed twice."""
    pairs, n, _ = make_pairs(6, seed=9, same=True)
    for dim in (264, 4104):
        student = rows(n, dim, 1)
        for divergence in ("kl", "reverse_kl", "jsd"):
            teacher = student + 1e-3 * rows(n, dim, 2)
            compare(backend, device, [student], [teacher], pairs, divergence=divergence)


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "jsd", "cosine"])
def test_pairs_that_share_a_warp_do_not_meet(divergence, launches, backend, device):
    """Each has the bits that it has alone, whatever its neighbours need: the form of close rows, scaling, nothing."""
    pairs, n, _ = make_pairs(11, seed=4, same=True, empty=True)
    student = rows(n, 72, 1)
    far = torch.arange(n)[:, None] % 3 == 0
    teacher = torch.where(far, rows(n, 72, 2), student + 1e-3 * rows(n, 72, 2))
    if divergence == "cosine":
        student = torch.where(far, student * 1e30, student)
    compare(backend, device, [student], [teacher], pairs, divergence=divergence)
    options = {"divergence": divergence, "reduction": "none", "backend": backend}
    together, sides = vd.span_loss(student, teacher, pairs, **options), (pairs.student_start, pairs.student_end)
    for i in range(len(pairs)):
        alone = vd.SpanPairs(*(x[i : i + 1] for x in (*sides, pairs.teacher_start, pairs.teacher_end)))
        assert torch.equal(vd.span_loss(student, teacher, alone, **options), together[i : i + 1])


def every_kernel(backend: str, device: str) -> None:
    pairs, n_s, n_t = make_pairs(3, seed=1, gaps=True)
    make_table().remap(torch.arange(6).view(2, 3), backend=backend)
    for columns in (7, 8):
        student, teacher = randn(n_s, columns, seed=1), randn(n_t, columns, seed=2)
        compare_logits(student, teacher, make_matched(columns, columns, 5), backend, device, pairs, unmatched="rest")
    for dim in (7, 8, 1000, 4104):
        for divergence in ("kl", "jsd"):
            compare(backend, device, [rows(n_s, dim, 1)], [rows(n_t, dim, 2)], pairs, divergence=divergence)
    start, end = pairs.student_start, pairs.student_end
    for dim in (7, 8):
        for dtype in (torch.float64, F32, BF16, F16):
            for wide in (False, True):
                x = rows(n_s, dim, 1).to(dtype).requires_grad_()
                out = pooled_rows([x], start, end, None, True, wide, backend)
                out.backward(torch.ones_like(out))
                exact = x.detach().double().requires_grad_()
                want = vd.reference.span_mean(exact, start, end)
                want.backward(torch.ones_like(want))
                assert_norm_close(out.detach(), want.detach(), out.dtype, "out")
                assert_norm_close(x.grad, exact.grad, dtype, "gradient")


def test_every_kernel_is_chosen_for_some_input(launches, programs, backend, device):
    every_kernel(backend, device)
    assert set(launches.count) == set(programs)


def test_what_a_build_for_several_architectures_shares(module, tmp_path, monkeypatch, backend, device):
    """The PTX of sm_80, of which it makes the machine code of later ones too."""
    programs = compile_cuda(ROOT / "csrc/cuda/kernels.cu", tmp_path, 80)
    for launches in launching(module, programs, monkeypatch):
        every_kernel(backend, device)
        assert set(launches.count) == set(programs)


def far_apart(count: int, dim: int) -> torch.Tensor:
    """Rows 1 GB from each other, in memory of which nobody touches more than they take."""
    x = torch.empty((count - 1) * 2**28 + dim).as_strided((count, dim), (2**28, 1))
    x.copy_(rows(count, dim, 1))
    return x


def mean_of_rows_far_apart(backend: str) -> None:
    start, end = (torch.tensor(v, dtype=torch.int32) for v in ([0, 2], [1, 4]))
    x = far_apart(4, 8)
    got = vd.span_mean(x, start, end, backend=backend)
    torch.testing.assert_close(got, torch.stack([x[0], x[2:].mean(0)]))


def logits_far_apart(backend: str) -> None:
    matched, student, teacher = make_matched(8, 8, 5), far_apart(4, 8), far_apart(4, 8)
    got = vd.matched_kl(student, teacher.flip(1), matched, backend=backend)
    want = vd.reference.matched_kl(student.double(), teacher.flip(1).double(), matched)
    torch.testing.assert_close(got.double(), want)
    vd.matched_kl(student, teacher, matched, unmatched="drop", backend=backend)


def mask_far_apart(backend: str) -> None:
    mask = torch.empty(2**31 + 3, dtype=torch.bool).as_strided((3, 3), (2**30, 1))
    mask.copy_(torch.arange(9).view(3, 3) % 2)
    ids = torch.arange(9).view(3, 3)
    got, want = (make_table().remap(ids, mask, 9, name) for name in (backend, "torch"))
    assert torch.equal(got.input_ids, want.input_ids)


def a_table_that_makes_no_sense(launches) -> None:
    """No bound of a row, and none of what was measured, leads outside."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(-3, 20, (4, 50), generator=generator)
    huge = torch.tensor([-(2**31), -5, 0, 3, 11, 12, 99, 2**31 - 1], dtype=torch.int32)
    indptr = huge[torch.randint(len(huge), (17,), generator=generator)]
    pieces = torch.arange(12, dtype=torch.int32)
    native.cuda_measure(ids, None, indptr)
    for measured, pairs in ((None, None), (torch.full((4, 4, 1), 70), 60)):
        native.cuda_remap(ids, None, indptr, pieces, 7, 0, 300, measured, pairs)


def test_a_table_that_makes_no_sense_leads_nowhere(launches):
    a_table_that_makes_no_sense(launches)


def test_every_byte_of_a_batch_crosses_the_memory_once(launches, backend):
    table, ids = make_table(), torch.randint(50, (6, 300), generator=torch.Generator().manual_seed(1))
    counts = launches.counts = Counts()
    out = table.remap(ids, ids >= 0, 1000, backend)
    launches.counts = None
    each = (8 + 1 + 16) * ids.numel() + 16 * out.input_ids.numel()
    assert counts.bytes < 1.05 * each + 4 * (51 + table.ids.numel()) + 1000
    assert launches.count == {"remap_kernel": 1}


def test_rows_past_2_gigabytes(backend):
    mask_far_apart(backend)
    logits_far_apart(backend)
    mean_of_rows_far_apart(backend)
    pairs = vd.SpanPairs(*(torch.tensor(v, dtype=torch.int32) for v in ([0, 2], [1, 4], [0, 1], [1, 3])))
    student, teacher = far_apart(4, 8), rows(3, 8, 2)
    got = vd.span_loss(student, teacher, pairs, backend=backend)
    torch.testing.assert_close(got.double(), vd.reference.span_loss(student.double(), teacher.double(), pairs))


# What must not go unnoticed: each is a fault put into a copy of the sources.


def copy_with(folder: Path, file: str, old: str, new: str) -> Path:
    for part in ("csrc", "tests/cuda_on_host"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "csrc/cuda" / file
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new), encoding="utf-8")
    return folder


def test_reductions_need_two_buffers(module, tmp_path, monkeypatch, backend):
    copy = copy_with(tmp_path, "softmax.cuh", "turn_ ^= 1;", "")
    programs = compile_cuda(copy / "csrc/cuda/kernels.cu", tmp_path)
    pairs, n_s, n_t = make_pairs(3, seed=1)
    student, teacher = rows(n_s, 4104, 1), rows(n_t, 4104, 2)
    for _ in launching(module, programs, monkeypatch):
        with pytest.raises(Failure, match="race of warps in shared memory"):
            vd.span_loss(student, teacher, pairs, reduction="none", backend=backend)


def test_a_warp_goes_on_together(module, tmp_path, monkeypatch, backend):
    copy = copy_with(tmp_path, "span_loss.cu", "again = any_of_warp(left);", "again = left;")
    programs = compile_cuda(copy / "csrc/cuda/kernels.cu", tmp_path)
    pairs, n, _ = make_pairs(4, seed=1, same=True)
    student, teacher = rows(n, 8, 1), rows(n, 8, 2)
    teacher[pairs.teacher_start[0] : pairs.teacher_end[0]] = student[pairs.student_start[0] : pairs.student_end[0]]
    for _ in launching(module, programs, monkeypatch):
        with pytest.raises(Failure, match="shfl"):
            vd.span_loss(student, teacher, pairs, backend=backend)


def test_packs_need_aligned_rows(programs, tmp_path, monkeypatch, backend):
    copy = copy_with(tmp_path, "rows.cuh", "== 0 && stride % 16 == 0", ">= 0")
    module = cuda_on_host.build(tmp_path, copy)
    pairs, n_s, n_t = make_pairs(3, seed=1)
    student, teacher = rows(n_s, 9, 1)[:, 1:], rows(n_t, 8, 2)
    same = vd.MatchedVocab(*[torch.arange(8)] * 2)
    for _ in launching(module, programs, monkeypatch):
        with pytest.raises(Failure, match="misaligned"):
            vd.span_loss(student, teacher, pairs, backend=backend)
        for s, t in ((student[:3], teacher[:3]), (teacher[:3], student[:3])):
            with pytest.raises(Failure, match="misaligned"):
                vd.matched_kl(s, t, same, backend=backend)


def test_addresses_need_64_bits(module, tmp_path, monkeypatch, backend):
    copy = copy_with(tmp_path, "rows.cuh", "position * stride[layer]", "int(position) * int(stride[layer])")
    programs = compile_cuda(copy / "csrc/cuda/kernels.cu", tmp_path)
    for _ in launching(module, programs, monkeypatch):
        with pytest.raises(Failure, match="out of bounds"):
            mean_of_rows_far_apart(backend)


def test_addresses_of_logits_need_64_bits(module, tmp_path, monkeypatch, backend):
    copy = copy_with(tmp_path, "matched_kl.cu", "int64_t{i} * side.stride", "int(i * side.stride)")
    programs = compile_cuda(copy / "csrc/cuda/kernels.cu", tmp_path)
    for _ in launching(module, programs, monkeypatch):
        with pytest.raises(Failure, match="out of bounds"):
            logits_far_apart(backend)


def test_what_a_sweep_has_found_needs_a_barrier(module, tmp_path, monkeypatch, backend):
    old = "__syncthreads();\n    if (next == Sweep::gradient)"
    copy = copy_with(tmp_path, "matched_kl.cu", old, old.split("\n")[1])
    programs = compile_cuda(copy / "csrc/cuda/kernels.cu", tmp_path)
    student, teacher, matched = randn(2, 1200, seed=1), randn(2, 1200, seed=2), make_matched(1200, 1200, 900)
    for _ in launching(module, programs, monkeypatch):
        with pytest.raises(Failure, match="race of warps in shared memory"):
            vd.matched_kl(student, teacher, matched, unmatched="rest", reduction="none", backend=backend)


FAULTS_OF_REMAP = {
    "two buffers": ("turn_ ^= 1;", "", "race of warps in shared memory"),
    "ids outside the table": ("token.known = id >= 0 && id < a.rows", "token.known = id < a.rows", "out of bounds"),
    "bounds of rows": ("clamp(a.indptr[id + 1], a.nnz)", "a.indptr[id + 1]", "out of bounds"),
    "pairs": ("p >= out.pairs || ", "", "out of bounds"),
    "addresses": ("row * x.stride + column", "int(row) * int(x.stride) + int(column)", "out of bounds"),
}


@pytest.mark.parametrize("fault", FAULTS_OF_REMAP)
def test_what_a_remap_needs(fault, module, tmp_path, monkeypatch, backend):
    old, new, noticed = FAULTS_OF_REMAP[fault]
    programs = compile_cuda(copy_with(tmp_path, "remap.cu", old, new) / "csrc/cuda/kernels.cu", tmp_path)
    for launches in launching(module, programs, monkeypatch):
        with pytest.raises(Failure, match=noticed):
            if fault == "addresses":
                mask_far_apart(backend)
            else:
                a_table_that_makes_no_sense(launches)
