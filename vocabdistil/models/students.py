"""Students: DistilBERT architectures by name, and their initialisation from a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from ..alignment.remap import RemapTable

__all__ = ["PRESETS", "Preset", "build_student", "copied_layers", "initialise_from_teacher", "principal_axes"]


@dataclass(frozen=True)
class Preset:
    """A student architecture.

    Attributes:
        layers, dim, heads, ffn: transformer layers, hidden width, attention heads, width of the feed-forward layer.
        vocab_size: tokens, if the user does not say.
    """

    layers: int
    dim: int
    heads: int
    ffn: int
    vocab_size: int


# The architectures of distilrubert-{base,small,tiny-v1,tiny-5k} (model cards, arXiv 2205.02340).
PRESETS = {
    "base": Preset(6, 768, 12, 3072, 31000),
    "small": Preset(2, 768, 12, 3072, 31000),
    "tiny": Preset(3, 264, 12, 792, 31000),
    "tiny-5k": Preset(3, 264, 12, 792, 5000),
}


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


def _row_means(table: RemapTable, embedding: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """For each student token the mean embedding of the teacher tokens whose row holds it, and how many there are.

    UNK and padding rows are holes in the table rather than segmentations; special tokens are set by role afterwards.
    """
    length = (table.indptr[1:] - table.indptr[:-1]).long()
    teacher = torch.repeat_interleave(torch.arange(len(table)), length)
    student = table.ids.long()
    # A piece that a token holds twice still counts once: the mean is over tokens.
    pairs = torch.unique(student * len(table) + teacher)
    student, teacher = pairs // len(table), pairs % len(table)
    inside = teacher < embedding.shape[0]
    student, teacher = student[inside], teacher[inside]
    sums = torch.zeros(vocab_size, embedding.shape[1], dtype=torch.float64)
    sums.index_add_(0, student, embedding.double()[teacher])
    counts = torch.bincount(student, minlength=vocab_size)
    return (sums / counts.clamp(min=1).unsqueeze(1)).float(), counts


def copied_layers(teacher_layers: int, student_layers: int) -> list[int]:
    """Which teacher layer each student layer copies: evenly spaced from the first to the last.

    For 12 -> 6 that is 0, 2, 4, 7, 9, 11, the choice of DistilBERT (arXiv 1910.01108).
    """
    if student_layers == 1:
        return [teacher_layers - 1]
    return [round(j * (teacher_layers - 1) / (student_layers - 1)) for j in range(student_layers)]


_BERT_TO_DISTILBERT = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}


def _teacher_blocks(teacher: PreTrainedModel) -> tuple[Sequence[nn.Module], dict[str, str]]:
    """The teacher's transformer layers, and how their parts are called in DistilBERT; empty if it is neither."""
    if hasattr(teacher, "encoder") and hasattr(teacher.encoder, "layer"):
        blocks, names = teacher.encoder.layer, _BERT_TO_DISTILBERT
    elif hasattr(teacher, "transformer") and hasattr(teacher.transformer, "layer"):
        blocks, names = teacher.transformer.layer, {name: name for name in _BERT_TO_DISTILBERT.values()}
    else:
        return [], {}
    present = dict(blocks[0].named_modules())
    return (blocks, names) if all(name in present for name in names) else ([], {})


@torch.no_grad()
def initialise_from_teacher(
    student: DistilBertForMaskedLM,
    teacher: PreTrainedModel,
    table: RemapTable,
    teacher_tokenizer: PreTrainedTokenizerBase,
    student_tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
) -> dict[str, object]:
    """Gives the student what the teacher knows and the student has room for.

    * Token embedding: the mean over the teacher tokens whose row of the remap table holds the student token, then
      projected on the leading principal axes of the teacher's embedding if the widths differ. A special token takes
      the embedding of the teacher's token of the same role. A token that is in no row takes the mean of all rows
      plus noise of a tenth of their standard deviation.
    * Positions: the teacher's, with its embedding of token type 0 added (DistilBERT has no types), projected alike.
    * Embedding LayerNorm and layers: copied if widths, heads and feed-forward widths are equal, layer by layer as
      :func:`copied_layers` says; otherwise they keep their fresh weights.

    Returns:
        What was done: ``embedding`` (``"copied"`` or ``"projected"``), ``uncovered_tokens``, ``copied_layers``.
    """
    width = student.config.dim
    source = teacher.get_input_embeddings().weight.detach().float().cpu()
    axes = None if source.shape[1] == width else principal_axes(source, width)

    def fit(x: Tensor) -> Tensor:
        return x if axes is None else x @ axes

    target = student.distilbert.embeddings
    rows, counts = _row_means(table, source, len(student_tokenizer))
    covered = counts > 0
    for role in ("pad", "unk", "cls", "sep", "mask"):
        from_id = getattr(teacher_tokenizer, f"{role}_token_id")
        to_id = getattr(student_tokenizer, f"{role}_token_id")
        if from_id is not None and to_id is not None:
            rows[to_id] = source[from_id]
            covered[to_id] = True
    rows = fit(rows)
    if not bool(covered.all()):
        noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed))
        known = rows[covered]
        rows[~covered] = (known.mean(0) + 0.1 * known.std(0) * noise)[~covered]
    target.word_embeddings.weight.copy_(rows)

    embeddings = getattr(teacher, "embeddings", None)
    positions = getattr(embeddings, "position_embeddings", None)
    if isinstance(positions, nn.Embedding):
        # RoBERTa counts its positions from padding_idx + 1.
        offset = positions.padding_idx + 1 if positions.padding_idx is not None else 0
        types = getattr(embeddings, "token_type_embeddings", None)
        known = positions.weight.detach().float().cpu()[offset:]
        known = known + types.weight.detach().float().cpu()[0] if types is not None else known
        count = min(len(known), target.position_embeddings.num_embeddings)
        target.position_embeddings.weight[:count] = fit(known[:count])

    copied: list[int] = []
    blocks, names = _teacher_blocks(teacher)
    config = teacher.config
    heads = getattr(config, "num_attention_heads", None)
    ffn = blocks[0].get_submodule(next(n for n, d in names.items() if d == "ffn.lin1")).out_features if blocks else None
    if axes is None and (heads, ffn) == (student.config.n_heads, student.config.hidden_dim):
        target.LayerNorm.load_state_dict(embeddings.LayerNorm.state_dict())
        copied = copied_layers(len(blocks), student.config.n_layers)
        for block, index in zip(student.distilbert.transformer.layer, copied, strict=True):
            for theirs, ours in names.items():
                block.get_submodule(ours).load_state_dict(blocks[index].get_submodule(theirs).state_dict())
    return {
        "embedding": "copied" if axes is None else "projected",
        "uncovered_tokens": int((~covered).sum()),
        "copied_layers": copied,
    }
