"""Tokenizers by the name of a model or the folder that they are in."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import VocabdistilError, need_place, spell

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "LOADING_ERRORS",
    "cannot_load",
    "check_source",
    "first_line",
    "load_tokenizer",
    "look_at_tokenizer",
    "needs_code",
    "tokenizer_of",
]

# What files make transformers, tokenizers and safetensors raise is of no common kind but this.
LOADING_ERRORS = Exception
_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model", "vocab.json")
# Some tokenizers can be loaded, but can do nothing, or nothing with what they do not know.
_TRIED = "a ꙮ"
# Seconds to wait for the hub.
_PATIENCE = 5


def check_source(source: str | os.PathLike, argument: str) -> str:
    """Where a model lies, or its name, which transformers resolves.

    Raises:
        VocabdistilError: there is no such folder; or something that may be a name is neither a folder nor in the local
            cache, and the hub cannot be reached.
    """
    need_place(source, argument, "a folder or a model's name")
    name = os.fspath(source)
    path = Path(os.path.expanduser(name))  # of an unknown user: as it is
    if path.is_dir():
        return str(path)
    if path.exists():
        raise VocabdistilError.of(argument, f"expected a model folder, got the file {name}")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise VocabdistilError.of(argument, f"no such folder: {name}")
    return _named(name, argument)


def _named(name: str, argument: str) -> str:
    """The name of a model; while the hub cannot be reached, its folder in the local cache: ``transformers`` would ask
    for each of its files, again and again, which takes minutes."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import get_session

    asked = "must not be asked (HF_HUB_OFFLINE)"
    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
            return name  # whatever it answered
        except Exception:  # of whichever library for HTTP this version of huggingface_hub has
            asked = "cannot be reached"
    try:
        return snapshot_download(name, local_files_only=True)
    except (OSError, ValueError):
        places = f"no such folder, not in the local cache ({constants.HF_HUB_CACHE})"
        problem = f"cannot load {name}: {places}, and {constants.ENDPOINT} {asked}"
        raise VocabdistilError.of(argument, problem) from None


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def needs_code(what: str, name: str, argument: str) -> VocabdistilError:
    """The error for what only code that nobody allowed can read."""
    allowed = f"{spell('trust_remote_code', True)} runs it"
    return VocabdistilError.of(argument, f"{name} needs code of its own to load {what}; {allowed}")


def cannot_load(what: str, name: str, argument: str, error: BaseException) -> VocabdistilError:
    """The one line for what ``transformers`` raised; custom code that nobody allowed is what a user can change."""
    if "trust_remote_code" in str(error):
        return needs_code(what, name, argument)
    return VocabdistilError.of(argument, f"cannot load {what} from {name}: {first_line(error)}")


def _need_files(source: str, argument: str) -> None:
    if Path(source).is_dir() and not any((Path(source) / name).exists() for name in _FILES):
        raise VocabdistilError.of(argument, f"no tokenizer in {source}")


def look_at_tokenizer(source: str | os.PathLike, argument: str, trust_remote_code: bool = False) -> Any:
    """Finds out what can be told of a tokenizer before ``transformers``, which takes seconds to import, loads it.

    Returns:
        The ``tokenizers.Tokenizer`` of a folder's ``tokenizer.json``; where there is no such file, what
        ``transformers`` makes of the others, as nothing else tells whether it can; None for a model on the Hub.

    Raises:
        VocabdistilError: no such folder, no tokenizer in it, or one that cannot be read or is slow.
    """
    source = check_source(source, argument)
    _need_files(source, argument)
    if not Path(source).is_dir():
        return None
    file = Path(source) / "tokenizer.json"
    if not file.is_file():
        return load_tokenizer(source, argument, trust_remote_code)
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.encode(_TRIED)
        settings = Path(source) / "tokenizer_config.json"
        if settings.is_file():
            int(json.loads(settings.read_text(encoding="utf-8")).get("model_max_length") or 0)
    except LOADING_ERRORS as error:
        raise cannot_load("a tokenizer", source, argument, error) from None
    return tokenizer


def load_tokenizer(
    source: str | os.PathLike, argument: str = "teacher", trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a folder or of a model's name.

    Raises:
        VocabdistilError: no such folder, no tokenizer in it, a slow one, or one with code of its own that
            ``trust_remote_code`` does not allow to run.
    """
    source = check_source(source, argument)
    _need_files(source, argument)
    from transformers import AutoTokenizer  # takes a while to import, and who brings tokenizers does not need it

    try:
        # False rather than the default: that asks a question at the terminal.
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True, trust_remote_code=trust_remote_code)
        tokenizer(_TRIED)
        tokenizer.model_max_length = int(tokenizer.model_max_length)
    except LOADING_ERRORS as error:
        raise cannot_load("a tokenizer", source, argument, error) from None
    if not tokenizer.is_fast:
        raise VocabdistilError.of(
            argument,
            f"{source} has a slow tokenizer ({type(tokenizer).__name__}); "
            "a fast one (tokenizer.json) is needed"
        )
    return tokenizer


def tokenizer_of(tokenizer: Any, name: str) -> Any:
    """The tokenizer, or the one that a model's name or a folder stands for: loaded once, as long as no file changes.

    Raises:
        VocabdistilError: as :func:`load_tokenizer`; ``name`` is the argument's name.
    """
    if not isinstance(tokenizer, (str, os.PathLike)):
        return tokenizer
    source = check_source(tokenizer, name)
    files = sorted(path for path in Path(source).iterdir() if path.is_file()) if Path(source).is_dir() else []
    return _loaded(source, name, tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files))


@functools.lru_cache(maxsize=64)
def _loaded(source: str, name: str, files: tuple[tuple[str, int, int], ...]) -> PreTrainedTokenizerBase:
    return load_tokenizer(source, name)
