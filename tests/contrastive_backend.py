"""What contrastive must do in every backend, against the float64 reference. A tier imports these tests and says by its
fixtures which ``backend`` runs on which ``device``: torch on the CPU (None), Triton in the interpreter or on a GPU."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

import vocabdistil as vd
from tests.spans import make_pairs
from tests.tolerances import assert_norm_close
from tests.vocabularies import randn

HALF_OR_SINGLE = [torch.float32, torch.bfloat16, torch.float16]
PARTS = ["whole", "bfloat16", "tf32"]  # of the products
module = import_module("vocabdistil.ops.contrastive")


def run(of, student, teacher, pairs, **options):
    """The loss, and the gradients of the student and of the projection."""
    leaves = {k: v.clone().requires_grad_() for k, v in options.items() if k in ("weight", "bias")}
    leaf = student.clone().requires_grad_()
    loss = of.contrastive(leaf, teacher, pairs, **options | leaves)
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype, device=loss.device).view_as(loss)
    (loss * upstream).sum().backward()
    return {"loss": loss.detach(), "student": leaf.grad, **{k: v.grad for k, v in leaves.items()}}


def compare(student, teacher, pairs, backend, device, **options):
    """Twice, for the same bits, and with the count of pairs on the device, where the host does not know it."""
    on = {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}
    wide = {k: v.double() if torch.is_tensor(v) else v for k, v in options.items()}
    want = run(vd.reference, student.double(), teacher.double(), pairs, **wide)
    fields = [pairs.student_start, pairs.student_end, pairs.teacher_start, pairs.teacher_end]
    counted = vd.SpanPairs._trusted(
        [x.to(device) for x in fields], torch.tensor(pairs.num_nonempty).to(device), pairs.student_tokens,
        pairs.teacher_tokens, pairs.padded,
    )  # fmt: skip
    student, teacher, pairs = student.to(device), teacher.to(device), pairs.to(device)
    got, again = (run(vd, student, teacher, pairs, backend=backend, **on) for _ in range(2))
    unknown = run(vd, student, teacher, counted, backend=backend, **on)
    dtype = student.dtype
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    # Products of parts are exact far below the rounding of half types, which the gradient has.
    factor = 50 if dtype.itemsize == 2 and (backend == "triton" or device == "cuda") else 2
    for name, value in got.items():
        of = exact if name == "loss" else dtype
        assert value.dtype == of and torch.equal(value, again[name]), name
        for found in (value, unknown[name]):
            assert_norm_close(found.cpu(), want[name], of, name, factor if name == "loss" else 2)


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE, ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("empty", [False, True])
def test_all_others(side, empty, dtype, backend, device):
    pairs, n_s, n_t = make_pairs(61, seed=3, gaps=True, empty=empty)
    student, teacher = randn(n_s, 20, seed=1, dtype=dtype), randn(n_t, 20, seed=2, dtype=dtype)
    compare(student, teacher, pairs, backend, device, side=side, temperature=0.3)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_projection_and_reductions(side, reduction, backend, device):
    pairs, n_s, n_t = make_pairs(40, seed=5, gaps=True, empty=True)
    compare(
        randn(n_s, 12, seed=1), randn(n_t, 17, seed=2), pairs, backend, device, side=side, reduction=reduction,
        weight=randn(17, 12, seed=3, scale=0.3), bias=randn(17, seed=4),
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 90])
def test_counts_of_pairs(count, backend, device):
    pairs, n_s, n_t = make_pairs(count, seed=count, gaps=True)
    compare(randn(n_s, 6, seed=1), randn(n_t, 6, seed=2), pairs, backend, device, temperature=0.5)


def compare_op(count, negatives, known, parts, backend, device):
    """Both gradients, some pairs left out, negatives drawn: the op with the products of all pairs, against that of
    torch in float64."""
    a, b = (torch.nn.functional.normalize(randn(count, 24, seed=i) + 1) for i in (1, 2))
    valid = None if known is None else torch.arange(count) % 7 != 3
    ids = None
    if negatives:
        generator = torch.Generator().manual_seed(count)
        ids = module.draw_negatives(count, valid, negatives, a.device, generator)
    scale = torch.linspace(0.01, 0.03, count)
    number = -1 if known is False else int(valid.sum()) if known else count
    op = torch.ops.vocabdistil.contrastive
    rest = [None if x is None else x.to(device) for x in (valid, ids, scale)]
    got, again = (op(a.to(device), b.to(device), *rest, 0.1, number, parts, backend, True, True) for _ in range(2))
    want = op(a.double(), b.double(), valid, ids, scale.double(), 0.1, number, "whole", "torch", True, True)
    for name, value, same, expected in zip(("total", "loss", "anchor", "other"), got, again, want, strict=True):
        assert value.is_contiguous() and torch.equal(value, same), name
        assert_norm_close(value.cpu(), expected, torch.float32, name, 50 if parts == "bfloat16" else 2)
    if parts != "whole":
        whole = op(a.to(device), b.to(device), *rest, 0.1, number, "whole", backend, True, True)
        assert not torch.equal(got[2], whole[2])


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("known", [None, True, False], ids=["all", "known", "unknown"])
@pytest.mark.parametrize("negatives", [0, 5])
@pytest.mark.parametrize("count", [37, 48])
def test_drawn_negatives_and_pairs_that_do_not_count(count, negatives, known, parts, backend, device, monkeypatch):
    monkeypatch.setattr(module, "_SPARSE", 10**9)
    compare_op(count, negatives, known, parts, backend or "torch", device)


def test_few_pairs(backend, device):
    none = torch.zeros(0, dtype=torch.int32)
    alone, empty = vd.SpanPairs([0], [2], [0], [1]), vd.SpanPairs([0], [0], [0], [1])
    for pairs in (vd.SpanPairs(none, none, none, none), alone, empty):
        for negatives in (-1, 3):
            got = run(
                vd, randn(3, 4).to(device), randn(3, 4, seed=1).to(device), pairs.to(device), negatives=negatives,
                backend=backend,
            )  # fmt: skip
            assert got["loss"].item() == 0 and torch.count_nonzero(got["student"]) == 0


def test_zero_rows_do_not_make_nan(backend, device):
    pairs, n_s, n_t = make_pairs(10, seed=5)
    student, teacher = randn(n_s, 6, seed=1), randn(n_t, 6, seed=2)
    student[pairs.student_start[2] : pairs.student_end[2]] = 0
    teacher[pairs.teacher_start[4] : pairs.teacher_end[4]] = 0
    want = run(vd.reference, student, teacher, pairs)
    got = run(vd, student.to(device), teacher.to(device), pairs.to(device), backend=backend)
    torch.testing.assert_close(got["loss"].cpu(), want["loss"])
    others = torch.arange(n_s) < pairs.student_start[2]  # a clamped norm has a gradient of the size 1 / 1e-8
    torch.testing.assert_close(got["student"].cpu()[others], want["student"][others], rtol=1e-4, atol=1e-6)


def test_a_nan_is_not_hidden(backend, device):
    pairs, n_s, n_t = make_pairs(10, seed=5)
    student, teacher = randn(n_s, 6, seed=1), randn(n_t, 6, seed=2)
    student[pairs.student_start[2]] = float("nan")
    got = run(
        vd, student.to(device), teacher.to(device), pairs.to(device), reduction="none", backend=backend
    )  # fmt: skip
    assert got["loss"].isnan().all()


def test_small_temperature(backend, device):
    pairs, n_s, n_t = make_pairs(30, seed=5)
    compare(randn(n_s, 6, seed=1), randn(n_t, 6, seed=2), pairs, backend, device, temperature=0.005)
