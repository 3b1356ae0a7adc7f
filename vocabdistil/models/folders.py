"""What can be told of a model's folder without loading it, which takes seconds: before torch is imported."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from safetensors import safe_open

from ..alignment.loading import LOADING_ERRORS, cannot_load, check_source, look_at_tokenizer, needs_code
from ..core.errors import VocabdistilError
from .architectures import ARCHITECTURES
from .sentence_settings import find, read_settings

__all__ = ["look_at_model", "need_known", "peek_config", "stated_licence", "transformer_folder"]

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WEIGHTS = (_ONE, _INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")


def need_known(
    name: str, model_type: str, own_code: bool, trust_remote_code: bool, argument: str, decoders: bool = False
) -> None:
    """Raises VocabdistilError for a model that is in no row of the table and brings no code that may run, and for a
    decoder unless ``decoders``."""
    row = ARCHITECTURES.get(model_type)
    if decoders or not row.causal if row is not None else own_code and trust_remote_code:
        return
    if own_code and row is None:
        raise needs_code("a model", name, argument)
    encoders, causal = (
        ", ".join(kind for kind, row in ARCHITECTURES.items() if row.causal == wanted) for wanted in (False, True)
    )
    expected = f"expected an encoder: {encoders}" + f"; or a decoder: {causal}" * decoders
    raise VocabdistilError.of(argument, f"{name} has model_type {model_type!r}; {expected}")


def look_at_model(
    source: str | os.PathLike,
    argument: str = "teacher",
    trust_remote_code: bool = False,
    sentence: bool = True,
    decoders: bool = False,
) -> SimpleNamespace | None:
    """Finds out what can be told of a model before it is loaded.

    Args:
        sentence: it is used as a sentence-transformers folder says, if it is one; else its transformer alone.
        decoders: it may be a decoder, but for one that makes vectors.

    Returns:
        Its configuration, as far as the file has it; None where only loading tells: of a model that is on the Hub, that
        brings code of its own, or whose file leaves out the shape.

    Raises:
        VocabdistilError: no such folder, no tokenizer or none that can be read, no encoder of a known architecture, no
            weights, files of them that are cut, or a tokenizer with ids beyond the embeddings.
    """
    name, find = os.fspath(source), transformer_folder if sentence else check_source
    folder = Path(find(source, argument))
    if not folder.is_dir():
        return None
    tokenizer = look_at_tokenizer(folder, argument, trust_remote_code)
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"config.json: expected an object, got {settings!r:.80}")
    except (OSError, ValueError, RecursionError) as error:
        raise cannot_load("a model", name, argument, error) from None
    kind = settings.get("model_type")
    if not isinstance(kind, str):
        return None
    own_code = bool(settings.get("auto_map"))
    if decoders and sentence:
        decoders = read_settings(source, argument) is None
    need_known(name, kind, own_code, trust_remote_code, argument, decoders)
    if own_code and trust_remote_code:
        return None
    _look_at_weights(folder, name, argument)
    rows, largest = settings.get("vocab_size"), max(tokenizer.get_vocab().values()) if tokenizer is not None else -1
    if isinstance(rows, int) and largest >= rows:
        problem = f"the tokenizer of {name} has ids up to {largest}, its model {rows} embeddings"
        raise VocabdistilError.of(argument, problem)
    whole = all(isinstance(settings.get(field), int) for field in ARCHITECTURES[kind].fields if field)
    return SimpleNamespace(**settings) if whole else None


def peek_config(source: str | os.PathLike) -> Any:
    """What a model's configuration says of its kind; nothing where it cannot be read, which is for others to say."""
    try:
        file = Path(check_source(source, "teacher"), "config.json")
        if not file.parent.is_dir():
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(os.fspath(source), file.name))
        return SimpleNamespace(model_type=json.loads(file.read_text(encoding="utf-8"))["model_type"])
    except LOADING_ERRORS:
        return SimpleNamespace(model_type=None)


def transformer_folder(source: str | os.PathLike, argument: str = "teacher") -> str:
    """Where the transformer of a sentence-transformers folder is, or what is no such folder itself.

    Raises:
        VocabdistilError: as :func:`.sentence_settings.read_settings`; of a model on the Hub nothing is read.
    """
    folder = check_source(source, argument)
    settings = read_settings(folder, argument) if os.path.isdir(folder) else None
    return folder if settings is None else settings.transformer_folder


def stated_licence(sources: Sequence[str]) -> str | None:
    """The licence that the cards of models state; None where one of them states none or another, or is not at hand.

    Args:
        sources: folders or names on the Hugging Face Hub.
    """
    found = set(map(_licence, sources))
    return found.pop() if len(found) == 1 else None


def _licence(source: str) -> str | None:
    """What a card says before its text, in YAML between two lines of dashes."""
    try:
        card = find(check_source(source, "teacher"), "README.md")
        text = card.read_text(encoding="utf-8-sig") if card is not None else ""
        front = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
        licence = yaml.safe_load(front[1]).get("license") if front else None
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return None
    return licence if isinstance(licence, str) and licence.strip() else None


def _look_at_weights(folder: Path, name: str, argument: str) -> None:
    """That there are some, and that no file is cut."""
    found = [file for file in _WEIGHTS if (folder / file).exists()]
    if not found:
        raise VocabdistilError.of(argument, f"cannot load a model from {name}: no {_ONE} or {_WEIGHTS[2]}")
    try:
        for file in _shards(folder, found[0]):
            with safe_open(folder / file, framework="np"):
                pass
    except LOADING_ERRORS as error:
        raise cannot_load("a model", name, argument, error) from None


def _shards(folder: Path, first: str) -> list[str]:
    if first == _INDEX:
        listed: dict[str, Any] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        return sorted(set(listed.values()))
    return [_ONE] if first == _ONE else []
