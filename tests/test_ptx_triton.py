"""The PTX of the Triton kernels, compiled for sm_90 as the arguments of a call want it (sizes that are multiples of 16
and sizes that are not), run in an interpreter (tests/ptx): against the float64 reference, and with every access looked
at."""

from __future__ import annotations

import importlib

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

import vocabdistil as vd  # noqa: E402
from tests import contrastive_backend as contrastive  # noqa: E402
from tests import relation_loss_backend as relations  # noqa: E402
from tests.output_layers import make  # noqa: E402
from tests.ptx.launch import TritonLauncher, triton_launching  # noqa: E402
from tests.remap_backend import test_equals_the_native_code as equals_the_native_code  # noqa: E402
from tests.remap_backend import test_ids_outside_the_table  # noqa: E402, F401
from tests.remapped_kl_backend import make_weights  # noqa: E402
from tests.span_loss_backend import (  # noqa: E402, F401
    DIVERGENCES,
    compare,
    rows,
    test_spans_that_make_no_sense_stay_inside,
)
from tests.span_mean_backend import test_span_mean_against_float64 as span_mean_against_float64  # noqa: E402
from tests.span_mean_backend import test_span_mean_of_layers  # noqa: E402, F401
from tests.spans import make_pairs  # noqa: E402
from tests.triton_interpreted import (  # noqa: E402
    check_linear_matched_kl,
    check_log_prob,
    check_matched_kl,
    check_remapped_kl,
)
from tests.vocabularies import make_matched, randn  # noqa: E402
from vocabdistil.core import native  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not TritonLauncher.possible(), reason="this triton launches in another way"),
    pytest.mark.filterwarnings("error:TRITON_DEFAULT_FP_FUSION"),  # a launch that leaves it to the version
]


@pytest.fixture(scope="module")
def launcher(request, tmp_path_factory):
    """What it compiles is kept for the next run: that takes longer than to run it."""
    cache = getattr(request.config, "cache", None)
    return TritonLauncher(cache.mkdir("triton") if cache else tmp_path_factory.mktemp("triton"))


@pytest.fixture(autouse=True)
def launches(launcher, monkeypatch):
    """Calls with CPU tensors to the backend "triton" run in the interpreter."""
    return triton_launching(launcher, monkeypatch)


@pytest.fixture
def backend():
    return "triton"


@pytest.fixture
def device():
    return "cpu"


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("dim", "dtype", "divergence"),
    [*((264, BF16, divergence) for divergence in DIVERGENCES), (7, F32, "mse"), (768, BF16, "kl"), (2056, F16, "kl")],
    ids=str,
)
def test_span_loss(dim, dtype, divergence, backend, device):
    pairs, n_s, n_t = make_pairs(7 if dim < 1000 else 3, seed=dim, gaps=True, empty=True)
    options = {"divergence": divergence, "temperature": 1.7, "beta": 0.3}
    compare(backend, device, [rows(n_s, dim, 1, dtype)], [rows(n_t, dim, 2, dtype)], pairs, **options)


def test_layers_weights_and_an_upstream_gradient(backend, device):
    pairs, n_s, n_t = make_pairs(6, seed=6, gaps=True, empty=True)
    students, teachers = [rows(n_s, 264, i, F16) for i in range(3)], [rows(n_t, 264, 5 + i) for i in range(9)]
    compare(
        backend, device, students, teachers, pairs, torch.tensor(-3.0), student_layer_weights=[1.0, 2.0, 0.5],
        pair_weights=torch.rand(6),
    )  # fmt: skip


@pytest.mark.parametrize(("dim", "dtype"), [(7, F16), (264, BF16), (264, torch.float64), (1032, F32)], ids=str)
def test_span_mean(dim, dtype, backend, device):
    span_mean_against_float64(dim, dtype, "mean", backend, device)


@pytest.mark.parametrize(("batch", "length", "mask"), [(3, 7, "none"), (2, 131, "holes"), (2, 2500, "padding")])
def test_remap(batch, length, mask, backend, device):
    equals_the_native_code(batch, length, True, mask, device, backend)


def test_matched_kl(backend, device):
    student, teacher = randn(3, 50, seed=1, scale=2), randn(3, 33, seed=2, scale=2)
    check_matched_kl.compare(student, teacher, make_matched(50, 33, 32), backend, device, temperature=1.7)


@pytest.mark.parametrize("whole", [True, False], ids=["whole rows", "turns"])
def test_matched_kl_of_pairs_with_the_rest(whole, monkeypatch, backend, device):
    if not whole:  # a block of columns at a time
        monkeypatch.setattr(check_matched_kl.kernels, "RESIDENT", 1)
        monkeypatch.setattr(check_matched_kl.kernels, "TURN", 1024)
    pairs, n_s, n_t = make_pairs(4, seed=3, gaps=True, empty=True)
    student, teacher = randn(n_s, 1100, seed=1, dtype=BF16), randn(n_t, 2104, seed=2, dtype=BF16)
    matched, options = make_matched(1100, 2104, 900), {"unmatched": "rest", "reduction": "none"}
    check_matched_kl.compare(student, teacher, matched, backend, device, pairs=pairs, **options)


@pytest.mark.parametrize("close", [True, False], ids=["close", "apart"])
@pytest.mark.parametrize("unmatched", ["renormalize", "drop"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_gradient_in_the_memory_of_the_logits(dtype, unmatched, close, launches):
    """The same bits as elsewhere, where rows are read again in turns too."""
    kernels, code = check_matched_kl.kernels, native.UNMATCHED_CODES[unmatched]
    columns, matched = 1100, 1000
    logits = randn(2, 1104, seed=1)
    teacher = logits[:, :1008] + (1e-3 if close else 1) * randn(2, 1008, seed=2)
    rest = None if unmatched == "renormalize" else torch.tensor([[2.0, 40.0, -60.0, 100.0]] * 2)
    tile = kernels.tile(columns, F32)
    assert tile["STREAM"] < columns and tile["BLOCK"] < columns <= tile["BLOCK"] + tile["TAIL"]
    results = []
    for elsewhere in (True, False):
        student = logits.clone()
        memory = torch.empty(2, 1104 * 4 // dtype.itemsize, dtype=dtype) if elsewhere else student.view(dtype)
        loss, grad, scale = torch.empty(2), memory[:, :columns], torch.tensor([1.0, 0.5])
        for tensor in (student, teacher, memory, loss, scale, *([] if rest is None else [rest])):
            launches.tensors.add(tensor, tensor is memory or tensor is loss)
        kernels.dense_rows(
            student[:, :columns], teacher[:, :matched], None, None, None, None, rest, scale, code, 1.3, loss, grad
        )
        results.append((loss, grad.clone()))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert (results[0][0] < 1e-3).all() == close or unmatched == "drop"


@pytest.mark.parametrize(
    ("unmatched", "dtype", "bias", "rows", "dims"),
    [
        ("renormalize", BF16, True, 70, (264, 72)), ("rest", F16, False, 70, (16, 40)),
        ("drop", BF16, True, 20, (7, 9)),
    ],
    ids=str,
)  # fmt: skip
def test_linear_matched_kl(unmatched, dtype, bias, rows, dims, monkeypatch, backend):
    """On tensor cores: rows, columns and dims that fill tiles and turns, or do not, products in parts, two chunks."""
    if rows == 20:
        for name in ("BUDGET", "_TIMES"):
            monkeypatch.setattr(importlib.import_module("vocabdistil.ops._dense_sweep"), name, 0)
    tensors = make(rows, rows, v_s=300, v_t=400, d_s=dims[0], d_t=dims[1], dtype=dtype, bias=bias)
    for side, dim in zip(("student", "teacher"), dims, strict=True):
        tensors[f"{side}_weight"] *= (12 / dim) ** 0.5
    options = {"unmatched": unmatched, "temperature": 1.7}
    check_linear_matched_kl.compare(tensors, make_matched(300, 400, 150), backend, **options)


@pytest.mark.parametrize(("columns", "dtype"), [(50, BF16), (1040, F32)], ids=str)
def test_span_likelihood(columns, dtype, monkeypatch):
    monkeypatch.setattr(check_log_prob.kernels, "TURN", 1024)
    check_log_prob.compare(check_log_prob.make(dtype, batch=1, v_s=columns, v_t=columns + 16), "triton")


def test_span_likelihood_of_hidden_states():
    check_log_prob.compare(check_log_prob.make(linear=True, batch=1), "triton")


@pytest.mark.parametrize(
    ("combine", "dtype", "small", "top"),
    [
        ("sum", F32, True, None), ("sum", F32, False, None), ("logsumexp", BF16, True, None),
        ("logsumexp", F32, True, "rest"), ("sum", BF16, True, "renormalize"),
    ],
    ids=str,
)  # fmt: skip
def test_remapped_kl(combine, dtype, small, top, monkeypatch):
    for name, value in check_remapped_kl.SMALL.items() if small else ():
        monkeypatch.setattr(check_remapped_kl.kernels, name, value)
    pairs, n_s, n_t = make_pairs(10, seed=3, gaps=True, empty=True)
    student, teacher = randn(n_s, 40, seed=1, dtype=dtype), randn(n_t, 90, seed=2, dtype=dtype)
    table = check_remapped_kl.make_table(90, 40, seed=int(small))  # another, as what is made of a table is kept
    options = {} if top is None else {"top_k": 5, "remainder": top, "entry_weights": make_weights(table)}
    check_remapped_kl.compare(student, teacher, table, pairs=pairs, combine=combine, **options)


def test_remapped_kl_does_not_hide_nan(monkeypatch):
    for name, value in check_remapped_kl.SMALL.items():
        monkeypatch.setattr(check_remapped_kl.kernels, name, value)
    pairs, n_s, n_t = make_pairs(10, seed=3)
    table, student = check_remapped_kl.make_table(90, 40, seed=1), randn(n_s, 40, seed=1)
    student[:, int(table.ids[0])] = float("nan")
    loss, _ = check_remapped_kl.run(vd, student, randn(n_t, 90, seed=2), table, pairs=pairs, backend="triton")
    assert loss.isnan()


def test_relation_loss(backend, device):
    """On tensor cores."""
    pairs, shape_s, shape_t = relations.make_texts([5, 1, 70, 0, 8], seed=36, empty=True)
    student, teacher = relations.states(shape_s, 36, 1, heads=3), relations.states(shape_t, 60, 2, heads=3)
    relations.compare(student, teacher, pairs, backend, device, heads=3)


@pytest.mark.parametrize("whole", [True, False], ids=["whole rows", "turns"])
@pytest.mark.parametrize("parts", contrastive.PARTS)
@pytest.mark.parametrize(("negatives", "known"), [(0, None), (5, False)])
def test_contrastive(negatives, known, parts, whole, monkeypatch, backend, device):
    monkeypatch.setattr(contrastive.module, "_SPARSE", 10**9)
    if not whole:
        kernels = importlib.import_module("vocabdistil.triton_kernels.contrastive")
        monkeypatch.setattr(kernels, "RESIDENT", 1)
        monkeypatch.setattr(kernels, "TURN", 512)
    contrastive.compare_op(70 if whole else 600, negatives, known, parts, backend, device)


@pytest.mark.parametrize(("dtype", "side"), [(F32, "student"), (BF16, "teacher")], ids=str)
def test_contrastive_of_hidden_states(dtype, side, backend, device):
    pairs, n_s, n_t = make_pairs(20, seed=3, gaps=True, empty=True)
    student, teacher = randn(n_s, 40, seed=1, dtype=dtype), randn(n_t, 40, seed=2, dtype=dtype)
    contrastive.compare(student, teacher, pairs, backend, device, side=side, temperature=0.3)
