"""What every benchmark shares: the gate, the clock, the rows.

A provider is compared with the float64 reference before it is timed; one that is wrong or raises gets a row
that says so and no time. The providers of a case are timed in turns within one run, in an order drawn anew
each round, a few calls at a turn: the first, which finds the caches as another provider left them, is not
counted. On a busy machine even that is unfair: a provider with many parallel regions may wait for the
scheduler at each of them, one with a single region waits once. So each row says what share of the CPU other
processes took meanwhile.
"""

from __future__ import annotations

import functools
import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import vocabdistil as vd
from vocabdistil.core import dispatch

from .report import COLUMNS, QUIET, UNAVAILABLE, cpu_seconds, environment, share_of_others

# ||got - want|| / ||want|| allowed, by the dtype of the value; integers must be equal. A rival may round to
# the dtype of its inputs on the way, so what it returns in float32 need not be more exact than that.
ALLOWED = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# What speedup_vs_reference divides by: the formula in PyTorch, or in Python where that is what people write.
BASELINES = ("reference", "python")
# Ours may round the products of half-precision inputs to TF32, whatever dtype their gradient has.
OURS_FROM_HALF = 2.0**-11
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}


def as_list(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


@dataclass(frozen=True)
class Provider:
    """One way to compute a case: ``call()`` is timed, ``outputs`` turns its value into tensors for the gate.

    ``outputs`` None: computes something else by design and is timed without being compared.
    """

    call: Callable[[], Any]
    outputs: Callable[[Any], list[Tensor]] | None = as_list


@dataclass(frozen=True)
class Problem:
    """A case, built on a device.

    Attributes:
        providers: name -> provider.
        truth: the expected outputs, then the gradients of ``leaves``, in float64 (integers as they are).
        nbytes: mode -> the bytes that have to be read and written whatever the method.
        leaves: tensors that get a gradient.
        upstream: gradient of the output, where it is not 1.
        missing: provider -> why it cannot run here.
        tokens: tokens of one call, for tokens per second.
    """

    providers: dict[str, Provider]
    truth: Callable[[], list[Tensor]]
    nbytes: dict[str, int]
    leaves: Sequence[Tensor] = ()
    upstream: Tensor | None = None
    missing: dict[str, str] = field(default_factory=dict)
    tokens: int = 0


@dataclass(frozen=True)
class Case:
    """A name, how to build it, and how long to time it: ``rounds`` at least, and for ``seconds``."""

    name: str
    build: Callable[[torch.device], Problem]
    dtype: torch.dtype = torch.float32
    modes: tuple[str, ...] = ("fwd", "fwd+bwd")
    rounds: int = 15
    seconds: float = 3.0


def random_pairs(
    batch: int, length: int, device: torch.device, seed: int = 0, filled: float = 1.0
) -> tuple[vd.SpanPairs, tuple[int, int]]:
    """Spans of 1 to 3 student tokens (1.31 on average, as in Russian text), one per teacher token.

    Args:
        filled: share of the teacher's tokens that are no padding: texts of ``2 filled - 1`` to 1 of the length.

    Returns:
        The pairs of ``batch`` x ``length`` teacher tokens, and the shape [B, L_s] of the student's batch.
    """
    weights = torch.tensor([0.75, 0.19, 0.06])
    g = torch.Generator().manual_seed(seed)
    sizes = 1 + torch.multinomial(weights, batch * length, True, generator=g).view(batch, length)
    shares = 1 - 2 * (1 - filled) * torch.rand(batch, 1, generator=g)
    width = int(sizes.sum(1).max())
    end = sizes.cumsum(1) + width * torch.arange(batch)[:, None]
    teacher = torch.arange(batch * length).view(batch, length)
    inside = torch.arange(length) < length * shares
    end, sizes, teacher = end[inside], sizes[inside], teacher[inside]
    return vd.SpanPairs(end - sizes, end, teacher, teacher + 1).to(device), (batch, width)


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with the default backend, for these shapes alone, as if it were the first case."""
    torch._dynamo.reset()
    return torch.compile(call, dynamic=False)


def own_providers(operation: str, device: torch.device) -> tuple[dict[str, str | None], dict[str, str]]:
    """Our providers: name -> ``backend=`` for those that can run here, and name -> reason for the others."""
    if device.type == "cpu":
        return {"ours": None}, {}
    choices = dispatch.TABLE.get(operation, {"cuda": ("torch",)})["cuda"]  # others are made of these
    if choices == ("torch",):
        return {"ours": None}, {}
    here, missing = {}, {}
    for backend in ("cuda", "triton", "torch"):
        why = dispatch.unavailable(backend)
        if backend not in choices:
            why = f"{operation} has no {backend} implementation"
        if not why:
            here[f"ours-{backend}"] = backend
        elif backend != "torch":
            missing[f"ours-{backend}"] = why
    return here, missing


def step(problem: Problem, provider: Provider, mode: str) -> Any:
    """One call as it is timed; in ``fwd+bwd`` and ``graph`` the gradients land in the leaves."""
    if mode in ("fwd+bwd", "graph"):
        value = provider.call()
        torch.autograd.backward(value, problem.upstream)
        return value
    with torch.no_grad():
        return provider.call()


def _clear(problem: Problem) -> None:
    for leaf in problem.leaves:
        leaf.grad = None


def _capture(problem: Problem, provider: Provider) -> tuple[Callable[[], Any], list[Tensor | None]]:
    """The replay of a CUDA graph of forward and backward, and the gradients that it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            _clear(problem)
            step(problem, provider, "graph")
        # Whoever waits for the device cannot be captured, and a capture that fails harms those after it.
        try:
            torch.cuda.set_sync_debug_mode("error")
            _clear(problem)
            step(problem, provider, "graph")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    _clear(problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        value = step(problem, provider, "graph")
    grads = [leaf.grad for leaf in problem.leaves]

    def replay() -> Any:
        graph.replay()
        return value

    return replay, grads


def relative_error(got: Tensor, want: Tensor) -> float:
    """``||got - want|| / ||want||`` in float64, infinite for another shape and NaN if ``got`` holds one."""
    if got.shape != want.shape:
        return float("inf")
    want = want.double()
    return float((got.detach().double() - want).norm()) / max(float(want.norm()), 1e-30)


def judge(got: Sequence[Tensor | None], want: Sequence[Tensor], slack: float = 0.0) -> str:
    """What is wrong with these tensors, or the empty string; ``slack``: relative error allowed at least."""
    if len(got) != len(want):
        return f"wrong: {len(got)} tensors, expected {len(want)}"
    for i, (value, expected) in enumerate(zip(got, want, strict=True)):
        if value is None:
            return f"wrong: no gradient in tensor {i}"
        error, allowed = relative_error(value, expected), max(ALLOWED.get(value.dtype, 0.0), slack)
        if not error <= allowed:
            return f"wrong: tensor {i} has relative error {error:.1e}, allowed {allowed:.0e}"
    return ""


def worst_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> str:
    """The largest relative error of floating-point tensors, or the empty string where there are none."""
    both = [(g, w) for g, w in zip(got, want, strict=True) if w.is_floating_point()]
    return f"{max(relative_error(g, w) for g, w in both):.2g}" if both else ""


def _prepare(
    problem: Problem, provider: Provider, mode: str, want: Sequence[Tensor], slack: float
) -> tuple[Callable[[], Any], str, str]:
    """What the clock runs, what the gate says about it, and how far from float64 it is."""
    run: Callable[[], Any] = functools.partial(step, problem, provider, mode)
    backward = mode in ("fwd+bwd", "graph")
    try:
        _clear(problem)
        grads = None
        if mode == "graph":
            run, grads = _capture(problem, provider)
        value = run()
        if provider.outputs is None:
            return run, "", ""
        got: list[Tensor | None] = list(provider.outputs(value))
        if backward:
            got += grads if grads is not None else [leaf.grad for leaf in problem.leaves]
        want = want if backward else want[: len(want) - len(problem.leaves)]
        wrong = judge(got, want, slack)
        return run, wrong, "" if wrong else worst_error(got, want)
    except Exception as error:  # a rival may fail in any way: the row tells, and the others go on
        return run, f"{type(error).__name__}: {error}".strip().splitlines()[0][:200], ""
    finally:
        _clear(problem)


class Clock:
    """Milliseconds of one call: the wall clock on a CPU, events on CUDA with the L2 cache emptied before.

    It is emptied by reading something large: what was written instead would have to be written back meanwhile. With
    ``host`` the device is idle when the call begins, so that what the host does before its launches counts.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            self.flush = torch.zeros(1 << 26, dtype=torch.int32, device=device)
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, run: Callable[[], Any], host: bool = False) -> float:
        if not self.cuda:
            start = time.perf_counter_ns()
            value = run()  # held, so that freeing it is not timed
            elapsed = time.perf_counter_ns() - start
            del value
            return elapsed / 1e6
        self.flush.amax()
        if host:
            torch.cuda.synchronize()
        self.start.record()
        run()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end)


BLOCK = 4


def _times(
    problem: Problem, runs: dict[str, Callable[[], Any]], clock: Clock, case: Case, quick: bool, host: bool
) -> dict[str, tuple[float, float, float]]:
    """Provider -> (p20, p50, p80) in ms."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    rounds, seconds, warm_up = (3, 0.2, 1) if quick else (case.rounds, case.seconds, 2)
    done, deadline = -warm_up, float("inf")
    collecting = gc.isenabled()
    gc.disable()
    try:
        while order and (done < rounds or time.perf_counter() < deadline):
            if done == 0:
                deadline = time.perf_counter() + seconds
            shuffle(order)
            for name in order:
                for call in range(BLOCK):
                    _clear(problem)
                    elapsed = clock(runs[name], host)
                    if done >= 0 and call:
                        samples[name].append(elapsed)
            done += 1
    finally:
        _clear(problem)
        if collecting:
            gc.enable()
    cuts = {name: statistics.quantiles(values, n=10, method="inclusive") for name, values in samples.items()}
    return {name: (cut[1], cut[4], cut[7]) for name, cut in cuts.items()}


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a large copy, read and write counted, median of a few."""
    size = COPY_BYTES[device.type]
    source, target = torch.ones(2, size // 4, device=device)
    clock = Clock(device)
    return 2 * size / statistics.median(clock(lambda: target.copy_(source)) for _ in range(7)) / 1e6


def _cuda_extras(problem: Problem, run: Callable[[], Any], mode: str) -> dict[str, Any]:
    """Kernel launches of one call, and the memory it takes beyond its inputs (a graph took it at capture)."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    _clear(problem)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    _clear(problem)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    kernels = [
        event
        for event in profiled.events()
        if event.device_type == DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return {"launches": len(kernels), "peak_mb": "" if mode == "graph" else round(peak / 1e6, 2)}


def _wanted(name: str, providers: Sequence[str] | None) -> bool:
    return not providers or any(name == p or name.startswith(f"{p}-") for p in providers)


def run_case(
    operation: str,
    case: Case,
    device: torch.device,
    providers: Sequence[str] | None = None,
    quick: bool = False,
    retries: int = 0,
) -> list[dict[str, Any]]:
    """One row per provider and mode; ``providers`` selects by name (``ours`` takes ``ours-cuda`` too).

    ``retries``: how often to measure a mode anew while other processes take more than ``QUIET`` of the CPU.
    """
    problem = case.build(device)
    wanted = {name: p for name, p in problem.providers.items() if _wanted(name, providers)}
    missing = {name: why for name, why in problem.missing.items() if _wanted(name, providers)}
    clock, rows = Clock(device), []
    for mode in case.modes + (("graph",) if device.type == "cuda" and "fwd+bwd" in case.modes else ()):
        want = problem.truth()
        prepared = {}
        for name, provider in sorted(wanted.items(), key=lambda item: not item[0].startswith("ours")):
            half = case.dtype.itemsize == 2
            ours = OURS_FROM_HALF if half else 0.0
            slack = ours if name.startswith("ours") else ALLOWED.get(case.dtype, 0.0)
            prepared[name] = _prepare(problem, provider, mode, want, slack)
        del want
        errors = {name: error for name, (_, error, _) in prepared.items() if error}
        runs = {name: run for name, (run, *_) in prepared.items() if name not in errors}
        for _ in range(retries + 1):
            busy = cpu_seconds()
            bandwidth = copy_bandwidth(device)
            times = _times(problem, runs, clock, case, quick, mode != "graph")
            others = share_of_others(busy, cpu_seconds())
            if float(others or 0) <= QUIET:
                break
        baseline = next((times[name] for name in BASELINES if name in times), None)
        nbytes = problem.nbytes.get(mode, problem.nbytes.get("fwd+bwd", 0))
        for name in (*wanted, *missing):
            row = dict.fromkeys(COLUMNS, "") | environment(device.type)
            row |= {"operation": operation, "provider": name, "case": case.name, "mode": mode}
            row |= {"dtype": str(case.dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
            row |= {"bytes": nbytes, "others": others}
            row["error"] = f"{UNAVAILABLE} {missing[name]}" if name in missing else errors.get(name, "")
            if name in times:
                p50 = times[name][1]
                row["float64_error"] = prepared[name][2]
                row |= {f"p{p}_ms": f"{t:.4g}" for p, t in zip((20, 50, 80), times[name], strict=True)}
                row["gb_s"] = f"{nbytes / p50 / 1e6:.4g}"
                row["copy_fraction"] = f"{nbytes / p50 / 1e6 / bandwidth:.3g}"
                row["speedup_vs_reference"] = f"{baseline[1] / p50:.3g}" if baseline else ""
                row["speedup_vs_compile"] = f"{times['compile'][1] / p50:.3g}" if "compile" in times else ""
                row["tokens_per_s"] = f"{problem.tokens / p50 * 1e3:.4g}" if problem.tokens else ""
                if device.type == "cuda":
                    row |= _cuda_extras(problem, prepared[name][0], mode)
            rows.append(row)
    return rows
