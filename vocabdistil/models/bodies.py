"""The student's body out of its teacher's: which layers stay, with another vocabulary, in the same class."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import need
from .architectures import Architecture, embedding_of, layer_kinds
from .named_tokens import follow_ids, generation_for
from .shapes import attention_period, check_layers, known_architecture
from .teachers import Teacher

__all__ = ["build_body", "check_body"]

_ROLES = ("pad", "bos", "eos", "unk", "cls", "sep", "mask")


def _row_of(teacher: Teacher) -> Architecture:
    return known_architecture(teacher.model.config)


def check_body(teacher: Teacher, keep: Sequence[int], tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Finds out, before any work, whether :func:`build_body` can do what is asked.

    Args:
        tokenizer: the student's, if there is one yet.

    Raises:
        VocabdistilError: one line that names the option that is at fault.
    """
    check_layers(teacher.model.config, keep)
    _check_padding(_row_of(teacher), tokenizer)


def _check_padding(row: Architecture, tokenizer: PreTrainedTokenizerBase | None) -> None:
    if tokenizer is None or not row.after_padding:
        return
    pad = tokenizer.pad_token_id
    need(pad is not None, "vocabulary", "a padding token, from whose id this architecture counts positions", "none")
    fixed = row.pad_id is None or row.pad_id == pad
    need(fixed, "vocabulary", f"padding at id {row.pad_id}, where this architecture looks for it", pad)


def _follow_tokens(config: Any, teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Ids of tokens in the configuration become those of the student's tokens of the same role, or None."""
    for key, value in list(vars(config).items()):
        if not key.endswith("_token_id") or value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        roles = [key.removesuffix("_token_id"), *(r for r in _ROLES if getattr(teacher, f"{r}_token_id", None) in ids)]
        found = (getattr(student, f"{role}_token_id", None) for role in roles)
        setattr(config, key, next((i for i in found if i is not None), None))


def _tell_attention(config: Any, kinds: Sequence[str]) -> None:
    """Says which layers attend to what, as transformers 4 reads it and as 5 does."""
    config.global_attn_every_n_layers = attention_period(kinds)
    if getattr(config, "layer_types", None):
        config.layer_types = list(kinds)
    for name, kind in (("global_rope_theta", "full_attention"), ("local_rope_theta", "sliding_attention")):
        theta = (getattr(config, "rope_parameters", None) or {}).get(kind, {}).get("rope_theta")
        if theta is not None:
            setattr(config, name, theta)


def _config(teacher: Teacher, tokenizer: PreTrainedTokenizerBase, vocab_size: int, keep: Sequence[int]) -> Any:
    """The teacher's configuration with the student's tokens and layers."""
    row, model = _row_of(teacher), teacher.whole
    config = copy.deepcopy(model.config)
    config.vocab_size = vocab_size
    if row.causal:
        follow_ids(config, teacher.tokenizer, tokenizer)
    else:
        _follow_tokens(config, teacher.tokenizer, tokenizer)
    setattr(config, row.fields.layers, len(keep))
    if (kinds := layer_kinds(model.config)) is not None and not row.causal:
        _tell_attention(config, [kinds[i] for i in keep])
    output = model.get_output_embeddings() if model is not teacher.model else None
    if output is not None:
        config.tie_word_embeddings = output.weight is embedding_of(model)
    if row.after_padding:
        table = row.part_of_embeddings(teacher.model, "positions")
        config.max_position_embeddings = table.num_embeddings + tokenizer.pad_token_id - table.padding_idx
    return config


def _base_prefix(model: PreTrainedModel) -> str:
    """How names of the body's tensors begin in the whole model."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _vocabulary_rows(teacher: Teacher, rows: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The teacher's tensors that have a row for each token, tied ones once, and what the student has instead."""
    inputs = embedding_of(teacher.whole)
    made = [(inputs, rows(inputs.detach()))]
    if teacher.whole is teacher.model:
        return made
    weight, bias = teacher.output_layer
    if weight is not inputs:
        made.append((weight, rows(weight.detach())))
    if bias is not None:
        made.append((bias, rows(bias.detach()[:, None])[:, 0]))
    return made


def _shifted_positions(teacher: Teacher, pad_id: int) -> Tensor:
    """The table of positions of a teacher that counts from its padding's id, for another id."""
    table = _row_of(teacher).part_of_embeddings(teacher.model, "positions")
    used = table.weight.detach()[table.padding_idx :]
    return torch.cat([used.new_zeros(pad_id, used.shape[1]), used])


def _state(
    teacher: Teacher,
    student: PreTrainedModel,
    made: Sequence[tuple[Tensor, Tensor]],
    keep: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Tensor]:
    """The student's tensors by name, taken from the teacher's."""
    row, base = _row_of(teacher), _base_prefix(teacher.whole)
    source = teacher.whole.state_dict(keep_vars=True)
    stem = f"{base}{row.layers}."

    def of_teacher(key: str) -> Tensor:
        if not key.startswith(stem) or row.shared:
            return source[key]
        index, part = key[len(stem) :].split(".", 1)
        same = source.get(f"{stem}{keep[int(index)]}.{part}")
        # What only the first layer holds, for all of them: T5's relative bias.
        return source[f"{stem}0.{part}"] if same is None else same

    state = {}
    for key in student.state_dict():
        value = of_teacher(key)
        state[key] = next((new for old, new in made if old is value), value).detach()
    if row.after_padding:
        state[f"{base}{row.embeddings}.{row.positions}.weight"] = _shifted_positions(teacher, tokenizer.pad_token_id)
    if row.first_norm and keep[0] != 0:
        # The first layer reads the embeddings, already normalised, without a norm of its own: its scale goes into
        # the product that reads them.
        norm, linear = row.first_norm
        scale = source[f"{stem}{keep[0]}.{norm}.weight"].detach()
        state[f"{stem}0.{linear}.weight"] = state[f"{stem}0.{linear}.weight"] * scale
    return state


@torch.no_grad()
def build_body(
    teacher: Teacher, rows: Callable[[Tensor], Tensor], tokenizer: PreTrainedTokenizerBase, keep: Sequence[int]
) -> PreTrainedModel:
    """A student of the teacher's class: some of its layers, with rows for another vocabulary.

    Everything that does not depend on the vocabulary is copied: positions (moved where they count from the padding's
    id, so that the first token keeps its row), token types, norms, maps of narrower embeddings, relative positions,
    the layers kept, and the MLM head if the teacher has one that works. Tied tensors stay tied. With all layers and
    the same vocabulary the student computes exactly what the teacher does. A decoder keeps all its layers, its dtype
    and how it generates, and ids in its configurations become those of the same tokens.

    Args:
        rows: ``[V_t, D]`` -> ``[V_s, D]``: rows for the student's tokens out of rows for the teacher's; also used
            for output weights and, as ``[V_t, 1]``, for the output bias.
        tokenizer: the student's: gives the ids of special tokens.
        keep: the teacher's layers that stay, ascending; of a model whose layers share their weights (ALBERT) only
            their number counts.

    Returns:
        A model on the CPU in evaluation mode: with the output layer if the teacher has one, else the body; an encoder
        in float32.

    Raises:
        VocabdistilError: the architecture cannot have such a body, or not with this vocabulary.
    """
    check_body(teacher, keep, tokenizer)
    causal = _row_of(teacher).causal
    made = _vocabulary_rows(teacher, rows)
    config = _config(teacher, tokenizer, len(made[0][1]), keep)
    with torch.random.fork_rng(devices=[]):
        # In the dtype that the configuration says; converted later, what is no weight would lose digits too.
        student = AutoModelForCausalLM.from_config(config) if causal else type(teacher.whole)(config)
    if getattr(teacher.model, "pooler", None) is None and hasattr(student.base_model, "pooler"):
        setattr(student.base_model, "pooler", None)  # noqa: B010 - torch declares no modules that are None
    student.load_state_dict(_state(teacher, student, made, keep, tokenizer))
    if causal:
        student.generation_config = generation_for(teacher, tokenizer)
        return student.eval()
    return student.float().eval()
