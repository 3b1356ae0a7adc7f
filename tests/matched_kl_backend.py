"""What matched_kl must do in every GPU backend, against the float64 reference. A tier imports these tests and says by
its fixtures which ``backend`` runs on which ``device``."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

import vocabdistil as vd
from tests.compiling import assert_compiles
from tests.numbers_backend import (  # noqa: F401
    test_classes_of_one_size_at_any_temperature,
    test_divergences_over_a_matched_vocabulary_at_any_temperature,
)
from tests.spans import make_pairs
from tests.tolerances import assert_norm_close
from tests.upstream import assert_guesses_the_upstream_gradient
from tests.vocabularies import make_matched, randn
from vocabdistil.core import dispatch

UNMATCHED = ["renormalize", "rest", "drop"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")


def run(module, student, teacher, matched, **options):
    student = student.clone().requires_grad_()
    loss = module.matched_kl(student, teacher, matched, **options)
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype, device=loss.device).view_as(loss)
    (loss * upstream).sum().backward()
    return loss.detach(), student.grad


def compare(student, teacher, matched, backend, device, pairs=None, **options):
    if pairs is not None:
        options["pairs"] = pairs.to(device)
    student, teacher, matched = student.to(device), teacher.to(device), matched.to(device)
    loss, grad = run(vd, student, teacher, matched, backend=backend, **options)
    want_loss, want_grad = run(vd.reference, student.double(), teacher.double(), matched, **options)
    dtype = student.dtype
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == exact and grad.dtype == dtype
    assert_norm_close(loss, want_loss, exact, "loss", 2)
    # The interpreter of Triton cuts a float32 to bfloat16 instead of rounding.
    assert_norm_close(grad, want_grad, dtype, "gradient", 2)


# Columns that make packs of 16 bytes and others, and more than the first turn of a block.
SIZES = [(2, 3, 1), (50, 33, 32), (48, 64, 40), (1100, 2100, 900), (1104, 2112, 900)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unmatched", UNMATCHED)
@pytest.mark.parametrize(("v_s", "v_t", "v_m"), SIZES)
def test_matched_kl_against_float64(v_s, v_t, v_m, unmatched, dtype, backend, device):
    student, teacher = randn(3, v_s, seed=1, dtype=dtype, scale=2), randn(3, v_t, seed=2, dtype=dtype, scale=2)
    matched = make_matched(v_s, v_t, v_m)
    compare(student, teacher, matched, backend, device, unmatched=unmatched, temperature=1.7)


@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_one_vocabulary_within_the_other(unmatched, backend, device):
    """Neighbours of one side are neighbours of the other: most, or all, of them."""
    student, teacher = randn(3, 48, seed=1, dtype=torch.bfloat16), randn(3, 64, seed=2)
    for ids in (torch.arange(48), torch.cat([torch.arange(16), torch.arange(17, 40)])):
        matched = vd.MatchedVocab(ids + 8, ids)
        if unmatched != "rest" or len(ids) < 48:
            compare(student, teacher, matched, backend, device, unmatched=unmatched)


@pytest.mark.parametrize(("pooling", "reduction"), [("mean", "batchmean"), ("sum", "none")])
@pytest.mark.parametrize("unmatched", UNMATCHED)
@pytest.mark.parametrize(("v_s", "v_t"), [(20, 30), (24, 32)])
def test_pairs_of_logits(v_s, v_t, unmatched, pooling, reduction, backend, device):
    pairs, n_s, n_t = make_pairs(9, seed=3, gaps=True, empty=True)
    options = {"pairs": pairs, "pooling": pooling, "unmatched": unmatched, "reduction": reduction}
    student, teacher = randn(n_s, v_s, seed=1), randn(n_t, v_t, seed=2)
    compare(student, teacher, make_matched(v_s, v_t, 17), backend, device, temperature=2.0, **options)


@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_minus_infinity_and_far_apart(unmatched, backend, device):
    matched = make_matched(40, 50, 30)
    student, teacher = randn(6, 40, seed=1, scale=20), randn(6, 50, seed=2, scale=20)
    s, t = matched.student_ids, matched.teacher_ids
    teacher[0, t[:7]] = student[0, s[:7]] = -INF
    teacher[1, t[1:]] = -INF
    student[2, s] += 400
    student[3, s] -= 400
    teacher[4, t] = -INF  # no matched mass
    teacher[5] = -INF  # none at all
    teacher[5, t[3]] = 0
    compare(student, teacher, matched, backend, device, unmatched=unmatched, reduction="none")
    student[0, s[9]] = -INF  # mass of the teacher where the student has none
    student, teacher, matched = student.to(device), teacher.to(device), matched.to(device)
    assert vd.matched_kl(student, teacher, matched, unmatched=unmatched, backend=backend).item() == INF


def test_nan_among_logits_is_not_hidden(backend, device):
    matched, nan = make_matched(40, 50, 30).to(device), float("nan")
    others = [v for v in range(40) if v not in matched.student_ids.tolist()]
    for side in (0, 1):
        for unmatched in UNMATCHED:
            logits = [randn(3, 40).to(device), randn(3, 50).to(device)]
            logits[side][1, (matched.student_ids, matched.teacher_ids)[side][4]] = nan
            assert vd.matched_kl(*logits, matched, unmatched=unmatched, backend=backend).isnan(), (side, unmatched)
    student, teacher = randn(3, 40).to(device), randn(3, 50).to(device)
    student[:, others] = nan
    assert vd.matched_kl(student, teacher, matched, backend=backend).isfinite()
    assert vd.matched_kl(student, teacher, matched, unmatched="rest", backend=backend).isnan()


@pytest.mark.parametrize("unmatched", ["renormalize", "rest"])
def test_gradient_of_logits_is_zero_where_both_sides_are_equal(unmatched, backend, device):
    x, ids = randn(3, 60).to(device), torch.randperm(60, generator=torch.Generator().manual_seed(0))[:20].to(device)
    loss, grad = run(vd, x, x, vd.MatchedVocab(ids, ids), unmatched=unmatched, backend=backend)
    assert loss.item() == 0 and torch.count_nonzero(grad) == 0


@pytest.mark.parametrize("unmatched", UNMATCHED)
@pytest.mark.parametrize("v_m", [1, 3])
def test_few_columns_and_all_mass_on_one(v_m, unmatched, backend, device):
    student, teacher = randn(4, 5, seed=1), randn(4, 6, seed=2)
    matched = make_matched(5, 6, v_m)
    student[1] = teacher[1] = -INF
    student[1, matched.student_ids[0]] = teacher[1, matched.teacher_ids[0]] = 3.0
    teacher[2, matched.teacher_ids[0]] = 300.0
    compare(student, teacher, matched, backend, device, unmatched=unmatched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upstream_gradients_are_folded_in_once(dtype, backend, device):
    matched, teacher = make_matched(40, 50, 30).to(device), randn(6, 50, seed=2, dtype=dtype).to(device)
    grads = []
    for upstream in (1.0, -4.0, 2.0**-30):
        leaf = randn(6, 40, seed=1, dtype=dtype).to(device).requires_grad_()
        loss = vd.matched_kl(leaf, teacher, matched, backend=backend)
        loss.backward(torch.full_like(loss, upstream))
        grads.append(leaf.grad / upstream)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
    loss = partial(vd.matched_kl, teacher_logits=teacher, matched=matched, backend=backend)
    assert_guesses_the_upstream_gradient(loss, randn(6, 40, seed=1, dtype=dtype).to(device))


def call(backend, student, teacher, spans, matched, unmatched="renormalize", **changes):
    """Losses, total and gradient ``[rows + 2, V]`` of which the first and the last are none of the student's."""
    pairs = len(spans[0]) if spans else len(student)
    made = {"loss": student.new_full((pairs,), float("nan")), "total": student.new_full((), float("nan"))}
    padded = student.new_full((len(student) + 2, student.shape[1]), float("nan"))
    arguments = {**made, "grad": padded[1:-1], "upstream": None, "formed": None, **changes}
    dispatch.implementation("matched_kl", backend, "matched_kl")(
        student, teacher, spans, matched.student_ids, matched.teacher_ids, student.new_ones(pairs),
        UNMATCHED.index(unmatched), True, 1.0, True, **arguments,
    )  # fmt: skip
    return arguments["loss"], arguments["total"], padded


@pytest.mark.parametrize("v_s", [20, 24])
@pytest.mark.parametrize("unmatched", UNMATCHED)
def test_every_element_of_the_results_is_written(unmatched, v_s, backend, device):
    pairs, n_s, n_t = make_pairs(9, seed=3, gaps=True, empty=True)
    pairs, matched = pairs.to(device), make_matched(v_s, 32, 17).to(device)
    spans = (pairs.student_start, pairs.student_end, pairs.teacher_start, pairs.teacher_end)
    student, teacher = randn(n_s, v_s, seed=1).to(device), randn(n_t, 32, seed=2).to(device)
    loss, total, grad = call(backend, student, teacher, spans, matched, unmatched)
    assert total.isfinite() and loss.isfinite().all() and grad[1:-1].isfinite().all()
    assert grad[[0, -1]].isnan().all()
    torch.testing.assert_close(total, loss.sum())
    others = [v for v in range(v_s) if v not in matched.student_ids.tolist()]
    assert unmatched != "renormalize" or torch.count_nonzero(grad[1:-1, others]) == 0


@pytest.mark.parametrize("unmatched", ["renormalize", "rest"])
def test_spans_of_logits_that_make_no_sense_stay_inside(unmatched, backend, device):
    positions = [-5, 9, 3, 2**31 - 1], [4, -(2**31), 2, 2**31 - 1], [7, 0, -1, -9], [1, 2, 9, 2**31 - 1]
    spans = [torch.tensor(v, dtype=torch.int32, device=device) for v in positions]
    student, teacher = randn(6, 24, seed=1).to(device), randn(6, 32, seed=2).to(device)
    grad = call(backend, student[1:5], teacher[1:5], spans, make_matched(24, 32, 17).to(device), unmatched)[2]
    assert grad[[0, -1]].isnan().all()


def test_ids_out_of_range_are_not_followed(backend, device):
    ids = [torch.tensor(v, dtype=torch.int32, device=device) for v in ([0, -1, 24, 5, 7], [3, 4, 5, -2, 40])]
    student, teacher = randn(3, 24, seed=1).to(device), randn(3, 32, seed=2).to(device)
    loss, _, grad = call(backend, student, teacher, [], SimpleNamespace(student_ids=ids[0], teacher_ids=ids[1]))
    assert (loss == 0).all() and torch.count_nonzero(grad[1:-1]) == 0  # one pair of columns is left


def test_a_gradient_of_logits_that_is_there_is_left_alone(backend, device):
    matched = make_matched(24, 32, 17).to(device)
    student, teacher = randn(3, 24, seed=1).to(device), randn(3, 32, seed=2).to(device)
    want = call(backend, student, teacher, [], matched)[2][1:-1]
    grad, two = torch.full_like(student, 7), student.new_full((), 2)
    options = {"loss": None, "total": None, "grad": grad, "upstream": two}
    call(backend, student, teacher, [], matched, formed=two.clone(), **options)
    assert torch.all(grad == 7)
    call(backend, student, teacher, [], matched, formed=two + 1, **options)
    torch.testing.assert_close(grad, 2 * want)


def test_matched_kl_compiles_as_one_graph(backend, device):
    matched = make_matched(12, 20, 8).to(device)
    teacher = randn(3, 20, seed=1, dtype=torch.bfloat16).to(device)

    def loss(x):
        return vd.matched_kl(x * 2, teacher, matched, unmatched="rest", backend=backend) * 3

    assert_compiles(loss, randn(3, 12, dtype=torch.bfloat16).to(device))


def test_strides_and_no_rows(backend, device):
    matched = make_matched(12, 20, 8).to(device)
    student, teacher = randn(4, 24).to(device)[:, :12], randn(4, 40, seed=1).to(device)[:, :20]
    want = run(vd.reference, student, teacher, matched)
    unaligned = torch.cat([student[:, :1], student], 1)[:, 1:], torch.cat([teacher[:, :1], teacher], 1)[:, 1:]
    for s, t in ((student, teacher), (student.t().contiguous().t(), teacher.view(2, 2, 20)), unaligned):
        got = run(vd, s, t.flatten(0, -2), matched, backend=backend)
        for value, wanted in zip(got, want, strict=True):
            torch.testing.assert_close(value, wanted)
    loss, grad = run(vd, student[:0], teacher[:0], matched, backend=backend)
    assert loss.item() == 0 and grad.shape == (0, 12)


def test_no_pairs_clear_the_gradient(backend, device):
    none = [torch.zeros(0, dtype=torch.int32, device=device)] * 4
    student, teacher = randn(3, 12).to(device), randn(4, 20, seed=1).to(device)
    _, total, grad = call(backend, student, teacher, none, make_matched(12, 20, 8).to(device))
    assert total == 0 and torch.count_nonzero(grad[1:-1]) == 0 and grad[[0, -1]].isnan().all()


def test_a_shift_and_a_mask(backend, device):
    matched, mask = make_matched(12, 20, 8).to(device), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], device=device)
    student, teacher = randn(2, 4, 12).to(device), randn(2, 4, 20, seed=1).to(device)
    options = {"mask": mask, "student_shift": 1, "teacher_shift": 1, "scale": 0.5}
    loss, grad = run(vd, student, teacher, matched, backend=backend, **options)
    del options["scale"]
    want, wanted = run(vd.reference, student.double(), teacher.double(), matched, **options)
    torch.testing.assert_close(loss.double(), want / 2, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad.double(), wanted / 2, rtol=1e-4, atol=1e-7)
