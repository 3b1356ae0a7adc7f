"""What holds for every loss: dtypes that differ, spans that were tampered with, second derivatives, transforms, tensors
of inference mode, and how often it is compiled."""

from __future__ import annotations

import pickle

import pytest
import torch

import vocabdistil as vd
from tests.compiling import assert_compiles
from tests.losses import LOSSES, SCALABLE, SPANNING, WIDTH, losses
from tests.spans import make_pairs
from tests.tolerances import assert_norm_close
from tests.vocabularies import make_matched, randn

REFERENCE = losses(vd.reference)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def inputs(student=torch.float32, teacher=torch.float32, count=9):
    pairs, n_s, n_t = make_pairs(count, seed=3)
    return randn(n_s, WIDTH).to(student).requires_grad_(), randn(n_t, WIDTH, seed=1).to(teacher), pairs


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("student", "teacher"), [(a, b) for a in DTYPES for b in DTYPES if a != b], ids=lambda x: str(x)[6:]
)
def test_any_two_dtypes_go_together(name, student, teacher):
    leaf, other, pairs = inputs(student, teacher)
    loss = LOSSES[name](leaf, other, pairs)
    loss.backward()
    wide = leaf.detach().double().requires_grad_()
    want = REFERENCE[name](wide, other.double(), pairs)
    want.backward()
    assert loss.dtype == (torch.float64 if torch.float64 in (student, teacher) else torch.float32)
    # What the test itself computes in half precision, or the teacher's product in it, is rounded there.
    coarse = [x for x in (student, teacher) if x in (torch.bfloat16, torch.float16)]
    rounded = name.startswith("linear_") or name in ("attention_loss", "layers", "projected")
    coarse = coarse if rounded else []
    factor = 8 if coarse else 1
    assert_norm_close(loss.detach(), want.detach(), coarse[0] if coarse else torch.float32, "loss", factor)
    finest = student if student.itemsize < 4 else torch.float32
    assert_norm_close(leaf.grad, wide.grad, coarse[0] if coarse else finest, "gradient", factor)
    assert leaf.grad.dtype == student


def tampered(how):
    """Pairs that were good, written to past what checked them, and the side that is now wrong."""
    pairs, n_s, n_t = make_pairs(9, seed=3)
    if how == "torch":
        pairs.student_end[1] = 400
    elif how == "numpy":
        pairs.student_start.numpy()[3] = -7
    elif how == "overlap":
        pairs.teacher_end.numpy()[0] = n_t
    else:
        pairs = pickle.loads(pickle.dumps(pairs))
        pairs.teacher_end.numpy()[-1] = 2**31 - 1
    return pairs


@pytest.mark.parametrize("how", ["torch", "numpy", "overlap", "unpickled"])
@pytest.mark.parametrize("name", SPANNING)
def test_spans_that_were_written_to_are_refused(name, how):
    student, teacher, _ = inputs()
    with pytest.raises((ValueError, RuntimeError), match="spans|pairs|index"):
        LOSSES[name](student, teacher, tampered(how))


@pytest.mark.parametrize("name", SPANNING)
def test_spans_that_were_written_to_before_the_backward_pass_are_refused(name):
    student, teacher, pairs = inputs()
    loss = LOSSES[name](student, teacher, pairs)
    pairs.student_end.numpy()[1] = 2**31 - 1
    try:  # a gradient that was formed with the loss follows no span any more
        (3 * loss).backward()
    except (ValueError, RuntimeError) as error:
        assert "spans" in str(error)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("upstream", ["one", "other"])
def test_a_penalty_on_the_gradient_is_refused_and_not_dropped(name, upstream):
    student, teacher, pairs = inputs(torch.float64, torch.float64)
    loss = LOSSES[name](student, teacher, pairs) * (1 if upstream == "one" else 3)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        (loss + 10 * grad.pow(2).sum()).backward()
    (again,) = torch.autograd.grad(LOSSES[name](student, teacher, pairs) * (1 if upstream == "one" else 3), student)
    assert torch.equal(again, grad.detach())


@pytest.mark.parametrize("name", LOSSES)
def test_a_second_derivative_is_refused_and_not_zero(name):
    student, teacher, pairs = inputs(torch.float64, torch.float64)
    (grad,) = torch.autograd.grad(LOSSES[name](student, teacher, pairs), student, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(grad.pow(2).sum(), student, allow_unused=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.functional.hvp(lambda x: LOSSES[name](x, teacher, pairs), student.detach(), grad.detach())


@pytest.mark.parametrize(
    "name", ["kl", "projected", "matched_kl", "linear_matched_kl", "linear_remapped_kl", "span_likelihood"]
)
def test_the_reference_has_second_derivatives(name):
    student, teacher, pairs = inputs(torch.float64, torch.float64, count=3)
    assert torch.autograd.gradgradcheck(lambda x: REFERENCE[name](x, teacher, pairs), student)


@pytest.mark.filterwarnings("ignore:vocabdistil.*reference implementation")
@pytest.mark.parametrize("name", LOSSES)
def test_torch_func(name):
    student, teacher, pairs = inputs(torch.float64, torch.float64)
    (want,) = torch.autograd.grad(LOSSES[name](student, teacher, pairs), student)
    got = torch.func.grad(lambda x: LOSSES[name](x, teacher, pairs))(student.detach())
    torch.testing.assert_close(got, want)
    batch = torch.stack([student.detach(), 2 * student.detach()])
    each = torch.func.vmap(lambda x: LOSSES[name](x, teacher, pairs))(batch)
    torch.testing.assert_close(each, torch.stack([LOSSES[name](x, teacher, pairs) for x in batch]))


def test_a_backend_that_torch_func_cannot_transform_is_named():
    student, teacher, pairs = inputs()
    with pytest.raises(ValueError, match="^backend: 'cpu'.*backend='reference'"):
        torch.func.grad(lambda x: vd.span_kl(x, teacher, pairs, backend="cpu"))(student.detach())


@pytest.mark.parametrize("name", LOSSES)
def test_hidden_states_of_inference_mode(name):
    student, teacher, pairs = inputs()
    with torch.inference_mode():
        frozen = teacher.clone()
        want = LOSSES[name](student, frozen, pairs)
    with torch.no_grad():
        torch.testing.assert_close(LOSSES[name](student, frozen, pairs), want)
    if name != "attention_loss":  # its maps are made of them here
        with pytest.raises(ValueError, match=r"^teacher.*inference_mode.*no_grad.*clone"):
            LOSSES[name](student, frozen, pairs)
    LOSSES[name](student, frozen.clone(), pairs).backward()


@pytest.mark.parametrize("name", LOSSES)
def test_pairs_of_inference_mode_are_like_others(name):
    student, teacher, pairs = inputs()
    LOSSES[name](student, teacher, pairs).backward()
    want = student.grad.clone()
    with torch.inference_mode():
        made = vd.SpanPairs(pairs.student_start, pairs.student_end, pairs.teacher_start.clone(), pairs.teacher_end)
        moved = made.to("cpu")
    for other in (made, moved):
        student.grad = None
        LOSSES[name](student, teacher, other).backward()
        assert torch.equal(student.grad, want)


@pytest.mark.parametrize("name", LOSSES)
def test_two_graphs_do_for_any_batch(name):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend=count)
    for i, size in enumerate((9, 14, 11, 30, 7, 8, 21, 16, 12, 19)):
        pairs, n_s, n_t = make_pairs(size, seed=i, empty=i % 2 == 1)
        student, teacher = randn(n_s + 3, WIDTH, seed=i), randn(n_t + 5, WIDTH, seed=i + 1)
        torch.testing.assert_close(compiled(student, teacher, pairs), LOSSES[name](student, teacher, pairs))
    assert len(graphs) <= 2
    torch._dynamo.reset()


@pytest.mark.parametrize("name", SPANNING)
def test_pairs_made_in_a_compiled_function(name):
    student, teacher, pairs = inputs()

    torch._dynamo.reset()

    def loss(s, *fields):
        return LOSSES[name](s, teacher, vd.SpanPairs(*fields))

    fields = pairs.student_start, pairs.student_end.long(), pairs.teacher_start, pairs.teacher_end
    want = loss(student, *fields)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(student, *fields)
    torch.testing.assert_close(got, want)
    (gradient,) = torch.autograd.grad(got, student)
    torch.testing.assert_close(gradient, torch.autograd.grad(want, student)[0])


WEIGHED = ["matched_kl", "remapped_kl", "linear_matched_kl", "linear_remapped_kl"]


def logit_losses(module):
    table = vd.RemapTable([0, 2, 2, 5], [0, 3, 1, 1, 4], student_vocab_size=WIDTH, unk_id=0, pad_id=0)
    matched = make_matched(WIDTH, WIDTH, 7)
    layer = torch.nn.Linear(WIDTH, WIDTH).requires_grad_(False).double()
    return {
        "matched_kl": lambda s, t, **o: module.matched_kl(s, t, matched, **o),
        "remapped_kl": lambda s, t, **o: module.remapped_kl(s, t, table, **o),
        "linear_matched_kl": lambda s, t, **o: module.linear_matched_kl(s, layer, t, layer, matched, **o),
        "linear_remapped_kl": lambda s, t, **o: module.linear_remapped_kl(s, layer, t, layer, table, top_k=2, **o),
    }


@pytest.mark.parametrize("module", [vd, vd.reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("name", WEIGHED)
def test_masked_rows_count_for_nothing(name, module):
    student, teacher = randn(3, 4, WIDTH).double().requires_grad_(), randn(3, 4, WIDTH, seed=1).double()
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    loss = logit_losses(module)[name]
    with torch.no_grad():
        student[0, 2] = float("nan")
    got = loss(student, teacher, mask=mask)
    (grad,) = torch.autograd.grad(got, student)
    kept = mask.bool()
    want = loss(student[kept], teacher[kept])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, torch.autograd.grad(want, student)[0].nan_to_num())
    assert loss(student, teacher, mask=kept, reduction="none").shape == (12,)


@pytest.mark.parametrize("module", [vd, vd.reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
@pytest.mark.parametrize("name", WEIGHED)
def test_weights_of_the_pairs(name, reduction, module):
    leaf, teacher, pairs = inputs(torch.float64, torch.float64)
    loss = logit_losses(module)[name]
    weights = randn(9).double().abs().requires_grad_()
    with torch.no_grad():
        weights[4] = 0
    each = loss(leaf, teacher, pairs=pairs, reduction="none") * weights
    want = each if reduction == "none" else each.sum() / (len(pairs) if reduction == "batchmean" else 1)
    wanted = torch.autograd.grad(want.square().sum(), (leaf, weights))
    for given, learned in ((weights, (leaf, weights)), (weights.detach(), (leaf,))):
        got = loss(leaf, teacher, pairs=pairs, reduction=reduction, pair_weights=given)
        torch.testing.assert_close(got, want)
        for a, b in zip(torch.autograd.grad(got.square().sum(), learned), wanted, strict=False):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"mask": torch.ones(9)}, TypeError, "mask: expected bool or integers, got float32"),
        ({"mask": torch.ones(8, dtype=torch.bool)}, ValueError, r"mask: expected shape \(9,\), got \(8,\)"),
        ({"mask": [1] * 9}, TypeError, "mask: expected a tensor, got list"),
        ({"pair_weights": torch.ones(8).double()}, ValueError, r"pair_weights: expected shape \(9,\), got \(8,\)"),
    ],
)
@pytest.mark.parametrize("name", WEIGHED)
def test_bad_masks_and_weights_are_named(name, change, error, text):
    rows = randn(9, WIDTH).double()
    with pytest.raises(error, match=f"^{text}"):
        logit_losses(vd)[name](rows, rows, **change)
    student, teacher, pairs = inputs(torch.float64, torch.float64)
    with pytest.raises(ValueError, match="^mask: expected None beside pairs"):
        logit_losses(vd)[name](student, teacher, pairs=pairs, mask=torch.ones(len(student)).bool())


@pytest.mark.parametrize("module", [vd, vd.reference], ids=["kernels", "reference"])
def test_a_projection_may_be_a_module(module):
    student, teacher, pairs = inputs()
    layer = torch.nn.Linear(WIDTH, WIDTH)
    masks = torch.ones(1, len(student)).bool(), torch.ones(1, len(teacher)).bool()
    for loss in (
        lambda **o: module.span_loss(student, teacher, pairs, **o),
        lambda **o: module.span_kl(student, teacher, pairs, **o),
        lambda **o: module.contrastive(student, teacher, pairs, **o),
        lambda **o: module.pooled_loss(student[None], teacher[None], *masks, **o),
    ):
        got, want = loss(weight=layer), loss(weight=layer.weight, bias=layer.bias)
        assert torch.equal(got, want)
        assert all(g is not None for g in torch.autograd.grad(got, list(layer.parameters())))
        with pytest.raises(ValueError, match="^bias: expected None beside a module"):
            loss(weight=layer, bias=layer.bias)
    with pytest.raises(TypeError, match="^student_weight: .*got ReLU"):
        module.linear_matched_kl(student, torch.nn.ReLU(), student, layer, make_matched(WIDTH, WIDTH, 7))


@pytest.mark.parametrize("kind", ["number", "tensor", "learned"])
@pytest.mark.parametrize("name", SCALABLE)
def test_a_scale_multiplies_loss_and_gradient(name, kind):
    leaf, teacher, pairs = inputs()
    plain = LOSSES[name](leaf, teacher, pairs)
    (want,) = torch.autograd.grad(plain, leaf)
    scale = -0.3 if kind == "number" else torch.tensor(-0.3, dtype=torch.float64, requires_grad=kind == "learned")
    loss = LOSSES[name](leaf, teacher, pairs, scale=scale)
    assert loss.dtype == torch.float32
    loss.backward()
    torch.testing.assert_close(loss.detach(), -0.3 * plain.detach())
    torch.testing.assert_close(leaf.grad, -0.3 * want)
    if kind == "learned":
        torch.testing.assert_close(scale.grad.float(), plain.detach())


@pytest.mark.parametrize("name", ["kl", "matched_kl", "remapped_kl", "relation_loss", "contrastive"])
@pytest.mark.parametrize("scale", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
def test_a_scale_counts_in_every_reduction_and_backend(name, scale):
    leaf, teacher, pairs = inputs()
    for options in ({"reduction": "none"}, {"reduction": "sum"}, {"backend": "reference"}):
        want = 0.3 * LOSSES[name](leaf, teacher, pairs, **options)
        torch.testing.assert_close(LOSSES[name](leaf, teacher, pairs, **options, scale=scale), want)


def test_a_scale_beside_learned_pair_weights():
    leaf, teacher, pairs = inputs()
    for name in ("kl", *WEIGHED):
        weights = torch.rand(len(pairs), requires_grad=True)
        plain = LOSSES[name](leaf, teacher, pairs, pair_weights=weights)
        for scale in (4.0, torch.tensor(4.0)):
            loss = LOSSES[name](leaf, teacher, pairs, pair_weights=weights, scale=scale)
            for got, want in zip(
                torch.autograd.grad(loss, (leaf, weights)),
                torch.autograd.grad(plain, (leaf, weights), retain_graph=True),
                strict=True,
            ):
                torch.testing.assert_close(got, 4 * want)


@pytest.mark.parametrize("name", SCALABLE)
def test_a_scale_that_is_none(name):
    leaf, teacher, pairs = inputs()
    for scale, error, told in [
        (True, TypeError, "a number or a tensor, got bool"),
        ("2", TypeError, "a number or a tensor, got str"),
        (float("nan"), ValueError, "a finite number, got nan"),
        (torch.tensor(2), TypeError, "float32.*got int64"),
        (torch.ones(2), ValueError, r"0 dimensions, got shape \(2,\)"),
        (torch.ones((), device="meta"), ValueError, "device cpu as the inputs, or cpu, got meta"),
    ]:
        with pytest.raises(error, match=f"^scale: expected {told}"):
            LOSSES[name](leaf, teacher, pairs, scale=scale)


@pytest.mark.parametrize("name", SCALABLE)
def test_compiled_code_takes_a_scale(name):
    leaf, teacher, pairs = inputs()
    torch._dynamo.reset()
    scale = torch.tensor(0.3)
    assert_compiles(lambda s: LOSSES[name](s, teacher, pairs, scale=scale), leaf.detach())
