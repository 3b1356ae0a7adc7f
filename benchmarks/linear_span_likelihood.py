"""Likelihoods of aligned spans from hidden states (`vocabdistil.linear_span_likelihood`).

``python -m benchmarks.linear_span_likelihood`` says what time and memory one step of 4,096 tokens of the student and
the vocabularies of large models takes, of ours and of full logits, each in a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import vocabdistil as vd

from . import span_likelihood
from ._losses import loss_problem, randn
from .harness import Case, Problem

OPERATION = "linear_span_likelihood"
LARGE = {"batch": 4, "length": 784, "v_s": 128256, "v_t": 151936, "d_s": 256, "d_t": 256, "dtype": torch.float32}


def inputs(
    device: torch.device, batch: int, length: int, v_s: int, v_t: int, d_s: int, d_t: int, dtype: torch.dtype
) -> tuple[list[Tensor], vd.SpanPairs]:
    (student_ids, teacher_ids), pairs, shape = span_likelihood.texts(device, batch, length, v_s, v_t)
    make = functools.partial(randn, device=device, dtype=dtype)
    student = [make(*shape, d_s, seed=1), make(v_s, d_s, seed=3) / d_s**0.5, student_ids]
    return [*student, make(batch, length, d_t, seed=2), make(v_t, d_t, seed=4) / d_t**0.5, teacher_ids], pairs


def full_logits(
    x: Tensor, w: Tensor, student_ids: Tensor, y: Tensor, v: Tensor, teacher_ids: Tensor, pairs: vd.SpanPairs
) -> Tensor:
    return span_likelihood.full_logits(lambda: x @ w.t(), student_ids, lambda: y @ v.t(), teacher_ids, pairs)


def rivals(tensors: list[Tensor], pairs: vd.SpanPairs) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    return {"full-logits": lambda: full_logits(*tensors, pairs)}, {}


def build(device: torch.device, **shape: Any) -> Problem:
    tensors, pairs = inputs(device, **shape)
    x, w, _, y, v, _ = tensors
    size = x.element_size() * (2 * x.numel() + 2 * w.numel() + y.numel() + v.numel())
    options = {"temperature": span_likelihood.TEMPERATURE}
    return loss_problem(OPERATION, tensors, 2, [pairs], options, size, rivals=functools.partial(rivals, pairs=pairs))


def cases(device: torch.device) -> Iterator[Case]:
    shapes = [{"batch": 2, "length": 256, "v_s": 16000, "v_t": 32000, "d_s": 256, "d_t": 256, "dtype": torch.float32}]
    if device.type == "cuda":
        shapes = [{**LARGE, "length": n, "d_s": 2048, "d_t": 4096, "dtype": torch.bfloat16} for n in (256, 1024)]
    for shape in shapes:
        name = "{batch}x{length}-{v_t}-{v_s}-d{d_t}-d{d_s}".format(**shape)
        yield Case(name, functools.partial(build, **shape), shape["dtype"], ("fwd+bwd",))


def step(provider: str) -> None:
    """One step of the large case in this process: seconds, and the peak of all its memory."""
    tensors, pairs = inputs(torch.device("cpu"), **LARGE)
    for x in tensors[:2]:
        x.requires_grad_()
    ours = functools.partial(vd.linear_span_likelihood, temperature=span_likelihood.TEMPERATURE)
    loss = ours if provider == "ours" else full_logits
    start = time.perf_counter()
    value = loss(*tensors, pairs)
    value.backward()
    seconds = time.perf_counter() - start
    unit = 1024 if sys.platform.startswith("linux") else 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    threads, result = torch.get_num_threads(), f"loss {value.item():.7g}"
    print(f"{provider:12s} threads {threads}  {seconds:7.2f} s  {peak:7.0f} MB  {result}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear_span_likelihood", description=__doc__)
    parser.add_argument("--provider", choices=["ours", "full-logits"], help="only this one, in this process")
    chosen = parser.parse_args().provider
    if chosen:
        step(chosen)
    else:
        for name in ("ours", "full-logits"):
            subprocess.run([sys.executable, "-m", "benchmarks.linear_span_likelihood", "--provider", name], check=True)
