"""A teacher with fewer or narrower layers, fitted to it in closed form on a little text, without training.

The hidden states lose coordinates rather than being rotated: behind a LayerNorm (post-norm layers, as BERT's) a
rotation does not commute with the norm's scales, a choice of coordinates does; SliceGPT (arXiv 2401.15024), whose
idea this follows, rotates pre-norm models. What the missing coordinates and layers would have said is made up for by
least squares, layer by layer from the first, each layer reading what the fitted ones before it really give.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from ..core.errors import need
from ..core.progress import counted
from .architectures import Architecture, LayerParts, body_of, layers_of
from .bodies import build_body, check_body
from .fitting import Batch, Seen, Tap, fit_linear, least_squares, tapped, token_batches
from .shapes import Shape, known_architecture, narrow_shape, shape_of
from .teachers import Teacher, model_inputs

__all__ = ["Shrunk", "shrink"]

# Tokens to fit on: for all-MiniLM-L6-v2 cut to 3 layers, whitened, Spearman on STS-B dev is 0.836, 0.8375 and 0.8385
# with half as many, these and twice as many; 264 wide 0.8235, 0.825 and 0.825. The time is in proportion.
TOKENS = 2**15


@dataclass
class Shrunk:
    """A smaller teacher, and the way back.

    Attributes:
        teacher: of the same class, with the same tokenizer and vocabulary.
        coordinates: ``[dim]`` int64, which of the teacher's coordinates its hidden states have.
        weight, bias: ``[D, dim]``, ``[D]``: from its last hidden states to the teacher's, by least squares; the
            identity where nothing was fitted.
        explained: for each layer the share of the variance of the teacher's hidden states, in these coordinates, that
            is explained; empty where nothing was fitted.
    """

    teacher: Teacher
    coordinates: Tensor
    weight: Tensor
    bias: Tensor
    explained: list[float]


class _Stream:
    """The hidden states of all batches on their way through a model's layers.

    What a layer is called with besides (masks, biases for distances) is the same for all layers, and taken from a
    call of the first one.

    Attributes:
        raw: ``[N, E]``: what the norm of the embeddings reads.
    """

    def __init__(self, body: PreTrainedModel, row: Architecture, batches: Sequence[Batch]) -> None:
        self.masks = [batch.mask == 1 for batch in batches]
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        raw = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.calls.append((args, kwargs))
            raise Seen

        first = layers_of(body, row)[0]
        hook = first.register_forward_pre_hook(keep, with_kwargs=True)
        norm = Tap(row.part_of_embeddings(body, "norm"), reads=True)
        try:
            for ids, mask in batches:
                raw += tapped(partial(body, **model_inputs(body, ids, mask)), [norm])
        finally:
            hook.remove()
        self.raw = self._flat(raw)
        self.padded = [args[0] if args else next(iter(kwargs.values())) for args, kwargs in self.calls]

    def _flat(self, padded: Sequence[Tensor]) -> Tensor:
        return torch.cat([x[mask] for x, mask in zip(padded, self.masks, strict=True)])

    @property
    def states(self) -> Tensor:
        """``[N, D]``: the hidden states of all tokens."""
        return self._flat(self.padded)

    @states.setter
    def states(self, rows: Tensor) -> None:
        parts = rows.split([int(mask.sum()) for mask in self.masks])
        self.padded = [rows.new_zeros(*mask.shape, rows.shape[1]) for mask in self.masks]
        for padded, mask, part in zip(self.padded, self.masks, parts, strict=True):
            padded[mask] = part

    def through(self, layer: nn.Module, taps: Sequence[Tap] = (), stop: bool = False) -> list[Tensor]:
        """Goes through a layer, if it is not stopped, and returns what the taps saw, ``[N, D]`` each."""
        seen: list[list[Tensor]] = [[] for _ in taps]
        for b, (args, kwargs) in enumerate(self.calls):

            def run(b: int = b, args: Any = args, kwargs: Any = kwargs) -> None:
                # The hidden states are the first argument, by place or, in older transformers, by name.
                x = self.padded[b]
                named = kwargs if args else {**kwargs, next(iter(kwargs)): x}
                out = layer(x, *args[1:], **named) if args else layer(**named)
                self.padded[b] = out[0] if isinstance(out, tuple) else out

            for rows, tensor in zip(seen, tapped(run, taps, stop), strict=True):
                rows.append(tensor)
        return [self._flat(rows) for rows in seen]


def _fit_norm(norm: nn.LayerNorm, x: Tensor, y: Tensor) -> Tensor:
    """Scales and shifts of a LayerNorm that bring its output nearest to ``y``, coordinate by coordinate; the output."""
    normal = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
    centred = normal - normal.mean(0)
    scale = (centred * y).mean(0) / centred.square().mean(0).clamp(min=1e-9)
    norm.weight.copy_(scale)
    norm.bias.copy_(y.mean(0) - scale * normal.mean(0))
    return norm(x)


def _root(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``C^(1/2)`` and ``C^(-1/2)`` of ``C = rows^T rows / N``, float64; directions without variance are left out."""
    rows = rows.double()
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    values = values.clamp(min=0)
    inverse = torch.where(values > 1e-7 * values.max(), values.rsqrt(), 0.0)
    return (vectors * values.sqrt()) @ vectors.T, (vectors * inverse) @ vectors.T


def _smaller_head(query: Tensor, key: Tensor, value: Tensor, written: Tensor, width: int) -> tuple[Tensor, ...]:
    """A head's queries, keys and values, ``[N, d]`` -> ``[N, width]``.

    Queries and keys are cut so that their products change least, by the singular vectors of ``Cq^(1/2) Ck^(1/2)``;
    values to the leading principal directions of what they write into the hidden states, ``written [D, d]``. A head
    that is wider than the teacher's has zeros.
    """
    old = query.shape[1]
    if width < old:
        # The mean key adds the same to all scores of a query, which a softmax does not see.
        key = key - key.mean(0)
        (root_q, inverse_q), (root_k, inverse_k) = _root(query), _root(key)
        left, strength, right = torch.linalg.svd(root_q @ root_k)
        strength = strength[:width].sqrt()
        query = query @ (inverse_q @ left[:, :width] * strength).float()
        key = key @ (inverse_k @ right.T[:, :width] * strength).float()
        root_v, _ = _root(value - value.mean(0))
        directions = torch.linalg.svd(written.double() @ root_v, full_matrices=False)[0][:, :width]
        value = value @ (written.double().T @ directions).float()
    # Scores are divided by the root of a head's width.
    query = query * (width / old) ** 0.5
    return tuple(F.pad(x, (0, width - x.shape[1])) for x in (query, key, value))


def _modules(layer: nn.Module, parts: LayerParts) -> Any:
    """:class:`LayerParts` of the modules themselves."""
    modules: Iterator[Any] = map(layer.get_submodule, parts)
    return LayerParts(*modules)


def _slices(count: int, width: int) -> list[slice]:
    return [slice(n * width, (n + 1) * width) for n in range(count)]


class _Readings(NamedTuple):
    """What a teacher's layer computes, ``[N, D]`` each: ``attended`` before the first norm, ``middle`` after it,
    ``expanded`` (``[N, F]``) within the feed-forward part, ``summed`` before the second norm."""

    query: Tensor
    key: Tensor
    value: Tensor
    attended: Tensor
    middle: Tensor
    expanded: Tensor
    summed: Tensor
    out: Tensor

    @classmethod
    def of(cls, stream: _Stream, layer: nn.Module, parts: Any) -> _Readings:
        """What the layer computes of the stream, which goes on behind it."""
        heads, norms = (parts.query, parts.key, parts.value), (parts.attention_norm, parts.ffn_norm)
        (attended, summed), (middle, out) = ([Tap(norm, reads) for norm in norms] for reads in (True, False))
        return cls(*stream.through(layer, [*map(Tap, heads), attended, middle, Tap(parts.ffn_in), summed, out]))


class _Cut(NamedTuple):
    """Both shapes, the coordinates that stay, and the activation of the feed-forward layers."""

    whole: Shape
    shape: Shape
    coordinates: Tensor
    act: Callable[[Tensor], Tensor]


def _fit_heads(ours: Any, theirs: Any, cut: _Cut, x: Tensor, read: _Readings) -> None:
    """Queries, keys and values, read out of ``x``, of the heads that write most into the coordinates that stay."""
    writes = theirs.attention.weight[cut.coordinates]
    heads = _slices(cut.whole.heads, cut.whole.dim // cut.whole.heads)
    loud = torch.stack([(read.value[:, s] @ writes[:, s].T).square().mean() for s in heads])
    chosen = loud.argsort(descending=True, stable=True)[: cut.shape.heads].sort().values.tolist()
    width = cut.shape.dim // cut.shape.heads
    smaller = [
        _smaller_head(read.query[:, s], read.key[:, s], read.value[:, s], writes[:, s], width)
        for s in (heads[h] for h in chosen)
    ]
    wanted = torch.cat([part for parts in zip(*smaller, strict=True) for part in parts], 1)
    fit_linear([ours.query, ours.key, ours.value], x, wanted, cut.shape == cut.whole)


def _fit_ffn(ours: Any, theirs: Any, cut: _Cut, x: Tensor, read: _Readings) -> Tensor:
    """The units that write most into the coordinates that stay; what they write also makes up for what ``x`` lacks."""
    worth = cut.act(read.expanded).var(0) * theirs.ffn_out.weight[cut.coordinates].square().sum(0)
    units = worth.argsort(descending=True, stable=True)[: cut.shape.ffn].sort().values
    same = cut.shape == cut.whole
    fit_linear([ours.ffn_in], x, read.expanded[:, units], same)
    active = cut.act(ours.ffn_in(x))
    fit_linear([ours.ffn_out], active, read.summed[:, cut.coordinates] - x, same)
    return _fit_norm(ours.ffn_norm, x + ours.ffn_out(active), read.out[:, cut.coordinates])


def _fit_layer(stream: _Stream, layer: nn.Module, ours: Any, theirs: Any, cut: _Cut, read: _Readings) -> None:
    """Fits one layer to a teacher's, and goes through it."""
    x = stream.states
    _fit_heads(ours, theirs, cut, x, read)
    (said,) = stream.through(layer, [Tap(ours.attention, reads=True)], stop=True)
    fit_linear([ours.attention], said, read.attended[:, cut.coordinates] - x, cut.shape == cut.whole)
    middle = _fit_norm(ours.attention_norm, x + ours.attention(said), read.middle[:, cut.coordinates])
    stream.states = _fit_ffn(ours, theirs, cut, middle, read)


def _loud_coordinates(teacher: Teacher, batches: Sequence[Batch], keep: Sequence[int], dim: int) -> Tensor:
    """The ``dim`` coordinates with the largest share of the squares of hidden states, every layer counting alike."""
    totals = torch.zeros(len(keep) + 1, teacher.width, dtype=torch.float64)
    for ids, mask in batches:
        states = teacher.read(ids, mask, all_layers=True).layers
        totals += torch.stack([states[i][mask == 1].double().square().sum(0) for i in (0, *(k + 1 for k in keep))])
    share = (totals / totals.sum(1, keepdim=True)).sum(0)
    return share.argsort(descending=True, stable=True)[:dim].sort().values


def _cut_model(copied: PreTrainedModel, row: Architecture, whole: Shape, shape: Shape, keep: Tensor) -> PreTrainedModel:
    """A narrower model: the coordinates ``keep`` of embeddings and norms; what is fitted afterwards merely fits in."""
    config = copy.deepcopy(copied.config)
    for name, value in zip((row.fields.dim, row.fields.heads, row.fields.ffn), shape, strict=True):
        setattr(config, name, value)
    if hasattr(config, "embedding_size") and row.widening(copied.base_model) is None:
        config.embedding_size = shape.dim
    with torch.random.fork_rng(devices=[]):
        small = type(copied)(config)
    if hasattr(small.base_model, "pooler"):
        setattr(small.base_model, "pooler", None)  # noqa: B010 - torch declares no modules that are None
    source, state = copied.state_dict(), {}
    for key, target in small.state_dict().items():
        value = source[key]
        for axis, (old, new) in enumerate(zip(value.shape, target.shape, strict=True)):
            if (old, new) == (whole.dim, shape.dim):
                value = value.index_select(axis, keep)
            value = value.narrow(axis, 0, new)
        state[key] = value
    small.load_state_dict(state)
    return small.eval()


def _fit_head(student: PreTrainedModel, teacher: Teacher, cut: _Cut, x: Tensor, last: Tensor) -> None:
    """The MLM head of a narrower body, for logits as near to the teacher's as what its output layer reads can make."""
    config = teacher.model.config
    row = known_architecture(config)
    assert row.head is not None
    act = ACT2FN[getattr(config, row.activation, row.activation)]
    dense, norm = map(teacher.whole.get_submodule, row.head)
    ours: Iterator[Any] = map(student.get_submodule, row.head)
    our_dense, our_norm = ours
    before = dense(last)
    given = norm(act(before))
    output = teacher.output_layer[0].double()
    if student.get_output_embeddings().weight.shape != output.shape:
        before, products = before[:, cut.coordinates], (output.T @ output)[:, cut.coordinates]
        given = given @ torch.linalg.solve(products[cut.coordinates], products.T).T.float()
    fit_linear([our_dense], x, before)
    _fit_norm(our_norm, act(our_dense(x)), given)


def _fitted(
    teacher: Teacher,
    copied: PreTrainedModel,
    keep: Sequence[int],
    shape: Shape,
    batches: Sequence[Batch],
    quiet: bool,
) -> Shrunk:
    """The smaller teacher out of one with its layers copied."""
    row, body, whole = known_architecture(teacher.model.config), teacher.model, shape_of(teacher.model.config)
    assert row.parts is not None
    student, coordinates = copied, torch.arange(whole.dim)
    if shape != whole:
        coordinates = _loud_coordinates(teacher, batches, keep, shape.dim)
        student = _cut_model(copied, row, whole, shape, coordinates)
    act = ACT2FN[getattr(body.config, "hidden_act", None) or body.config.activation]
    cut = _Cut(whole, shape, coordinates, act)
    student_body = body_of(student)
    layers, small = layers_of(body, row), layers_of(student_body, row)
    theirs, ours = _Stream(body, row, batches), _Stream(student_body, row, batches)
    if shape.dim != whole.dim and row.widening(body) is None:
        norm = row.part_of_embeddings(student_body, "norm")
        ours.states = _fit_norm(norm, ours.raw, theirs.states[:, coordinates])

    # Up to the first gap the copied layers are exact.
    exact = next((j for j, k in enumerate(keep) if j != k), len(keep)) if shape == whole else 0
    explained = []
    for k, layer in enumerate(counted(list(layers), "Fitting layers", quiet)):
        if k not in keep:
            theirs.through(layer)
            continue
        j, parts = keep.index(k), _modules(layer, row.parts)
        read = _Readings.of(theirs, layer, parts)
        if j < exact:
            ours.through(small[j])
        else:
            _fit_layer(ours, small[j], _modules(small[j], row.parts), parts, cut, read)
        wanted = read.out[:, coordinates]
        lost = (ours.states - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
        explained.append(1 - float(lost))
    if shape.dim != whole.dim and teacher.masked_lm is not None:
        _fit_head(student, teacher, cut, ours.states, theirs.states)
    weight, bias = least_squares(ours.states, theirs.states)
    return Shrunk(_teacher_with(teacher, student), coordinates, weight, bias, explained)


def _teacher_with(teacher: Teacher, model: PreTrainedModel) -> Teacher:
    """The teacher with another body, and the head of that."""
    masked_lm = model if teacher.masked_lm is not None else None
    return replace(teacher, model=body_of(model.requires_grad_(False)), masked_lm=masked_lm)


@torch.no_grad()
def shrink(
    teacher: Teacher,
    keep: Sequence[int],
    texts: Sequence[str],
    dim: int | None = None,
    heads: int | None = None,
    ffn: int | None = None,
    max_length: int = 128,
    tokens: int = TOKENS,
    quiet: bool = True,
) -> Shrunk:
    """A teacher with some of its layers, and those narrower if asked for, that computes nearly what the whole one does.

    The hidden states keep the coordinates that are largest on the text. Then layer after layer, on what the layers
    before it give: queries, keys and values come near to those of the teacher's layer, of the heads that write most;
    what attention and the feed-forward layer write comes near to what its hidden states lack, so that a layer also
    stands in for those left out before it; the norms' scales and shifts follow. Each is a linear least-squares
    problem. Layers before the first one left out stay as they are if the width is the teacher's. Where an
    architecture's layers are of another kind (DeBERTa, ModernBERT, T5) or share their weights (ALBERT), they are
    copied.

    Args:
        keep: the teacher's layers that stay, as :func:`vocabdistil.models.shapes.keep_layers` gives them.
        texts: what the student will read is of their kind, prompts included.
        dim, heads, ffn: see :func:`vocabdistil.models.shapes.narrow_shape`.
        max_length: tokens of a text that are read.
        tokens: how many are read in all, from the first text on: the more, the better the layers fit other text.
        quiet: show no progress.

    Returns:
        The smaller teacher, with the tokenizer and vocabulary of the whole one, for :func:`build_body`; without a
        pooler if it is narrower.

    Raises:
        VocabdistilError: no such layers, or a shape that the architecture cannot take.
    """
    check_body(teacher, keep)
    row, whole = known_architecture(teacher.model.config), shape_of(teacher.model.config)
    shape, keep = narrow_shape(teacher.model.config, dim, heads, ffn), list(keep)
    nothing_cut = shape == whole and len(keep) == teacher.num_layers
    copied = teacher
    if not nothing_cut:
        copied = _teacher_with(teacher, build_body(teacher, lambda matrix: matrix, teacher.tokenizer, keep))
    if nothing_cut or not row.fittable:
        return Shrunk(copied, torch.arange(whole.dim), torch.eye(whole.dim), torch.zeros(whole.dim), [])
    batches = token_batches(teacher, texts, min(max_length, teacher.max_positions), tokens)
    need(bool(batches), "text", "some text to fit the student to", "none")
    return _fitted(teacher, copied.whole, keep, shape, batches, quiet)
