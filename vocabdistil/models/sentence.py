"""sentence-transformers folders: how a teacher makes vectors of texts, and the same for its student.

Such a folder lists modules (``modules.json``) that work one after the other: the transformer, the pooling of its last
hidden states, and what is done to the vector, each with its settings in a folder of its own. Nothing here imports
``sentence_transformers``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers.normalizers import Lowercase
from torch import Tensor, nn
from transformers import AutoConfig

from ..alignment.families import encode
from .sentence_settings import (
    POOLINGS,
    SentenceModule,
    SentenceSettings,
    expected_prompt,
    read_json,
    read_settings,
)

__all__ = [
    "POOLINGS",
    "SentenceModule",
    "SentenceSettings",
    "expected_prompt",
    "finish",
    "lowered",
    "pool",
    "projected",
    "prompt_length",
    "read_sentence_settings",
    "write_sentence_settings",
]


def read_sentence_settings(source: str | os.PathLike[str], argument: str = "teacher") -> SentenceSettings | None:
    """:func:`.sentence_settings.read_settings`, with the weights of its modules."""
    return read_settings(source, argument, _load)


def _load(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def lowered(texts: Iterable[str], settings: SentenceSettings | None) -> list[str]:
    """Texts as the model's tokenizer gets them: lower-cased where the folder says so."""
    if settings is None or not settings.do_lower_case:
        return list(texts)
    return [Lowercase().normalize_str(text) for text in texts]


def prompt_length(tokenizer: Any, prompt: str, settings: SentenceSettings | None = None) -> int:
    """How many first tokens of a text are the prompt: those of the prompt alone, without the special token at its end.

    A tokenizer that joins the prompt's last character to the text counts one too many, as sentence-transformers does.
    """
    if not prompt:
        return 0
    (row,) = encode(tokenizer, lowered([prompt], settings), "tokenizer")
    return len(row) - (row[-1] in tokenizer.all_special_ids)


def _projection_module(projection: Tensor, bias: Tensor | None, modes: int) -> SentenceModule:
    """A Dense module that projects each of the pooled vectors that follow each other."""
    weight = torch.block_diag(*[projection.detach().float().cpu()] * modes).contiguous()
    weights = {"linear.weight": weight}
    if bias is not None:
        weights["linear.bias"] = bias.detach().float().cpu().repeat(modes)
    config = {
        "in_features": weight.shape[1],
        "out_features": weight.shape[0],
        "bias": bias is not None,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    return SentenceModule("Dense", config, weights)


def projected(settings: SentenceSettings, projection: Tensor, bias: Tensor | None = None) -> SentenceSettings:
    """The settings of a student whose hidden states a projection ``[D_t, D_s]`` maps to its teacher's."""
    module = _projection_module(projection, bias, len(settings.pooling))
    return replace(settings, width=projection.shape[1], modules=(module, *settings.modules))


def _write_json(folder: Path, name: str, value: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_sentence_settings(
    settings: SentenceSettings | None,
    folder: str | os.PathLike[str],
    projection: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Completes a student's folder so that ``SentenceTransformer(folder)`` makes vectors as its teacher does.

    Pooling, normalisation, prompts and similarity are the teacher's; a projection becomes a ``Dense`` module right
    after the pooling, so that the vectors have the teacher's width and lie in its space, before the teacher's own
    modules. Written as version 2 writes it, which every later one reads.

    Args:
        settings: the teacher's; with None (a plain model) nothing is written.
        folder: the student's, with model and tokenizer at its root.
        projection: ``[D_t, D_s]``, from the student's hidden states to the teacher's.
        bias: ``[D_t]``, added after it.

    Raises:
        ValueError: a projection that does not fit the two widths, or none where modules of the teacher read vectors of
            another width than the student's.
    """
    if settings is None:
        return
    folder = Path(folder)
    width, modules = AutoConfig.from_pretrained(folder).hidden_size, settings.modules
    if projection is not None:
        if projection.shape != (settings.width, width):
            raise ValueError(f"projection: expected {(settings.width, width)}, got {tuple(projection.shape)}")
        modules = projected(settings, projection, bias).modules
    elif width != settings.width and any(module.weights for module in modules):
        raise ValueError(f"projection: expected one from the student's {width} to the {settings.width} of its teacher")

    pooling: dict[str, Any] = {"word_embedding_dimension": width}
    pooling |= {key: mode in settings.pooling for mode, key in POOLINGS.items()}
    if not settings.include_prompt:
        pooling["include_prompt"] = False
    _write_json(folder / "1_Pooling", "config.json", pooling)
    names, paths = ["Transformer", "Pooling"], ["", "1_Pooling"]
    for k, module in enumerate(modules, start=2):
        names.append(module.name)
        paths.append(f"{k}_{module.name}")
        _write_json(folder / paths[-1], "config.json", module.config)
        if module.weights:
            weights = {name: tensor.contiguous() for name, tensor in module.weights.items()}
            save_file(weights, folder / paths[-1] / "model.safetensors", {"format": "pt"})
    listed = [
        {"idx": k, "name": str(k), "path": path, "type": f"sentence_transformers.models.{name}"}
        for k, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    _write_json(folder, "modules.json", listed)
    transformer: dict[str, Any] = {"do_lower_case": settings.do_lower_case}
    if settings.max_seq_length is not None:
        # The student may have room for less.
        tokenizer = read_json("out", str(folder), "tokenizer_config.json") or {}
        limit = tokenizer.get("model_max_length", settings.max_seq_length)
        transformer["max_seq_length"] = int(min(settings.max_seq_length, limit))
    _write_json(folder, "sentence_bert_config.json", transformer)
    model = {
        "prompts": settings.prompts,
        "default_prompt_name": settings.default_prompt_name,
        "similarity_fn_name": settings.similarity or "cosine",
    }
    _write_json(folder, "config_sentence_transformers.json", model)


def _pool_one(hidden: Tensor, mask: Tensor, position: Tensor, mode: str) -> Tensor:
    batch = torch.arange(len(hidden), device=hidden.device)
    if mode == "cls":
        return hidden[batch, mask.int().argmax(1)]
    if mode == "lasttoken":
        return hidden[batch, (position * mask).argmax(1)]
    if mode == "max":
        return hidden.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(1)
    weight = (mask * position if mode == "weightedmean" else mask).to(hidden.dtype)
    total = weight.sum(1, keepdim=True).clamp(min=1e-9)
    return (weight.unsqueeze(1) @ hidden)[:, 0] / (total.sqrt() if mode == "mean_sqrt_len_tokens" else total)


def pool(hidden: Tensor, mask: Tensor, settings: SentenceSettings | None = None, prompt_length: int = 0) -> Tensor:
    """One vector for each text, pooled as the settings say; the mean over its tokens without any.

    Args:
        hidden: last hidden states ``[B, L, D]``.
        mask: attention mask ``[B, L]``, bool or integer, padded on either side.
        settings: of the teacher.
        prompt_length: how many first tokens of each text are prompt; they count unless ``include_prompt`` is false.

    Returns:
        ``[B, D]`` per pooling, ``[B, n D]`` for n of them, in the dtype of ``hidden``, float32 for half precision.
    """
    hidden = hidden.float() if hidden.dtype in (torch.float16, torch.bfloat16) else hidden
    position = mask.ne(0).cumsum(1)
    used = mask.ne(0)
    if settings is not None and not settings.include_prompt:
        used = used & (position > prompt_length)
    modes = ("mean",) if settings is None else settings.pooling
    return torch.cat([_pool_one(hidden, used, position, mode) for mode in modes], dim=-1)


def _activation(config: dict[str, Any]) -> nn.Module:
    """Of a Dense module; one that torch does not have would be code that came with the model."""
    name = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    made = getattr(nn, name.rpartition(".")[2], None) if name.startswith("torch.nn.") else None
    if not (isinstance(made, type) and issubclass(made, nn.Module)):
        raise ValueError(f"its Dense module has the activation {name}, which is none of torch.nn")
    return made()


def _dense(vectors: Tensor, module: SentenceModule) -> Tensor:
    config, weights = module.config, module.weights
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise ValueError(f"its Dense module has {key} {config[key]!r}")
    out = _activation(config)(F.linear(vectors, weights["linear.weight"], weights.get("linear.bias")))
    if config.get("use_residual"):
        residual = weights.get("residual.weight")
        out = out + (vectors if residual is None else F.linear(vectors, residual))
    return out


def finish(vectors: Tensor, settings: SentenceSettings | None) -> Tensor:
    """What a sentence-transformers model makes of pooled vectors: its modules after the pooling.

    Args:
        vectors: ``[B, D]`` on the CPU, as :func:`pool` gives them.
        settings: of the folder; with None nothing is done.

    Returns:
        ``[B, E]``.

    Raises:
        ValueError: a Dense module that reads or writes something else than the vector, or whose activation is none of
            ``torch.nn``.
        KeyError, RuntimeError: modules without their weights, or of other widths.
    """
    for module in settings.modules if settings is not None else ():
        if module.name == "Dense":
            vectors = _dense(vectors, module)
        elif module.name == "Normalize":
            vectors = F.normalize(vectors, dim=-1)
        elif module.name == "LayerNorm":
            weights = module.weights
            vectors = F.layer_norm(vectors, vectors.shape[-1:], weights["norm.weight"], weights["norm.bias"])
    return vectors
