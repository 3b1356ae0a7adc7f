"""A tokenizer taken apart, and put together again around another vocabulary."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..alignment.families import ROLES, backend_of, plain_settings, read_tokenizer
from ..core.errors import VocabdistilError

__all__ = [
    "Vocabulary",
    "contains_step",
    "model_ids",
    "rebuild",
    "save_tokenizer",
    "special_strings",
    "tokenizer_state",
]

_SETTINGS = (
    "model_max_length",
    "padding_side",
    "truncation_side",
    "model_input_names",
    "clean_up_tokenization_spaces",
    "split_special_tokens",
    "chat_template",
)


@dataclass(frozen=True)
class Vocabulary:
    """A student's vocabulary.

    Attributes:
        tokenizer: the student's tokenizer.
        kind: where its tokens come from: ``"train"`` (the text), ``"trim"`` (the teacher's), ``"given"``.
        kept: of a trimmed one the teacher's id of each student id, int64 ``[V_s]``; else ``None``.
        notes: what the user should know, a sentence each.
    """

    tokenizer: PreTrainedTokenizerBase
    kind: str
    kept: Tensor | None = None
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.tokenizer)


def tokenizer_state(tokenizer: Any, name: str = "teacher") -> dict[str, Any]:
    """A tokenizer as the JSON values of ``tokenizer.json``, without padding and truncation.

    Raises:
        VocabdistilError: it is not a fast tokenizer, or has a component made in Python.
    """
    try:
        backend = backend_of(tokenizer, name)
    except TypeError as error:
        raise VocabdistilError(f"--{error}") from None
    try:
        with plain_settings(backend):
            return json.loads(backend.to_str())
    except Exception as error:
        raise VocabdistilError(f"--{name}: its tokenizer cannot be copied: {error}") from None


def contains_step(component: Any, kind: str) -> bool:
    """Whether a part of a normalizer's or a pre-tokenizer's state is of that type."""
    if isinstance(component, list):
        return any(contains_step(part, kind) for part in component)
    return isinstance(component, dict) and (
        component.get("type") == kind or any(contains_step(part, kind) for part in component.values())
    )


def model_ids(model: dict[str, Any]) -> dict[str, int]:
    """Token -> id of a model's state; where a list names a token twice, the last one is the one that is read."""
    vocab = model["vocab"]
    return dict(vocab) if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}


def _template_tokens(processor: dict[str, Any] | None) -> Iterator[str]:
    """The tokens that a post-processor puts around texts."""
    if processor is None:
        return
    if processor["type"] == "TemplateProcessing":
        for entry in processor["special_tokens"].values():
            yield from entry["tokens"]
    elif processor["type"] in ("BertProcessing", "RobertaProcessing"):
        yield from (processor["cls"][0], processor["sep"][0])
    elif processor["type"] == "Sequence":
        for part in processor["processors"]:
            yield from _template_tokens(part)


def _with_ids(processor: dict[str, Any] | None, ids: dict[str, int]) -> dict[str, Any] | None:
    """The same post-processor with the ids of another vocabulary."""
    if processor is None:
        return None
    processor = dict(processor)
    if processor["type"] == "TemplateProcessing":
        processor["special_tokens"] = {
            name: entry | {"ids": [ids[token] for token in entry["tokens"]]}
            for name, entry in processor["special_tokens"].items()
        }
    elif processor["type"] in ("BertProcessing", "RobertaProcessing"):
        for side in ("sep", "cls"):
            processor[side] = [processor[side][0], ids[processor[side][0]]]
    elif processor["type"] == "Sequence":
        processor["processors"] = [_with_ids(part, ids) for part in processor["processors"]]
    return processor


def _roles(tokenizer: Any) -> dict[str, str]:
    """The special token of each role, such as ``{"unk_token": "[UNK]"}``."""
    if isinstance(tokenizer, Tokenizer):
        info = read_tokenizer(tokenizer, "teacher")
        return {f"{role}_token": str(info.tokens[i]) for role, i in info.roles.items()}
    tokens = {f"{role}_token": getattr(tokenizer, f"{role}_token", None) for role in ROLES}
    return {role: str(token) for role, token in tokens.items() if token is not None}


def special_strings(tokenizer: Any, state: dict[str, Any]) -> dict[str, int]:
    """String -> id of what any vocabulary keeps, by id: added tokens, special or not, and tokens with a role."""
    ids = model_ids(state["model"]) | {token["content"]: token["id"] for token in state["added_tokens"]}
    model = state["model"]
    found = {token["content"] for token in state["added_tokens"]}
    found |= {*_roles(tokenizer).values(), *_template_tokens(state["post_processor"])}
    if model["type"] == "Unigram":
        found |= {model["vocab"][model["unk_id"]][0]} if model["unk_id"] is not None else set()
    elif model["unk_token"]:
        found.add(model["unk_token"])
    return {token: ids[token] for token in sorted(found & ids.keys(), key=ids.__getitem__)}


def rebuild(teacher: Any, state: dict[str, Any], roles: dict[str, str] | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a state whose model holds another vocabulary than the teacher's.

    Added tokens that the model does not hold get the ids after the model's, in their order; the template's ids follow.

    Args:
        teacher: whose settings and roles of special tokens the result takes.
        roles: special tokens of roles that the teacher lacks.
    """
    ids = model_ids(state["model"])
    for token in state["added_tokens"]:
        ids.setdefault(token["content"], len(ids))
    added = [token | {"id": ids[token["content"]]} for token in state["added_tokens"]]
    state = state | {
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "post_processor": _with_ids(state["post_processor"], ids),
    }
    settings = {name: getattr(teacher, name) for name in _SETTINGS if getattr(teacher, name, None) is not None}
    # Both versions of transformers overwrite what the pre-tokenizer says with what they are told here.
    prefix = (state["pre_tokenizer"] or {}).get("add_prefix_space")
    if prefix is not None:
        settings["add_prefix_space"] = prefix
    extra = getattr(teacher, "extra_special_tokens", None)
    if not isinstance(extra, list):
        extra = getattr(teacher, "additional_special_tokens", None)
    if extra:
        settings["additional_special_tokens"] = [str(token) for token in extra]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        **({"clean_up_tokenization_spaces": False} | settings | (roles or {}) | _roles(teacher)),
    )


def _strings(tokens: Sequence[Any]) -> list[str]:
    return [token["content"] if isinstance(token, dict) else str(token) for token in tokens]


def save_tokenizer(tokenizer: Any, folder: str | os.PathLike) -> None:
    """Saves a fast tokenizer so that ``AutoTokenizer`` of transformers 4 and 5 and ``Tokenizer.from_file`` load it.

    The class is always ``PreTrainedTokenizerFast``, which reads ``tokenizer.json`` as it stands. The classes of single
    architectures make their own pipeline around the vocabulary, and version 4 knows none of version 5's names.
    """
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # With either of the last two, version 5 makes a template of its own.
    for name in ("backend", "is_local", "local_files_only", "auto_map", "add_bos_token", "add_eos_token"):
        settings.pop(name, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    # For some types of models (Qwen 2) version 5 takes its own class all the same, which would add tokens for them.
    settings |= {f"{role}_token": None for role in ROLES if getattr(tokenizer, f"{role}_token", None) is None}
    # What the class itself would have said.
    for name in ("padding_side", "truncation_side", "model_input_names"):
        settings[name] = getattr(tokenizer, name)
    prefix = (json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}).get("add_prefix_space")
    if prefix is not None:
        settings["add_prefix_space"] = prefix
    # Version 4 wants a mapping under the name that version 5 gives a list; both read the older name.
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = _strings(settings.pop("extra_special_tokens"))
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
