"""The GPU kernels against the float64 reference, and what only a GPU can show: needs a CUDA device."""

from __future__ import annotations

import pytest
import torch

import vocabdistil as vd
from tests.compiling import assert_compiles
from tests.graphs import TrainingStep, capture
from tests.span_loss_backend import *  # noqa: F403
from tests.span_loss_backend import DIVERGENCES, DTYPES, run
from tests.span_mean_backend import *  # noqa: F403
from tests.spans import make_pairs
from tests.tolerances import assert_norm_close
from vocabdistil.core import dispatch

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    return request.param


@pytest.fixture
def device():
    return "cuda"


def inputs(dim, dtype=torch.float32, count=700, seed=0, device="cuda", **options):
    pairs, n_s, n_t = make_pairs(count, seed=seed, gaps=True, empty=True, **options)
    generator = torch.Generator(device).manual_seed(seed)
    student, teacher = (torch.randn(n, dim, device=device, generator=generator).to(dtype) for n in (n_s, n_t))
    return student, teacher, pairs.to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dim", [1, 7, 264, 768, 1000, 1024, 1030, 4096, 5120, 8192, 16384])
def test_hidden_sizes(dim, divergence, dtype, backend):
    student, teacher, pairs = inputs(dim, dtype, seed=dim)
    if dim == 1 and divergence == "cosine":
        student, teacher = student.abs() + 1, teacher.abs() + 1
    options = {"divergence": divergence, "temperature": 1.7, "beta": 0.3}
    got = run(vd, [student], [teacher], pairs, backend=backend, **options)
    want = run(vd.reference, [student.double()], [teacher.double()], pairs, **options)
    assert_norm_close(got["loss"], want["loss"], torch.float32, "loss")
    assert_norm_close(got["d0"], want["d0"], dtype, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [768, 4096])
def test_layers_and_learned_weights(dim, dtype, backend):
    student, teacher, pairs = inputs(dim, dtype)
    students = [student, student.flip(0), student * 2]
    teachers = [teacher.roll(i, 0) for i in range(12)]
    learned = {"student_layer_weights": torch.rand(3).cuda(), "teacher_layer_weights": torch.rand(12).cuda()}
    for weights in ({}, learned):
        got = run(vd, students, teachers, pairs, backend=backend, **weights)
        wide = {k: v.double() for k, v in weights.items()}
        want = run(vd.reference, [x.double() for x in students], [x.double() for x in teachers], pairs, **wide)
        for name, value in got.items():
            assert_norm_close(value, want[name], dtype if name.startswith("d") else torch.float32, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=str)
def test_projection(weight_dtype, dtype, backend):
    student, _, pairs = inputs(264, dtype, count=3000)
    teacher = torch.randn(pairs.teacher_tokens, 768, device="cuda").to(dtype)
    weight, bias = torch.randn(768, 264, device="cuda") / 16, torch.randn(768, device="cuda")
    options = {"weight": weight.to(weight_dtype or dtype), "bias": bias.to(weight_dtype or dtype)}
    before = torch.get_float32_matmul_precision()
    got = run(vd, [student], [teacher], pairs, backend=backend, **options)
    assert torch.get_float32_matmul_precision() == before
    wide = {name: value.double() for name, value in options.items()}
    want = run(vd.reference, [student.double()], [teacher.double()], pairs, **wide)
    for name, value in got.items():
        # The products of half-precision rows have TF32's 11 bits, like float16.
        exact = torch.float16 if dtype != torch.float32 and value.dtype == torch.float32 else value.dtype
        assert_norm_close(value, want[name], exact, name, 2)


def test_the_same_bits_every_time_and_on_another_stream(backend):
    student, teacher, pairs = inputs(768, torch.bfloat16, count=20000)
    first = run(vd, [student], [teacher], pairs, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = student + 0  # ready only after the sleep: a launch on any other stream reads what is not there yet
        second = run(vd, [late], [teacher], pairs, backend=backend)
    stream.synchronize()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_in_a_cuda_graph(divergence, backend):
    student, teacher, pairs = inputs(264)
    layers = [student.requires_grad_(), (student * 2).detach().requires_grad_()]

    def step():
        options = {"student_layer_weights": [1.0, 3.0], "divergence": divergence, "backend": backend}
        loss = vd.span_loss(layers, teacher, pairs, **options) * 2
        return loss, *torch.autograd.grad(loss, layers)

    graph, captured = capture(step)
    with torch.no_grad():
        for x in (*layers, teacher):
            x.copy_(torch.randn_like(x))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


def test_a_whole_step_in_a_cuda_graph():
    steps = [TrainingStep("cuda") for _ in range(2)]
    graph, loss = capture(steps[1])
    for _ in range(3):
        steps[0]()
    for seed in range(5):
        for step in steps:
            step.new_batch(seed)
        graph.replay()
        torch.testing.assert_close(loss, steps[0](), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("upstream", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_the_host_never_waits(reduction, upstream, backend):
    student, teacher, pairs = inputs(768, torch.bfloat16)
    layers, weight = [student.requires_grad_()] * 2, torch.randn(768, 768, device="cuda", dtype=torch.bfloat16)

    def step():
        loss = vd.span_loss(
            layers, [teacher] * 10, pairs, teacher_layer_weights=[1.0] * 10, reduction=reduction, backend=backend
        )
        projected = vd.span_loss(student, teacher, pairs, weight=weight.requires_grad_(), backend=backend)
        (loss.sum() * upstream + projected).backward()

        mean = vd.span_mean(student, pairs.student_start, pairs.student_end, backend=backend)
        mean.sum().backward()

    step()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_the_gradient_and_little_more(backend):
    student, teacher, pairs = inputs(1024, torch.bfloat16, count=20000)
    student.requires_grad_()
    vd.span_loss(student, teacher, pairs, backend=backend).backward()  # whatever is allocated once
    student.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    vd.span_loss(student, teacher, pairs, backend=backend).backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= student.numel() * student.element_size() + 64 * len(pairs)


def test_float16_gradients_survive_a_loss_scale(backend):
    student, teacher, pairs = inputs(64, torch.float16, count=5000)
    leaf, wide = student.clone().requires_grad_(), student.double().requires_grad_()
    (vd.span_loss(leaf, teacher, pairs, backend=backend) * 65536).backward()
    (vd.reference.span_loss(wide, teacher.double(), pairs) * 65536).backward()
    assert_norm_close(leaf.grad, wide.grad, torch.float16, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_with_inductor(dtype, backend):
    student, teacher, pairs = inputs(264, dtype)

    def loss(s):
        return vd.span_loss(s * 2, teacher, pairs, temperature=2.0, backend=backend) * 3

    assert_compiles(loss, student, backend="inductor")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_on_the_second_device(backend):
    student, teacher, pairs = inputs(768, device="cuda:1")
    got = run(vd, [student], [teacher], pairs, backend=backend)
    want = run(vd.reference, [student.double()], [teacher.double()], pairs)
    assert torch.cuda.current_device() == 0
    for name, value in got.items():
        assert_norm_close(value, want[name], torch.float32, name)


def test_without_a_backend_the_kernels_run_and_float64_falls_back():
    student, teacher, pairs = inputs(64)
    explicit = vd.span_loss(student, teacher, pairs, backend="cuda")
    assert torch.equal(vd.span_loss(student, teacher, pairs), explicit)
    dispatch._warn_fallback.cache_clear()
    with pytest.warns(UserWarning, match="float64"):
        wide = vd.span_loss(student.double(), teacher.double(), pairs)
    torch.testing.assert_close(wide, vd.reference.span_loss(student.double(), teacher.double(), pairs))
