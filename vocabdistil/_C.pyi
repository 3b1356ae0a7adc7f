"""The compiled module. Private: its functions take addresses, sizes and codes, as csrc/ops.h describes them, and are
called through ``core/native.py`` and ``alignment/``, which check everything before. An address of what is not there
is 0; strides are in elements."""

import builtins
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

_Address: TypeAlias = int
_Addresses: TypeAlias = Sequence[int]
_Strides: TypeAlias = Sequence[int]
# rows and how many, shapes and how many, ids, indptr, pieces_of, weights, weights_of.
_Plan: TypeAlias = tuple[_Address, int, _Address, int, _Address, _Address, _Address, _Address, _Address]
# Dtype code, address, row stride, rows, columns.
_Rows: TypeAlias = tuple[int, _Address, int, int, int]
# hidden, weight, and the addresses of bias, lengths and ids.
_LinearSide: TypeAlias = tuple[_Rows, _Rows, _Address, _Address, _Address]
# Addresses of the ids and of which are needed; of log_prob, shift and share.
_Tokens: TypeAlias = tuple[_Address, _Address]
_Odds: TypeAlias = tuple[_Address, _Address, _Address]
# Address, bytes per item, row stride.
_View: TypeAlias = tuple[_Address, int, int]
# Ids, mask, batch, length; indptr, pieces, rows, and how many pieces.
_Batch: TypeAlias = tuple[_View, _View, int, int, _Address, _Address, int, int]
# Address, bytes per item, address of the mask, length.
_Offsets: TypeAlias = tuple[_Address, int, _Address, int]

cxx_compiler: str
isas: str
cuda_compiler: str | None
cuda_architectures: str

def active_isa() -> str: ...

# Operations on the CPU.

def span_mean_fwd(
    dtype: int, data: _Addresses, stride: _Strides, coef: Sequence[float], rows: int, start: _Address, end: _Address,
    pairs: int, dim: int, mean: bool, out_dtype: int, out: _Address, threads: int, /,
) -> None: ...  # fmt: skip
def span_mean_bwd(
    grad_dtype: int, grad: _Address, grad_stride: int, start: _Address, end: _Address, pairs: int, dim: int,
    mean: bool, dtype: int, out: _Addresses, coef: Sequence[float], rows: int, threads: int, /,
) -> None: ...  # fmt: skip
def span_loss(
    s_dtype: int, s_data: _Addresses, s_stride: _Strides, s_coef: Sequence[float], s_grad: _Addresses, s_rows: int,
    t_dtype: int, t_data: _Addresses, t_stride: _Strides, t_coef: Sequence[float], t_grad: _Addresses, t_rows: int,
    s_start: _Address, s_end: _Address, t_start: _Address, t_end: _Address, pairs: int, dim: int, divergence: int,
    mean: bool, temperature: float, beta: float, scale: _Address, loss: _Address, total: _Address, threads: int, /,
) -> None: ...  # fmt: skip
def matched_kl(
    student: _Rows, teacher: _Rows, s_start: _Address, s_end: _Address, t_start: _Address, t_end: _Address,
    s_ids: _Address, t_ids: _Address, matched: int, pairs: int, unmatched: int, mean: bool, temperature: float,
    scale: _Address, loss: _Address, total: _Address, grad: _Address, threads: int, /,
) -> None: ...  # fmt: skip
def linear_matched_kl(
    student: _LinearSide, teacher: _LinearSide, matched: int, unmatched: int, temperature: float, budget: int,
    scale: _Address, loss: _Address, total: _Address, grad_hidden: _Address, grad_weight: _Address,
    grad_bias: _Address, threads: int, /,
) -> None: ...  # fmt: skip
def log_prob_fwd(logits: _Rows, tokens: _Tokens, out: _Odds, threads: int, /) -> None: ...
def log_prob_bwd(
    logits: _Rows, tokens: _Tokens, of: _Odds, grad: _Address, grad_logits: _Address, threads: int, /
) -> None: ...
def linear_log_prob_fwd(
    hidden: _Rows, weight: _Rows, bias: _Address, tokens: _Tokens, out: _Odds, threads: int, /
) -> None: ...
def linear_log_prob_bwd(
    hidden: _Rows, weight: _Rows, bias: _Address, tokens: _Tokens, of: _Odds, grad: _Address, budget: int,
    grad_hidden: _Address, grad_weight: _Address, grad_bias: _Address, threads: int, /,
) -> None: ...  # fmt: skip
def remapped_kl(
    student: _Rows, teacher: _Rows, s_start: _Address, s_end: _Address, t_start: _Address, t_end: _Address,
    of: _Plan, pairs: int, logsumexp: bool, top_k: int, remainder: int, temperature: float, scale: _Address,
    loss: _Address, total: _Address, grad: _Address, threads: int, /,
) -> None: ...  # fmt: skip
def linear_remapped_kl(
    student: _LinearSide, teacher: _LinearSide, of: _Plan, columns: int, logsumexp: bool, top_k: int, remainder: int,
    temperature: float, budget: int, scale: _Address, loss: _Address, total: _Address, grad_hidden: _Address,
    grad_weight: _Address, grad_bias: _Address, threads: int, /,
) -> None: ...  # fmt: skip
def relation_loss(
    dtype: int, student: _Address, teacher: _Address, pairs: int, student_dim: int, teacher_dim: int, heads: int,
    first: _Address, last: _Address, scale: _Address, loss: _Address, total: _Address, grad: _Address,
    threads: int, /,
) -> None: ...  # fmt: skip

# Operations on a GPU: only where the module was built with CUDA.

def cuda_problem() -> str: ...
def cuda_span_mean_fwd(
    dtype: int, data: _Addresses, stride: _Strides, rows: int, coef: _Address, start: _Address, end: _Address,
    pairs: int, dim: int, mean: bool, out_dtype: int, out: _Address, stream: _Address, /,
) -> None: ...  # fmt: skip
def cuda_span_mean_bwd(
    grad_dtype: int, grad: _Address, grad_stride: int, start: _Address, end: _Address, pairs: int, dim: int,
    mean: bool, dtype: int, out: _Addresses, stride: _Strides, rows: int, coef: _Address, stream: _Address, /,
) -> None: ...  # fmt: skip
def cuda_span_loss(
    s_dtype: int, s_data: _Addresses, s_stride: _Strides, s_rows: int, s_coef: _Address, grad: _Addresses,
    t_dtype: int, t_data: _Addresses, t_stride: _Strides, t_rows: int, t_coef: _Address, s_start: _Address,
    s_end: _Address, t_start: _Address, t_end: _Address, pairs: int, dim: int, divergence: int, mean: bool,
    temperature: float, beta: float, base: float, weights: _Address, upstream: _Address, formed: _Address,
    loss: _Address, total: _Address, parts: _Address, stream: _Address, /,
) -> None: ...  # fmt: skip
def cuda_matched_tables(
    student_ids: _Address, wide_student: bool, teacher_ids: _Address, wide_teacher: bool, matched: int,
    student_columns: int, teacher_columns: int, teacher_of: _Address, student_of: _Address, teacher_matched: _Address,
    stream: _Address, /,
) -> None: ...  # fmt: skip
def cuda_matched_kl(
    student: _Rows, teacher: _Rows, s_start: _Address, s_end: _Address, t_start: _Address, t_end: _Address,
    teacher_of: _Address, student_of: _Address, teacher_matched: _Address, matched: int, pairs: int, unmatched: int,
    mean: bool, temperature: float, scale: _Address, upstream: _Address, formed: _Address, loss: _Address,
    total: _Address, parts: _Address, grad: _Address, stream: _Address, /,
) -> None: ...  # fmt: skip
def cuda_remap_measure(of: _Batch, out: _Address, stream: _Address, /) -> None: ...
def cuda_remap_write(
    of: _Batch, ends: _Address, pair_ends: _Address, width: int, pairs: int, unk_id: int, pad_id: int,
    input_ids: _Address, attention: _Address, spans: _Address, nonempty: _Address, stream: _Address, /,
) -> None: ...  # fmt: skip

# The remap table.

class Block:
    """So many bytes of memory, from a pool; has the buffer protocol."""

    def __init__(self, size: int, /) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class RemapIndex:
    @property
    def rows(self) -> int: ...
    @property
    def nnz(self) -> int: ...
    def copy_to(self, indptr: _Address, ids: _Address, /) -> None: ...

def remap_build(
    teacher: list[str | None], student: list[str | None], teacher_prefix: str, student_prefix: str, max_chars: int,
    unk_id: int, overrides: Mapping[int, Sequence[int]], student_size: int, /,
) -> RemapIndex: ...  # fmt: skip
def remap_from_csr(indptr: _Address, bounds: int, ids: _Address, nnz: int, student_size: int, /) -> RemapIndex: ...
def remap_run(
    index: RemapIndex, ids: _View, mask: _View, batch: int, length: int, max_length: int, pad_id: int, threads: int, /
) -> tuple[int, int, int, int, Block | None]: ...

# Alignments.

class MatchArgs:
    def __init__(
        self, teacher_ids: _Address, student_ids: _Address, teacher_mask: _Address, student_mask: _Address,
        sizes: tuple[int, int, int], teacher: tuple[_Address, int], student: tuple[_Address, int], matched: int,
        found: _Address, counts: _Address, threads: int, /,
    ) -> None: ...  # fmt: skip

class Surfaces:
    def __init__(
        self, tokens: list[bytes], kinds: bytes, spaces: Sequence[tuple[int, str]], bytes: bool, folds: bool,
        drops_unknown: bool, whole_words: bool, /,
    ) -> None: ...  # fmt: skip

class WordPattern:
    def __init__(self, style: int, contractions: bool, digits: int, classes: bytes, /) -> None: ...
    def cut(self, text: str, /) -> list[int] | None: ...

class Side:
    def __init__(
        self, surfaces: Surfaces, ask: Callable[[int], Sequence[tuple[Sequence[builtins.bytes], builtins.bytes]]],
        rows: int, ends: tuple[int, int], kinds: Sequence[tuple[int, int]], max_length: int, keep_last: bool,
        words_at_spaces: bool, places: builtins.bytes, pattern: WordPattern | None, /,
    ) -> None: ...  # fmt: skip
    def read(
        self, texts: list[str], rows: Sequence[int], encodings: list[object], words: bool, spell: bool, offsets: bool,
        threads: int, /,
    ) -> list[int]: ...  # fmt: skip
    def length(self) -> int: ...
    def write(self, length: int, pad_id: int, input_ids: _Address, attention_mask: _Address, /) -> None: ...
    def row(self, b: int, /) -> tuple[list[int], list[int], int]: ...
    def floor(self, b: int, /) -> int: ...
    def bytes(
        self, texts: list[str], starts: _Address, ends: _Address, count: int, length: int, /
    ) -> tuple[int, int]: ...

def align_match_plan(args: MatchArgs, /) -> int: ...
def align_match_write(args: MatchArgs, pairs: _Address, /) -> None: ...
def align_sides(
    teacher: Side, student: Side, teacher_length: int, student_length: int, threads: int, /
) -> bytearray: ...
def align_offsets(teacher: _Offsets, student: _Offsets, batch: int, threads: int, /) -> bytearray | None: ...
def align_pad(
    rows: list[list[int]], length: int, pad_id: int, input_ids: _Address, attention_mask: _Address, /
) -> None: ...
def align_bad_text(texts: list[object], /) -> int: ...
def align_cover(
    ids: _Address, mask: _Address, size: int, spans: Sequence[_Address], count: int, unknown_id: int, examples: int, /
) -> tuple[int, int, int, int, int, list[tuple[int, int]]]: ...
