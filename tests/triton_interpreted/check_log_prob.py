"""The Triton kernels of span_likelihood and linear_span_likelihood in the interpreter against the float64 reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from vocabdistil.triton_kernels import log_prob as kernels

import vocabdistil as vd
from tests.compiling import assert_compiles
from tests.ops import test_span_likelihood as native
from tests.ops.test_span_likelihood import DTYPES, INF, V_S, V_T, compare, function, run
from tests.vocabularies import randn
from vocabdistil.ops import _dense_sweep

# -inf less -inf, and more, in lanes that are masked afterwards: numpy, which plays the GPU here, tells of it.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")


make = partial(native.make, batch=1)


@pytest.fixture(params=["one turn", "turns"], autouse=True)
def turns(request, monkeypatch):
    """Rows that are read at once, and rows that are read a block of columns at a time."""
    if request.param == "turns":
        monkeypatch.setattr(kernels, "TURN", 32)


@pytest.fixture(params=[False, True], ids=["logits", "linear"])
def linear(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_against_float64(bias, dtype, linear, backend):
    if bias and not linear:
        return
    compare(make(dtype, linear, bias), backend, reduction="none", temperature=3.0)


def test_chunks_of_rows(monkeypatch, backend):
    monkeypatch.setattr(_dense_sweep, "BUDGET", 0)
    monkeypatch.setattr(_dense_sweep, "_TIMES", 0)
    compare(make(linear=True), backend)


def test_other_sizes(backend):
    for v_s, v_t in ((1, 2), (33, 100)):
        for linear in (False, True):
            compare(make(torch.float64, linear, v_s=v_s, v_t=v_t), backend)


def test_sure_tokens_and_minus_infinity(backend):
    arguments = make()
    for side, v in (("student", V_S), ("teacher", V_T)):
        peaks = torch.nn.functional.one_hot(arguments[f"{side}_ids"].long().roll(-1, 1), v) * 40.0
        arguments[f"{side}_logits"] = peaks + randn(*peaks.shape, seed=7)
    assert 0 < compare(arguments, backend, temperature=1.0)["loss"] < 1e-10
    arguments = make()
    arguments["teacher_logits"][..., ::7] = -INF
    compare(arguments, backend)
    arguments["student_logits"][0, 0] = -INF  # a row without any mass
    got = run(vd, arguments, backend=backend, reduction="none")
    assert got["loss"][1].isinf() and got["student_logits"].isfinite().all()


def test_rows_of_no_span_are_not_read_and_nan_is_not_hidden(linear, backend):
    arguments = make(linear=linear)
    name = "student_hidden" if linear else "student_logits"
    want = run(vd, arguments, backend=backend)
    arguments[name][:, 5] = float("nan")  # of token 6, which is in no span
    got = run(vd, arguments, backend=backend)
    assert all(torch.equal(got[k], want[k]) for k in want)
    arguments[name][0, 1, 3] = float("nan")
    assert run(vd, arguments, backend=backend)["loss"].isnan()


def test_an_id_that_is_none_of_the_columns(linear, backend):
    for bad in (-1, V_S, 2**40):
        arguments = make(linear=linear)
        arguments["student_ids"] = torch.full_like(arguments["student_ids"], bad)
        loss = function(vd, arguments)(**arguments, backend=backend)
        assert loss.isnan()


def test_no_texts(linear, backend):
    got = run(vd, {**native.make(linear=linear, batch=0), "pairs": vd.SpanPairs([], [], [], [])}, backend=backend)
    assert not any(x.any() for x in got.values())


def test_compiles_as_one_graph(linear, backend):
    arguments = make(torch.bfloat16, linear)
    name = "student_hidden" if linear else "student_logits"

    def loss(x):
        return function(vd, arguments)(**{**arguments, name: 2 * x}, backend=backend) * 300

    assert_compiles(loss, arguments[name])
