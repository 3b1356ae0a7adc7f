"""Argument checks shared by every implementation of a loss.

They look at types, shapes, dtypes and devices only: no check reads a device tensor, so none waits for a
device, and ``torch.compile`` traces through all of them. Index vectors that lie in host memory are also
checked for their range, outside compilation.

A wrong type or dtype raises ``TypeError``, everything else ``ValueError``; each message is one line that
names the argument, what was expected and what came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from .values import INT32_MAX, integer

__all__ = [
    "COMBINES",
    "DIVERGENCES",
    "Layers",
    "LIKELIHOOD_DIVERGENCES",
    "LayerWeights",
    "POOLINGS",
    "REDUCTIONS",
    "UNMATCHED",
    "Matched",
    "Projection",
    "RemapLike",
    "Scale",
    "as_output_layer",
    "as_projection",
    "check_beta",
    "check_choice",
    "check_columns",
    "check_entry_weights",
    "check_float",
    "check_index_range",
    "check_keepable",
    "check_layer_weights",
    "check_layers",
    "check_matched",
    "check_projection",
    "check_reference_backend",
    "check_remap",
    "check_same_kind",
    "check_scale",
    "check_sides",
    "check_temperature",
    "check_tensor",
    "check_token_ids",
    "check_top_k",
    "check_weight_dtype",
    "compute_dtype",
]

Layers = Tensor | Sequence[Tensor]
LayerWeights = Tensor | Sequence[float]
Projection = tuple[Tensor | nn.Module | None, Tensor | None]
Scale = float | Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int32, torch.int64)
DIVERGENCES = ("kl", "reverse_kl", "jsd", "mse", "cosine")
LIKELIHOOD_DIVERGENCES = ("kl", "total_variation")
COMBINES = ("sum", "logsumexp")
POOLINGS = ("mean", "sum")
REDUCTIONS = ("batchmean", "sum", "none")
UNMATCHED = ("renormalize", "rest", "drop")


class Matched(Protocol):
    """The vocabulary that both sides share: column ``teacher_ids[i]`` means what ``student_ids[i]`` means."""

    teacher_ids: Tensor
    student_ids: Tensor


class RemapLike(Protocol):
    """Teacher id -> student ids, as CSR: row ``v`` is ``ids[indptr[v]:indptr[v + 1]]``."""

    indptr: Tensor
    ids: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for float32 and the half types."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kind_of(value: object) -> str:
    return type(value).__name__


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(value: object, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {kind_of(value)}")
    return value


def check_float(value: object, name: str, dims: tuple[int, ...] | None = None) -> Tensor:
    """A floating tensor, with one of ``dims`` dimensions if given."""
    value = check_tensor(value, name)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {dtype_name(value.dtype)}")
    if dims is not None and value.dim() not in dims:
        wanted = " or ".join(str(d) for d in dims)
        raise ValueError(f"{name}: expected {wanted} dimensions, got shape {tuple(value.shape)}")
    return value


def check_sides(student: Tensor, student_name: str, teacher: Tensor, teacher_name: str) -> None:
    """One device; any two dtypes go together. No side of inference mode where a gradient is asked for."""
    if student.device != teacher.device:
        raise ValueError(f"{teacher_name}: expected device {student.device} as {student_name}, got {teacher.device}")
    check_keepable(teacher, teacher_name, student)


def check_keepable(x: Tensor, name: str, *learned: object) -> None:
    """Raises where autograd would have to keep a tensor of inference mode, for the gradient of what is learned."""
    if torch.compiler.is_compiling() or not (x.is_inference() and torch.is_grad_enabled()):
        return
    tensors = [x for value in learned for x in (value.parameters() if isinstance(value, nn.Module) else [value])]
    if any(isinstance(value, Tensor) and value.requires_grad for value in tensors):
        raise ValueError(
            f"{name}: expected a tensor that autograd can keep, got one made under torch.inference_mode(): make it "
            "under torch.no_grad(), or pass a clone() of it"
        )


def check_same_kind(a: Tensor, a_name: str, b: Tensor, b_name: str) -> None:
    """One device and one dtype (any floating ones under autocast, which leaves both as they come): of one side."""
    if a.device != b.device:
        raise ValueError(f"{b_name}: expected device {a.device} as {a_name}, got {b.device}")
    if a.dtype != b.dtype and not torch.is_autocast_enabled(a.device.type):
        raise TypeError(f"{b_name}: expected dtype {dtype_name(a.dtype)} as {a_name}, got {dtype_name(b.dtype)}")


def check_choice(value: object, name: str, choices: Sequence[str | None]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_real(value: object, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {kind_of(value)}")


def check_temperature(temperature: float) -> None:
    _check_real(temperature, "temperature")
    # Beyond these float32 has neither T^2 nor 1 / T. Traceable where the compiler makes the number a symbol.
    if not 1e-18 < temperature < 1e18:
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature} (not from 1e-18 to 1e18)")


def check_beta(beta: float) -> None:
    _check_real(beta, "beta")
    if not 0 < beta < 1:
        raise ValueError(f"beta: expected a number between 0 and 1 (both excluded), got {beta}")


def check_scale(scale: object) -> Scale:
    """What a loss is multiplied with: a finite number, or a tensor ``[]``."""
    if isinstance(scale, Tensor):
        return check_float(scale, "scale", dims=(0,))
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a number or a tensor, got {kind_of(scale)}")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale: expected a finite number, got {scale}")
    return scale


def check_reference_backend(backend: str | None) -> None:
    check_choice(backend, "backend", (None, "reference"))


def check_layers(value: object, name: str) -> tuple[Tensor, ...]:
    """One tensor, or a list of tensors of one shape, dtype and device -> a tuple of ``[N, D]`` tensors."""
    layers = (value,) if isinstance(value, Tensor) else value
    if not isinstance(layers, (list, tuple)):
        raise TypeError(f"{name}: expected a tensor or a list of tensors, got {kind_of(value)}")
    if not layers:
        raise ValueError(f"{name}: expected at least one layer, got an empty list")
    several = len(layers) > 1
    for i, layer in enumerate(layers):
        check_float(layer, f"{name}[{i}]" if several else name, dims=(2, 3))
        if not layer.shape[-1]:
            raise ValueError(f"{name}: expected a hidden size of at least 1, got shape {tuple(layer.shape)}")
        if i:
            check_same_kind(layers[0], f"{name}[0]", layer, f"{name}[{i}]")
            if layer.shape != layers[0].shape:
                raise ValueError(
                    f"{name}[{i}]: expected shape {tuple(layers[0].shape)} as {name}[0], "
                    f"got {tuple(layer.shape)}"
                )
    return tuple(layer.flatten(0, -2) for layer in layers)


def check_layer_weights(weights: LayerWeights | None, layers: Sequence[Tensor], name: str) -> None:
    """None, or one weight per layer: a floating tensor ``[n]`` or a list of n numbers whose sum is not 0."""
    if weights is None:
        return
    if isinstance(weights, Tensor):
        check_float(weights, name, dims=(1,))
        check_weight_dtype(weights, name, layers[0])
        count = weights.shape[0]
    elif isinstance(weights, (list, tuple)):
        for i, weight in enumerate(weights):
            _check_real(weight, f"{name}[{i}]")
        count = len(weights)
        total = sum(weights)
        if count and not (math.isfinite(total) and total != 0):
            raise ValueError(f"{name}: expected weights with a finite sum that is not 0, got {total}")
    else:
        raise TypeError(f"{name}: expected a tensor or a list of numbers, got {kind_of(weights)}")
    if count != len(layers):
        raise ValueError(f"{name}: expected one weight per layer ({len(layers)}), got {count}")


def check_weight_dtype(value: Tensor, name: str, x: Tensor) -> None:
    """A parameter on the device of ``x``, in its dtype or in the dtype that it is computed in."""
    if value.device != x.device:
        raise ValueError(f"{name}: expected device {x.device}, got {value.device}")
    if value.dtype not in (x.dtype, compute_dtype(x.dtype)) and not torch.is_autocast_enabled(x.device.type):
        wanted = dict.fromkeys((dtype_name(x.dtype), dtype_name(compute_dtype(x.dtype))))
        raise TypeError(f"{name}: expected dtype {' or '.join(wanted)}, got {dtype_name(value.dtype)}")


def as_projection(weight: Tensor | nn.Module | None, bias: Tensor | None, name: str = "") -> Projection:
    """The weight and bias of a projection that may be given as a module, which stays one unless it is linear; ``name``:
    before both."""
    if not isinstance(weight, nn.Module):
        return weight, bias
    if bias is not None:
        raise ValueError(f"{name}bias: expected None beside a module, which has its own, got a tensor")
    if isinstance(weight, nn.Linear) and type(weight).forward is nn.Linear.forward and not weight._forward_pre_hooks:
        return weight.weight, weight.bias
    return weight, None


def as_output_layer(weight: Tensor | nn.Linear, bias: Tensor | None, side: str) -> tuple[Tensor, Tensor | None]:
    """The same of an output layer, whose rows are read one by one: it is linear."""
    rows, bias = as_projection(weight, bias, f"{side}_")
    if not isinstance(rows, Tensor):
        raise TypeError(f"{side}_weight: expected a tensor or a torch.nn.Linear, got {kind_of(weight)}")
    return rows, bias


def check_projection(weight: Tensor | nn.Module | None, bias: Tensor | None, student: Tensor, teacher: Tensor) -> None:
    """``weight [D_t, D_s]`` and ``bias [D_t]``; without a weight both sides must be equally wide. What a module makes
    of the rows is seen when it is run."""
    width_s, width_t = student.shape[-1], teacher.shape[-1]
    if isinstance(weight, nn.Module):
        return
    if weight is None:
        if bias is not None:
            raise ValueError("bias: expected None as there is no weight, got a tensor")
        if width_s != width_t:
            raise ValueError(
                f"weight: expected a projection of shape ({width_t}, {width_s}) as student and teacher "
                f"differ in width, got None"
            )
        return
    check_float(weight, "weight")
    check_weight_dtype(weight, "weight", student)
    if weight.shape != (width_t, width_s):
        raise ValueError(f"weight: expected shape ({width_t}, {width_s}), got {tuple(weight.shape)}")
    if bias is not None:
        check_float(bias, "bias")
        check_weight_dtype(bias, "bias", student)
        if bias.shape != (width_t,):
            raise ValueError(f"bias: expected shape ({width_t},), got {tuple(bias.shape)}")


def check_columns(logits: object, name: str) -> None:
    """Logits ``[..., V]`` with at least one row dimension."""
    logits = check_float(logits, name)
    if logits.dim() < 2:
        raise ValueError(
            f"{name}: expected shape [..., V] with at least 2 dimensions, got {tuple(logits.shape)}"
        )


def check_index(value: object, name: str) -> None:
    value = check_tensor(value, name)
    if value.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name}: expected int32 or int64, got {dtype_name(value.dtype)}")
    if value.dim() != 1:
        raise ValueError(f"{name}: expected a vector, got shape {tuple(value.shape)}")


def check_index_range(index: Tensor, name: str, size: int) -> None:
    """Every index in ``[0, size)``; looked at only in host memory and outside compilation."""
    if torch.compiler.is_compiling() or index.device.type != "cpu" or not index.numel():
        return
    low, high = (int(v) for v in torch.aminmax(index))
    if low < 0 or high >= size:
        raise ValueError(f"{name}: expected ids from 0 to {size - 1}, got {low if low < 0 else high}")


def check_token_ids(ids: object, name: str, x: Tensor, x_name: str) -> None:
    """A token for each row of ``x [..., .]``."""
    ids = check_tensor(ids, name)
    if ids.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name}: expected int32 or int64, got {dtype_name(ids.dtype)}")
    if ids.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} as {x_name}, got {ids.device}")
    if ids.shape != x.shape[:-1]:
        raise ValueError(f"{name}: expected shape {tuple(x.shape[:-1])} as {x_name}, got {tuple(ids.shape)}")


def check_matched(matched: Matched, student_columns: int, teacher_columns: int) -> None:
    for side, columns in (("student", student_columns), ("teacher", teacher_columns)):
        ids = getattr(matched, f"{side}_ids", None)
        if ids is None:
            raise TypeError(f"matched: expected a MatchedVocab (an object with {side}_ids), got {kind_of(matched)}")
        check_index(ids, f"matched.{side}_ids")
        check_index_range(ids, f"matched.{side}_ids", columns)
    if matched.student_ids.shape != matched.teacher_ids.shape:
        raise ValueError(
            f"matched.student_ids: expected as many as matched.teacher_ids ({matched.teacher_ids.numel()}), "
            f"got {matched.student_ids.numel()}"
        )
    if not matched.student_ids.numel():
        raise ValueError("matched: expected at least one token in both vocabularies, got none")


def check_entry_weights(weights: Tensor | None, table: RemapLike, combine: str, dtype: torch.dtype) -> None:
    """One finite weight per entry of the table, in ``dtype`` where it is a factor, none negative where its logarithm is
    needed; looked at only in host memory and outside compilation."""
    if weights is None:
        return
    check_float(weights, "entry_weights", dims=(1,))
    if weights.numel() != table.ids.numel():
        raise ValueError(
            f"entry_weights: expected one per entry of the table ({table.ids.numel()}), got {weights.numel()}"
        )
    if torch.compiler.is_compiling() or weights.device.type != "cpu" or not weights.numel():
        return
    low, high = (float(v) for v in torch.aminmax(weights.detach()))
    if not (-math.inf < low and high < math.inf):
        raise ValueError(f"entry_weights: expected finite values, got {high if low > -math.inf else low}")
    most = torch.finfo(dtype).max
    if combine == "sum" and max(-low, high) > most:
        got = high if high > most else low
        raise ValueError(f"entry_weights: expected values that {str(dtype).removeprefix('torch.')} holds, got {got:g}")
    if combine == "logsumexp" and low < 0:
        raise ValueError(f"entry_weights: expected no negative value with combine='logsumexp', got {low}")


def check_top_k(top_k: int | None, remainder: str) -> None:
    if top_k is not None and not 1 <= integer(top_k, "top_k") <= INT32_MAX:
        raise ValueError(f"top_k: expected a number from 1 to {INT32_MAX}, or None, got {top_k}")
    check_choice(remainder, "remainder", UNMATCHED)


def check_remap(
    table: RemapLike, student_columns: int, teacher_columns: int, columns_of: str = "teacher_logits"
) -> None:
    """A CSR table with a row per teacher column; further columns (padding of an output layer) are allowed."""
    for field in ("indptr", "ids"):
        if not hasattr(table, field):
            raise TypeError(f"table: expected a RemapTable (an object with {field}), got {kind_of(table)}")
        check_index(getattr(table, field), f"table.{field}")
    rows = table.indptr.numel() - 1
    if not 0 <= rows <= teacher_columns:
        kind = "rows" if columns_of == "teacher_weight" else "columns"
        raise ValueError(f"table: expected at most {teacher_columns} rows ({kind} of {columns_of}), got {rows}")
    check_index_range(table.ids, "table.ids", student_columns)


