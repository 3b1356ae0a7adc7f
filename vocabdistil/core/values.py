"""Checks of plain values and vectors that a user passes, shared by tables, vocabularies, spans and alignments.

A wrong type raises ``TypeError``, everything else ``ValueError``; each message names the argument, what was expected
and what came.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = [
    "INT32_MAX",
    "MadeOf",
    "Seen",
    "check_dense",
    "check_int32",
    "check_kind",
    "int_array",
    "int_vector",
    "integer",
    "kept",
]

INT32_MAX = 2**31 - 1
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Seen:
    """Tensors that were looked at: whether others are the same, and have not been written to since.

    They are known as long as they live, and not by an ``id``, which a later tensor may get; not by their copies, in
    another process either. Tensors of inference mode do not count what is written to them: none is known again. What is
    written past torch (by numpy, say) nothing counts: whoever follows positions checks them where it reads them.
    """

    __slots__ = ("_seen",)

    def __init__(self, *tensors: Tensor) -> None:
        counted = not any(x.is_inference() for x in tensors)
        self._seen = tuple((weakref.ref(x), x._version) for x in tensors) if counted else ()

    def __reduce__(self) -> tuple:
        return Seen, ()

    def are(self, *tensors: Tensor) -> bool:
        return bool(self._seen) and all(
            x is ref() and x._version == version for x, (ref, version) in zip(tensors, self._seen, strict=True)
        )


class MadeOf:
    """What ``make(first, second, *key)`` gives for two tensors that both lie on one device, kept as long as the tensors
    live and are not written to.

    Nothing is kept from or used in the capture of a CUDA graph: what it builds is filled when it is replayed, and what
    it uses has to outlive it. What is kept is used in the stream alone that it was made in.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make
        self._of: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def get(self, first: Tensor, second: Tensor, *key: Hashable) -> Any:
        stream = None
        if first.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return self.make(first, second, *key)
            stream = torch.cuda.current_stream(first.device).cuda_stream
        known = self._of.get(first)
        if known is None or not known[0].are(first, second):
            known = self._of[first] = Seen(first, second), {}
        made, place = known[1], (*key, stream)
        if place not in made:
            made[place] = self.make(first, second, *key)
        return made[place]


def kept(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy of one of inference mode: autograd cannot keep such a tensor for a backward pass."""
    if torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def check_kind(value: object, name: str, kind: type) -> None:
    """Raises TypeError unless ``value`` is a ``kind``."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")


def integer(value: Any, name: str) -> int:
    """An ``int`` of one integer, be it of numpy or of torch; TypeError for others, ``bool`` among them."""
    if isinstance(value, Tensor) and not value.dim() and value.device.type != "meta":
        value = value.item()
    if not isinstance(value, (bool, np.bool_, Tensor)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")


def check_dense(tensor: Tensor, name: str) -> None:
    """Raises ValueError for a tensor that has no values, or not all of them in memory: meta, sparse, nested."""
    if tensor.is_nested or tensor.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got one of layout {tensor.layout}")
    if tensor.device.type == "meta":
        raise ValueError(f"{name}: expected a tensor with values, got one on the meta device")


def int_array(value: Any, name: str, dims: int = 1, bools: bool = False) -> np.ndarray:
    """A list, an array or a tensor as int64 in host memory, or as bool with ``bools``, with ``dims`` dimensions.

    Raises:
        TypeError: neither, or values that are not integers.
        ValueError: another shape, a tensor without values, values that do not fit 64 signed bits.
    """
    if isinstance(value, Tensor):
        check_dense(value, name)
        if value.dtype not in _INTEGERS and not (bools and value.dtype == torch.bool):
            raise TypeError(f"{name}: expected integers, got {value.dtype}")
        value = value.detach().cpu().numpy()
    if isinstance(value, (str, bytes)) or not (isinstance(value, Sequence) or hasattr(value, "__array__")):
        raise TypeError(f"{name}: expected a list of integers, got {type(value).__name__}")
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{name}: expected a list of integers ({error})") from None
    if array.ndim != dims:
        raise ValueError(f"{name}: expected integers in {dims} dimension(s), got shape {array.shape}")
    if not array.size and isinstance(value, Sequence):
        return array.astype(np.int64)
    kind = array.dtype.kind
    if kind == "O" or (kind == "u" and array.size and int(array.max()) >= 2**63):
        for item in array.flat:
            if not isinstance(item, (int, np.integer)):
                raise TypeError(f"{name}: expected integers, got one {type(item).__name__}")
            if not -(2**63) <= int(item) < 2**63:
                raise ValueError(f"{name}: expected integers that fit 64 signed bits, got {item}")
    if kind not in ("iub" if bools else "iu"):
        raise TypeError(f"{name}: expected integers, got {array.dtype}")
    return array if kind == "b" else array.astype(np.int64, copy=False)


def int_vector(value: Any, name: str) -> Tensor:
    """A list, an array or a tensor of integers as a dense tensor ``[n]``, a tensor where it is and in its dtype.

    Raises:
        TypeError: neither, or values that are not integers.
        ValueError: another shape, a tensor without values, values that do not fit 64 signed bits.
    """
    if not isinstance(value, Tensor):
        return torch.tensor(int_array(value, name))
    check_dense(value, name)
    if value.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected integers, got {value.dtype}")
    if value.dim() != 1:
        raise ValueError(f"{name}: expected a vector, got shape {tuple(value.shape)}")
    return value


def check_int32(vector: Tensor, name: str) -> None:
    """Raises ValueError unless all values are from 0 to 2^31 - 1; waits for the device that they are on."""
    if vector.numel():
        low, high = torch.stack(torch.aminmax(vector)).tolist()
        if low < 0 or high > INT32_MAX:
            raise ValueError(f"{name}: expected values from 0 to {INT32_MAX}, got {low if low < 0 else high}")
