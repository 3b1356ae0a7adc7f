"""The tokens that a decoder cannot do without: those that its configurations name and those that its chat template
writes; and the ids of another vocabulary in their place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from transformers import GenerationConfig, PreTrainedTokenizerBase

from .counting import count_tokens
from .teachers import Teacher

__all__ = ["chat_texts", "follow_ids", "generation_for", "named_ids"]

# Beside all that ends in ``_token_id``. Of a sequence that lost a token nothing is left.
_SINGLE = ("suppress_tokens", "begin_suppress_tokens")
_SEQUENCES = ("bad_words_ids", "force_words_ids")
# With which token text is forced to begin: position and id.
_FORCED = "forced_decoder_ids"
# What configurations may not say, as transformers refuses to save it, where it does nothing: without sampling; without
# beams.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_BEAMS = ("early_stopping", "length_penalty")
# Short ones, so that what is written around them is most of what is counted.
_TURNS = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "a"})
_SYSTEM = {"role": "system", "content": "a"}
_TOOL = {
    "type": "function",
    "function": {"name": "a", "description": "a", "parameters": {"type": "object", "properties": {}}},
}
_CALL = {
    "role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "a", "arguments": {}}}]
}  # fmt: skip
_ANSWER = {"role": "tool", "name": "a", "content": "a"}
_CHATS: tuple[tuple[list[Mapping[str, Any]], Mapping[str, Any]], ...] = (
    ([*_TURNS, _TURNS[0]], {"add_generation_prompt": True}),
    ([*_TURNS, *_TURNS], {}),
    ([_SYSTEM, *_TURNS, _TURNS[0]], {"add_generation_prompt": True}),
    ([_SYSTEM, _TURNS[0]], {"add_generation_prompt": True, "enable_thinking": False}),
    ([_SYSTEM, _TURNS[0]], {"add_generation_prompt": True, "tools": [_TOOL]}),
    ([_SYSTEM, _TURNS[0], _CALL, _ANSWER], {"add_generation_prompt": True, "tools": [_TOOL]}),
)


def chat_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each chat template of a tokenizer makes of a few short conversations, with and without a system's turn,
    tools and their answers; those that a template refuses are left out."""
    templates, render = getattr(tokenizer, "chat_template", None), cast("Any", tokenizer).apply_chat_template
    names = list(templates) if isinstance(templates, Mapping) else [None] if templates else []
    found = []
    for name in names:
        for turns, options in _CHATS:
            try:
                found.append(str(render(turns, chat_template=name, tokenize=False, **options)))
            except Exception:  # a template is a program, and what it refuses it may say by any error
                continue
    return list(dict.fromkeys(found))


def _ids_of(settings: Any) -> Iterator[int]:
    """Ids that a configuration needs."""
    for name, value in vars(settings).items():
        if name.endswith("_token_id"):
            yield from _listed(value)
    for _, i in getattr(settings, _FORCED, None) or ():
        yield from _listed(i)
    for sequence in getattr(settings, "force_words_ids", None) or ():
        yield from _listed(sequence)


def _listed(value: Any) -> Iterator[int]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _listed(item)
    elif isinstance(value, int):
        yield value


def named_ids(teacher: Teacher) -> list[int]:
    """The ids that a decoder's vocabulary must keep: those in its configurations, and those of what its chat template
    writes; as far as its tokenizer has them."""
    known = set(teacher.tokenizer.get_vocab().values())
    found = {*_ids_of(teacher.whole.config), *_ids_of(teacher.whole.generation_config)}
    found |= set(count_tokens(teacher.tokenizer, chat_texts(teacher.tokenizer)).nonzero()[:, 0].tolist())
    return sorted(found & known)


def _moved(value: Any, place: Callable[[int], int | None]) -> Any:
    """An id, or those of a list that are left; None where none is."""
    if isinstance(value, (list, tuple)):
        return [i for i in (place(item) for item in value) if i is not None] or None
    return place(value)


def _moved_sequence(value: Any, place: Callable[[int], int | None]) -> Any:
    """A sequence of ids, or several of them in place of each other; None if one is lost."""
    if value and isinstance(value[0], (list, tuple)):
        return [part for part in (_moved_sequence(item, place) for item in value) if part is not None] or None
    found = [place(item) for item in value]
    return None if None in found else found


def follow_ids(settings: Any, teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """The ids of tokens in a model's or a generation's configuration become those of the same tokens in the student's
    vocabulary; those that it lacks are left out."""
    names, ids = {i: token for token, i in teacher.get_vocab().items()}, student.get_vocab()

    def place(i: int) -> int | None:
        return ids.get(names[i]) if i in names else None

    for name, value in list(vars(settings).items()):
        if value is None:
            continue
        if name.endswith("_token_id") or name in _SINGLE:
            setattr(settings, name, _moved(value, place))
        elif name in _SEQUENCES:
            kept = [part for part in (_moved_sequence(item, place) for item in value) if part is not None]
            setattr(settings, name, kept or None)
        elif name == _FORCED:
            forced = [[at, place(i)] for at, i in value if i is not None]
            setattr(settings, name, [pair for pair in forced if pair[1] is not None] or None)
        elif name == "sequence_bias":
            listed = value.items() if isinstance(value, Mapping) else value
            biased = [[_moved_sequence(list(sequence), place), bias] for sequence, bias in listed]
            setattr(settings, name, [pair for pair in biased if pair[0] is not None] or None)


def generation_for(teacher: Teacher, student: PreTrainedTokenizerBase) -> GenerationConfig:
    """How a decoder generates, with the ids of another vocabulary.

    Settings that do nothing, as nothing is sampled or there are no beams, take their defaults: whoever published them
    was warned only, but saved anew they are refused.
    """
    settings = copy.deepcopy(teacher.whole.generation_config)
    assert settings is not None
    follow_ids(settings, teacher.tokenizer, student)
    default = GenerationConfig()
    idle = (() if settings.do_sample else _SAMPLING) + (() if (settings.num_beams or 1) > 1 else _BEAMS)
    for name in idle:
        if hasattr(settings, name):
            setattr(settings, name, getattr(default, name))
    return settings
