"""sentence-transformers folders: how a teacher makes vectors of texts, and the same for its student.

Such a folder lists modules (``modules.json``) that work one after the other: the transformer, the pooling of its last
hidden states, and what is done to the vector, each with its settings in a folder of its own. Nothing here imports
``sentence_transformers``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from tokenizers.normalizers import Lowercase
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.utils import cached_file

from ..alignment.families import encode
from ..alignment.loading import check_source
from ..core.errors import VocabdistilError, need

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

# By the names that version 6 writes, the keys that older ones write, which every version reads. A folder may ask for
# several: their vectors then follow each other in this order.
POOLINGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
_LATER = ("Dense", "Normalize", "LayerNorm", "Dropout")  # what may follow the pooling
_TRANSFORMER_SETTINGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


@dataclass(frozen=True)
class SentenceModule:
    """What is done to a pooled vector.

    Attributes:
        name: ``"Dense"``, ``"Normalize"``, ``"LayerNorm"`` or ``"Dropout"``.
        config: its settings, as they stand in its ``config.json``.
        weights: its tensors by name; empty where it has none.
    """

    name: str
    config: dict[str, Any]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class SentenceSettings:
    """How a sentence-transformers model makes vectors of texts.

    Attributes:
        transformer_folder: what ``AutoModel.from_pretrained`` takes: where the transformer lies.
        pooling: names of ``POOLINGS``; the vectors of several follow each other.
        include_prompt: whether the tokens of the prompt are pooled too.
        width: of the hidden states that are pooled.
        modules: what follows the pooling.
        prompts: prefixes of texts by name.
        default_prompt_name: the one that texts get if nobody says.
        similarity: name of the similarity function, ``None`` for the default (cosine).
        max_seq_length: tokens of a text at most, ``None``: the tokenizer's own limit.
        do_lower_case: whether texts are lower-cased first.
    """

    transformer_folder: str
    pooling: tuple[str, ...]
    include_prompt: bool
    width: int
    modules: tuple[SentenceModule, ...]
    prompts: dict[str, str]
    default_prompt_name: str | None
    similarity: str | None
    max_seq_length: int | None
    do_lower_case: bool

    @property
    def prompt(self) -> str:
        """The prefix that texts get if nobody says, or ``""``."""
        return self.prompts.get(self.default_prompt_name or "", "")


def _find(source: str, *path: str) -> Path | None:
    """A file of a folder, or of a model on the Hub; None if it is not there."""
    relative = "/".join(part for part in path if part)
    if os.path.isdir(source):
        found = Path(source, relative)
        return found if found.is_file() else None
    try:
        cached = cached_file(source, relative)
    except (OSError, ValueError):
        return None
    return None if cached is None else Path(cached)


def _read_json(argument: str, source: str, *path: str) -> Any:
    """None if there is no such file."""
    found = _find(source, *path)
    if found is None:
        return None
    try:
        return json.loads(found.read_text(encoding="utf-8"))
    except ValueError as error:
        raise VocabdistilError.of(argument, f"cannot read {found}: {error}") from None


def _read_module(argument: str, source: str, name: str, path: str) -> SentenceModule:
    weights: dict[str, Tensor] = {}
    if (file := _find(source, path, "model.safetensors")) is not None:
        weights = load_file(file)
    elif (file := _find(source, path, "pytorch_model.bin")) is not None:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    return SentenceModule(name, _read_json(argument, source, path, "config.json") or {}, weights)


def _read_pooling(argument: str, config: dict[str, Any]) -> tuple[str, ...]:
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for mode, key in POOLINGS.items() if config.get(key)] or ["mean"]
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    unknown = [mode for mode in modes if mode not in POOLINGS]
    need(not unknown, argument, f"a pooling of {', '.join(POOLINGS)}", unknown)
    return modes


def read_sentence_settings(source: str | os.PathLike[str], argument: str = "teacher") -> SentenceSettings | None:
    """Reads how a sentence-transformers model makes vectors of texts; None for a plain model of ``transformers``.

    Versions 2 to 6 of sentence-transformers are read: the transformer at the root or in a folder of its own, the
    pooling by name or by flags. A model that makes other things than one dense vector (sparse, late interaction,
    cross-encoders) counts as plain.

    Args:
        source: a folder, or a model's name on the Hugging Face Hub.
        argument: what an error names.

    Raises:
        VocabdistilError: a settings file that is no JSON or has other kinds of values, or modules other than a
            transformer, a pooling and ``Dense``, ``Normalize``, ``LayerNorm`` or ``Dropout``.
    """
    try:
        return _read_settings(check_source(source, argument), argument)
    except (AttributeError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
        told = f"cannot read the sentence-transformers settings of {os.fspath(source)}: {problem}"
        raise VocabdistilError.of(argument, told) from None


def _text_of(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r:.80}")
    return value


def _read_settings(source: str, argument: str) -> SentenceSettings | None:
    listed = _read_json(argument, source, "modules.json")
    model = _read_json(argument, source, "config_sentence_transformers.json") or {}
    if listed is None or model.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        return None
    names = [entry["type"].rpartition(".")[2] for entry in listed]
    understood = names[:2] == ["Transformer", "Pooling"] and set(names[2:]) <= {*_LATER}
    expected = f"sentence-transformers modules Transformer, Pooling and any of {', '.join(_LATER)}"
    need(understood, argument, expected, ", ".join(names))
    (inside, where), later = (entry["path"] for entry in listed[:2]), listed[2:]
    pooling = _read_json(argument, source, where, "config.json") or {}
    width = pooling.get("embedding_dimension", pooling.get("word_embedding_dimension"))
    need(isinstance(width, int), argument, "the width of the vectors in its pooling's config.json", width)
    found = (_read_json(argument, source, inside, name) for name in _TRANSFORMER_SETTINGS)
    transformer = next((settings for settings in found if settings is not None), {})
    folder = source
    if inside:
        local = source if os.path.isdir(source) else snapshot_download(source, allow_patterns=f"{inside}/*")
        folder = os.path.join(local, inside)
    return SentenceSettings(
        transformer_folder=folder,
        pooling=_read_pooling(argument, pooling),
        include_prompt=pooling.get("include_prompt", True),
        width=width,
        modules=tuple(
            _read_module(argument, source, name, entry["path"]) for name, entry in zip(names[2:], later, strict=True)
        ),
        prompts={name: _text_of(text) for name, text in (model.get("prompts") or {}).items() if text is not None},
        default_prompt_name=None if (default := model.get("default_prompt_name")) is None else _text_of(default),
        similarity=model.get("similarity_fn_name"),
        max_seq_length=None if (most := transformer.get("max_seq_length")) is None else int(most),
        do_lower_case=transformer.get("do_lower_case", False),
    )


def expected_prompt(asked: str | None, settings: SentenceSettings | None) -> str:
    """What stands before every text: what was asked for, or what the folder says."""
    if asked is not None:
        return asked
    return settings.prompt if settings is not None else ""


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
        tokenizer = _read_json("out", str(folder), "tokenizer_config.json") or {}
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
