"""The weights of a model in training, to a file and back, whatever holds them: engines keep all of them in one tensor,
where safetensors' own functions take every parameter for a part of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core.errors import VocabdistilError

__all__ = ["load_weights", "save_weights"]


def _tied(model: nn.Module) -> set[str]:
    """Names of parameters that another name stands for."""
    return set(dict(model.named_parameters(remove_duplicate=False))) - set(dict(model.named_parameters()))


def save_weights(model: nn.Module, path: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """
    Args:
        state: the weights, where they were gathered from several processes; None: the model's own.
    """
    tied = _tied(model)
    state = model.state_dict() if state is None else state
    # Cloned where it is a view, as a file holds the whole of what is viewed.
    own = {name: value.detach().cpu().clone() for name, value in state.items() if name not in tied}
    save_file({name: value.contiguous() for name, value in own.items()}, path)


def load_weights(model: nn.Module, path: Path) -> None:
    """
    Raises:
        VocabdistilError: the file holds the weights of another model.
    """
    found = model.load_state_dict(load_file(path), strict=False)
    if wrong := sorted((set(found.missing_keys) - _tied(model)) | set(found.unexpected_keys)):
        raise VocabdistilError(f"{path}: expected the weights of this model, got others in {', '.join(wrong[:3])}")
