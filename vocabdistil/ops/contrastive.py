"""contrastive: schema, implementation, autograd, public function. Formula: ``reference/contrastive.py``.

Pairs are taken in chunks, whose scores are one product with every pair of the batch, those not drawn left out; where
few of many pairs are drawn, these are gathered instead, in torch on every device: their rows are what it takes. Scores
become the gradient in place, or in parts of half precision; on a GPU in one pass, by Triton.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from ..alignment.spans import SpanPairs
from ..core import checks, native
from ..core.checks import Scale
from ..core.dispatch import implementation, resolve
from ..reference._common import unit_rows, valid_pairs
from ..reference.contrastive import check_contrastive_arguments
from ..reference.contrastive import contrastive as reference_contrastive
from ._gradient import HALF, hand_out, once_differentiable
from ._library import define
from ._products import SPLITS, left_parts, product, right_parts, split, split_tf32, tf32, tf32_pays
from ._projection import project
from ._scale import scalable, scaled
from .matched_kl import row_scale
from .span_mean import pool_rows

BUDGET = 16 << 20  # bytes for the scores of a chunk of pairs, or for the rows of their negatives
GPU_BUDGET = 64 << 20  # the same with Triton, parts included: a product of few rows leaves most of a GPU idle
_SPARSE = 64  # with fewer than one in this many pairs drawn, gathering them is cheaper than a product with all


def _chunks(count: int, row_bytes: int, budget: int | None = None) -> list[slice]:
    """Of one size, as far as that goes."""
    most = max(1, (budget or BUDGET) // max(row_bytes, 1))
    step = -(-count // max(1, -(-count // most)))
    return [slice(begin, min(count, begin + step)) for begin in range(0, count, max(step, 1))]


def _loss_and_slope(scores: Tensor, own: Tensor, scale: Tensor, temperature: float) -> Tensor:
    """Scores [R, n] -> [R] losses; in place, scores become the gradient for the similarities.

    own: the view of the positive scores, [R]. Each loss counts ``scale`` [R] in the gradient.
    """
    scores.mul_(1 / temperature)
    top = scores.amax(-1, keepdim=True)
    above = top[:, 0] - own
    total = scores.sub_(top).exp_().sum(-1, keepdim=True)
    factor = scale[:, None] / temperature
    scores.mul_(factor / total)
    own.sub_(factor[:, 0])
    return above + total[:, 0].log()


def _softmax(
    scores: Tensor, first: int, count: int, valid: Tensor | None, left_out: Tensor | None, scale: Tensor,
    temperature: float, loss: Tensor, slopes: Tensor | None,
) -> None:  # fmt: skip
    """As :func:`vocabdistil.triton_kernels.contrastive.softmax`; the scores are lost."""
    own = scores.diagonal(first)
    if valid is not None:
        left_out = ~valid.expand_as(scores) if left_out is None else left_out.logical_or(~valid)
    if left_out is not None:
        left_out.diagonal(first).fill_(False)
        scores.masked_fill_(left_out, float("-inf"))
    loss.copy_(_loss_and_slope(scores, own, scale, temperature))
    if slopes is not None and slopes.shape[1] > 1:
        slopes.copy_(left_parts(*(split if slopes.dtype == torch.bfloat16 else split_tf32)(scores)))


def _impl(
    anchor: Tensor, other: Tensor, valid: Tensor | None, negatives: Tensor | None, scale: Tensor, temperature: float,
    num_valid: int, parts: str, backend: str, anchor_grad: bool, other_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``num_valid``: how many pairs are valid, the others are then left out; -1 where the host does not know, and their
    scores are. ``parts``: of what the products are, of SPLITS; "exact": of what takes the least time on the device."""
    shape, all_rows = anchor.shape, scale
    if parts == "exact":
        parts = "tf32" if anchor.dtype == torch.float32 and tf32_pays(anchor.device) else "whole"
    compact = valid is not None and num_valid >= 0
    if valid is not None and not compact:
        scale = torch.where(valid, scale, 0.0)
    if valid is not None and compact:
        # As nonzero(), which would wait for the device to tell how many there are.
        kept = torch.searchsorted(valid.cumsum(0), torch.arange(1, num_valid + 1, device=valid.device))
        anchor, other, scale = anchor[kept], other[kept], scale[kept]
        if negatives is not None:
            negatives = (valid.cumsum(0) - 1)[negatives[kept]]
    seen = None if compact else valid
    loss = torch.empty_like(scale)
    d_anchor = torch.empty_like(anchor) if anchor_grad else None
    if negatives is None or len(anchor) < _SPARSE * negatives.shape[1]:
        d_other = _by_products(
            anchor, other, seen, negatives, scale, temperature, parts, backend, loss, d_anchor, other_grad
        )  # fmt: skip
    else:
        d_other = torch.zeros_like(other) if other_grad else None
        _gathered(anchor, other, seen, negatives, scale, temperature, loss, d_anchor, d_other)
    total = (loss * scale).sum(dtype=torch.float64).to(scale.dtype)
    if compact:
        loss = torch.zeros_like(all_rows).index_copy_(0, kept, loss)
        d_anchor, d_other = (
            None if d is None else d.new_zeros(shape).index_copy_(0, kept, d) for d in (d_anchor, d_other)
        )
    elif valid is not None:
        loss = torch.where(valid, loss, 0.0)
    nothing = scale.new_empty(0)
    d_anchor, d_other = (nothing.clone() if d is None else d for d in (d_anchor, d_other))
    return total, loss, d_anchor, d_other


def _by_products(
    anchor: Tensor, other: Tensor, valid: Tensor | None, negatives: Tensor | None, scale: Tensor, temperature: float,
    parts: str, backend: str, loss: Tensor, d_anchor: Tensor | None, other_grad: bool,
) -> Tensor | None:  # fmt: skip
    """Of every pair with all others: writes the losses and ``d_anchor``, returns the gradient of the others."""

    def times(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
        with tf32() if parts == "tf32" else contextlib.nullcontext():
            product(a, b, out, add)

    count, fused = len(anchor), backend == "triton"
    if fused:
        # Rows of scores and of their parts then begin where a GPU reads 16 bytes at once; no pair stands in the rest.
        other = nn.functional.pad(other, (0, 0, 0, -count % 16))
    columns = len(other)
    softmax = implementation("contrastive", backend, "softmax") if fused else _softmax
    split_up = SPLITS[parts]
    others = right_parts(*split_up(other))
    terms, size = others.shape[1], others.dtype.itemsize
    across = others.flatten(1).t()
    below = None if d_anchor is None else others.transpose(0, 1).flatten(0, 1)
    d_other = torch.zeros_like(other) if other_grad else None
    each = anchor.element_size() + (terms * size if terms > 1 else 0) + (negatives is not None)
    for part in _chunks(count, each * columns, GPU_BUDGET if fused else None):
        a = split_up(anchor[part])
        scores = scale.new_empty(len(a[0]), columns)
        times(left_parts(*a).flatten(1), across, scores)
        left_out = None
        if negatives is not None:
            left_out = torch.ones_like(scores, dtype=torch.bool).scatter_(1, negatives[part], False)
        slopes = scores[:, None]
        if terms > 1:
            slopes = scores.new_empty(len(scores), terms, columns, dtype=others.dtype)
        wanted = d_anchor is not None or d_other is not None
        softmax(
            scores, part.start, count, valid, left_out, scale[part], temperature, loss[part], slopes if wanted else None
        )
        if d_anchor is not None and below is not None:
            times(slopes.flatten(1), below, d_anchor[part])
        if d_other is not None:
            times(slopes.flatten(0, 1).t(), right_parts(*a).flatten(0, 1), d_other, add=True)
    return None if d_other is None else d_other[:count]


def _gathered(
    anchor: Tensor, other: Tensor, valid: Tensor | None, negatives: Tensor, scale: Tensor, temperature: float,
    loss: Tensor, d_anchor: Tensor | None, d_other: Tensor | None,
) -> None:  # fmt: skip
    """Of every pair with the few that were drawn for it: writes the losses and ``d_anchor``, adds to ``d_other``."""
    count, width = anchor.shape
    for part in _chunks(count, anchor.element_size() * negatives.shape[1] * width):
        a, b, ids = anchor[part], other[part], negatives[part]
        rows = other[ids.flatten()].view(*ids.shape, width)
        theirs = torch.bmm(rows, a[:, :, None])[:, :, 0]
        if valid is not None:
            theirs.masked_fill_(~valid[ids], float("-inf"))
        scores = torch.cat([(a * b).sum(-1, keepdim=True), theirs], 1)
        loss[part] = _loss_and_slope(scores, scores[:, 0], scale[part], temperature)
        if d_anchor is not None:
            torch.bmm(scores[:, None, 1:], rows, out=d_anchor[part, None])
            d_anchor[part].addcmul_(scores[:, :1], b)
        if d_other is not None:
            d_other[part].addcmul_(scores[:, :1], a)
            _add_rows(d_other, ids.flatten(), torch.mul(scores[:, 1:, None], a[:, None], out=rows).flatten(0, 1))


def _add_rows(out: Tensor, ids: Tensor, rows: Tensor) -> None:
    """``out[ids[i]] += rows[i]`` in an order that does not change from run to run."""
    if out.is_cuda:  # sorts the ids; index_add_ would use atomics there
        out.index_put_((ids,), rows, accumulate=True)
    else:
        out.index_add_(0, ids, rows)


def _fake(
    anchor, other, valid, negatives, scale, temperature, num_valid, parts, backend, anchor_grad, other_grad
):  # fmt: skip
    grads = (x.new_empty(x.shape if wanted else 0) for x, wanted in ((anchor, anchor_grad), (other, other_grad)))
    return scale.new_empty(()), torch.empty_like(scale), *grads


def _without_autocast(*args):
    with torch.autocast(args[0].device.type, enabled=False):
        return _impl(*args)


_op = define(
    "contrastive(Tensor anchor, Tensor other, Tensor? valid, Tensor? negatives, Tensor scale, float temperature, "
    "SymInt num_valid, str parts, str backend, bool anchor_grad, bool other_grad) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _without_autocast,
    _fake,
)


class _Contrastive(torch.autograd.Function):
    """The gradients of a scalar loss are formed in the forward sweep, which has the probabilities at hand."""

    @staticmethod
    def forward(ctx, anchor, other, valid, negatives, scale, options, reduce, needed):
        ctx.static = (options, reduce, needed)
        wanted = needed if reduce else (False, False)
        total, loss, *grads = _op(anchor, other, valid, negatives, scale, *options, *wanted)
        compiling = torch.compiler.is_compiling()
        ctx.save_for_backward(anchor, other, valid, negatives, scale, *(grads if compiling else ()))
        if not compiling:  # not among the saved tensors: whoever takes them must be their only owner
            ctx.ready = grads if reduce else None
        return total if reduce else loss * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        options, reduce, needed = ctx.static
        anchor, other, valid, negatives, scale, *grads = ctx.saved_tensors

        def compute() -> list[Tensor]:
            scaled = (scale * grad).expand_as(scale).contiguous()
            return _op(anchor, other, valid, negatives, scaled, *options, *needed)[2:]

        if torch.compiler.is_compiling():
            grads = [g * grad for g in grads] if reduce else compute()
        else:
            ready, ctx.ready = ctx.ready, None
            grads = compute() if ready is None else hand_out(ready, grad, compute)
        return *(g if wanted else None for g, wanted in zip(grads, needed, strict=True)), *(None,) * 6


def draw_negatives(
    count: int, valid: Tensor | None, negatives: int, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """``[P, K]`` int64: for each pair K others with both spans non-empty, drawn without replacement.

    The K largest of independent uniform keys; drawn in rows, so that on a CPU the choice for a given generator does
    not depend on the size of the chunks.
    """
    out = torch.empty(count, negatives, dtype=torch.int64, device=device)
    columns = torch.arange(count, device=device)
    for part in _chunks(count, 4 * count):
        keys = torch.rand(part.stop - part.start, count, generator=generator, device=device)
        keys.masked_fill_(columns == columns[part, None], -1.0)
        if valid is not None:
            keys.masked_fill_(~valid, -1.0)
        out[part] = keys.topk(negatives, dim=-1).indices
    return out


@scalable
def contrastive(
    student: Tensor,
    teacher: Tensor,
    pairs: SpanPairs,
    *,
    temperature: float = 1.0,
    negatives: int = -1,
    side: str = "student",
    weight: Tensor | nn.Module | None = None,
    bias: Tensor | None = None,
    generator: torch.Generator | None = None,
    reduction: str = "batchmean",
    scale: Scale = 1.0,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE between the averaged hidden states of aligned spans; formulas in
    :func:`vocabdistil.reference.contrastive`.

    Chunks of pairs whose scores (or, with K negatives, whose negatives' rows) take 16 MiB, with Triton 64: neither
    ``[P, P]`` nor ``[P, K, D]`` is ever there at once, nor anything larger. On a GPU half-precision hidden states are
    averaged and normalised in float32, and the scores are products of these means split into two bfloat16 parts each:
    tensor cores, and an error far below the rounding of the hidden states; of float32 on GPUs of data centres the parts
    are TF32, and nearly all of float32 remains. What stands between the products of a chunk is one kernel in Triton.

    Args:
        student: ``[N_s, D_s]`` or ``[B, L_s, D_s]``; float32, float64, bfloat16 or float16.
        teacher: the same for the teacher, width ``D_t``. It gets no gradient.
        pairs: the aligned spans, on the same device.
        temperature: ``T > 0``.
        negatives: K other pairs per pair, drawn without replacement; -1 for all others.
        side: ``"student"`` or ``"teacher"``: where the negatives are taken from.
        weight, bias: ``[D_t, D_s]``, ``[D_t]``: projection of the student, applied to the averaged rows; or a module
            as ``weight``, as in :func:`span_loss`.
        generator: draws the negatives, on the device of the student; torch's global one by default. On a CPU the
            reference draws the same from it.
        reduction: ``"batchmean"`` (mean over the pairs with both spans non-empty), ``"sum"`` or ``"none"``
            (``[P]``).
        scale: as in :func:`span_loss`.
        backend: ``"triton"`` (float64 goes through torch there), ``"torch"`` or ``"reference"``; None chooses by
            device.

    Returns:
        The loss, float32 (float64 if an input is float64): ``[]``, or ``[P]`` for ``reduction="none"``.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, value or device, named in the text.
    """
    weight, bias = checks.as_projection(weight, bias)
    student_rows, teacher_rows = check_contrastive_arguments(
        student, teacher, pairs, temperature, negatives, side, weight, bias, reduction
    )
    device, dtype = student.device, native.accumulation_dtype(student.dtype, teacher.dtype)
    limits = (("triton", "float64 goes through torch"),) if dtype == torch.float64 else ()
    choice = resolve("contrastive", device, backend, limits)
    if choice == "reference":
        loss = reference_contrastive(
            student, teacher, pairs, temperature=temperature, negatives=negatives, side=side, weight=weight,
            bias=bias, generator=generator, reduction=reduction,
        )  # fmt: skip
        return scaled(loss, scale)
    valid = valid_pairs(pairs)
    s = pool_rows(student_rows, pairs.student_start, pairs.student_end, "mean", valid).to(dtype)
    t = pool_rows(teacher_rows, pairs.teacher_start, pairs.teacher_end, "mean", valid).to(dtype)
    if weight is not None:
        s = project(s, weight, bias, t.shape[1], half=False)  # not in TF32: scores are more exact than that
    anchor, other = (unit_rows(x) for x in ((t, s) if side == "student" else (s, t)))
    chosen, count = None, pairs.num_nonempty
    # A count on a device is not looked at: where too few are valid, others are drawn and left out.
    if 0 < negatives < (len(pairs) if isinstance(count, Tensor) else count) - 1:
        chosen = draw_negatives(len(pairs), valid, negatives, device, generator)
    each = row_scale(pairs, s, reduction, dtype, scale)
    grad = torch.is_grad_enabled()
    halves = student.dtype in HALF and teacher.dtype in HALF and (device.type == "cuda" or choice == "triton")
    parts = "bfloat16" if halves else "exact"
    options = (float(temperature), -1 if isinstance(count, Tensor) else count, parts, choice)
    return _Contrastive.apply(
        anchor, other, valid, chosen, each, options, reduction != "none",
        (grad and anchor.requires_grad, grad and other.requires_grad),
    )  # fmt: skip
