"""Weights of models whose parameters are parts of larger tensors, or stand under two names."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vocabdistil.core.errors import VocabdistilError
from vocabdistil.distillation.weights import load_weights, save_weights


def tied(seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    model = nn.ModuleDict({"rows": nn.Embedding(5, 3), "head": nn.Linear(3, 5), "norm": nn.BatchNorm1d(3)})
    model["head"].weight = model["rows"].weight
    return model


def test_parameters_that_share_one_tensor_are_saved_one_by_one(tmp_path):
    model, other = tied(), tied(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = 0
    for p in model.parameters():
        p.data = flat[start : start + p.numel()].view(p.shape)
        start += p.numel()
    save_weights(model, tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert "head.weight" not in saved and saved.keys() == before.keys() - {"head.weight"}
    load_weights(other, tmp_path / "model.safetensors")
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert other["head"].weight is other["rows"].weight


def test_gathered_weights_are_saved_once_where_they_are_tied(tmp_path):
    model = tied()
    gathered = {name: value.clone() for name, value in model.state_dict().items()}
    save_weights(model, tmp_path / "model.safetensors", gathered)
    assert load_file(tmp_path / "model.safetensors").keys() == gathered.keys() - {"head.weight"}


def test_weights_of_another_model_are_named(tmp_path):
    save_weights(nn.ModuleDict({"rows": nn.Embedding(5, 3)}), tmp_path / "model.safetensors")
    with pytest.raises(VocabdistilError, match="got others in head.bias, norm.bias"):
        load_weights(tied(), tmp_path / "model.safetensors")
