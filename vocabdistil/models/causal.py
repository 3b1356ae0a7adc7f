"""Causal language models: what their output layer reads, without the logits that it makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import VocabdistilError, need

__all__ = ["Readout", "at_output_layer", "check_causal", "most_positions", "read_causal"]


class Readout(NamedTuple):
    """What a causal model computed of a batch: ``logits = hidden weight^T + bias``.

    Attributes:
        hidden: ``[B, L, H]``.
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


@contextmanager
def _hooked(register: Callable[[Callable], Any], hook: Callable) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


def _output_layer(model: nn.Module) -> Any:
    layer = model.get_output_embeddings()  # type: ignore[operator]
    return getattr(layer, "_fsdp_wrapped_module", layer)  # whose weight is whole inside of FSDP's wrapper alone


def _readout(layer: Any, hidden: Tensor) -> Readout:
    weight = layer.weight
    # Norms under autocast give float32, which the layer would read as what its weight is.
    read = hidden.to(weight.dtype) if weight.dtype in (torch.float16, torch.bfloat16) else hidden
    return Readout(read, weight, getattr(layer, "bias", None))


def at_output_layer(
    model: nn.Module, inputs: dict[str, Tensor], compute: Callable[[Readout], Tensor], called: nn.Module | None = None
) -> Tensor:
    """Runs a model once, whose output layer gives what is computed of its readout in place of logits, which then exist
    of one position alone. Whatever spreads the weights over processes has those of the layer whole then, and again
    when the gradient comes back.

    Args:
        model: as :func:`check_causal` wants it.
        inputs: ``input_ids`` and ``attention_mask`` or ``position_ids``, ``[B, L]`` on its device.
        compute: once.
        called: what wraps the model, to be called in its place.

    Returns:
        What ``compute`` did.
    """
    hidden: list[Tensor] = []

    def cut(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden.append(args[0])
        return args[0][:, :1], *args[1:]

    def instead(layer: Any, args: tuple[Any, ...], logits: Tensor) -> Tensor:
        return compute(_readout(layer, hidden.pop()))

    layer = _output_layer(model)
    first = partial(layer.register_forward_hook, prepend=True)  # before the one that takes the weights away again
    with _hooked(layer.register_forward_pre_hook, cut), _hooked(first, instead):
        return (called or model)(**inputs, use_cache=False)[0]


def read_causal(model: nn.Module, inputs: dict[str, Tensor]) -> Readout:
    """Runs a model once; its output layer is given one position alone, so that there are no logits of the others.

    Args:
        model: as :func:`check_causal` wants it.
        inputs: ``input_ids`` and ``attention_mask`` or ``position_ids``, ``[B, L]`` on its device.

    Raises:
        VocabdistilError: FSDP's wrapper of the first kind has spread the output layer again before it could be read.
    """
    found: list[Readout] = []

    def keep(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        found.append(_readout(layer, args[0]))
        return args[0][:, :1], *args[1:]

    layer = _output_layer(model)
    with _hooked(layer.register_forward_pre_hook, keep):
        model(**inputs, use_cache=False)
    read = found[-1]
    if hasattr(layer.weight, "full_tensor"):
        bias = getattr(layer, "bias", None)
        return Readout(read.hidden, layer.weight.full_tensor(), None if bias is None else bias.full_tensor())
    if read.weight.numel() and not read.weight.untyped_storage().size():
        raise VocabdistilError("the output layer is gone after the forward pass; spread it by fully_shard")
    return read


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluates a model, but for its linear layers, which compute the same in training: those of bitsandbytes in 4 bits
    give no gradient any more after they were evaluated on a CPU."""
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        module.training = isinstance(module, nn.Linear)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def most_positions(model: Any) -> int | None:
    """The tokens that a model can read, if its configuration says so."""
    config = model.config
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions"))
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


@torch.no_grad()
def check_causal(model: Any, name: str, tokens: int, packed: bool = False) -> None:
    """Raises unless a model reads from left to right, and its logits are what its output layer makes of hidden states,
    with a row for every token: seen by two texts that differ in their last token, and where the layer gives something
    else.

    Args:
        name: of the argument.
        tokens: of its tokenizer.
        packed: whether it has to keep texts of one row apart.

    Raises:
        VocabdistilError: it is no such model.
    """
    kind = type(model).__name__
    expected = "a causal language model"
    layer: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    need(layer is not None, name, expected, f"{kind}, which has no output layer")
    need(not getattr(model.config, "is_encoder_decoder", False), name, expected, f"{kind}, an encoder with a decoder")
    need(not hasattr(layer, "base_layer"), name, "an output layer without adapters", "one that has some")
    held = f"{type(layer.weight.data).__name__} of {str(layer.weight.dtype).removeprefix('torch.')}"
    plain = layer.weight.is_floating_point() and (
        type(layer.weight.data) is Tensor or hasattr(layer.weight, "full_tensor")
    )
    need(plain, name, "an output layer that is not quantized, whatever else is", f"one that holds a {held}")
    size = layer.weight.shape[0]
    need(layer.weight.device.type != "meta", name, "an output layer in memory", "one that is offloaded")
    need(size >= tokens, name, f"an output layer for the {tokens} tokens of its tokenizer", f"one for {size}")
    given: list[Tensor] = []
    told: list[Tensor] = []

    def other(layer: Any, args: tuple[Any, ...], out: Tensor) -> Tensor:
        given.append(args[0])
        told.append(torch.linspace(-90, 90, size, device=out.device).to(out.dtype).expand_as(out))
        return told[-1]

    ids = torch.tensor([[0, 1], [0, min(2, size - 1)]], device=layer.weight.device)
    try:
        with _without_dropout(model), _hooked(layer.register_forward_hook, other):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise VocabdistilError.of(name, f"expected {expected}, got {kind}: {error}") from None
    same = _alike(given[-1][0, 0], given[-1][1, 0])
    need(same, name, expected, f"{kind}, whose hidden states depend on what comes after them")
    plain = logits.shape == told[-1].shape and torch.equal(logits.float(), told[-1].float())
    need(plain, name, "a model whose logits are those of its output layer", f"{kind}, which scales or caps them")
    if packed:
        row = {"input_ids": ids[:1].repeat(1, 2), "position_ids": torch.tensor([[0, 1, 0, 1]], device=ids.device)}
        try:
            with _without_dropout(model):
                hidden = read_causal(model, row).hidden[0]
        except TypeError:  # it takes no positions
            hidden = None
        apart = hidden is not None and _alike(hidden[:2], hidden[2:])
        need(apart, "packed", "a model that keeps texts of one row apart by their positions", kind)


def _alike(x: Tensor, y: Tensor) -> bool:
    # Rows of a batch are not always computed in one order.
    close = max(1e-5, 4 * torch.finfo(x.dtype).eps) * float(x.abs().max())
    return float((x - y).abs().max()) <= close
