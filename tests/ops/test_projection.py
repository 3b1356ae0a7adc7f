"""The projection of averaged rows in TF32: what of it shows without a GPU."""

from __future__ import annotations

import pytest
import torch

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
