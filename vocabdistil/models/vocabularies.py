"""Text in, batches out: reading and splitting text, the student's vocabulary, the collator."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..alignment.families import encode
from ..core.errors import VocabdistilError

__all__ = [
    "save_tokenizer",
    "token_counts",
    "train_wordpiece",
    "wordpiece_like",
]

_ROLES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
_ENCODE_CHUNK = 4096


# ---------------------------------------------------------------- text


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


