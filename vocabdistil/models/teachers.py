"""Teachers: loading one with its tokenizer and, where it has one, its MLM head; reading what it computes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    logging,
)

from ..core.errors import VocabdistilError

__all__ = ["Reading", "Teacher", "load_teacher", "load_tokenizer"]

_LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError)


class Reading(NamedTuple):
    """What a model computed of a batch.

    Attributes:
        layers: hidden states ``[B, L, D]``: the last layer's alone, or of the embedding and every layer.
        head: ``[B, L, E]``, what the model's output layer would be given; None if it was not asked for.
    """

    layers: list[Tensor]
    head: Tensor | None = None


@dataclass
class Teacher:
    """A frozen model, and its tokenizer.

    Attributes:
        name: the folder or name that it was loaded from.
        model: the body, in evaluation mode, without gradients.
        tokenizer: a fast WordPiece tokenizer.
        masked_lm: the body with its MLM head, or None.
        headless: why there is no head; empty if there is one.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    masked_lm: PreTrainedModel | None = None
    headless: str = ""

    @property
    def whole(self) -> PreTrainedModel:
        """The model with its head, if it has one."""
        return self.model if self.masked_lm is None else self.masked_lm

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

    @property
    def output_layer(self) -> tuple[Tensor, Tensor | None]:
        """Weight ``[V, E]`` and bias ``[V]`` or None: ``logits = head weight^T + bias``."""
        layer = self.whole.get_output_embeddings()
        return layer.weight, getattr(layer, "bias", None)

    @torch.no_grad()
    def read(
        self, input_ids: Tensor, attention_mask: Tensor, all_layers: bool = False, head: bool = False
    ) -> Reading:
        """Runs the model once; see :class:`Reading`.

        Args:
            input_ids, attention_mask: ``[B, L]`` on the model's device.
            all_layers: every layer's hidden states.
            head: what the output layer would be given, too; no logits are computed.

        Raises:
            VocabdistilError: a token's hidden state is NaN or infinite.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs |= {"output_hidden_states": all_layers, "return_dict": True}
        if head:
            out, before_output = _run_to_output_layer(self.whole, inputs)
        else:
            out, before_output = self.model(**inputs), None
        if not bool((out.last_hidden_state.isfinite().all(-1) | (attention_mask == 0)).all()):
            raise VocabdistilError(f"--teacher: {self.name} gives NaN or infinite hidden states")
        return Reading(list(out.hidden_states) if all_layers else [out.last_hidden_state], before_output)


def _run_to_output_layer(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[Any, Tensor]:
    """The body's output, and what the head gives to the output layer, whichever way the architecture builds it.

    A single position goes on through the output layer: the product with the whole vocabulary is what costs.
    """
    body: list[Any] = []
    head: list[Tensor] = []

    def keep_body(module: nn.Module, args: Any, out: Any) -> None:
        body.append(out)

    def keep_head(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        head.append(args[0])
        return (args[0][(slice(1),) * (args[0].dim() - 1)], *args[1:])

    hooks = (
        model.base_model.register_forward_hook(keep_body),
        model.get_output_embeddings().register_forward_pre_hook(keep_head),
    )
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not (body and head):
        raise LookupError("it does not go through its output layer")
    return body[0], head[0]


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


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without the advice to train the weights that a checkpoint lacks."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _load_masked_lm(source: str) -> tuple[PreTrainedModel | None, str]:
    """The model with its MLM head, or why it has none of its own."""
    try:
        with _quiet_loading():
            model, info = AutoModelForMaskedLM.from_pretrained(source, output_loading_info=True)
    except _LOADING_ERRORS as error:
        if "configuration class" in str(error):
            return None, "its architecture has none"
        return None, _first_line(error)
    body = f"{model.base_model_prefix}."
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(body))
    if missing:
        return None, f"the checkpoint has no {missing[0]}"
    return model.float().eval().requires_grad_(False), ""


@torch.no_grad()
def _head_problem(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Why the head cannot be used, found by a trial on four tokens; empty if it can."""
    layer = model.get_output_embeddings()
    if model.base_model is model or layer is None:
        return "it has no output layer of its own"
    if tokenizer.mask_token_id is None:
        return "its tokenizer has no mask_token"
    if len(layer.weight) < len(tokenizer):
        return f"its output layer has {len(layer.weight)} rows for {len(tokenizer)} tokens"
    ids = torch.arange(4)[None] % len(tokenizer)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "return_dict": True}
    try:
        _, head = _run_to_output_layer(model, inputs)
        ours, theirs = nn.functional.linear(head, layer.weight, getattr(layer, "bias", None)), model(**inputs).logits
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        return f"it cannot be read: {_first_line(error)}"
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3, equal_nan=True):
        return "its logits are not those of its output layer alone"
    return ""


def load_teacher(source: str | os.PathLike, argument: str = "--teacher", head: bool = True) -> Teacher:
    """Loads a teacher in float32, frozen, for evaluation.

    An MLM head counts only if all its weights are in the checkpoint (``transformers`` would draw them at random)
    and its logits are ``h W^T + b`` of the model's output embeddings.

    Args:
        source: a folder or a model's name on the Hugging Face Hub.
        argument: what an error names.
        head: look for an MLM head; else load the body alone.

    Raises:
        VocabdistilError: no such folder, no model or no fast WordPiece tokenizer in it, or vocabularies of the two
            that do not fit.
    """
    name = os.fspath(source)
    tokenizer = load_tokenizer(source, argument)
    kind = type(tokenizer.backend_tokenizer.model).__name__
    if kind != "WordPiece":
        raise VocabdistilError(f"{argument}: {name} has a {kind} tokenizer; WordPiece is needed")
    path = _check_source(source, argument)
    masked_lm, headless = _load_masked_lm(path) if head else (None, "it was not loaded")
    if masked_lm is not None and (headless := _head_problem(masked_lm, tokenizer)):
        masked_lm = None
    if masked_lm is not None:
        model = masked_lm.base_model
    else:
        try:
            model = AutoModel.from_pretrained(path)
        except _LOADING_ERRORS as error:
            raise VocabdistilError(f"{argument}: cannot load a model from {name}: {_first_line(error)}") from None
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise VocabdistilError(
            f"{argument}: the tokenizer of {name} has {len(tokenizer)} tokens, its model only {rows} embeddings"
        )
    model.float().eval().requires_grad_(False)
    return Teacher(name, model, tokenizer, masked_lm, headless)
