"""Where each architecture keeps its parts: one table, a row for each ``model_type``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Fields",
    "LayerParts",
    "architecture_of",
    "body_of",
    "embedding_of",
    "first_position",
    "is_decoder",
    "layer_kinds",
    "layers_of",
    "move",
]


class Fields(NamedTuple):
    """What a configuration calls the number of layers, the hidden width, the heads and the feed-forward width; empty
    where it does not say."""

    layers: str = "num_hidden_layers"
    dim: str = "hidden_size"
    heads: str = "num_attention_heads"
    ffn: str = "intermediate_size"


class LayerParts(NamedTuple):
    """The modules of a layer ``norm(x + ffn(x))`` after ``norm(x + attention(x))``, by their paths in the layer."""

    query: str
    key: str
    value: str
    attention: str
    attention_norm: str
    ffn_in: str
    ffn_out: str
    ffn_norm: str


@dataclass(frozen=True)
class Architecture:
    """A row of the table. Paths lead from the body to a module; an empty one means that there is none.

    Attributes:
        layers: the list of layers.
        fields: names in the configuration.
        embeddings: the module that holds ``positions``, ``types`` and ``norm``.
        positions: learned absolute positions.
        after_padding: their first row in use is the one after the padding's id, as RoBERTa counts.
        pad_id: the id that the code takes for padding whatever the configuration says; None: it asks the configuration.
        types: token types.
        norm: the LayerNorm of the embeddings.
        widen: the map from the width of the embeddings to the hidden width, used where they differ.
        parts: the modules of a layer, where it is a post-norm one of BERT's kind.
        head: dense layer and LayerNorm between body and output layer, paths in the model with its MLM head.
        activation: what stands between these two: a field of the configuration that says it, or its name.
        shared: all layers are one set of weights, so that a layer more costs nothing.
        first_norm: a LayerNorm that the first layer lacks, and the product that reads it in the others.
        body: the class to load where AutoModel takes another.
        biased_heads: each head has a bias of its own for distances, so that there must be as many.
        causal: a decoder: it predicts the next token, by an output layer right behind its body.
    """

    layers: str = "encoder.layer"
    fields: Fields = Fields()
    embeddings: str = "embeddings"
    positions: str = "position_embeddings"
    after_padding: bool = False
    pad_id: int | None = None
    types: str = "token_type_embeddings"
    norm: str = "LayerNorm"
    widen: str = ""
    parts: LayerParts | None = None
    head: tuple[str, str] | None = None
    activation: str = "hidden_act"
    shared: bool = False
    first_norm: tuple[str, str] | None = None
    body: str = ""
    biased_heads: bool = False
    causal: bool = False

    @property
    def fittable(self) -> bool:
        """Whether its layers can be fitted one by one: they are post-norm ones of BERT's kind, each with its own
        weights."""
        return self.parts is not None and not self.shared

    # What such a module has depends on its kind, which whoever asks knows: hence Any.
    def part_of_embeddings(self, body: nn.Module, name: str) -> Any:
        """``positions``, ``types`` or ``norm`` of a model, None where it has none."""
        path = getattr(self, name)
        return _find(body, f"{self.embeddings}.{path}") if path else None

    def widening(self, body: nn.Module) -> Any:
        """The map from the embeddings to the hidden width, None where they are equal."""
        return _find(body, self.widen) if self.widen else None


def _find(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


_BERT_PARTS = LayerParts(
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
_BERT = Architecture(
    parts=_BERT_PARTS, head=("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm")
)
_ROBERTA = replace(_BERT, after_padding=True, head=("lm_head.dense", "lm_head.layer_norm"), activation="gelu")
_T5 = Architecture(
    layers="encoder.block",
    fields=Fields("num_layers", "d_model", "num_heads", "d_ff"),
    positions="",
    types="",
    norm="",
    body="T5EncoderModel",
)

# What stands between tokens and layers (GPT-2's positions, Gemma's scale) is copied or computed as it is.
_DECODER = Architecture(layers="layers", embeddings="", positions="", types="", norm="", causal=True)

ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,
    "distilbert": Architecture(
        layers="transformer.layer",
        fields=Fields("n_layers", "dim", "n_heads", "hidden_dim"),
        types="",
        parts=LayerParts(
            "attention.q_lin",
            "attention.k_lin",
            "attention.v_lin",
            "attention.out_lin",
            "sa_layer_norm",
            "ffn.lin1",
            "ffn.lin2",
            "output_layer_norm",
        ),
        head=("vocab_transform", "vocab_layer_norm"),
        activation="activation",
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": replace(
        _BERT,
        widen="embeddings_project",
        head=("generator_predictions.dense", "generator_predictions.LayerNorm"),
        activation="gelu",
    ),
    "mpnet": replace(
        _ROBERTA,
        pad_id=1,
        biased_heads=True,
        types="",
        parts=_BERT_PARTS._replace(
            query="attention.attn.q",
            key="attention.attn.k",
            value="attention.attn.v",
            attention="attention.attn.o",
            attention_norm="attention.LayerNorm",
        ),
    ),
    "albert": Architecture(
        layers="encoder.albert_layer_groups",
        widen="encoder.embedding_hidden_mapping_in",
        parts=LayerParts(
            *(f"albert_layers.0.attention.{name}" for name in ("query", "key", "value", "dense", "LayerNorm")),
            *(f"albert_layers.0.{name}" for name in ("ffn", "ffn_output", "full_layer_layer_norm")),
        ),
        head=("predictions.dense", "predictions.LayerNorm"),
        shared=True,
    ),
    # Attention by relative positions: its layers are of no other architecture's kind.
    "deberta-v2": Architecture(head=_BERT.head),
    "modernbert": Architecture(
        layers="layers",
        positions="",
        types="",
        norm="norm",
        head=("head.dense", "head.norm"),
        activation="classifier_activation",
        first_norm=("attn_norm", "attn.Wqkv"),
    ),
    "t5": _T5,
    "mt5": replace(_T5, body="MT5EncoderModel"),
    "gpt2": replace(_DECODER, layers="h", fields=Fields("n_layer", "n_embd", "n_head", "")),
    **dict.fromkeys(
        (
            "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "smollm3", "olmo2",
            "gpt_neox",
        ),
        _DECODER,
    ),  # fmt: skip
}


def architecture_of(config: Any) -> Architecture | None:
    """The row of a configuration's ``model_type``, or None."""
    return ARCHITECTURES.get(config.model_type)


def is_decoder(config: Any) -> bool:
    """Whether a configuration is that of a decoder of the table."""
    row = architecture_of(config)
    return row is not None and row.causal


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model without its head."""
    return cast("PreTrainedModel", model.base_model)


def embedding_of(model: PreTrainedModel) -> Tensor:
    """The rows of its tokens, ``[V, E]``."""
    return cast("Tensor", model.get_input_embeddings().weight)


def move(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """The same model on another device; what wraps ``PreTrainedModel.to`` has no types."""
    return cast("Any", model).to(device)


def layers_of(body: nn.Module, row: Architecture) -> nn.ModuleList:
    return cast("nn.ModuleList", body.get_submodule(row.layers))


def first_position(body: PreTrainedModel) -> int:
    """The row of the table of positions that the first token takes; 0 where there is no table."""
    row = architecture_of(body.config)
    table = row.part_of_embeddings(body, "positions") if row and row.after_padding else None
    return 0 if table is None else table.padding_idx + 1


def layer_kinds(config: Any) -> list[str] | None:
    """What each layer attends to, where layers differ in that: ``full_attention`` or ``sliding_attention``."""
    if kinds := getattr(config, "layer_types", None):
        return list(kinds)
    period = getattr(config, "global_attn_every_n_layers", None)
    if period is None:
        return None
    return ["sliding_attention" if i % period else "full_attention" for i in range(config.num_hidden_layers)]
