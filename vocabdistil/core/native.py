"""Tensors to addresses: the one place that calls the compiled module.

Callers have checked shapes, dtypes and devices; here tensors become (address, stride, dtype code), the current
stream and the thread count are passed along, and a missing module gives an error that says what to do.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from .values import INT32_MAX, MadeOf

_module: ModuleType | None
try:
    _module = import_module("vocabdistil._C")
except ImportError as error:  # kept, to be told by whoever needs the module
    _module = None
    _load_error: str | None = str(error)
else:
    _load_error = None

if hasattr(os, "register_at_fork"):
    # A forked child has none of its parent's threads, but an OpenMP runtime that would wait for them: in torch's own
    # operations too, which stand around every kernel. csrc/parallel.h sees to the kernels whatever is set later.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
CUDA_MAX_LAYERS = 64  # kMaxLayers of csrc/ops.h
CUDA_TOTAL_PAIRS = 8192  # kTotalPairs
CUDA_REMAP_CHUNK = 2048  # kRemapChunk
DIVERGENCE_CODES = {"kl": 0, "reverse_kl": 1, "jsd": 2, "mse": 3, "cosine": 4}
UNMATCHED_CODES = {"renormalize": 0, "rest": 1, "drop": 2}


def load_error() -> str | None:
    """Why the compiled module cannot be used, or None."""
    return _load_error


def module() -> ModuleType:
    if _module is None:
        raise ImportError(
            f"vocabdistil._C could not be loaded ({_load_error}); build it with `pip install -e .` in the "
            "source folder, which needs a C++17 compiler"
        )
    return _module


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


# Bytes of a result from which on fresh memory costs more than what fills it, and up to which blocks are kept.
_POOLED = range(1 << 20, 1 << 26)


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """``like.new_empty``, but a large result on the CPU comes from a pool of blocks that earlier results have given
    back (csrc/block.h): the first touch of fresh pages costs as much as a whole kernel."""
    dtype = like.dtype if dtype is None else dtype
    count = math.prod(shape)
    size = count * dtype.itemsize
    if like.device.type != "cpu" or size not in _POOLED or _module is None:
        return like.new_empty(shape, dtype=dtype)
    storage = torch.frombuffer(_module.Block(size), dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[call-overload]  # strides are optional


def _layers(layers: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    return [x.data_ptr() for x in layers], [x.stride(0) for x in layers]


def _coef(coef: Tensor | None, count: int) -> list[float]:
    return [1.0 / count] * count if coef is None else coef.tolist()


def span_mean_fwd(
    x: Sequence[Tensor], start: Tensor, end: Tensor, coef: Tensor | None, mean: bool, out: Tensor
) -> None:
    """x: layers [N, D], unit column stride; start, end: int32 [P]; coef: [n] or None (1/n each); out: [P, D]. Raises
    ValueError for bad spans, as do all that take them."""
    module().span_mean_fwd(
        DTYPE_CODES[x[0].dtype], *_layers(x), _coef(coef, len(x)), x[0].shape[0], start.data_ptr(), end.data_ptr(),
        start.numel(), x[0].shape[1], mean, DTYPE_CODES[out.dtype], out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def span_mean_bwd(
    grad: Tensor, start: Tensor, end: Tensor, coef: Tensor | None, mean: bool, out: Sequence[Tensor]
) -> None:
    """grad: [P, D], unit column stride; out: contiguous layers [N, D], every row written."""
    module().span_mean_bwd(
        DTYPE_CODES[grad.dtype], grad.data_ptr(), grad.stride(0), start.data_ptr(), end.data_ptr(), start.numel(),
        grad.shape[1], mean, DTYPE_CODES[out[0].dtype], [x.data_ptr() for x in out], _coef(coef, len(out)),
        out[0].shape[0], torch.get_num_threads(),
    )  # fmt: skip


def span_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], spans: Sequence[Tensor], scale: Tensor,
    student_coef: Tensor | None, teacher_coef: Tensor | None, divergence: int, mean: bool, temperature: float,
    beta: float, loss: Tensor, total: Tensor, student_grads: Sequence[Tensor], teacher_grads: Sequence[Tensor],
) -> None:  # fmt: skip
    """Layers [N, D], unit column stride; spans: the four int32 [P] of SpanPairs; scale, loss: [P]; total: []."""
    module().span_loss(
        DTYPE_CODES[student[0].dtype], *_layers(student), _coef(student_coef, len(student)),
        [g.data_ptr() for g in student_grads], student[0].shape[0],
        DTYPE_CODES[teacher[0].dtype], *_layers(teacher), _coef(teacher_coef, len(teacher)),
        [g.data_ptr() for g in teacher_grads], teacher[0].shape[0],
        *(s.data_ptr() for s in spans), spans[0].numel(), student[0].shape[1], divergence, mean, temperature, beta,
        scale.data_ptr(), loss.data_ptr(), total.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def _rows(x: Tensor) -> tuple[int, int, int, int, int]:
    return DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0), x.shape[0], x.shape[1]


def _addresses(spans: Sequence[Tensor]) -> list[int]:
    """The four vectors of SpanPairs, or none: row p with row p."""
    return [s.data_ptr() for s in spans] or [0] * 4


def matched_kl(
    student: Tensor, teacher: Tensor, spans: Sequence[Tensor], student_ids: Tensor, teacher_ids: Tensor,
    unmatched: int, mean: bool, temperature: float, scale: Tensor, loss: Tensor, total: Tensor, grad: Tensor | None,
) -> None:  # fmt: skip
    """Logits [N, V], unit column stride; spans: none or four int32 [P]; ids: int32 [V_m]; scale, loss: [P]; total: [].

    grad: contiguous, like the student. Raises ValueError for bad ids, spans.
    """
    module().matched_kl(
        _rows(student), _rows(teacher), *_addresses(spans), student_ids.data_ptr(), teacher_ids.data_ptr(),
        student_ids.numel(), scale.numel(), unmatched, mean, temperature, scale.data_ptr(), loss.data_ptr(),
        total.data_ptr(), _address(grad), torch.get_num_threads(),
    )  # fmt: skip


# hidden, weight, bias, lengths, ids.
LinearSide = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None", Tensor]


def _side(hidden: Tensor, weight: Tensor, bias: Tensor | None, lengths: Tensor | None, ids: Tensor | None) -> tuple:
    return _rows(hidden), _rows(weight), _address(bias), _address(lengths), _address(ids)


def linear_matched_kl(
    student: LinearSide, teacher: LinearSide, unmatched: int, temperature: float, budget: int,
    scale: Tensor, loss: Tensor, total: Tensor, grads: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Each side: hidden [R, D] and weight [V, D] with unit column stride, bias [V] or None, lengths [R] or None (1
    each), ids int32 [V_m]; scale, loss: [R]; total: []; grads of hidden, weight and bias, contiguous, or None: all but
    the weights and the hidden states in the accumulation dtype. Raises ValueError for bad ids.
    """

    module().linear_matched_kl(
        _side(*student), _side(*teacher), student[4].numel(), unmatched, temperature, budget, scale.data_ptr(),
        loss.data_ptr(), total.data_ptr(), *(_address(g) for g in grads), torch.get_num_threads(),
    )  # fmt: skip


# log_prob, shift, share: [N] in the accumulation dtype, TokenOddsOut of csrc/ops.h.
TokenOdds = tuple[Tensor, Tensor, Tensor]


def _tokens(ids: Tensor, needed: Tensor) -> tuple[int, int]:
    return ids.data_ptr(), needed.data_ptr()


def _odds(of: TokenOdds) -> tuple[int, int, int]:
    return of[0].data_ptr(), of[1].data_ptr(), of[2].data_ptr()


def log_prob_fwd(logits: Tensor, ids: Tensor, needed: Tensor, out: TokenOdds) -> None:
    """Logits [N, V], unit column stride; ids: int64 [N]; needed: bool [N]. Raises ValueError for bad ids, as do all of
    these."""
    module().log_prob_fwd(_rows(logits), _tokens(ids, needed), _odds(out), torch.get_num_threads())


def log_prob_bwd(logits: Tensor, ids: Tensor, needed: Tensor, of: TokenOdds, grad: Tensor, out: Tensor) -> None:
    """grad: [N] in the accumulation dtype; out: contiguous, like the logits, every row written."""
    module().log_prob_bwd(
        _rows(logits), _tokens(ids, needed), _odds(of), grad.data_ptr(), out.data_ptr(), torch.get_num_threads()
    )


def linear_log_prob_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, needed: Tensor, out: TokenOdds
) -> None:
    """hidden [N, D], weight [V, D], unit column stride; bias [V] in the accumulation dtype or None."""
    module().linear_log_prob_fwd(
        _rows(hidden), _rows(weight), _address(bias), _tokens(ids, needed), _odds(out), torch.get_num_threads()
    )


def linear_log_prob_bwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, needed: Tensor, of: TokenOdds, grad: Tensor,
    budget: int, grads: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """grads: of hidden, weight and bias, contiguous, in the accumulation dtype, or None."""
    module().linear_log_prob_bwd(
        _rows(hidden), _rows(weight), _address(bias), _tokens(ids, needed), _odds(of), grad.data_ptr(), budget,
        *(_address(g) for g in grads), torch.get_num_threads(),
    )  # fmt: skip


def _plan(plan: Sequence[Tensor | None]) -> tuple[int, ...]:
    """rows [M], shapes [B, 2], ids [nnz], indptr [columns + 1], pieces_of [nnz], int32; weights and weights_of [nnz] in
    the accumulation dtype, or None: RemapPlan of csrc/ops.h."""
    rows, shapes, ids, indptr, pieces_of, weights, weights_of = plan
    assert rows is not None and shapes is not None
    return (
        rows.data_ptr(), rows.numel(), shapes.data_ptr(), shapes.shape[0],
        *(_address(x) for x in (ids, indptr, pieces_of, weights, weights_of)),
    )  # fmt: skip


def remapped_kl(
    student: Tensor, teacher: Tensor, spans: Sequence[Tensor], plan: Sequence[Tensor | None], logsumexp: bool,
    top_k: int, remainder: int, temperature: float, scale: Tensor, loss: Tensor, total: Tensor, grad: Tensor | None,
) -> None:  # fmt: skip
    """As matched_kl; plan: see _plan; top_k: 0 for all."""
    module().remapped_kl(
        _rows(student), _rows(teacher), *_addresses(spans), _plan(plan), scale.numel(), logsumexp, top_k, remainder,
        temperature, scale.data_ptr(), loss.data_ptr(), total.data_ptr(), _address(grad), torch.get_num_threads(),
    )  # fmt: skip


def linear_remapped_kl(
    student: tuple[Tensor, Tensor, Tensor | None], teacher: tuple[Tensor, Tensor, Tensor | None], columns: Tensor,
    plan: Sequence[Tensor | None], logsumexp: bool, top_k: int, remainder: int, temperature: float, budget: int,
    scale: Tensor, loss: Tensor, total: Tensor, grads: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Each side: hidden [R, D] and weight [V, D] with unit column stride, bias [V] or None; columns: int32, those of
    the student that the plan's ids are positions in; plan: see _plan; scale, loss, total, grads: as linear_matched_kl.
    A row of scale 0 has loss 0."""
    module().linear_remapped_kl(
        _side(*student, None, columns), _side(*teacher, None, None), _plan(plan), columns.numel(), logsumexp, top_k,
        remainder, temperature, budget, scale.data_ptr(), loss.data_ptr(), total.data_ptr(),
        *(_address(g) for g in grads), torch.get_num_threads(),
    )  # fmt: skip


def relation_loss(
    student: Tensor, teacher: Tensor, first: Tensor, last: Tensor, scale: Tensor, heads: int, loss: Tensor,
    total: Tensor, grad: Tensor | None,
) -> None:  # fmt: skip
    """Rows [P, D_s], [P, D_t] of one dtype, float32 or float64, contiguous as are all; first, last: int32 [P], pairs of
    one text with one ``first``, none (last = first) for a pair that is left out; scale, loss: [P]; total: []."""
    module().relation_loss(
        DTYPE_CODES[student.dtype], student.data_ptr(), teacher.data_ptr(), student.shape[0], student.shape[1],
        teacher.shape[1], heads, first.data_ptr(), last.data_ptr(), scale.data_ptr(), loss.data_ptr(),
        total.data_ptr(), _address(grad), torch.get_num_threads(),
    )  # fmt: skip


def _cuda_rows(layers: Sequence[Tensor], coef: Tensor | None) -> tuple:
    return DTYPE_CODES[layers[0].dtype], *_layers(layers), layers[0].shape[0], _address(coef)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@contextlib.contextmanager
def _cuda_stream(device: torch.device) -> Iterator[int]:
    """Makes the device current, as launches go there; gives its current stream."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


def cuda_span_mean_fwd(
    x: Sequence[Tensor], start: Tensor, end: Tensor, coef: Tensor | None, mean: bool, out: Tensor
) -> None:
    """As :func:`span_mean_fwd`; coef: float64 [n] on the device, or None (1/n each)."""
    with _cuda_stream(out.device) as stream:
        module().cuda_span_mean_fwd(
            *_cuda_rows(x, coef), start.data_ptr(), end.data_ptr(), *out.shape, mean, DTYPE_CODES[out.dtype],
            out.data_ptr(), stream,
        )  # fmt: skip


def cuda_span_mean_bwd(
    grad: Tensor, start: Tensor, end: Tensor, coef: Tensor | None, mean: bool, out: Sequence[Tensor]
) -> None:
    """As :func:`span_mean_bwd`; coef: float64 [n] on the device, or None (1/n each)."""
    with _cuda_stream(grad.device) as stream:
        module().cuda_span_mean_bwd(
            DTYPE_CODES[grad.dtype], grad.data_ptr(), grad.stride(0), start.data_ptr(), end.data_ptr(), *grad.shape,
            mean, *_cuda_rows(out, coef), stream,
        )  # fmt: skip


def total_parts(loss: Tensor) -> Tensor | None:
    """Memory for the first stage of a total of losses ``[P]``; None where one stage does."""
    parts = -(-loss.numel() // CUDA_TOTAL_PAIRS)
    return loss.new_empty(parts) if parts > 1 else None


def cuda_span_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], spans: Sequence[Tensor], weights: Tensor | None, base: float,
    student_coef: Tensor | None, teacher_coef: Tensor | None, divergence: int, mean: bool, temperature: float,
    beta: float, loss: Tensor | None, total: Tensor | None, grads: Sequence[Tensor], upstream: Tensor | None,
    formed: Tensor | None,
) -> None:  # fmt: skip
    """The arguments of ``triton_kernels.span_loss.span_loss``; one dtype, at most CUDA_MAX_LAYERS layers a side."""
    with _cuda_stream(student[0].device) as stream:
        parts = None if total is None or loss is None else total_parts(loss)
        module().cuda_span_loss(
            *_cuda_rows(student, student_coef), [g.data_ptr() for g in grads], *_cuda_rows(teacher, teacher_coef),
            *(s.data_ptr() for s in spans), spans[0].numel(), student[0].shape[1], divergence, mean, temperature, beta,
            base, _address(weights), _address(upstream), _address(formed), _address(loss), _address(total),
            _address(parts), stream,
        )  # fmt: skip


# teacher_of [V_s], student_of [V_t] (int32, -1 where there is none), teacher_matched [V_t] (int8): GpuMatchedTables of
# csrc/ops.h; the last two are None for "renormalize".
MatchedTables = tuple[Tensor, "Tensor | None", "Tensor | None"]


def _new_tables(ids: Tensor, v_s: int, v_t: int, whole: bool) -> MatchedTables:
    teacher_of = ids.new_empty(v_s, dtype=torch.int32)
    if not whole:
        return teacher_of, None, None
    return teacher_of, ids.new_empty(v_t, dtype=torch.int32), ids.new_empty(v_t, dtype=torch.int8)


def _make_tables(student_ids: Tensor, teacher_ids: Tensor, v_s: int, v_t: int, whole: bool) -> MatchedTables:
    tables = _new_tables(student_ids, v_s, v_t, whole)
    wide_student, wide_teacher = (ids.dtype == torch.int64 for ids in (student_ids, teacher_ids))
    with _cuda_stream(student_ids.device) as stream:
        module().cuda_matched_tables(
            student_ids.data_ptr(), wide_student, teacher_ids.data_ptr(), wide_teacher, student_ids.numel(), v_s, v_t,
            *map(_address, tables), stream,
        )  # fmt: skip
    return tables


_tables = MadeOf(_make_tables)


def matched_tables(
    student_ids: Tensor, teacher_ids: Tensor, v_s: int, v_t: int, whole: bool, keep: bool
) -> MatchedTables:
    """keep: whether they may be kept for the next call, and taken from one before."""
    return (_tables.get if keep else _tables.make)(student_ids, teacher_ids, v_s, v_t, whole)


def cuda_matched_kl(
    student: Tensor, teacher: Tensor, spans: Sequence[Tensor], student_ids: Tensor, teacher_ids: Tensor,
    scale: Tensor, unmatched: int, mean: bool, temperature: float, keep: bool, loss: Tensor | None,
    total: Tensor | None, grad: Tensor | None, upstream: Tensor | None = None, formed: Tensor | None = None,
) -> None:  # fmt: skip
    """The arguments of ``triton_kernels.matched_kl.matched_kl``; no float64."""
    v_s, v_t = student.shape[1], teacher.shape[1]
    tables = matched_tables(student_ids, teacher_ids, v_s, v_t, unmatched != UNMATCHED_CODES["renormalize"], keep)
    with _cuda_stream(student.device) as stream:
        parts = None if total is None or loss is None else total_parts(loss)
        module().cuda_matched_kl(
            _rows(student), _rows(teacher), *_addresses(spans), *map(_address, tables), student_ids.numel(),
            scale.numel(), unmatched, mean, temperature, scale.data_ptr(), _address(upstream), _address(formed),
            _address(loss), _address(total), _address(parts), _address(grad), stream,
        )  # fmt: skip


def _batch(ids: Tensor, mask: Tensor | None, indptr: Tensor, pieces: Tensor | None) -> tuple:
    ids_view, mask_view = (
        (0, 1, 0) if x is None else (x.data_ptr(), x.element_size(), x.stride(0)) for x in (ids, mask)
    )
    nnz = INT32_MAX if pieces is None else pieces.numel()
    return ids_view, mask_view, *ids.shape, indptr.data_ptr(), _address(pieces), indptr.numel() - 1, nnz


def cuda_remap_measure(ids: Tensor, mask: Tensor | None, indptr: Tensor, out: Tensor) -> None:
    """ids, mask: integers ``[B, L]``, columns adjacent; indptr: int32 ``[V + 1]``; out: int64 ``[4, B, chunks]``, of
    every chunk its pieces, the tokens kept, those with pieces, and those outside the table."""
    with _cuda_stream(ids.device) as stream:
        module().cuda_remap_measure(_batch(ids, mask, indptr, None), out.data_ptr(), stream)


def cuda_remap_write(
    ids: Tensor, mask: Tensor | None, indptr: Tensor, pieces: Tensor, ends: Tensor | None, pair_ends: Tensor | None,
    unk_id: int, pad_id: int, out: Sequence[Tensor],
) -> None:  # fmt: skip
    """pieces: int32 ``[nnz]``; ends: int64 ``[B, chunks]``, pieces of a sequence up to the end of a chunk, or None
    where it has one; pair_ends: int64 ``[B * chunks]``, tokens kept up to there, or None for a pair per token; out:
    int64 input_ids and attention ``[B, W]``, int32 spans ``[4, pairs]``, int32 ``[B * chunks]``, pairs of two spans
    that are not empty."""
    with _cuda_stream(ids.device) as stream:
        module().cuda_remap_write(
            _batch(ids, mask, indptr, pieces), _address(ends), _address(pair_ends), out[0].shape[1], out[2].shape[1],
            unk_id, pad_id, *map(_address, out), stream,
        )  # fmt: skip


def remap_totals(found: Tensor) -> Tensor:
    """Of what GPU kernels have found of every chunk, ``[4, B, chunks]``, int64 ``[4]``: the largest sum of the first
    numbers over a sequence, and the sums of the others."""
    rows = found.sum(2)
    longest = torch.nn.functional.pad(rows[0], (0, 1)).amax()  # of no sequences: 0
    return torch.cat([longest[None], rows[1:].sum(1)])


def remap_results(ids: Tensor, width: int, pairs: int, chunks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for what GPU kernels write of ``ids [B, L]``: input ids, attention, spans, and pairs of every chunk of two
    spans that are not empty."""
    input_ids = ids.new_empty(len(ids), width, dtype=torch.int64)
    spans, nonempty = (ids.new_empty(n, dtype=torch.int32) for n in ((4, pairs), (len(ids) * chunks,)))
    return input_ids, torch.empty_like(input_ids), spans, nonempty


def _chunks(ids: Tensor) -> int:
    return max(-(-ids.shape[1] // CUDA_REMAP_CHUNK), 1)


def _measured(ids: Tensor, mask: Tensor | None, indptr: Tensor) -> Tensor:
    found = ids.new_empty(4, ids.shape[0], _chunks(ids), dtype=torch.int64)
    if found.numel():
        cuda_remap_measure(ids, mask, indptr, found)
    return found


def cuda_measure(ids: Tensor, mask: Tensor | None, indptr: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`vocabdistil.reference.remap.measure`, on columns that are adjacent."""
    found = _measured(ids, mask, indptr)
    return remap_totals(found), found


def cuda_remap(
    ids: Tensor, mask: Tensor | None, indptr: Tensor, pieces: Tensor, unk_id: int, pad_id: int, width: int,
    measured: Tensor | None = None, pairs: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As :func:`vocabdistil.reference.remap.remap`, on columns that are adjacent."""
    (batch, length), chunks = ids.shape, _chunks(ids)
    if measured is None and chunks > 1:
        measured = _measured(ids, mask, indptr)
    ends = None if measured is None or chunks == 1 else measured[0].cumsum(1)
    pair_ends = None if measured is None or pairs is None else measured[1].flatten().cumsum(0)
    out = remap_results(ids, width, batch * length if pairs is None else pairs, chunks)
    if batch:
        cuda_remap_write(ids, mask, indptr, pieces, ends, pair_ends, unk_id, pad_id, out)
    return *out[:3], out[3].sum()
