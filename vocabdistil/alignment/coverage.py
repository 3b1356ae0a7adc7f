"""How two tokenizers correspond on a text, before any training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence, Sized
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_index_range
from ..core.native import module as _native_module
from .families import chunks
from .loading import tokenizer_of
from .methods import (
    METHODS,
    Aligned,
    Tokens,
    align_texts,
    check_method,
    check_ready,
    check_text,
    locate,
    match_pairs,
    read_side,
)
from .remap import RemapTable
from .spans import SpanPairs
from .surfaces import Known, known
from .vocab import MatchedVocab, matched_ids

__all__ = ["TEXTS_AT_ONCE", "Coverage", "CoverageReport", "checked", "coverage"]

# Texts, and characters, that are read at once: whichever comes first.
TEXTS_AT_ONCE = 512, 1 << 20
_SIDES = "teacher", "student"


@dataclass(frozen=True)
class CoverageReport:
    """How two tokenizers correspond on a text.

    Attributes:
        teacher_vocab, student_vocab: vocabulary sizes.
        matched_vocab: tokens that both have.
        texts: how many were read.
        teacher_tokens, student_tokens: tokens of the text, specials included, by the two tokenizers.
        teacher_unknown, student_unknown: unknown ones of them.
        teacher_matched, student_matched: those that are in the matched vocabulary.
        methods: what each alignment covers, by its name; the text, too, of all of them.
        equal_texts: texts that ``reduce`` segments exactly as the student's own tokenizer; None without ``reduce``.
    """

    teacher_vocab: int
    student_vocab: int
    matched_vocab: int
    texts: int
    teacher_tokens: int
    student_tokens: int
    teacher_unknown: int
    student_unknown: int
    teacher_matched: int
    student_matched: int
    methods: dict[str, Coverage]
    equal_texts: int | None = None

    @property
    def matched_tokens(self) -> float:
        """Share of the teacher's tokens of the text that the student has too."""
        return self.teacher_matched / max(self.teacher_tokens, 1)

    @property
    def unk_rate_teacher(self) -> float:
        """Share of unknown ones among the teacher's tokens."""
        return self.teacher_unknown / max(self.teacher_tokens, 1)

    @property
    def unk_rate_own(self) -> float:
        """Share of unknown ones among the student's tokens, by its own tokenizer."""
        return self.student_unknown / max(self.student_tokens, 1)

    @property
    def unk_rate_reduce(self) -> float | None:
        """The same of what the student reads under ``reduce``."""
        return self.methods["reduce"].student_unknown_rate if "reduce" in self.methods else None

    @property
    def pieces_per_token(self) -> float | None:
        """Student tokens per teacher token under ``reduce``."""
        reduce = self.methods.get("reduce")
        return None if reduce is None else reduce.student_tokens / max(reduce.teacher_tokens, 1)

    @property
    def reduce_equals_own(self) -> float | None:
        """Share of the texts that ``reduce`` segments exactly as the student's own tokenizer."""
        return None if self.equal_texts is None else self.equal_texts / max(self.texts, 1)

    def as_dict(self) -> dict[str, Any]:
        """What JSON can hold: shares from 0 to 1, and every method's :meth:`Coverage.as_dict`."""
        names = (
            "teacher_vocab", "student_vocab", "matched_vocab", "texts", "teacher_tokens", "student_tokens",
            "pieces_per_token", "unk_rate_reduce", "unk_rate_own", "unk_rate_teacher", "matched_tokens",
            "reduce_equals_own",
        )  # fmt: skip
        values = {name: getattr(self, name) for name in names}
        return values | {"methods": {name: found.as_dict() for name, found in self.methods.items()}}


def checked(texts: Iterable[str]) -> Iterator[str]:
    """The texts; TypeError or ValueError at the first that is none."""
    for i, text in enumerate(texts):
        check_text(text, f"texts[{i}]")
        yield text


def _rows_equal(a: Tokens, b: Tokens) -> int:
    """In how many rows two tokenizations are the same."""
    width = max(a.input_ids.shape[1], b.input_ids.shape[1])
    left, right = (
        torch.nn.functional.pad(
            side.input_ids.masked_fill(side.attention_mask == 0, -1), (0, width - side.input_ids.shape[1]), value=-1
        )
        for side in (a, b)
    )
    return int((left == right).all(1).sum())


def _lookup(ids: Tensor, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.bool).index_fill_(0, ids, True)


def coverage(
    texts: Iterable[str],
    teacher: Any,
    student: Any,
    methods: Sequence[str] = METHODS,
    *,
    table: RemapTable | None = None,
    matched: MatchedVocab | None = None,
    quiet: bool = True,
) -> CoverageReport:
    """Counts over ``texts`` how two tokenizers correspond: which of each other's tokens they pair, and what is lost.

    Texts are read once and a few hundred at a time, so that a file of any length can be counted.

    Args:
        texts: strings.
        teacher, student: ``transformers`` fast tokenizers or ``tokenizers.Tokenizer``, of any family, or names of
            models or folders that have one.
        methods: the alignments to count, see :func:`align`.
        table, matched: the remap table and the matched vocabulary, if there are some already.
        quiet: show no progress.

    Raises:
        TypeError: texts that are not strings, a tokenizer that is not fast.
        ValueError: an unknown method.
    """
    from ..core.progress import counting  # rich takes a while to import, and the losses do not need it

    if isinstance(methods, str) or not isinstance(methods, Collection):
        raise TypeError(f"methods: expected a list of methods, got {methods!r}")
    for method in methods:
        check_method(method)
    check_ready(table, matched)
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
        raise TypeError(f"texts: expected a list of strings, got {type(texts).__name__}")
    teacher, student = tokenizer_of(teacher, "teacher"), tokenizer_of(student, "student")
    sources = known(teacher, "teacher"), known(student, "student")
    if matched is None:
        matched = MatchedVocab.from_tokenizers(teacher, student)
    if table is None and "reduce" in methods:
        table = RemapTable.from_tokenizers(teacher, student)
    sizes = len(sources[0].info.tokens), len(sources[1].info.tokens)
    for side, size in zip(_SIDES, sizes, strict=True):
        check_index_range(getattr(matched, f"{side}_ids"), f"matched.{side}_ids", size)
    counts = _Counting((teacher, student), sources, methods, table, matched)
    with counting("Counting texts", len(texts) if isinstance(texts, Sized) else None, quiet) as advance:
        for chunk in chunks(checked(texts), *TEXTS_AT_ONCE):
            counts.add(chunk)
            advance(len(chunk))
    if not counts.texts:
        raise ValueError("texts: expected at least one, got none")
    return CoverageReport(
        teacher_vocab=len(teacher) if hasattr(teacher, "__len__") else teacher.get_vocab_size(),
        student_vocab=len(student) if hasattr(student, "__len__") else student.get_vocab_size(),
        matched_vocab=len(matched),
        texts=counts.texts,
        **counts.tokens,
        methods=counts.methods,
        equal_texts=counts.equal if "reduce" in methods else None,
    )


class _Counting:
    """What :func:`coverage` counts, some texts after the others.

    Attributes:
        texts: how many were read.
        tokens: of each side how many there were, were unknown, and are in the other vocabulary.
        methods: of each alignment.
        equal: how many texts ``reduce`` cuts as the student does.
    """

    def __init__(
        self,
        tokenizers: tuple[Any, Any],
        sources: tuple[Known, Known],
        methods: Collection[str],
        table: RemapTable | None,
        matched: MatchedVocab,
    ) -> None:
        self.tokenizers, self.sources, self.table, self.matched = tokenizers, sources, table, matched
        self.sizes = len(sources[0].info.tokens), len(sources[1].info.tokens)
        self.in_both = _lookup(matched.teacher_ids, self.sizes[0]), _lookup(matched.student_ids, self.sizes[1])
        self.wanted = methods
        self.texts = self.equal = 0
        self.methods: dict[str, Coverage] = {}
        self.tokens = {f"{side}_{what}": 0 for side in _SIDES for what in ("tokens", "unknown", "matched")}

    def add(self, chunk: list[str]) -> None:
        left, right, found = self._aligned(chunk)
        for name, tokens, source, both in zip(_SIDES, (left, right), self.sources, self.in_both, strict=True):
            ids = tokens.input_ids[tokens.attention_mask != 0]
            self.tokens[f"{name}_tokens"] += ids.numel()
            self.tokens[f"{name}_matched"] += int(both[ids].sum())
            if source.info.unk_id is not None:
                self.tokens[f"{name}_unknown"] += int((ids == source.info.unk_id).sum())
        if "reduce" in found:
            self.equal += _rows_equal(found["reduce"][1], right)
        for method, (a, b, pairs, counted) in found.items():
            part = Coverage.of(a, b, pairs, self.sources, counted, examples=max(self.sizes))
            self.methods[method] = self.methods[method] + part if method in self.methods else part
        self.texts += len(chunk)

    def _aligned(self, chunk: list[str]) -> tuple[Tokens, Tokens, dict[str, Aligned]]:
        """What each side reads by itself, and the alignments; every text is tokenized as seldom as possible."""
        sources, matched = self.sources, self.matched
        found = {
            method: align_texts(chunk, *self.tokenizers, method, None, self.table, matched, sources)
            for method in self.wanted
            if method in ("boundary", "word")
        }
        if found:
            left, right, _, _ = next(iter(found.values()))
        else:
            left, right = read_side(chunk, sources[0], "teacher", None), read_side(chunk, sources[1], "student", None)
        by_ids: dict[str, tuple[Tokens, SpanPairs]] = {}
        if "match" in self.wanted:
            pairs = match_pairs(left.input_ids, right.input_ids, matched, left.attention_mask, right.attention_mask)
            by_ids["match"] = right, pairs
        if self.table is not None and "reduce" in self.wanted:
            out = self.table.remap(left.input_ids, left.attention_mask)
            by_ids["reduce"] = Tokens(out.input_ids, out.attention_mask), out.pairs
        if by_ids:
            # These do not look at the text: the teacher's tokens tell which part of it they cover.
            place, _ = locate(chunk, sources[0], "teacher", None, by_word=False)
            for method, (tokens, pairs) in by_ids.items():
                spans = pairs.teacher_start.data_ptr(), pairs.teacher_end.data_ptr()
                counted = place.bytes(chunk, *spans, len(pairs), left.input_ids.shape[1])
                found[method] = left, tokens, pairs, counted
        return left, right, {method: found[method] for method in self.wanted}


_EXAMPLES = 5


@dataclass(frozen=True)
class Coverage:
    """How much of some texts an alignment covers: counts, which add up over batches, and shares of them.

    Attributes:
        pairs: span pairs with both spans non-empty.
        one_to_one_pairs: those of them with one token on each side.
        teacher_tokens, student_tokens: tokens of each side, padding left out.
        teacher_unaligned, student_unaligned: tokens of each side in no such pair.
        teacher_unknown, student_unknown: unknown tokens of each side.
        teacher_examples, student_examples: the most frequent unaligned tokens as (token, count); of one batch
            five at most, of a sum those of its parts.
        matched_vocabulary: tokens that both vocabularies have.
        text_bytes, covered_bytes: bytes of the texts in UTF-8, white space left out, and those of them inside
            a pair; None where the alignment does not look at the text (``match``, ``reduce``) and nobody else did
            (:func:`coverage` does).
    """

    pairs: int
    one_to_one_pairs: int
    teacher_tokens: int
    student_tokens: int
    teacher_unaligned: int
    student_unaligned: int
    teacher_unknown: int
    student_unknown: int
    teacher_examples: tuple[tuple[str, int], ...]
    student_examples: tuple[tuple[str, int], ...]
    matched_vocabulary: int
    text_bytes: int | None = None
    covered_bytes: int | None = None

    @classmethod
    def of(
        cls,
        teacher: Tokens,
        student: Tokens,
        pairs: SpanPairs,
        sources: tuple[Known, Known],
        text_bytes: tuple[int, int] | None = None,
        examples: int = _EXAMPLES,
    ) -> Coverage:
        """Counts one batch; ``examples`` unaligned tokens of each side are named."""
        values: dict[str, Any] = {}
        spans = [
            getattr(pairs, f"{side}_{end}").data_ptr()
            for side in ("teacher", "student")
            for end in ("start", "end")
        ]
        for name, side, source in zip(("teacher", "student"), (teacher, student), sources, strict=True):
            unknown_id = source.info.unk_id
            count, singles, tokens, covered, unknown, left_out = _native_module().align_cover(
                side.input_ids.data_ptr(),
                side.attention_mask.data_ptr(),
                side.input_ids.numel(),
                spans,
                len(pairs),
                -1 if unknown_id is None else unknown_id,
                examples,
            )
            spans = spans[2:] + spans[:2]
            values |= {
                "pairs": count,
                "one_to_one_pairs": singles,
                f"{name}_tokens": tokens,
                f"{name}_unaligned": tokens - covered,
                f"{name}_unknown": unknown,
                f"{name}_examples": tuple((source.info.tokens[i] or "", n) for i, n in left_out),
            }
        if text_bytes is not None:
            values["text_bytes"], values["covered_bytes"] = text_bytes
        return cls(matched_vocabulary=len(matched_ids(*sources)), **values)

    def __add__(self, other: Coverage) -> Coverage:
        """The coverage of both texts together, by the same tokenizers and method."""
        if not isinstance(other, Coverage):
            return NotImplemented
        values: dict[str, Any] = {}
        for field in fields(self):
            a, b = getattr(self, field.name), getattr(other, field.name)
            if field.name == "matched_vocabulary":
                values[field.name] = a
            elif isinstance(a, tuple):
                counts = Counter(dict(a))
                counts.update(dict(b))
                values[field.name] = tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
            else:
                values[field.name] = None if a is None else a + b
        return Coverage(**values)

    @property
    def one_to_one(self) -> float:
        """Share of the pairs with one token on each side."""
        return self.one_to_one_pairs / max(self.pairs, 1)

    @property
    def teacher_covered(self) -> float:
        """Share of the teacher's tokens inside a pair."""
        return (self.teacher_tokens - self.teacher_unaligned) / max(self.teacher_tokens, 1)

    @property
    def student_covered(self) -> float:
        """Share of the student's tokens inside a pair."""
        return (self.student_tokens - self.student_unaligned) / max(self.student_tokens, 1)

    @property
    def teacher_one_to_one(self) -> float:
        """Share of the teacher's tokens inside a pair with one token on each side."""
        return self.one_to_one_pairs / max(self.teacher_tokens, 1)

    @property
    def student_one_to_one(self) -> float:
        """Share of the student's tokens inside a pair with one token on each side."""
        return self.one_to_one_pairs / max(self.student_tokens, 1)

    @property
    def teacher_span(self) -> float:
        """Mean tokens of the teacher in a pair."""
        return (self.teacher_tokens - self.teacher_unaligned) / max(self.pairs, 1)

    @property
    def student_span(self) -> float:
        """Mean tokens of the student in a pair."""
        return (self.student_tokens - self.student_unaligned) / max(self.pairs, 1)

    @property
    def teacher_unknown_rate(self) -> float:
        """Share of the teacher's tokens that are unknown."""
        return self.teacher_unknown / max(self.teacher_tokens, 1)

    @property
    def student_unknown_rate(self) -> float:
        """Share of the student's tokens that are unknown."""
        return self.student_unknown / max(self.student_tokens, 1)

    @property
    def covered_text(self) -> float | None:
        """Share of the text's bytes inside a pair; None where they were not counted."""
        if self.text_bytes is None or self.covered_bytes is None:
            return None
        return self.covered_bytes / max(self.text_bytes, 1)

    def as_dict(self) -> dict[str, Any]:
        """Counts, shares and means by name, examples as lists: what JSON can hold."""
        shares = {name: getattr(self, name) for name, value in vars(Coverage).items() if isinstance(value, property)}
        return {**asdict(self), **shares} | {
            f"{side}_examples": [list(item) for item in getattr(self, f"{side}_examples")[:_EXAMPLES]]
            for side in ("teacher", "student")
        }
