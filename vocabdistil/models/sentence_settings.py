"""What a sentence-transformers folder says of how vectors are made: read and checked before torch is imported."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..alignment.loading import LOADING_ERRORS, cannot_load, check_source
from ..core.errors import VocabdistilError, need

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["POOLINGS", "SentenceModule", "SentenceSettings", "expected_prompt", "find", "read_json", "read_settings"]

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
# Reads a file of weights.
Load = Callable[[Path], "dict[str, Tensor]"]


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


def find(source: str, *path: str) -> Path | None:
    """A file of a folder, or of a model on the Hub; None if it is not there."""
    relative = "/".join(part for part in path if part)
    if os.path.isdir(source):
        found = Path(source, relative)
        return found if found.is_file() else None
    from transformers.utils import cached_file  # takes seconds to import

    try:
        cached = cached_file(source, relative)
    except (OSError, ValueError):
        return None
    return None if cached is None else Path(cached)


def read_json(argument: str, source: str, *path: str) -> Any:
    """None if there is no such file."""
    found = find(source, *path)
    if found is None:
        return None
    try:
        return json.loads(found.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise VocabdistilError.of(argument, f"cannot read {found}: {error}") from None


def _read_module(argument: str, source: str, name: str, path: str, load: Load | None) -> SentenceModule:
    files = (find(source, path, file) for file in ("model.safetensors", "pytorch_model.bin")) if load else ()
    file = next((file for file in files if file is not None), None)
    try:
        weights = load(file) if load and file is not None else {}
    except LOADING_ERRORS as error:
        raise cannot_load("weights", str(file), argument, error) from None
    return SentenceModule(name, read_json(argument, source, path, "config.json") or {}, weights)


def _read_pooling(argument: str, config: dict[str, Any]) -> tuple[str, ...]:
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for mode, key in POOLINGS.items() if config.get(key)] or ["mean"]
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    unknown = [mode for mode in modes if mode not in POOLINGS]
    need(not unknown, argument, f"a pooling of {', '.join(POOLINGS)}", unknown)
    return modes


def read_settings(
    source: str | os.PathLike[str], argument: str = "teacher", load: Load | None = None
) -> SentenceSettings | None:
    """Reads how a sentence-transformers model makes vectors of texts; None for a plain model of ``transformers``.

    Versions 2 to 6 of sentence-transformers are read: the transformer at the root or in a folder of its own, the
    pooling by name or by flags. A model that makes other things than one dense vector (sparse, late interaction,
    cross-encoders) counts as plain.

    Args:
        source: a folder, or a model's name on the Hugging Face Hub.
        argument: what an error names.
        load: reads the weights of a module after the pooling; None: they are left out.

    Raises:
        VocabdistilError: a settings file that is no JSON or has other kinds of values, weights that cannot be read, or
            modules other than a transformer, a pooling and ``Dense``, ``Normalize``, ``LayerNorm`` or ``Dropout``.
    """
    try:
        return _read_settings(check_source(source, argument), argument, load)
    except VocabdistilError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
        told = f"cannot read the sentence-transformers settings of {os.fspath(source)}: {problem}"
        raise VocabdistilError.of(argument, told) from None


def _local(source: str, inside: str) -> str:
    """Where a folder of the model lies."""
    if os.path.isdir(source):
        return source
    from huggingface_hub import snapshot_download

    return snapshot_download(source, allow_patterns=f"{inside}/*")


def _text_of(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r:.80}")
    return value


def _read_settings(source: str, argument: str, load: Load | None) -> SentenceSettings | None:
    listed = read_json(argument, source, "modules.json")
    model = read_json(argument, source, "config_sentence_transformers.json") or {}
    if listed is None or model.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        return None
    names = [entry["type"].rpartition(".")[2] for entry in listed]
    understood = names[:2] == ["Transformer", "Pooling"] and set(names[2:]) <= {*_LATER}
    expected = f"sentence-transformers modules Transformer, Pooling and any of {', '.join(_LATER)}"
    need(understood, argument, expected, ", ".join(names))
    (inside, where), later = (entry["path"] for entry in listed[:2]), listed[2:]
    pooling = read_json(argument, source, where, "config.json") or {}
    width: Any = pooling.get("embedding_dimension", pooling.get("word_embedding_dimension"))
    need(isinstance(width, int), argument, "the width of the vectors in its pooling's config.json", width)
    found = (read_json(argument, source, inside, name) for name in _TRANSFORMER_SETTINGS)
    transformer: dict[str, Any] = next((settings for settings in found if settings is not None), {})
    folder = source
    if inside:
        folder = os.path.join(_local(source, inside), inside)
    return SentenceSettings(
        transformer_folder=folder,
        pooling=_read_pooling(argument, pooling),
        include_prompt=pooling.get("include_prompt", True),
        width=width,
        modules=tuple(
            _read_module(argument, source, name, entry["path"], load)
            for name, entry in zip(names[2:], later, strict=True)
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
