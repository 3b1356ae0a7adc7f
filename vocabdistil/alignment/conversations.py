"""Rows that a causal model is trained on, as each tokenizer reads them: texts, completions, conversations."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .methods import check_text

__all__ = ["Rendered", "rendered"]

_EXPECTED = "a string, or a mapping with 'messages', with 'prompt' and 'completion', or with 'text'"
# What stands for the content of a message while it is looked where a template puts it: of Unicode's private use, which
# no template looks for.
_MARK = "\ue0f0{}\ue0f1"
_MARKS = re.compile("\ue0f0([0-9]+)\ue0f1")


@dataclass(frozen=True)
class Rendered:
    """A row as one tokenizer reads it.

    Attributes:
        text: all of it.
        learned: half-open ranges of its characters, ascending: what is learned of it, the same strings on every side.
        chat: whether a chat template made it, with all its special tokens; else the tokenizer puts its own around.
    """

    text: str
    learned: tuple[tuple[int, int], ...]
    chat: bool = False


def rendered(row: Any, tokenizer: Any, side: str, name: str) -> Rendered:
    """A row of a data set for the tokenizer of one side.

    Args:
        row: a text; or a mapping with ``"messages"`` (what is learned are those of the assistant), with ``"prompt"``
            and ``"completion"``, both strings or both messages (the completion is learned), or with ``"text"``;
            ``"tools"``, if there, a list or JSON, and what ``"chat_template_kwargs"`` names are for the template. Or
            what this function made of one for the same tokenizer.
        side, name: of the tokenizer and of the row, for errors.

    Raises:
        TypeError: a row that is none of these.
        ValueError: messages without a role or a text, none that is learned, a tokenizer without a chat template, a
            template that does not show them as they are.
    """
    if isinstance(row, Rendered):
        return row
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, Mapping):
        raise TypeError(f"{name}: expected {_EXPECTED}, got {type(row).__name__}")
    if row.get("messages") is not None:
        messages = _messages(row["messages"], f"{name}['messages']")
        learned = [message["role"] == "assistant" for message in messages]
        if not any(learned):
            raise ValueError(f"{name}['messages']: expected one of the assistant's, got none")
        return _chat(messages, learned, row, tokenizer, side, name)
    if row.get("completion") is not None:
        prompt: Any = row.get("prompt")
        completion = row["completion"]
        if isinstance(completion, str):
            for key, text in (("prompt", prompt), ("completion", completion)):
                check_text(text, f"{name}[{key!r}]")
            return Rendered(prompt + completion, ((len(prompt), len(prompt) + len(completion)),))
        after = _messages(completion, f"{name}['completion']")
        before = _messages(prompt, f"{name}['prompt']")
        learned = [False] * len(before) + [True] * len(after)
        return _chat(before + after, learned, row, tokenizer, side, name)
    if row.get("text") is not None:
        check_text(row["text"], f"{name}['text']")
        return Rendered(row["text"], ((0, len(row["text"])),))
    keys = ", ".join(map(repr, row)) or "(none)"
    raise TypeError(f"{name}: expected {_EXPECTED}, got a mapping with the keys {keys}")


def _messages(messages: Any, name: str) -> list[Mapping[str, Any]]:
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise TypeError(f"{name}: expected a list of messages, got {type(messages).__name__}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or not isinstance(message.get("content"), str):
            raise ValueError(f"{name}[{i}]: expected a message with a 'role' and a text as 'content', got {message!r}")
        check_text(message["content"], f"{name}[{i}]['content']")
    return list(messages)


def _chat(
    messages: list[Mapping[str, Any]],
    learned: list[bool],
    row: Mapping[str, Any],
    tokenizer: Any,
    side: str,
    name: str,
) -> Rendered:
    """Where a chat template puts what is learned is seen where it puts marks in its place; it may strip white space."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(f"{side}: expected a tokenizer with a chat template, as {name} has messages, got one without")

    others = row.get("chat_template_kwargs") or {}
    if not isinstance(others, Mapping):
        raise TypeError(f"{name}['chat_template_kwargs']: expected a mapping, got {type(others).__name__}")

    if taken := sorted({"conversation", "tokenize", "tools"} & set(others)):
        raise ValueError(f"{name}['chat_template_kwargs']: expected none of {', '.join(taken)}, got it")
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise ValueError(f"{name}['tools']: expected a list or JSON, got {tools[:40]!r}") from None

    def render(messages: list[Any]) -> str:
        try:
            return tokenizer.apply_chat_template(messages, **others, tools=tools, tokenize=False)
        except Exception as error:  # a template raises what it likes
            raise ValueError(f"{name}: the {side}'s chat template refuses the messages: {error}") from None

    text = render(messages)
    pieces = _MARKS.split(render([{**m, "content": _MARK.format(i)} for i, m in enumerate(messages)]))
    # Texts of the template and numbers of messages take turns.
    fixed, order = pieces[::2], list(map(int, pieces[1::2]))
    at, ranges = len(fixed[0]), {}
    fits = text.startswith(fixed[0]) and sorted(order) == list(range(len(messages)))
    for i, after in zip(order, fixed[1:], strict=True):
        content = messages[i]["content"]
        ways = [part(chars) for chars in ("\n", None) for part in (content.rstrip, content.lstrip, content.strip)]
        shown = next((way for way in (content, *ways) if text.startswith(way + after, at)), None)
        if not fits or shown is None:
            fits = False
            break
        bare = shown.strip()
        first = at + shown.find(bare)
        if learned[i]:
            ranges[i] = first, first + len(bare)
        at += len(shown) + len(after)
    if not fits or at != len(text) or list(ranges) != sorted(ranges):
        raise ValueError(f"{name}: expected messages that the {side}'s chat template shows as they are, got others")
    return Rendered(text, tuple(ranges.values()), chat=True)
