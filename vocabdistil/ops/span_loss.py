"""span_loss: schema, implementation, autograd, public functions. Formulas: ``reference/span_loss.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..alignment.spans import SpanPairs, at_least_one
from ..core import native
from ..core.checks import Layers, LayerWeights, Scale, as_projection
from ..core.dispatch import implementation, resolve
from ..reference.span_loss import check_span_loss
from ..reference.span_loss import span_loss as reference_span_loss
from ._gradient import HALF, next_upstream, note_upstream, once_differentiable
from ._library import define
from ._projection import project
from ._scale import scalable, scaled
from .span_mean import native_rows, pooled_rows


def _empty_grads(layers: Sequence[Tensor], wanted: bool, empty: Callable[..., Tensor]) -> list[Tensor]:
    return [empty(x, *x.shape) for x in layers] if wanted else []


def _run(
    student: Sequence[Tensor], teacher: Sequence[Tensor], spans: Sequence[Tensor], weights: Tensor | None, base: float,
    student_coef: Tensor | None, teacher_coef: Tensor | None, divergence: int, mean: bool, temperature: float,
    beta: float, backend: str, loss: Tensor | None, total: Tensor | None, student_grads: Sequence[Tensor],
    teacher_grads: Sequence[Tensor], upstream: Tensor | None = None, formed: Tensor | None = None,
) -> None:  # fmt: skip
    if backend == "cpu":
        assert loss is not None and total is not None  # only a GPU is asked for gradients alone
        scale = loss.new_full(loss.shape, base) if weights is None else weights * base
        native.span_loss(
            student, teacher, spans, scale, student_coef, teacher_coef, divergence, mean, temperature, beta, loss,
            total, student_grads, teacher_grads,
        )  # fmt: skip
        return
    kernel = implementation("span_loss", backend, "span_loss")
    if loss is not None or student_grads:
        kernel(
            student, teacher, spans, weights, base, student_coef, teacher_coef, divergence, mean, temperature, beta,
            loss, total, student_grads, upstream, formed,
        )  # fmt: skip
    if teacher_grads:  # the gradient in the teacher is that of the mirrored divergence in its student
        kernel(
            teacher, student, [*spans[2:], *spans[:2]], weights, base, teacher_coef, student_coef, _MIRROR[divergence],
            mean, temperature, 1 - beta, None, None, teacher_grads, upstream, formed,
        )  # fmt: skip


_CODES = native.DIVERGENCE_CODES
_MIRROR = {code: code for code in _CODES.values()} | {
    _CODES["kl"]: _CODES["reverse_kl"],
    _CODES["reverse_kl"]: _CODES["kl"],
}


def _impl(
    student: Sequence[Tensor], teacher: Sequence[Tensor], spans: Sequence[Tensor], weights: Tensor | None, base: float,
    student_coef: Tensor | None, teacher_coef: Tensor | None, divergence: int, mean: bool, temperature: float,
    beta: float, backend: str, student_grad: bool, teacher_grad: bool, upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    arguments = (
        student, teacher, spans, weights, base, student_coef, teacher_coef, divergence, mean, temperature, beta,
        backend,
    )  # fmt: skip
    total, loss, student_grads, teacher_grads = _fake(*arguments, student_grad, teacher_grad, upstream, native.empty)
    _run(*arguments, loss, total, student_grads, teacher_grads, upstream)
    return total, loss, student_grads, teacher_grads


def _fake(
    student, teacher, spans, weights, base, student_coef, teacher_coef, divergence, mean, temperature, beta, backend,
    student_grad, teacher_grad, upstream=None, empty=Tensor.new_empty,
):  # fmt: skip
    dtype = native.accumulation_dtype(student[0].dtype, teacher[0].dtype)
    loss = student[0].new_empty(spans[0].shape[0], dtype=dtype)
    grads = _empty_grads(student, student_grad, empty), _empty_grads(teacher, teacher_grad, empty)
    return loss.new_empty(()), loss, *grads


_op = define(
    "span_loss(Tensor[] student, Tensor[] teacher, Tensor[] spans, Tensor? weights, float base, Tensor? student_coef, "
    "Tensor? teacher_coef, int divergence, bool mean, float temperature, float beta, str backend, bool student_grad, "
    "bool teacher_grad, Tensor? upstream=None) -> (Tensor, Tensor, Tensor[], Tensor[])",
    _impl,
    _fake,
)


class _SpanLoss(torch.autograd.Function):
    """One pass gives the loss and, for a scalar reduction, the gradient: read student, read teacher, write gradient.

    That gradient is handed out as it is where the upstream gradient is 1 (the usual ``loss.backward()``), without
    a second pass and without a copy. Half-precision gradients under any other upstream gradient are computed anew
    with it folded in, so that they are rounded once, after scaling, and a loss scaler can do its work. On a GPU forward
    folds in the upstream gradient that the last backward pass met, and the kernel of this one ends at once where it is
    the same: the host need not wait for it.
    """

    @staticmethod
    def forward(
        ctx, weights, student_coef, teacher_coef, base, options, reduce, needs_student, needs_teacher, count,
        *tensors,
    ):  # fmt: skip
        # torch.compile takes a forward with as many parameters as there are arguments for one without ctx: with the
        # four spans among the last there never are.
        spans, layers = tensors[:4], tensors[4:]
        compiling = torch.compiler.is_compiling()
        early = reduce and not (compiling and any(x.dtype in HALF for x in layers))
        guess = None
        if options[-1] != "cpu" and early and (needs_student or needs_teacher) and not compiling:
            guess = next_upstream(_op, spans[0], torch.float32)
        total, loss, student_grads, teacher_grads = _op(
            layers[:count], layers[count:], spans, weights, base, student_coef, teacher_coef, *options,
            early and needs_student, early and needs_teacher, guess,
        )  # fmt: skip
        ready = (*student_grads, *teacher_grads)
        ctx.static = (base, options, needs_student, needs_teacher, count, early, len(layers))
        if compiling:
            ctx.save_for_backward(weights, loss, student_coef, teacher_coef, *spans, *layers, *ready)
        else:  # not among the saved tensors: whoever takes it must be its only owner
            ctx.save_for_backward(weights, loss, student_coef, teacher_coef, *spans, *layers)
            ctx.ready = (*ready, guess) if early else None
        if reduce:
            return total
        return loss * base if weights is None else loss * (weights * base)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        base, options, needs_student, needs_teacher, count, early, n = ctx.static
        weights, loss, student_coef, teacher_coef, *rest = ctx.saved_tensors
        spans, layers = rest[:4], rest[4 : 4 + n]
        grad_weights = loss * (grad * base) if ctx.needs_input_grad[0] else None
        grads: Sequence[Tensor] | None = None
        if not (needs_student or needs_teacher):
            grads = ()
        elif torch.compiler.is_compiling():
            if early:
                grads = [g * grad.to(g.dtype) for g in rest[4 + n :]]
        elif early and options[-1] != "cpu":
            learned = (layers[:count] if needs_student else ()), (layers[count:] if needs_teacher else ())
            held, ctx.ready = ctx.ready, None
            *grads, formed = held or (*(x.new_empty(x.shape) for side in learned for x in side), None)
            split = len(learned[0])
            _run(
                layers[:count], layers[count:], spans, weights, base, student_coef, teacher_coef, *options,
                None, None, grads[:split], grads[split:], grad, formed,
            )  # fmt: skip
            note_upstream(_op, grad)
        elif ctx.ready is not None:
            *ready, _ = ctx.ready
            ctx.ready = None
            if bool(grad == 1):
                grads = ready
            elif all(g.dtype not in HALF for g in ready):
                grads = [g.mul_(grad) for g in ready]
        if grads is None:
            scale = (grad if weights is None else weights * grad).expand_as(loss).contiguous()
            _, _, student_grads, teacher_grads = _op(
                layers[:count], layers[count:], spans, scale, base, student_coef, teacher_coef, *options,
                needs_student, needs_teacher,
            )  # fmt: skip
            grads = (*student_grads, *teacher_grads)
        student_grads = tuple(grads[:count]) if needs_student else (None,) * count
        teacher_grads = tuple(grads[-(n - count) :]) if needs_teacher else (None,) * (n - count)
        return grad_weights, *(None,) * 12, *student_grads, *teacher_grads


def _normalised(layer_weights: LayerWeights | None, like: Tensor) -> Tensor | None:
    if layer_weights is None:
        return None
    if isinstance(layer_weights, Tensor):
        weights = layer_weights.to(torch.float64)
        return weights / weights.sum()
    # Filled on the device: a copy from the host would wait for it, and could not be captured in a CUDA graph.
    norm = sum(layer_weights)
    return torch.stack([like.new_full((), w / norm, dtype=torch.float64) for w in layer_weights])


_GPU_WIDEST = 16384


def _limits(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> tuple[tuple[str, str], ...]:
    """What the GPU kernels cannot take: pairs of a backend and the reason."""
    if torch.float64 in (student[0].dtype, teacher[0].dtype):
        return tuple((backend, "float64 goes through the reference") for backend in ("cuda", "triton"))
    if (dim := teacher[0].shape[1]) > _GPU_WIDEST:
        return tuple((backend, f"hidden size {dim} > {_GPU_WIDEST}") for backend in ("cuda", "triton"))
    if (layers := max(len(student), len(teacher))) > native.CUDA_MAX_LAYERS:
        return (("cuda", f"{layers} layers > {native.CUDA_MAX_LAYERS}"),)
    return ()


@scalable
def span_loss(
    student: Layers,
    teacher: Layers,
    pairs: SpanPairs,
    *,
    divergence: str = "kl",
    temperature: float = 1.0,
    weight: Tensor | nn.Module | None = None,
    bias: Tensor | None = None,
    pair_weights: Tensor | None = None,
    beta: float = 0.5,
    pooling: str = "mean",
    reduction: str = "batchmean",
    scale: Scale = 1.0,
    student_layer_weights: LayerWeights | None = None,
    teacher_layer_weights: LayerWeights | None = None,
    backend: str | None = None,
) -> Tensor:
    """Divergence between the averaged hidden states of aligned spans; formulas in
    :func:`vocabdistil.reference.span_loss`.

    Args:
        student: ``[N_s, D_s]`` or ``[B, L_s, D_s]``, or a list of such layers (their weighted mean); float32,
            float64, bfloat16 or float16; any strides (one copy where the last dimension is not contiguous).
        teacher: the same for the teacher, width ``D_t``. It gets no gradient.
        pairs: the aligned spans, on the same device.
        divergence: ``"kl"`` (teacher to student), ``"reverse_kl"``, ``"jsd"``, ``"mse"`` or ``"cosine"``.
        temperature: ``T > 0``; the softmax divergences are multiplied by ``T^2``.
        weight, bias: ``[D_t, D_s]``, ``[D_t]``: projection of the student, applied to the averaged rows; or as
            ``weight`` a module, linear or not, that maps these rows ``[P, D_s]`` to ``[P, D_t]``. It runs in the dtype
            of its parameters, without autocast.
        pair_weights: ``[P]``, what each pair counts.
        beta: weight of the teacher in the mixture of ``"jsd"``, ``0 < beta < 1``.
        pooling: ``"mean"`` or ``"sum"`` over the tokens of a span.
        reduction: ``"batchmean"`` (divided by the number of pairs with both spans non-empty), ``"sum"`` or
            ``"none"`` (``[P]``).
        scale: what this loss counts among others, a number or a float tensor ``[]`` that multiplies loss and gradient.
            On a GPU it is better than a product outside, with which a half-precision gradient may be formed twice: in
            forward, and in backward if the upstream gradient is neither 1 nor that of the backward pass before.
        student_layer_weights, teacher_layer_weights: one number per layer, normalised to sum 1; a tensor may
            require gradients.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None chooses by device.

    Returns:
        The loss, float32 (float64 if an input is float64): ``[]``, or ``[P]`` for ``reduction="none"``.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, value or device, named in the text.
    """
    weight, bias = as_projection(weight, bias)
    students: Sequence[Tensor]
    teachers: Sequence[Tensor]
    students, teachers = check_span_loss(
        student, teacher, pairs, divergence=divergence, temperature=temperature, weight=weight, bias=bias,
        pair_weights=pair_weights, beta=beta, pooling=pooling, reduction=reduction,
        student_layer_weights=student_layer_weights, teacher_layer_weights=teacher_layer_weights,
    )  # fmt: skip
    device = students[0].device
    choice = resolve("span_loss", device, backend, _limits(students, teachers))
    if choice == "reference":
        loss = reference_span_loss(
            student, teacher, pairs, divergence=divergence, temperature=temperature, weight=weight, bias=bias,
            pair_weights=pair_weights, beta=beta, pooling=pooling, reduction=reduction,
            student_layer_weights=student_layer_weights, teacher_layer_weights=teacher_layer_weights,
        )  # fmt: skip
        return scaled(loss, scale)
    students, teachers = [native_rows(x) for x in students], [native_rows(x) for x in teachers]
    mean = pooling == "mean"
    grad = torch.is_grad_enabled()
    student_coef = _normalised(student_layer_weights, students[0])
    teacher_coef = _normalised(teacher_layer_weights, teachers[0])
    spans = [pairs.student_start, pairs.student_end, pairs.teacher_start, pairs.teacher_end]
    learns_student = student_coef is not None and student_coef.requires_grad and grad
    learns_teacher = teacher_coef is not None and teacher_coef.requires_grad and grad
    dtype = native.accumulation_dtype(students[0].dtype, teachers[0].dtype)
    # Averaged rows are written to memory only where something outside the kernel needs them: a projection
    # (a linear map commutes with the mean, so it sees one row per pair) or the gradient of layer weights.
    if weight is not None or bias is not None or learns_student:
        rows = pooled_rows(students, spans[0], spans[1], student_coef, mean, True, choice).to(dtype)
        if weight is not None:
            rows = project(rows, weight, bias, teachers[0].shape[1], students[0].dtype in HALF)
        students, student_coef = [rows], None
        spans[:2] = _row_spans(spans[0], spans[1])
    if learns_teacher:
        teachers = [pooled_rows(teachers, spans[2], spans[3], teacher_coef, mean, True, choice).to(dtype)]
        teacher_coef = None
        spans[2:] = _row_spans(spans[2], spans[3])
    weights = None if pair_weights is None else pair_weights.to(dtype).contiguous()
    base, count = 1.0, at_least_one(pairs.num_nonempty)
    if reduction == "batchmean":
        if isinstance(count, Tensor) or torch.compiler.is_compiling():
            # A part of the weights: it stays on the device, and compiled code is not made anew for each number.
            weights = (torch.ones(len(pairs), dtype=dtype, device=device) if weights is None else weights) / count
        else:
            base = 1.0 / count
    if isinstance(scale, Tensor):
        weights = scaled(torch.ones(len(pairs), dtype=dtype, device=device) if weights is None else weights, scale)
    else:
        base *= scale
    options = (_CODES[divergence], mean, float(temperature), float(beta), choice)
    return _SpanLoss.apply(
        weights, student_coef, teacher_coef, base, options, reduction != "none",
        grad and any(x.requires_grad for x in students), learns_teacher, len(students), *spans, *students, *teachers,
    )  # fmt: skip


def _row_spans(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """One averaged row per pair: spans [p, p + 1), empty where the span that was averaged is."""
    rows = torch.arange(start.shape[0], dtype=torch.int32, device=start.device)
    return rows, rows + (end > start)


@scalable
def span_kl(
    student: Layers,
    teacher: Layers,
    pairs: SpanPairs,
    *,
    temperature: float = 1.0,
    weight: Tensor | nn.Module | None = None,
    bias: Tensor | None = None,
    pair_weights: Tensor | None = None,
    pooling: str = "mean",
    reduction: str = "batchmean",
    scale: Scale = 1.0,
    student_layer_weights: LayerWeights | None = None,
    teacher_layer_weights: LayerWeights | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`span_loss` with ``divergence="kl"``: ``T^2 sum_p w_p KL(softmax(mean_t/T) || softmax(mean_s/T)) / P``."""
    return span_loss(
        student, teacher, pairs, divergence="kl", temperature=temperature, weight=weight, bias=bias,
        pair_weights=pair_weights, pooling=pooling, reduction=reduction, scale=scale,
        student_layer_weights=student_layer_weights, teacher_layer_weights=teacher_layer_weights, backend=backend,
    )  # fmt: skip
