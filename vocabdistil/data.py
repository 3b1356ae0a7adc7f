"""Text in, batches out: reading and splitting text, the student's vocabulary, the collator."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ._tokenizers import encode
from .align import match_pairs
from .collator import restride, text_of, widen
from .errors import VocabdistilError
from .remap import RemapTable
from .vocab import MatchedVocab

__all__ = [
    "DistillCollator",
    "TextFiles",
    "TextSplit",
    "pad",
    "read_text",
    "save_tokenizer",
    "split_text",
    "token_counts",
    "train_wordpiece",
    "wordpiece_like",
]

_ROLES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
_ENCODE_CHUNK = 4096


# ---------------------------------------------------------------- text


class TextFiles:
    """The training examples of UTF-8 files, in order: read anew, a line at a time, whenever they are iterated over.

    Args:
        paths: text files.
        unit: ``"line"``: every non-blank line is one example; ``"paragraph"``: lines are joined by a space until
            a blank line. Examples are stripped, never empty.

    Raises:
        VocabdistilError: a file is missing or not a file; while reading: undecodable (with the offset of the first
            bad byte), or holds nothing but white space.
    """

    def __init__(self, paths: Sequence[str | os.PathLike], unit: str = "line") -> None:
        if unit not in ("line", "paragraph"):
            raise VocabdistilError(f"--unit: expected 'line' or 'paragraph', got {unit!r}")
        if not paths:
            raise VocabdistilError("--text: expected at least one file")
        self.paths, self.unit = [Path(path) for path in paths], unit
        for path in self.paths:
            if not path.exists():
                raise VocabdistilError(f"--text: no such file: {path}")
            if not path.is_file():
                raise VocabdistilError(f"--text: not a file: {path}")

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            found = False
            for example in self._examples(path):
                found = True
                yield example
            if not found:
                raise VocabdistilError(f"--text: {path} is empty")

    def _examples(self, path: Path) -> Iterator[str]:
        if self.unit == "line":
            yield from filter(None, self._lines(path))
            return
        paragraph: list[str] = []
        for line in chain(self._lines(path), [""]):
            if line:
                paragraph.append(line)
            elif paragraph:
                yield " ".join(paragraph)
                paragraph = []

    def _lines(self, path: Path) -> Iterator[str]:
        offset = 0
        try:
            with open(path, "rb") as file:
                for data in file:
                    text = data.decode() if offset else data.decode().removeprefix("\ufeff")
                    offset += len(data)
                    # A line feed ends a line in any case; str knows other ends of lines too.
                    for line in text.splitlines():
                        yield line.strip()
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise VocabdistilError(
                f"--text: {path} is not UTF-8: byte 0x{byte:02x} at offset {offset + error.start}"
            ) from None
        except OSError as error:
            raise VocabdistilError(f"--text: cannot read {path}: {error.strerror}") from None


def read_text(paths: Sequence[str | os.PathLike], unit: str = "line") -> list[str]:
    """All of :class:`TextFiles` at once."""
    return list(TextFiles(paths, unit))


@dataclass
class TextSplit:
    """Training and held-out examples; ``digest`` identifies the text that they came from."""

    train: list[str]
    held_out: list[str]
    digest: str


def split_text(examples: Sequence[str], fraction: float, seed: int, minimum: int = 8) -> TextSplit:
    """Draws the held-out examples without replacement; the same arguments give the same split.

    An example whose text also occurs on the other side is taken out of the held-out side, so that repeated lines
    ("First Citizen:") are not scored as unseen text.

    Raises:
        VocabdistilError: too little text to hold out ``minimum`` distinct examples and train on the rest.
    """
    if not 0 < fraction < 1:
        raise VocabdistilError(f"--held-out: expected a fraction between 0 and 1, got {fraction}")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = set(order[: round(len(examples) * fraction)])
    train = [text for i, text in enumerate(examples) if i not in chosen]
    seen = set(train)
    held_out = list(dict.fromkeys(text for i, text in enumerate(examples) if i in chosen and text not in seen))
    if len(held_out) < minimum or len(train) < minimum:
        raise VocabdistilError(
            f"--text: too little text: {len(examples)} examples leave {len(train)} for training and "
            f"{len(held_out)} distinct held-out ones; at least {minimum} of each are needed"
        )
    digest = hashlib.sha256("\n".join(examples).encode()).hexdigest()
    return TextSplit(train, held_out, digest)


# ---------------------------------------------------------------- the student's vocabulary


def _special_tokens(tokenizer: Any) -> list[str]:
    """The tokenizer's special tokens in the order of their ids: they open the student's vocabulary."""
    tokens = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    return sorted(tokens, key=tokens.__getitem__)


def _postprocessor_for(processor: dict | None, vocab: dict[str, int]) -> dict | None:
    """The same template with the ids of another vocabulary."""
    if processor is None:
        return None
    processor = json.loads(json.dumps(processor))
    if processor["type"] == "TemplateProcessing":
        for entry in processor["special_tokens"].values():
            entry["ids"] = [vocab[token] for token in entry["tokens"]]
    elif processor["type"] in ("BertProcessing", "RobertaProcessing"):
        for side in ("sep", "cls"):
            processor[side] = [processor[side][0], vocab[processor[side][0]]]
    elif processor["type"] == "Sequence":
        processor["processors"] = [_postprocessor_for(part, vocab) for part in processor["processors"]]
    return processor


def train_wordpiece(
    examples: Iterable[str], vocab_size: int, base: Tokenizer, special_tokens: Sequence[str], unk_token: str
) -> dict[str, int]:
    """Trains a WordPiece vocabulary with the normaliser and pre-tokeniser of ``base``.

    The special tokens come first, then the alphabet, then merges in the order in which they were learned. The
    trainer numbers continuation characters in hash order, which changes from run to run and with it the ties
    between merges: a first pass collects the alphabet, and the second is given it sorted.

    Returns:
        Token -> id, of exactly ``vocab_size`` tokens.

    Raises:
        VocabdistilError: the text supports fewer tokens, or its alphabet alone needs more.
    """
    if isinstance(examples, Iterator):  # it is read twice
        examples = list(examples)

    def train(size: int, first: Sequence[str]) -> dict[str, int]:
        tokenizer = Tokenizer(models.WordPiece({unk_token: 0}, unk_token=unk_token))
        tokenizer.normalizer = base.normalizer
        tokenizer.pre_tokenizer = base.pre_tokenizer
        trainer = trainers.WordPieceTrainer(
            vocab_size=size, min_frequency=2, special_tokens=list(first), show_progress=False
        )
        tokenizer.train_from_iterator(examples, trainer)
        return tokenizer.get_vocab()

    specials = list(special_tokens)
    alphabet = sorted(set(train(0, specials)) - set(specials))
    if vocab_size < len(specials) + len(alphabet):
        raise VocabdistilError(
            f"--vocab-size: {vocab_size} is too small for this text: its alphabet and the special tokens "
            f"need {len(specials) + len(alphabet)}"
        )
    vocab = train(vocab_size, [*specials, *alphabet])
    if len(vocab) < vocab_size:
        raise VocabdistilError(
            f"--vocab-size: {vocab_size} is larger than this text supports: it yields {len(vocab)} tokens"
        )
    return dict(sorted(vocab.items(), key=lambda item: item[1]))


def wordpiece_like(teacher: Any, examples: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer trained on ``examples`` that treats text as the teacher's tokenizer does.

    Normaliser, pre-tokeniser, decoder, post-processor template and special tokens are the teacher's own; only the
    vocabulary is new.

    Args:
        teacher: a fast WordPiece tokenizer of ``transformers``.
        max_length: what the result reports as ``model_max_length`` (tokens).

    Raises:
        VocabdistilError: as :func:`train_wordpiece`, or the teacher lacks a special token.
    """
    for role in _ROLES:
        if getattr(teacher, role, None) is None:
            raise VocabdistilError(
                f"--teacher: its tokenizer has no {role}, and a student's vocabulary is trained for BERT-like "
                f"(WordPiece) teachers only; the coverage command takes any student's tokenizer as --student"
            )
    specials = _special_tokens(teacher)
    vocab = train_wordpiece(examples, vocab_size, teacher.backend_tokenizer, specials, teacher.unk_token)
    state = json.loads(teacher.backend_tokenizer.to_str())
    state["truncation"] = state["padding"] = None
    state["added_tokens"] = [
        {
            "id": vocab[token],
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in specials
    ]
    state["post_processor"] = _postprocessor_for(state["post_processor"], vocab)
    prefix = state["model"].get("continuing_subword_prefix", "##")
    state["model"] = {
        "type": "WordPiece",
        "unk_token": teacher.unk_token,
        "continuing_subword_prefix": prefix,
        "max_input_chars_per_word": state["model"].get("max_input_chars_per_word", 100),
        "vocab": vocab,
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        model_max_length=max_length,
        # DistilBERT has no token types; without this, plain transformers would pass it some.
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **{role: getattr(teacher, role) for role in _ROLES},
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | os.PathLike) -> None:
    """Saves a tokenizer so that ``AutoTokenizer`` of transformers 4 and 5 both load it.

    Version 5 writes a class name that version 4 does not know; the older name means the same to both.
    """
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("backend", None)
    settings.pop("is_local", None)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def token_counts(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """How often each id occurs in ``texts``: int64 ``[V]``."""
    counts = torch.zeros(len(tokenizer), dtype=torch.int64)
    for start in range(0, len(texts), _ENCODE_CHUNK):
        ids = [i for row in encode(tokenizer, texts[start : start + _ENCODE_CHUNK], "tokenizer") for i in row]
        counts += torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=len(counts))
    return counts


# ---------------------------------------------------------------- batches


def pad(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """``[B, L]`` ids and attention mask, padded on the right."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), value, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[b, : len(row)] = 1
    return ids, mask


class DistillCollator:
    """Texts -> one batch for the student and one for each teacher, with the spans that align them.

    The student reads every text once per teacher as ``reduce`` gives it and once as its own tokenizer does.

    Args:
        teachers: their tokenizers.
        student: the student's tokenizer.
        tables, matched: one of each per teacher.
        max_length: teacher tokens kept of a text.
        student_max_length: student tokens kept (``reduce`` cuts at a teacher token, never inside one).

    Returns (of a call on ``B`` texts, or mappings with the key ``"text"``):
        ``student_ids``, ``student_mask``: int64 ``[(T + 1) B, L_s]``: ``B`` rows for each of the ``T`` teachers'
        ``reduce`` ids, then ``B`` rows of the student's own tokenization;
        ``teacher_ids``, ``teacher_mask``: lists of ``T`` int64 ``[B, L_t]``;
        ``reduce_pairs``, ``own_pairs``: lists of ``T`` :class:`SpanPairs`, positions counted within the block of
        ``B`` student rows that they belong to, ``L_s`` apart.
    """

    def __init__(
        self,
        teachers: Sequence[Any],
        student: Any,
        tables: Sequence[RemapTable],
        matched: Sequence[MatchedVocab],
        max_length: int,
        student_max_length: int,
    ) -> None:
        self.teachers, self.student = list(teachers), student
        self.tables, self.matched = list(tables), list(matched)
        self.max_length, self.student_max_length = max_length, student_max_length

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        texts = [text_of(feature, "text", f"features[{i}]") for i, feature in enumerate(features)]
        own_ids, own_mask = pad(
            encode(self.student, texts, "student", self.student_max_length), self.student.pad_token_id
        )
        teacher_ids, teacher_mask = [], []
        blocks = []
        for tokenizer, table in zip(self.teachers, self.tables, strict=True):
            ids, mask = pad(encode(tokenizer, texts, "teacher", self.max_length), tokenizer.pad_token_id)
            teacher_ids.append(ids)
            teacher_mask.append(mask)
            blocks.append(table.remap(ids, mask, max_length=self.student_max_length))
        width = max(own_ids.shape[1], *(block.input_ids.shape[1] for block in blocks))
        rows = [(block.input_ids, block.attention_mask) for block in blocks] + [(own_ids, own_mask)]
        student_ids = torch.cat([widen(ids, width, self.student.pad_token_id) for ids, _ in rows])
        student_mask = torch.cat([widen(mask.to(torch.int64), width, 0) for _, mask in rows])
        own_ids, own_mask = student_ids[-len(texts) :], student_mask[-len(texts) :]
        return {
            "student_ids": student_ids,
            "student_mask": student_mask,
            "teacher_ids": teacher_ids,
            "teacher_mask": teacher_mask,
            "reduce_pairs": [
                restride(block.pairs, len(texts), (block.input_ids.shape[1], width), (ids.shape[1],) * 2)
                for block, ids in zip(blocks, teacher_ids, strict=True)
            ],
            "own_pairs": [
                match_pairs(ids, own_ids, matched, teacher_mask=mask, student_mask=own_mask)
                for ids, mask, matched in zip(teacher_ids, teacher_mask, self.matched, strict=True)
            ],
        }
