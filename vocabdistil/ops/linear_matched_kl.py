"""linear_matched_kl: schema, implementation, autograd, public function. Formula: ``reference/linear_matched_kl.py``.

On a CPU the whole sweep is native (csrc/cpu/linear_matched_kl.cpp): chunks of rows, whose logits are formed from the
weights where they lie, turned into their gradient in place, and carried on to the hidden states and the weight. On a
GPU half-precision hidden states take ``_fused_sweep.py``, where logits stay in registers; others, and a CPU without the
native module, the sweep in ``_dense_sweep.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..alignment.spans import SpanPairs, chosen_pairs
from ..core import native
from ..core.checks import Matched, Scale
from ..core.dispatch import resolve
from ..reference._common import reduce_pairs
from ..reference.linear_matched_kl import linear_matched_kl as reference_linear_matched_kl
from ..reference.linear_matched_kl import output_layers
from ..reference.matched_kl import check_matched_arguments
from ._dense_sweep import dense_sweep
from ._fused_sweep import fused_sweep
from ._gradient import HALF, LinearLoss
from ._library import define, without_autocast
from ._linear import empty_grads, fake_results, pool_sides, results, wanted_grads
from ._scale import scalable, scaled
from .matched_kl import pair_count, row_scale
from .span_mean import native_rows

# Bytes that the logits of a chunk of rows may take on a CPU, or, where the weights are large, a quarter of what the
# matched rows of both take, as each chunk has to read them all.
BUDGET = 2 << 20


def _impl(
    student: Tensor, student_weight: Tensor, student_bias: Tensor | None, student_lengths: Tensor | None,
    teacher: Tensor, teacher_weight: Tensor, teacher_bias: Tensor | None, teacher_lengths: Tensor | None,
    student_ids: Tensor, teacher_ids: Tensor, scale: Tensor, unmatched: int, temperature: float, backend: str,
    hidden_grad: bool, weight_grad: bool, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if backend == "triton" and student.dtype in HALF and teacher.dtype in HALF:
        return fused_sweep(
            student, student_weight, student_bias, student_lengths, teacher, teacher_weight, teacher_bias,
            teacher_lengths, student_ids, teacher_ids, scale, unmatched, temperature, hidden_grad, weight_grad,
            bias_grad,
        )  # fmt: skip
    if backend != "cpu":
        return dense_sweep(
            student, student_weight, student_bias, student_lengths, teacher, teacher_weight, teacher_bias,
            teacher_lengths, student_ids, teacher_ids, scale, unmatched, temperature, backend, hidden_grad, weight_grad,
            bias_grad,
        )  # fmt: skip
    dtype = scale.dtype
    student_ids, teacher_ids = student_ids.to(torch.int32), teacher_ids.to(torch.int32)

    def side(x: Tensor, weight: Tensor, bias: Tensor | None, lengths: Tensor | None, ids: Tensor) -> tuple:
        bias, lengths = (None if v is None else v.to(dtype).contiguous() for v in (bias, lengths))
        return native_rows(x), native_rows(weight), bias, lengths, ids

    total, loss = scale.new_empty(()), torch.empty_like(scale)
    grads = empty_grads(scale, (student, hidden_grad), (student_weight, weight_grad), (student_bias, bias_grad))
    native.linear_matched_kl(
        side(student, student_weight, student_bias, student_lengths, student_ids),
        side(teacher, teacher_weight, teacher_bias, teacher_lengths, teacher_ids),
        unmatched, temperature, BUDGET, scale, loss, total, grads,
    )  # fmt: skip
    return results(total, loss, grads)


def _fake(
    student, student_weight, student_bias, student_lengths, teacher, teacher_weight, teacher_bias, teacher_lengths,
    student_ids, teacher_ids, scale, unmatched, temperature, backend, hidden_grad, weight_grad, bias_grad,
):  # fmt: skip
    return fake_results(scale, student, student_weight, hidden_grad, weight_grad, bias_grad)


_op = define(
    "linear_matched_kl(Tensor student, Tensor student_weight, Tensor? student_bias, Tensor? student_lengths, "
    "Tensor teacher, Tensor teacher_weight, Tensor? teacher_bias, Tensor? teacher_lengths, Tensor student_ids, "
    "Tensor teacher_ids, Tensor scale, int unmatched, float temperature, str backend, bool hidden_grad, "
    "bool weight_grad, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    without_autocast(_impl),
    _fake,
)


@scalable
def linear_matched_kl(
    student_hidden: Tensor,
    student_weight: Tensor | nn.Linear,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | nn.Linear,
    matched: Matched,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    pairs: SpanPairs | None = None,
    mask: Tensor | None = None,
    pair_weights: Tensor | None = None,
    temperature: float = 1.0,
    unmatched: str = "renormalize",
    pooling: str = "mean",
    student_shift: int = 0,
    teacher_shift: int = 0,
    reduction: str = "batchmean",
    scale: Scale = 1.0,
    backend: str | None = None,
) -> Tensor:
    """:func:`matched_kl` of the logits ``h weight^T + bias`` of both sides, which are never all there at once;
    formulas in :func:`vocabdistil.reference.linear_matched_kl`.

    Rows are taken in chunks, so that the memory does not grow with the number of rows: on a CPU chunks whose logits
    take 2 MiB (or a quarter of what the matched rows of both weights take, if that is more; at least a panel of 8 to
    48 rows), on a GPU 64 MB for all that is held meanwhile (or 3.25 times what the matched rows and their gradient
    take). There half-precision hidden states are multiplied in their dtype on the tensor cores, with float32
    accumulation and logits; a float32 weight and the means over spans are rounded to that dtype first. With Triton
    these logits are never written to memory: 4 bytes per row and column are kept for the gradient, which is rounded
    once to that dtype, as an operand of the two products that carry it on.
    ``"renormalize"`` reads only the matched rows of the teacher's weight. The gradients to the hidden states, the
    weight and the bias are formed in the same sweep, accumulated in float32 (float64 for float64); weight rows
    outside the matched vocabulary get exactly 0 under ``"renormalize"``.

    Args:
        student_hidden: ``[..., D_s]``, flattened to rows; float32, float64, bfloat16 or float16.
        student_weight, student_bias: ``[V_s, D_s]``, ``[V_s]`` or None: the student's output layer, which may be
            its embedding; the dtype of the hidden states, or float32 with half-precision hidden states; or a
            :class:`torch.nn.Linear` as ``student_weight``.
        teacher_hidden: ``[..., D_t]``. Neither it nor the teacher's weights get a gradient.
        teacher_weight, teacher_bias: ``[V_t, D_t]``, ``[V_t]`` or None.
        matched, pairs, mask, pair_weights, temperature, unmatched, pooling, student_shift, teacher_shift,
            reduction, scale: as in :func:`matched_kl`;
            pooling is over hidden states, with which the output layer commutes (a sum of n rows adds the bias n times).
            Logits of float32 are rounded before the temperature divides them, here as wherever they are formed: under
            ``T = 0.01`` the relative error is about ``1e-6 / T``.
        backend: ``"cpu"``, ``"triton"``, ``"torch"`` (any device, chunked as on a GPU, without a row kernel) or
            ``"reference"``; None chooses by device.

    Returns:
        The loss, float32 (float64 if the hidden states are float64): ``[]``, or ``[P]`` for ``reduction="none"``.

    Raises:
        TypeError, ValueError: as :func:`matched_kl`; weights that do not fit the hidden states.
    """
    student_weight, student_bias, teacher_weight, teacher_bias = output_layers(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias
    )
    student, teacher = student_hidden.flatten(0, -2), teacher_hidden.detach().flatten(0, -2)
    shifts = student_shift, teacher_shift
    pairs = chosen_pairs(pairs, mask, pair_weights, student_hidden, teacher_hidden, "hidden", shifts)
    check_matched_arguments(
        matched, student_weight.shape[0], teacher_weight.shape[0], temperature, unmatched, pooling, reduction
    )
    if pair_weights is not None and pair_weights.requires_grad:
        each = linear_matched_kl(
            student_hidden, student_weight, teacher_hidden, teacher_weight, matched, student_bias=student_bias,
            teacher_bias=teacher_bias, pairs=pairs, temperature=temperature, unmatched=unmatched, pooling=pooling,
            reduction="none", backend=backend,
        )  # fmt: skip
        return scaled(reduce_pairs(each, None, pair_count(pairs, student), reduction, pair_weights), scale)
    choice = resolve("linear_matched_kl", student.device, backend)
    if choice == "reference":
        loss = reference_linear_matched_kl(
            student_hidden, student_weight, teacher_hidden, teacher_weight, matched, student_bias=student_bias,
            teacher_bias=teacher_bias, pairs=pairs, pair_weights=pair_weights, temperature=temperature,
            unmatched=unmatched, pooling=pooling, reduction=reduction,
        )  # fmt: skip
        return scaled(loss, scale)
    dtype = native.accumulation_dtype(student.dtype, teacher.dtype)
    each = row_scale(pairs, student, reduction, dtype, scale, pair_weights)
    student, teacher, each = pool_sides(student, teacher, pairs, pooling, each, choice)
    student_lengths = teacher_lengths = None
    if pairs is not None and pooling == "sum":
        # A pair with an empty side counts for nothing: 0 times a bias of -inf would be a NaN in its gradient.
        student_lengths = (pairs.student_end - pairs.student_start).clamp(min=1)
        teacher_lengths = (pairs.teacher_end - pairs.teacher_start).clamp(min=1)
    needed = wanted_grads(student, student_weight, student_bias)
    # Two names, not a loop: see matched_kl.
    student_ids = matched.student_ids.to(student.device, torch.int64)
    teacher_ids = matched.teacher_ids.to(student.device, torch.int64)
    return LinearLoss.apply(
        _op, student, student_weight, student_bias,
        (native.UNMATCHED_CODES[unmatched], float(temperature), choice), reduction != "none", needed, each,
        student_lengths, teacher, teacher_weight.detach(), None if teacher_bias is None else teacher_bias.detach(),
        teacher_lengths, student_ids, teacher_ids,
    )  # fmt: skip
