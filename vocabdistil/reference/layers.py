"""Which layers of the teacher teach which layers of the student, and means over layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from vocabdistil.core import checks
from vocabdistil.core.checks import LayerWeights
from vocabdistil.reference._common import weighted_mean

LAYER_MAPS = ("last", "skip", "average", "average_all", "weighted")


class LayerAssignment(NamedTuple):
    """The mean of the ``student`` layers is compared with the mean of the ``teacher`` layers.

    Layers count from 1, and 0 is the embedding layer: they index ``hidden_states`` of a Hugging Face output.
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]


def layer_map(
    kind: str | Sequence[tuple[int | Sequence[int], int | Sequence[int]]],
    student_layers: int,
    teacher_layers: int,
    k: int | None = None,
) -> list[LayerAssignment]:
    """Assigns teacher layers to student layers.

    For n student and N teacher layers and a step ``k``, by default ``N / n`` (which must be whole)::

        last         n <-> N
        skip         i <-> k i                          for i = 1 .. n   (every k-th teacher layer)
        average      i <-> k (i - 1) + 1, ..., k i      for i = 1 .. n   (k consecutive teacher layers)
        average_all  1, ..., n <-> 1, ..., N
        weighted     as average_all; give `span_loss` the learned ``*_layer_weights``
        explicit     a list of (student layer or layers, teacher layer or layers)

    Sources: ``skip``: Sanh et al., arXiv 1910.01108, section 3; ``average``: the model cards of
    ``distilrubert-base`` (two teacher layers for one of the student) and ``distilrubert-small`` (six for
    one).

    Args:
        kind: one of the names above, or the explicit list.
        student_layers, teacher_layers: the numbers of layers n and N, embeddings not counted.
        k: the step of ``skip`` and ``average``.

    Returns:
        One assignment per loss term.

    Raises:
        TypeError: a kind or layer of another type.
        ValueError: an unknown name, a layer that a side does not have, a step that does not fit.
    """
    for name, count in (("student_layers", student_layers), ("teacher_layers", teacher_layers)):
        _check_int(count, name)
        if count < 1:
            raise ValueError(f"{name}: expected at least 1, got {count}")
    if not isinstance(kind, str):
        if k is not None:
            raise ValueError(f"k: expected None with an explicit list of layers, got {k}")
        return _explicit(kind, student_layers, teacher_layers)
    checks.check_choice(kind, "kind", LAYER_MAPS)
    if kind in ("skip", "average"):
        k = _step(k, student_layers, teacher_layers)
        width = k if kind == "average" else 1
        return [
            LayerAssignment((i,), tuple(range(k * i - width + 1, k * i + 1)))
            for i in range(1, student_layers + 1)
        ]
    if k is not None:
        raise ValueError(f"k: expected None with kind {kind!r}, got {k}")
    if kind == "last":
        return [LayerAssignment((student_layers,), (teacher_layers,))]
    return [LayerAssignment(tuple(range(1, student_layers + 1)), tuple(range(1, teacher_layers + 1)))]


def layer_mean(layers: Sequence[Tensor], weights: LayerWeights | None = None) -> Tensor:
    """``sum_l w_l h_l / sum_l w_l``, added layer by layer, never stacked.

    Args:
        layers: tensors of one shape (2 or 3 dimensions), dtype and device.
        weights: ``[n]`` tensor or list of numbers; uniform by default.

    Returns:
        A tensor of the layers' shape and dtype; half types are accumulated in float32.

    Raises:
        TypeError, ValueError: no layers, layers that differ, weights that are not one per layer.
    """
    rows = checks.check_layers(layers, "layers")
    checks.check_layer_weights(weights, rows, "weights")
    first = layers if isinstance(layers, Tensor) else layers[0]
    return weighted_mean(rows, weights).view(first.shape).to(first.dtype)


def _check_int(value: object, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")


def _step(k: int | None, student_layers: int, teacher_layers: int) -> int:
    if k is None:
        if teacher_layers % student_layers:
            raise ValueError(
                f"k: expected a step, as {teacher_layers} teacher layers do not divide by {student_layers} "
                f"student layers, got None"
            )
        return teacher_layers // student_layers
    _check_int(k, "k")
    if k < 1 or k * student_layers > teacher_layers:
        raise ValueError(
            f"k: expected a step from 1 to {teacher_layers // student_layers} ({student_layers} student "
            f"layers, {teacher_layers} teacher layers), got {k}"
        )
    return k


def _explicit(
    kind: Sequence[tuple[int | Sequence[int], int | Sequence[int]]], student_layers: int, teacher_layers: int
) -> list[LayerAssignment]:
    if not isinstance(kind, (list, tuple)):
        raise TypeError(f"kind: expected a name or a list of assignments, got {type(kind).__name__}")
    if not kind:
        raise ValueError("kind: expected at least one assignment, got an empty list")
    assignments = []
    for i, entry in enumerate(kind):
        if not isinstance(entry, (list, tuple)) or len(entry) != 2:
            raise TypeError(f"kind[{i}]: expected (student layers, teacher layers), got {entry!r}")
        sides = []
        for side, value, count in zip(
            ("student", "teacher"), entry, (student_layers, teacher_layers), strict=True
        ):
            numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            if not numbers:
                raise ValueError(f"kind[{i}]: expected at least one {side} layer, got none")
            for number in numbers:
                _check_int(number, f"kind[{i}]")
                if not 0 <= number <= count:
                    raise ValueError(f"kind[{i}]: expected {side} layers from 0 to {count}, got {number}")
            sides.append(numbers)
        assignments.append(LayerAssignment(*sides))
    return assignments
