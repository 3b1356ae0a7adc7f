"""Teachers: loading one with its tokenizer, reading its hidden states, and training a small one on a text."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .errors import VocabdistilError

__all__ = ["Teacher", "load_teacher", "load_tokenizer"]


@dataclass
class Teacher:
    """A frozen model without its head, and its tokenizer.

    Attributes:
        name: the folder or name that it was loaded from.
        model: in evaluation mode, without gradients.
        tokenizer: a fast WordPiece tokenizer.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @property
    def num_layers(self) -> int:
        return self.model.config.num_hidden_layers

    @property
    def max_positions(self) -> int:
        """Tokens that the model can read."""
        positions = getattr(self.model.config, "max_position_embeddings", 512)
        # RoBERTa's table has rows for the padding and before it.
        roberta = "roberta" in self.model.config.model_type
        return positions - (self.tokenizer.pad_token_id + 1 if roberta else 0)

    @torch.no_grad()
    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor, all_layers: bool = False) -> list[Tensor]:
        """Hidden states ``[B, L, D]``: the last layer's alone, or of the embedding and every layer.

        Args:
            input_ids, attention_mask: ``[B, L]`` on the model's device.

        Raises:
            VocabdistilError: a token's hidden state is NaN or infinite.
        """
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=all_layers, return_dict=True
        )
        if not bool((out.last_hidden_state.isfinite().all(-1) | (attention_mask == 0)).all()):
            raise VocabdistilError(f"--teacher: {self.name} gives NaN or infinite hidden states")
        return list(out.hidden_states) if all_layers else [out.last_hidden_state]


def _check_source(source: str | os.PathLike, argument: str) -> str:
    """A folder must exist if it looks like one; anything else is a name that transformers resolves."""
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise VocabdistilError(f"{argument}: expected a model folder, got the file {name}")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise VocabdistilError(f"{argument}: no such folder: {name}")
    return name


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def load_tokenizer(source: str | os.PathLike, argument: str = "--teacher") -> PreTrainedTokenizerBase:
    """The fast tokenizer of a folder or of a model's name.

    Raises:
        VocabdistilError: no such folder, no tokenizer in it, or a slow one.
    """
    source = _check_source(source, argument)
    if Path(source).is_dir():
        files = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model", "vocab.json")
        if not any((Path(source) / name).exists() for name in files):
            raise VocabdistilError(f"{argument}: no tokenizer in {source}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise VocabdistilError(f"{argument}: cannot load a tokenizer from {source}: {_first_line(error)}") from None
    if not tokenizer.is_fast:
        raise VocabdistilError(
            f"{argument}: {source} has a slow tokenizer ({type(tokenizer).__name__}); "
            "a fast one (tokenizer.json) is needed"
        )
    return tokenizer


def load_teacher(source: str | os.PathLike, argument: str = "--teacher") -> Teacher:
    """Loads a teacher in float32, frozen, for evaluation.

    Args:
        source: a folder or a model's name on the Hugging Face Hub.
        argument: what an error names.

    Raises:
        VocabdistilError: no such folder, no model or no fast WordPiece tokenizer in it, or vocabularies of the two
            that do not fit.
    """
    name = os.fspath(source)
    tokenizer = load_tokenizer(source, argument)
    kind = type(tokenizer.backend_tokenizer.model).__name__
    if kind != "WordPiece":
        raise VocabdistilError(f"{argument}: {name} has a {kind} tokenizer; WordPiece is needed")
    try:
        model = AutoModel.from_pretrained(_check_source(source, argument))
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise VocabdistilError(f"{argument}: cannot load a model from {name}: {_first_line(error)}") from None
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise VocabdistilError(
            f"{argument}: the tokenizer of {name} has {len(tokenizer)} tokens, its model only {rows} embeddings"
        )
    model.float().eval().requires_grad_(False)
    return Teacher(name, model, tokenizer)
