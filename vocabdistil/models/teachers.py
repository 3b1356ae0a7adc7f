"""Teachers: loading one with its tokenizer and, where it has one, its output layer; reading what it computes."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    logging,
)
from transformers.activations import ACT2FN

from ..alignment.loading import LOADING_ERRORS, cannot_load, check_source, first_line, load_tokenizer
from ..core.errors import VocabdistilError
from .architectures import Architecture, architecture_of, body_of, embedding_of, first_position, layers_of
from .folders import need_known

__all__ = [
    "Reading",
    "Teacher",
    "give_attention_maps",
    "head_input",
    "load_teacher",
    "load_tokenizer",
    "model_inputs",
    "read_body",
]

# Tokenizers of models without a limit say a number like 1e30.
_NO_LIMIT = 10**6


class Reading(NamedTuple):
    """What a model computed of a batch.

    Attributes:
        layers: hidden states ``[B, L, D]``: the last layer's alone, or of the embedding and every layer.
        head: ``[B, L, E]``, what the model's output layer would be given; None if it was not asked for.
        projections: of each layer that was asked for, counted from 1, its queries, keys and values ``[B, L, D]``, the
            heads one after the other.
        attentions: of every layer ``[B, H, L, L]``; None if they were not asked for.
    """

    layers: list[Tensor]
    head: Tensor | None = None
    projections: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    attentions: list[Tensor] | None = None

    @property
    def last(self) -> Tensor:
        """The last layer's hidden states."""
        return self.layers[-1]


@dataclass
class Teacher:
    """A frozen model, and its tokenizer.

    Attributes:
        name: the folder or name that it was loaded from.
        model: the body, in evaluation mode, without gradients.
        tokenizer: a fast tokenizer.
        masked_lm: the body with its MLM head, or None.
        headless: why there is no head; empty if there is one.
        prompt: what the model expects before every text; whoever encodes texts puts it there.
        causal_lm: the body of a decoder with its output layer; None for an encoder.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    masked_lm: PreTrainedModel | None = None
    headless: str = ""
    prompt: str = ""
    causal_lm: PreTrainedModel | None = None

    @property
    def architecture(self) -> Architecture | None:
        """Where the model keeps its parts; None for custom code."""
        return architecture_of(self.model.config)

    @property
    def whole(self) -> PreTrainedModel:
        """The model with its output layer, if it has one."""
        return next((model for model in (self.masked_lm, self.causal_lm) if model is not None), self.model)

    @property
    def embedding(self) -> Tensor:
        """Of the tokens, ``[V, E]``."""
        return embedding_of(self.model)

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @property
    def num_layers(self) -> int:
        return self.model.config.num_hidden_layers

    @property
    def max_positions(self) -> int:
        """Tokens that the model can read, or that it has learned to if nothing ends at a number."""
        row = self.architecture
        table = row.part_of_embeddings(self.model, "positions") if row else None
        if isinstance(table, nn.Embedding):
            return table.num_embeddings - first_position(self.model)
        limits = [getattr(self.model.config, "max_position_embeddings", None), self.tokenizer.model_max_length]
        return next((limit for limit in limits if limit is not None and 0 < limit < _NO_LIMIT), 512)

    @property
    def output_layer(self) -> tuple[Tensor, Tensor | None]:
        """Weight ``[V, E]`` and bias ``[V]`` or None: ``logits = head weight^T + bias``."""
        layer = self.whole.get_output_embeddings()
        return layer.weight, getattr(layer, "bias", None)

    @torch.no_grad()
    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        all_layers: bool = False,
        head: bool = False,
        projections: Sequence[int] = (),
        attentions: bool = False,
    ) -> Reading:
        """Runs the model once; see :class:`Reading`.

        Args:
            input_ids, attention_mask: ``[B, L]`` on the model's device.
            all_layers: every layer's hidden states.
            head: what the output layer would be given, too; no logits are computed.
            projections, attentions: see :func:`read_body`.

        Raises:
            VocabdistilError: a token's hidden state is NaN or infinite.
        """
        whole = self.whole if head else None
        reading = read_body(self.model, input_ids, attention_mask, all_layers, projections, attentions, whole)
        if not bool((reading.last.isfinite().all(-1) | (attention_mask == 0)).all()):
            raise VocabdistilError.of("teacher", f"{self.name} gives NaN or infinite hidden states")
        return reading


def read_body(
    body: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    all_layers: bool = False,
    projections: Sequence[int] = (),
    attentions: bool = False,
    whole: PreTrainedModel | None = None,
) -> Reading:
    """Runs a model once, with gradients if they are on.

    Args:
        projections: layers, counted from 1, whose queries, keys and values are wanted.
        attentions: whether the attention maps are, for which the model must compute its attention eagerly.
        whole: the model with its MLM head, to have what its output layer would be given.

    Raises:
        VocabdistilError: the model's layers have no queries, keys and values of their own, or it gives no maps.
    """
    inputs = model_inputs(body, input_ids, attention_mask)
    inputs |= {"output_hidden_states": all_layers} | ({"output_attentions": True} if attentions else {})
    with _recorded_projections(body, projections) as recorded:
        if whole is not None:
            out, before_output = _run_to_output_layer(whole, inputs)
        else:
            out, before_output = body(**inputs), None
    maps = getattr(out, "attentions", None) if attentions else None
    if attentions and (not maps or any(x is None for x in maps)):
        kind = type(body).__name__
        raise VocabdistilError.of("weights", f"attention needs models that give their maps; {kind} does not")
    # ModernBERT of transformers 4.48 gives its last layer without the norm that follows it.
    before_last = list(out.hidden_states[:-1]) if all_layers else []
    layers = [*before_last, out.last_hidden_state]
    return Reading(layers, before_output, dict(recorded), None if maps is None else list(maps))


def give_attention_maps(body: PreTrainedModel) -> None:
    """Has a model compute its attention in the one way that also gives its maps."""
    if hasattr(body, "set_attn_implementation"):
        body.set_attn_implementation("eager")
    else:  # transformers before 4.51
        body.config._attn_implementation = "eager"


@contextlib.contextmanager
def _recorded_projections(body: PreTrainedModel, layers: Sequence[int]) -> Iterator[dict[int, Any]]:
    """Records what the query, key and value products of some layers give while the body runs."""
    found: dict[int, Any] = {}
    hooks = []
    if layers:
        row = architecture_of(body.config)
        if row is None or row.parts is None:
            kind = type(body).__name__
            raise VocabdistilError.of("weights", f"relations needs layers of BERT's kind; {kind} has others")
        blocks, parts = layers_of(body, row), row.parts

        def recorder(layer: int, place: int) -> Any:
            def record(module: nn.Module, args: Any, out: Tensor) -> None:
                found.setdefault(layer, [None] * 3)[place] = out

            return record

        for layer in layers:
            # Layers that share their weights are one block, and the last of them is what its hooks see.
            block = blocks[min(layer, len(blocks)) - 1]
            for place, path in enumerate((parts.query, parts.key, parts.value)):
                hooks.append(block.get_submodule(path).register_forward_hook(recorder(layer, place)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def model_inputs(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
    """What a forward pass of a body takes: with types 0 where the model tells types of tokens apart."""
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "return_dict": True}
    types = getattr(model.config, "type_vocab_size", None) or 0
    if types > 0 and "token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["token_type_ids"] = torch.zeros_like(input_ids)
    return inputs


def head_input(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """What the output layer of a model with an MLM head reads: ``[..., D]`` last hidden states of any positions ->
    ``[..., E]``.

    Raises:
        LookupError: the head is of no kind that the table of architectures knows.
    """
    row = architecture_of(model.config)
    if row is None or row.head is None:
        raise LookupError("its head is of an unknown kind")
    try:
        dense, norm = (model.get_submodule(path) for path in row.head)
    except AttributeError:
        raise LookupError(f"it has no {row.head[0]}") from None
    activation = ACT2FN[getattr(model.config, row.activation, row.activation)]
    return norm(activation(dense(hidden)))


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


def _largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values())


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without the advice to train the weights that a checkpoint lacks."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _load_masked_lm(source: str, trust_remote_code: bool) -> tuple[PreTrainedModel | None, list[str], str]:
    """The model with its MLM head and the body's tensors that the checkpoint lacks, or why it has no head."""
    try:
        with _quiet_loading():
            model, info = AutoModelForMaskedLM.from_pretrained(
                source, output_loading_info=True, trust_remote_code=trust_remote_code
            )
    except LOADING_ERRORS as error:
        if "configuration class" in str(error):
            return None, [], "its architecture has none"
        return None, [], first_line(error)
    body = f"{model.base_model_prefix}."
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(body))
    if missing:
        return None, [], f"the checkpoint has no {missing[0]}"
    return model, sorted(info["missing_keys"]), ""


def _load_causal_lm(source: str, trust_remote_code: bool) -> tuple[PreTrainedModel, list[str]]:
    """A decoder with its output layer, in the dtype of its file, and the tensors that its checkpoint lacks."""
    auto: Any = AutoModelForCausalLM  # whose types leave out what it gives beside the model
    with _quiet_loading():
        model, info = auto.from_pretrained(
            source, output_loading_info=True, torch_dtype="auto", trust_remote_code=trust_remote_code
        )
    return model, sorted(info["missing_keys"])


def _load_body(source: str, class_name: str, trust_remote_code: bool) -> tuple[PreTrainedModel, list[str]]:
    """The model without a head, without its pooler if the checkpoint has none, and what else the checkpoint lacks."""
    auto = getattr(transformers, class_name) if class_name else AutoModel
    # Only the Auto classes know the argument.
    options = {} if class_name else {"trust_remote_code": trust_remote_code}
    with _quiet_loading():
        model, info = auto.from_pretrained(source, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    without_pooler = [key for key in missing if not key.startswith("pooler.")]
    if len(without_pooler) < len(missing):
        model.pooler = None
    return model, without_pooler


@torch.no_grad()
def _head_problem(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Why the head cannot be used, found by a trial on four tokens; empty if it can."""
    layer = model.get_output_embeddings()
    if model.base_model is model or layer is None:
        return "it has no output layer of its own"
    if tokenizer.mask_token_id is None:
        return "its tokenizer has no mask_token"
    if len(layer.weight) <= _largest_id(tokenizer):
        return f"its output layer has {len(layer.weight)} rows for ids up to {_largest_id(tokenizer)}"
    ids = torch.arange(4)[None] % len(layer.weight)
    inputs = model_inputs(body_of(model), ids, torch.ones_like(ids))
    try:
        out, head = _run_to_output_layer(model, inputs)
        ours, theirs = nn.functional.linear(head, layer.weight, getattr(layer, "bias", None)), model(**inputs).logits
        # What the head of code of its own does, nobody but that code needs to know: no student gets a copy of it.
        alone = head if architecture_of(model.config) is None else head_input(model, out.last_hidden_state)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        return f"it cannot be read: {first_line(error)}"
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3, equal_nan=True):
        return "its logits are not those of its output layer alone"
    if not torch.allclose(alone, head, rtol=1e-3, atol=1e-3, equal_nan=True):
        return "its head is more than a dense layer and a norm"
    return ""


def _load_config(source: str, argument: str, trust_remote_code: bool, decoders: bool) -> Any:
    """The configuration of a model of the table, or of custom code if that may run.

    Raises:
        VocabdistilError: there is none, or it is of another kind of model.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise cannot_load("a model", source, argument, error) from None
    own_code = bool(getattr(config, "auto_map", None))
    need_known(source, config.model_type, own_code, trust_remote_code, argument, decoders)
    return config


def load_teacher(
    source: str | os.PathLike,
    argument: str = "teacher",
    head: bool = True,
    prompt: str = "",
    trust_remote_code: bool = False,
    decoders: bool = False,
) -> Teacher:
    """Loads a teacher, frozen, for evaluation: an encoder in float32, a decoder in the dtype of its file.

    An MLM head counts only if all its weights are in the checkpoint (``transformers`` would draw them at random)
    and its logits are ``h W^T + b`` of the model's output embeddings. A decoder always has its output layer.

    Args:
        source: a folder or a model's name on the Hugging Face Hub.
        argument: what an error names.
        head: look for an MLM head; else load the body alone.
        prompt: what the model expects before every text.
        trust_remote_code: run code that comes with the model, and take models that only such code can read.
        decoders: take a decoder too.

    Raises:
        VocabdistilError: no such folder, no model of a known architecture or no fast tokenizer in it, weights of
            the body that are not there, a tokenizer with ids beyond the model's embeddings, or code of its own that
            ``trust_remote_code`` does not allow to run.
    """
    name = os.fspath(source)
    tokenizer = load_tokenizer(source, argument, trust_remote_code)
    path = check_source(source, argument)
    row = architecture_of(_load_config(path, argument, trust_remote_code, decoders))
    causal = row is not None and row.causal
    masked_lm: PreTrainedModel | None = None
    causal_lm: PreTrainedModel | None = None
    missing: list[str] = []
    headless = "it is a decoder" if causal else "it was not loaded"
    if head and not causal:
        masked_lm, missing, headless = _load_masked_lm(path, trust_remote_code)
    if masked_lm is not None and (headless := _head_problem(masked_lm.float().eval(), tokenizer)):
        masked_lm = None
    if masked_lm is not None:
        model = body_of(masked_lm)
    else:
        try:
            if causal:
                causal_lm, missing = _load_causal_lm(path, trust_remote_code)
                model = body_of(causal_lm)
            else:
                model, missing = _load_body(path, row.body if row else "", trust_remote_code)
        except LOADING_ERRORS as error:
            raise cannot_load("a model", name, argument, error) from None
    if missing:
        raise VocabdistilError.of(argument, f"cannot load a model from {name}: its checkpoint has no {missing[0]}")
    rows = len(embedding_of(model))
    if _largest_id(tokenizer) >= rows:
        raise VocabdistilError.of(
            argument,
            f"the tokenizer of {name} has ids up to {_largest_id(tokenizer)}, its model {rows} embeddings"
        )
    teacher = Teacher(name, model, tokenizer, masked_lm, headless, prompt, causal_lm)
    if not causal:
        teacher.whole.float()
    teacher.whole.eval().requires_grad_(False)
    return teacher
