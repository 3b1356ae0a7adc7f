"""linear_remapped_kl: schema, implementation, autograd, public function. Formula: ``reference/linear_remapped_kl.py``.

On a CPU the whole sweep is native (csrc/cpu/linear_remapped_kl.cpp): chunks of rows, whose logits are formed from the
weights where they lie, combined, turned into their gradient in place, and carried on to the hidden states and the
weight. A GPU takes the sweep in ``_dense_remapped.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..alignment.spans import SpanPairs, chosen_pairs
from ..core import native
from ..core.checks import RemapLike, Scale
from ..core.dispatch import resolve
from ..reference._common import reduce_pairs
from ..reference.linear_matched_kl import output_layers
from ..reference.linear_remapped_kl import linear_remapped_kl as reference_linear_remapped_kl
from ..reference.remapped_kl import check_remapped_arguments
from ._dense_remapped import dense_remapped
from ._gradient import LinearLoss
from ._library import define, without_autocast
from ._linear import empty_grads, fake_results, pool_sides, results, wanted_grads
from ._remap_plans import compact_plans
from ._scale import scalable, scaled
from .matched_kl import pair_count, row_scale
from .remapped_kl import kernel_options
from .span_mean import native_rows

# Bytes that the logits of a chunk of rows may take on a CPU, or, where the weights are large, a quarter of what the
# rows of both that the table names take, as each chunk has to read them all.
BUDGET = 2 << 20


def _impl(
    student: Tensor, student_weight: Tensor, student_bias: Tensor | None, teacher: Tensor, teacher_weight: Tensor,
    teacher_bias: Tensor | None, indptr: Tensor, ids: Tensor, entry_weights: Tensor | None, scale: Tensor,
    logsumexp: bool, top_k: int, remainder: int, temperature: float, backend: str, hidden_grad: bool,
    weight_grad: bool, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``top_k``: 0 for all."""
    options = logsumexp, top_k, remainder, temperature
    if not 1 <= indptr.numel() <= teacher_weight.shape[0] + 1:
        raise ValueError(f"table: expected at most {teacher_weight.shape[0]} rows, got {indptr.numel() - 1}")
    if backend != "cpu":
        return dense_remapped(
            student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, indptr, ids, entry_weights,
            scale, *options, backend, hidden_grad, weight_grad, bias_grad,
        )  # fmt: skip
    dtype = scale.dtype
    columns, *plan = compact_plans.get(indptr, ids, entry_weights, student_weight.shape[0], logsumexp, dtype)

    def side(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple:
        return native_rows(x), native_rows(weight), None if bias is None else bias.to(dtype).contiguous()

    total, loss = scale.new_empty(()), torch.empty_like(scale)
    grads = empty_grads(scale, (student, hidden_grad), (student_weight, weight_grad), (student_bias, bias_grad))
    native.linear_remapped_kl(
        side(student, student_weight, student_bias), side(teacher, teacher_weight, teacher_bias), columns, plan,
        *options, BUDGET, scale, loss, total, grads,
    )  # fmt: skip
    return results(total, loss, grads)


def _fake(
    student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, indptr, ids, entry_weights, scale,
    logsumexp, top_k, remainder, temperature, backend, hidden_grad, weight_grad, bias_grad,
):  # fmt: skip
    return fake_results(scale, student, student_weight, hidden_grad, weight_grad, bias_grad)


_op = define(
    "linear_remapped_kl(Tensor student, Tensor student_weight, Tensor? student_bias, Tensor teacher, "
    "Tensor teacher_weight, Tensor? teacher_bias, Tensor indptr, Tensor ids, Tensor? entry_weights, Tensor scale, "
    "bool logsumexp, int top_k, int remainder, float temperature, str backend, bool hidden_grad, bool weight_grad, "
    "bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    without_autocast(_impl),
    _fake,
)


@scalable
def linear_remapped_kl(
    student_hidden: Tensor,
    student_weight: Tensor | nn.Linear,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | nn.Linear,
    table: RemapLike,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    pairs: SpanPairs | None = None,
    mask: Tensor | None = None,
    pair_weights: Tensor | None = None,
    entry_weights: Tensor | None = None,
    combine: str = "sum",
    top_k: int | None = None,
    remainder: str = "rest",
    temperature: float = 1.0,
    student_shift: int = 0,
    teacher_shift: int = 0,
    reduction: str = "batchmean",
    scale: Scale = 1.0,
    backend: str | None = None,
) -> Tensor:
    """:func:`remapped_kl` of the logits ``h weight^T + bias`` of both sides, which are never all there at once;
    formulas in :func:`vocabdistil.reference.linear_remapped_kl`.

    Rows are taken in chunks, so that the memory does not grow with the number of rows: on a CPU chunks whose logits
    take 2 MiB (or a quarter of what the rows of both weights that the table names take, if that is more; at least a
    panel of 8 to 48 rows), on a GPU 64 MB for logits and their gradients (or 3.25 times what the weights and their
    gradient take) beside the 256 MiB of :func:`remapped_kl`. There half-precision hidden states are multiplied in their
    dtype on the tensor cores, with float32 accumulation and logits; a float32 weight, the means over spans and the
    logits' gradient are rounded to that dtype first. The gradients to the hidden states, the weight and the bias are
    formed in the same sweep, accumulated in float32 (float64 for float64); weight rows of no piece of the table get
    exactly 0.

    Args:
        student_hidden: ``[..., D_s]``, flattened to rows; float32, float64, bfloat16 or float16.
        student_weight, student_bias: ``[V_s, D_s]``, ``[V_s]`` or None: the student's output layer, which may be
            its embedding; the dtype of the hidden states, or float32 with half-precision hidden states; or a
            :class:`torch.nn.Linear` as ``student_weight``.
        teacher_hidden: ``[..., D_t]``. Neither it nor the teacher's weights get a gradient.
        teacher_weight, teacher_bias: ``[V_t, D_t]``, ``[V_t]`` or None; V_t at least the rows of the table.
        table, pairs, mask, pair_weights, entry_weights, combine, top_k, remainder, temperature, student_shift,
            teacher_shift, reduction, scale: as in :func:`remapped_kl`; hidden states are averaged over spans, with
            which the output layer commutes.
        backend: ``"cpu"``, ``"triton"`` or ``"reference"``; None chooses by device.

    Returns:
        The loss, float32 (float64 if the hidden states are float64): ``[]``, or ``[P]`` for ``reduction="none"``.

    Raises:
        TypeError, ValueError: as :func:`remapped_kl`; weights that do not fit the hidden states.
    """
    student_weight, student_bias, teacher_weight, teacher_bias = output_layers(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias
    )
    student, teacher = student_hidden.flatten(0, -2), teacher_hidden.detach().flatten(0, -2)
    shifts = student_shift, teacher_shift
    pairs = chosen_pairs(pairs, mask, pair_weights, student_hidden, teacher_hidden, "hidden", shifts)
    columns = student_weight.shape[0], teacher_weight.shape[0]
    dtype = native.accumulation_dtype(student.dtype, teacher.dtype)
    check_remapped_arguments(
        table, *columns, entry_weights, combine, top_k, remainder, temperature, reduction, dtype, "teacher_weight"
    )
    if pair_weights is not None and pair_weights.requires_grad:
        each = linear_remapped_kl(
            student_hidden, student_weight, teacher_hidden, teacher_weight, table, student_bias=student_bias,
            teacher_bias=teacher_bias, pairs=pairs, entry_weights=entry_weights, combine=combine, top_k=top_k,
            remainder=remainder, temperature=temperature, reduction="none", backend=backend,
        )  # fmt: skip
        return scaled(reduce_pairs(each, None, pair_count(pairs, student), reduction, pair_weights), scale)
    choice = resolve("linear_remapped_kl", student.device, backend)
    if choice == "reference":
        loss = reference_linear_remapped_kl(
            student_hidden, student_weight, teacher_hidden, teacher_weight, table, student_bias=student_bias,
            teacher_bias=teacher_bias, pairs=pairs, pair_weights=pair_weights, entry_weights=entry_weights,
            combine=combine, top_k=top_k, remainder=remainder, temperature=temperature, reduction=reduction,
        )  # fmt: skip
        return scaled(loss, scale)
    each = row_scale(pairs, student, reduction, dtype, scale, pair_weights)
    student, teacher, each = pool_sides(student, teacher, pairs, "mean", each, choice)
    needed = wanted_grads(student, student_weight, student_bias)
    return LinearLoss.apply(
        _op, student, student_weight, student_bias, (*kernel_options(combine, top_k, remainder, temperature), choice),
        reduction != "none", needed, each, teacher, teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(), table.indptr, table.ids,
        None if entry_weights is None else entry_weights.detach(),
    )  # fmt: skip
