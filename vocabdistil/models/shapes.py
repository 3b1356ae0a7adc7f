"""What a student's body may be of its teacher's: which of the layers, how wide; told by the configuration alone, before
any model is loaded and without what takes long to import."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..core.errors import VocabdistilError, need, spell
from .architectures import Architecture, architecture_of, layer_kinds

__all__ = [
    "Shape",
    "attention_period",
    "check_layers",
    "choose_layers",
    "keep_layers",
    "known_architecture",
    "narrow_shape",
    "parse_keep_layers",
    "shape_of",
]


class Shape(NamedTuple):
    """Hidden width, attention heads and width of the feed-forward layer."""

    dim: int
    heads: int
    ffn: int


def known_architecture(config: Any) -> Architecture:
    """The row of a teacher's configuration.

    Raises:
        VocabdistilError: there is none.
    """
    row = architecture_of(config)
    if row is None:
        other = f"{spell('preset')} makes a student for it"
        raise VocabdistilError.of("teacher", f"no rule for layers of model_type {config.model_type!r}; {other}")
    return row


def shape_of(config: Any) -> Shape:
    """The shape of a teacher's layers."""
    fields = known_architecture(config).fields
    return Shape(*(getattr(config, name) for name in (fields.dim, fields.heads, fields.ffn)))


def _count(config: Any) -> int:
    return getattr(config, known_architecture(config).fields.layers)


def choose_layers(teacher_layers: int, layers: int, kinds: Sequence[str] | None = None) -> list[int]:
    """Which layers stay if so many are to: evenly spaced from the first to the last, or the last alone.

    For 12 -> 6 that is 0, 2, 4, 7, 9, 11, the choice of DistilBERT (arXiv 1910.01108).

    Args:
        kinds: what each layer of the teacher attends to, if they differ (ModernBERT): then the kinds of the chosen
            layers repeat as a configuration can say it. Of such choices the first that there is of: with the last
            layer, and no smaller a share of layers that attend to all tokens; with the last layer; any (18 of 22
            layers). Of its kind it is the nearest to even spacing.

    Raises:
        VocabdistilError: the teacher has fewer layers.
    """
    need(1 <= layers <= teacher_layers, "layers", f"a number from 1 to {teacher_layers}, the teacher's layers", layers)
    if layers == 1:
        even = [float(teacher_layers - 1)]
    else:
        even = [j * (teacher_layers - 1) / (layers - 1) for j in range(layers)]
    chosen = [round(place) for place in even]
    if kinds is None or layers == teacher_layers or attention_period([kinds[i] for i in chosen]):
        return chosen
    found = [
        (chosen[-1] != teacher_layers - 1, period > (attention_period(kinds) or 1), distance, chosen)
        for period in range(1, layers + 1)
        for distance, chosen in _nearest(even, kinds, period)
    ]
    return min(found)[-1]


def _nearest(even: Sequence[float], kinds: Sequence[str], period: int) -> list[tuple[float, list[int]]]:
    """For each layer that may come last, the ascending layers up to it that are nearest to ``even``, every
    ``period``-th from the first attending to all tokens and no other; each after its sum of squared distances.

    By dynamic programming: the best choice for the first places, for each layer that the last of them may take.
    """
    best: dict[int, tuple[float, list[int]]] = {-1: (0.0, [])}
    for j, place in enumerate(even):
        wanted = "sliding_attention" if j % period else "full_attention"
        longer = {}
        for i in (i for i, kind in enumerate(kinds) if kind == wanted):
            before = [choice for last, choice in best.items() if last < i]
            if before:
                distance, chosen = min(before)
                longer[i] = (distance + (i - place) ** 2, [*chosen, i])
        best = longer
    return list(best.values())


def attention_period(kinds: Sequence[str]) -> int | None:
    """The ``n`` for which layers 0, n, 2n, ... attend to all tokens and no other does; None if there is no such."""
    return next(
        (
            n
            for n in range(1, len(kinds) + 1)
            if all((kind == "sliding_attention") == bool(i % n) for i, kind in enumerate(kinds))
        ),
        None,
    )


def parse_keep_layers(text: str, teacher_layers: int) -> list[int]:
    """The layers that ``"0,2,5"`` names.

    Raises:
        VocabdistilError: it is no list of numbers, they do not ascend, or the teacher has no such layer.
    """
    expected = f"ascending layers from 0 to {teacher_layers - 1}, as 0,{teacher_layers - 1}"
    need(bool(re.fullmatch(r" *[0-9]{1,9} *(, *[0-9]{1,9} *)*", text)), "keep_layers", expected, repr(text))
    layers = [int(number) for number in text.split(",")]
    ascending = all(a < b for a, b in zip(layers, layers[1:], strict=False))
    need(ascending and layers[-1] < teacher_layers, "keep_layers", expected, text)
    return layers


def keep_layers(config: Any, layers: int | None = None, named: str | None = None) -> list[int]:
    """The teacher's layers that stay: so many of them, those named, or all.

    Raises:
        VocabdistilError: both are given, the teacher has no such layers, or no configuration can express the choice.
    """
    count = _count(config)
    if named is not None:
        need(layers is None, "keep_layers", f"no {spell('layers')} besides it", f"both, {spell('layers', layers)}")
        return parse_keep_layers(named, count)
    return choose_layers(count, count if layers is None else layers, layer_kinds(config))


def check_layers(config: Any, keep: Sequence[int]) -> None:
    """Raises VocabdistilError unless a body of the teacher's class can have these of its layers."""
    row, count = known_architecture(config), _count(config)
    ascending = all(a < b for a, b in zip(keep, keep[1:], strict=False))
    known = bool(keep) and ascending and keep[0] >= 0 and keep[-1] < count
    need(known, "keep_layers", f"ascending layers from 0 to {count - 1}", ",".join(map(str, keep)) or "none")
    if row.causal:
        need(len(keep) == count, "layers", f"all {count} layers of a decoder", len(keep))
        return
    if (kinds := layer_kinds(config)) is not None:
        period = attention_period([kinds[i] for i in keep])
        expected = "layers of which the first and then every n-th attend to all tokens (" + ", ".join(
            str(i) for i, kind in enumerate(kinds) if kind == "full_attention"
        )
        need(period is not None, "keep_layers", f"{expected} do)", ",".join(map(str, keep)))
    groups = getattr(config, "num_hidden_groups", 1)
    need(
        not row.shared or groups == 1 or len(keep) == count,
        "layers",
        f"all {count} layers of a model whose layers share {groups} sets of weights",
        len(keep),
    )


def narrow_shape(config: Any, dim: int | None = None, heads: int | None = None, ffn: int | None = None) -> Shape:
    """The shape of a student's layers: what is asked for, and in proportion to the teacher's what is not.

    Heads that nobody asked for are as many as the teacher has, or the most below that which divide the width.

    Raises:
        VocabdistilError: a number that the teacher does not have room for, heads that do not divide the width, or an
            architecture without a rule for narrower layers.
    """
    row, whole = known_architecture(config), shape_of(config)
    if all(value in (None, own) for value, own in zip((dim, heads, ffn), whole, strict=True)):
        return whole
    option = "dim" if dim is not None else "heads" if heads is not None else "ffn"
    expected = f"the teacher's width, heads and feed-forward width: no rule makes {config.model_type} narrower"
    need(row.fittable, option, expected, (dim, heads, ffn)[Shape._fields.index(option)])
    for name, value, most in zip(Shape._fields, (dim, heads, ffn), whole, strict=True):
        need(value is None or 1 <= value <= most, name, f"a number from 1 to {most}, the teacher's", value)
    width = whole.dim if dim is None else dim
    if heads is None:
        heads = next(n for n in range(whole.heads, 0, -1) if width % n == 0)
    need(width % heads == 0, "heads", f"a number that divides the width {width}", heads)
    expected = f"{whole.heads}, the teacher's, as each of its heads has a bias of its own for distances"
    need(not row.biased_heads or heads == whole.heads, "heads", expected, heads)
    return Shape(width, heads, max(1, round(whole.ffn * width / whole.dim)) if ffn is None else ffn)
