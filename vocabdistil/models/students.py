"""Students: DistilBERT architectures by name, and their initialisation from a teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from .architectures import ARCHITECTURES, Architecture, first_position, layers_of
from .presets import PRESETS, Preset
from .shapes import choose_layers, shape_of
from .teachers import Teacher

__all__ = ["PRESETS", "Preset", "build_student", "initialise_from_teacher", "principal_axes"]


def build_student(
    preset: Preset, tokenizer: PreTrainedTokenizerBase, max_positions: int = 512, seed: int = 0
) -> DistilBertForMaskedLM:
    """A student with fresh weights: input and output embeddings tied, the same weights for the same seed.

    Args:
        tokenizer: gives the vocabulary size and the id of the padding.
    """
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=max_positions,
        n_layers=preset.layers,
        n_heads=preset.heads,
        dim=preset.dim,
        hidden_dim=preset.ffn,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DistilBertForMaskedLM(config)


def principal_axes(embedding: Tensor, dim: int) -> Tensor:
    """The ``dim`` leading right singular vectors of an embedding.

    Computed in float64 from ``E^T E``, and each turned so that its largest component is positive: the same on every
    run. A width above ``D`` is filled with zero columns.

    Args:
        embedding: ``[V, D]``.

    Returns:
        ``[D, dim]`` float32, orthonormal columns.
    """
    e = embedding.detach().to("cpu", torch.float64)
    axes = torch.linalg.eigh(e.T @ e).eigenvectors.flip(1)[:, :dim]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    axes = axes * torch.where(largest < 0, -1.0, 1.0)
    return nn.functional.pad(axes, (0, dim - axes.shape[1])).float()


def _widened(row: Architecture | None, body: PreTrainedModel, x: Tensor, bias: bool = False) -> Tensor:
    """Rows as wide as the teacher's embeddings, in its hidden width."""
    widen = row.widening(body) if row else None
    if widen is None:
        return x
    made = x @ widen.weight.detach().float().cpu().T
    return made + widen.bias.detach().float().cpu() if bias else made


def _known_positions(row: Architecture | None, body: PreTrainedModel) -> Tensor | None:
    """The teacher's positions ``[P, D]`` from the first that a token takes, with token type 0; None without a table."""
    table = row.part_of_embeddings(body, "positions") if row else None
    if row is None or not isinstance(table, nn.Embedding):
        return None
    known = table.weight.detach().float().cpu()[first_position(body) :]
    types = row.part_of_embeddings(body, "types")
    if types is not None:
        known = known + types.weight.detach().float().cpu()[0]
    return _widened(row, body, known, bias=True)


def _copy_modules(source: nn.Module, target: nn.Module, names: dict[str, str]) -> None:
    for theirs, ours in names.items():
        target.get_submodule(ours).load_state_dict(source.get_submodule(theirs).state_dict())


def _copy_layers(student: DistilBertForMaskedLM, teacher: Teacher, row: Architecture) -> list[int]:
    """Copies the teacher's layers if they are of DistilBERT's kind and shape; returns which, in the student's order."""
    if row.parts is None or shape_of(teacher.model.config) != shape_of(student.config):
        return []
    chosen = choose_layers(teacher.num_layers, min(student.config.n_layers, teacher.num_layers))
    ours = ARCHITECTURES["distilbert"].parts
    assert ours is not None
    names = dict(zip(row.parts, ours, strict=True))
    layers = layers_of(teacher.model, row)
    for block, index in zip(student.distilbert.transformer.layer, chosen, strict=False):
        source = layers[index * len(layers) // teacher.num_layers if row.shared else index]
        _copy_modules(source, block, names)
    return chosen


@torch.no_grad()
def initialise_from_teacher(
    student: DistilBertForMaskedLM, teacher: Teacher, rows: Callable[[Tensor], Tensor]
) -> dict[str, object]:
    """Gives the student what the teacher knows and the student has room for.

    * Token embedding: ``rows`` of the teacher's, through the teacher's own map to its hidden width where its
      embedding is narrower (ALBERT, ELECTRA), then projected on its own leading principal axes if the student's
      width is another.
    * Positions: the teacher's, with its embedding of token type 0 added (DistilBERT has no types), likewise.
    * Layers, the embeddings' LayerNorm and the MLM head: copied if they are of the same kind and widths, heads and
      feed-forward widths are equal, layer by layer as :func:`choose_layers` says; otherwise they keep their fresh
      weights.

    Args:
        rows: ``[V_t, D]`` -> ``[V_s, D]``: rows for the student's tokens out of rows for the teacher's.

    Returns:
        What was done: ``embedding`` (``"copied"`` or ``"projected"``), ``positions`` (how many), ``copied_layers``,
        ``head`` (whether it was copied).
    """
    width, row, body = student.config.dim, teacher.architecture, teacher.model
    source = _widened(row, body, teacher.embedding.detach().float().cpu())
    axes = None if source.shape[1] == width else principal_axes(source, width)

    def fit(x: Tensor) -> Tensor:
        return x if axes is None else x @ axes

    target = student.distilbert.embeddings
    target.word_embeddings.weight.copy_(fit(rows(source)))
    known = _known_positions(row, body)
    count = 0 if known is None else min(len(known), target.position_embeddings.num_embeddings)
    if known is not None:
        target.position_embeddings.weight[:count] = fit(known[:count])

    copied = _copy_layers(student, teacher, row) if row and axes is None else []
    norm = row.part_of_embeddings(body, "norm") if row and copied else None
    if norm is not None and norm.weight.shape == target.LayerNorm.weight.shape:
        target.LayerNorm.load_state_dict(norm.state_dict())
    return {
        "embedding": "copied" if axes is None else "projected",
        "positions": count,
        "copied_layers": copied,
        "head": bool(copied) and _copy_head(student, teacher, rows),
    }


def _copy_head(student: DistilBertForMaskedLM, teacher: Teacher, rows: Callable[[Tensor], Tensor]) -> bool:
    """Copies the MLM head if there is one as wide as the body; returns whether it did."""
    row = teacher.architecture
    if teacher.masked_lm is None or row is None or row.head is None:
        return False
    dense, norm = row.head
    if teacher.masked_lm.get_submodule(dense).weight.shape != student.vocab_transform.weight.shape:
        return False
    _copy_modules(teacher.masked_lm, student, {dense: "vocab_transform", norm: "vocab_layer_norm"})
    _, bias = teacher.output_layer
    if bias is not None:
        student.vocab_projector.bias.copy_(rows(bias.detach().float().cpu()[:, None])[:, 0])
    return True
