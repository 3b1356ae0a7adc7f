"""Rows of a text as decoders read them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..alignment.conversations import rendered
from ..core.errors import VocabdistilError

__all__ = ["RenderedRows", "said_of_text"]


@contextlib.contextmanager
def said_of_text() -> Iterator[None]:
    """What is wrong with a row, or with a template for it, is said in one line."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise VocabdistilError.of("text", f"{error}") from None


@dataclass
class RenderedRows:
    """Rows as a decoder reads them, to read as often as they can be: texts, and what the chat template of its tokenizer
    makes of conversations, without the token of the text's beginning in front.

    Attributes:
        rows: JSON objects.
        tokenizer: of the teacher.

    Raises:
        VocabdistilError: while reading: a row that the chat template cannot show.
    """

    rows: Iterable[str]
    tokenizer: Any

    def __iter__(self) -> Iterator[str]:
        begin = self.tokenizer.bos_token or ""
        for row in self.rows:
            with said_of_text():
                found = rendered(json.loads(row), self.tokenizer, "teacher", f"the row {row[:60]}...")
            text = found.text.removeprefix(begin) if found.chat else found.text
            if text := text.strip():
                yield text
