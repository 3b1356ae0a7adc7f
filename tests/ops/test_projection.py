"""The projection of averaged rows: by any module, and in TF32 what of it shows without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vocabdistil as vd
from tests.compiling import assert_compiles
from tests.reference_cases import identity_pairs
from tests.spans import make_pairs
from tests.vocabularies import randn
from vocabdistil.ops import _products, _projection

MATMUL = torch.backends.cuda.matmul


def settings():
    return getattr(MATMUL, "fp32_precision", None) or MATMUL.allow_tf32


def test_the_products_allow_tf32_and_the_setting_comes_back():
    before = settings()
    with pytest.raises(ZeroDivisionError), _products.tf32():
        assert settings() in ("tf32", True)
        raise ZeroDivisionError
    assert settings() == before


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_opcheck_compile(bias):
    rows, weight = torch.randn(9, 5), torch.randn(7, 5)
    inputs = [rows, weight, torch.randn(7)] if bias else [rows, weight, None]

    def run(f):
        leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
        out = f(*leaves)
        out.square().sum().backward()
        return [out.detach(), *(x.grad for x in leaves if x is not None)]

    want = run(torch.nn.functional.linear)
    for f in (_projection._Tf32Linear.apply, torch.compile(_projection._Tf32Linear.apply, fullgraph=True)):
        for got, expected in zip(run(f), want, strict=True):
            torch.testing.assert_close(got, expected)
    torch.library.opcheck(_projection._op, (rows, weight.t(), inputs[2]))


def mlp(student=5, teacher=7):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(student, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, teacher, bias=False))


class Scaled(nn.Linear):
    """Is called a linear layer, and does more."""

    def forward(self, x):
        return 3 * super().forward(x)


def hooked():
    layer = nn.Linear(5, 7)
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return layer


MODULES = {"mlp": mlp, "subclass": lambda: Scaled(5, 7), "hooked": hooked, "no parameters": lambda: nn.ZeroPad1d(1)}
PROJECTED = {
    "span_loss": lambda m, s, t, pairs, **o: m.span_loss(s, t, pairs, divergence="jsd", **o),
    "span_kl": lambda m, s, t, pairs, **o: m.span_kl(s, t, pairs, temperature=2.0, **o),
    "contrastive": lambda m, s, t, pairs, **o: m.contrastive(s, t, pairs, **o),
}


@pytest.mark.parametrize("module", [vd, vd.reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("name", PROJECTED)
def test_any_module_is_run_on_the_averaged_rows(name, kind, module):
    pairs, n_s, n_t = make_pairs(9, seed=3, gaps=True)
    projection = MODULES[kind]().double()
    student, teacher = randn(n_s, 5, dtype=torch.float64).requires_grad_(), randn(n_t, 7, seed=1, dtype=torch.float64)
    learned = [student, *projection.parameters()]
    got = PROJECTED[name](module, student, teacher, pairs, weight=projection)
    means = vd.reference.span_mean(student, pairs.student_start, pairs.student_end)
    targets = vd.reference.span_mean(teacher, pairs.teacher_start, pairs.teacher_end)
    want = PROJECTED[name](vd.reference, projection(means), targets, identity_pairs(9))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, learned), torch.autograd.grad(want, learned))


@pytest.mark.parametrize("module", [vd, vd.reference], ids=["kernels", "reference"])
def test_a_module_projects_one_row_per_text(module):
    projection, student, teacher = mlp().double(), randn(2, 4, 5).double(), randn(2, 3, 7, seed=1).double()
    masks = torch.ones(2, 4).bool(), torch.ones(2, 3).bool()
    got = module.pooled_loss(student, teacher, *masks, weight=projection)
    want = 1 - torch.cosine_similarity(projection(student.mean(1)), teacher.mean(1)).mean()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("of_module", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_rows", [torch.float32, torch.bfloat16], ids=str)
def test_a_module_runs_in_the_dtype_of_its_parameters(of_rows, of_module, autocast):
    pairs, n_s, n_t = make_pairs(9, seed=3)
    student, teacher = randn(n_s, 5).to(of_rows).requires_grad_(), randn(n_t, 7, seed=1)
    projection, seen = mlp().to(of_module), []
    projection[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", enabled=autocast, dtype=torch.bfloat16):
        loss = vd.span_loss(student, teacher, pairs, weight=projection)
    loss.backward()
    assert seen == [of_module] and loss.dtype == torch.float32
    assert student.grad.dtype == of_rows and all(p.grad.dtype == of_module for p in projection.parameters())


def test_a_module_compiles_with_the_loss():
    pairs, n_s, n_t = make_pairs(9, seed=3)
    projection, teacher = mlp(), randn(n_t, 7, seed=1)
    assert_compiles(lambda x: vd.span_kl(x * 2, teacher, pairs, weight=projection), randn(n_s, 5))


@pytest.mark.parametrize("module", [vd, vd.reference], ids=["kernels", "reference"])
@pytest.mark.parametrize(
    ("projection", "error", "text"),
    [
        (lambda: mlp(6), ValueError, "got Sequential: .*shapes"),
        (lambda: mlp(teacher=6), ValueError, r"got shape \(9, 6\) of rows \(9, 5\)"),
        (lambda: nn.Flatten(0), ValueError, r"got shape \(45,\) of rows \(9, 5\)"),
        (lambda: nn.LayerNorm(7), ValueError, "got LayerNorm: "),
        (lambda: nn.LSTM(5, 7), TypeError, "got tuple of LSTM"),
    ],
)
@pytest.mark.parametrize("name", PROJECTED)
def test_modules_of_another_width_are_named(name, projection, error, text, module):
    pairs, n_s, n_t = make_pairs(9, seed=3)
    with pytest.raises(error, match=f"^weight: expected a projection from width 5 to width 7, {text}") as caught:
        PROJECTED[name](module, randn(n_s, 5), randn(n_t, 7, seed=1), pairs, weight=projection())
    assert "\n" not in str(caught.value)


def test_a_teacher_of_inference_mode_is_told_of_beside_a_module_that_learns():
    pairs, n_s, n_t = make_pairs(9, seed=3)
    with torch.inference_mode():
        teacher = randn(n_t, 7, seed=1)
    with pytest.raises(ValueError, match="^teacher: expected a tensor that autograd can keep"):
        vd.span_loss(randn(n_s, 5), teacher, pairs, weight=mlp())
