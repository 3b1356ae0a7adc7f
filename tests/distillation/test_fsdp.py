"""A step of a model whose weights FSDP spreads over two processes: the losses read them whole."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import vocabdistil as vd
from tests.runs import PRESET
from vocabdistil.alignment.masking import masking_probabilities
from vocabdistil.distillation.batches import DistillCollator
from vocabdistil.distillation.model import DistillModel
from vocabdistil.distillation.objective import Objective
from vocabdistil.distillation.recipes import LossWeights
from vocabdistil.models.students import build_student
from vocabdistil.models.teachers import load_teacher
from vocabdistil.models.vocabularies import count_tokens
from vocabdistil.reference.layers import layer_map

WORLD = 2


def step_of(folder, lines):
    """A model and the step that computes its losses, with projections and output layers read beside the passes."""
    torch.manual_seed(0)
    teacher = load_teacher(folder)
    tokenizer = teacher.tokenizer
    model = DistillModel(
        build_student(PRESET, tokenizer), [teacher.width], [layer_map("last", 2, 2)], train_projections=True
    )
    pair = (tokenizer, tokenizer)
    matched = [vd.MatchedVocab.from_tokenizers(*pair)]
    batch = DistillCollator([tokenizer], tokenizer, [], matched, 32, 64)(lines[:6])
    chances = masking_probabilities(count_tokens(tokenizer, lines), tokenizer.all_special_ids)
    objective = Objective(
        [teacher], LossWeights(kl=1, logits=1, mlm=1), [1.0], [[1.0]], 2.0, chances, tokenizer.mask_token_id, "match",
        [], matched,
    )  # fmt: skip
    return model.eval(), lambda model: objective.loss(model, batch, 5)[0]


def work(rank, folder, lines, place):
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=WORLD)
    model, step = step_of(folder, lines)
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    layers = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    for module in (*layers, model):
        fully_shard(module, mesh=mesh)
    loss = model(step=step)
    loss.backward()
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save((len(layers), loss.detach(), grads), f"{place}/found.pt")
    dist.barrier()
    os._exit(0)  # as in test_ddp


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo")
def test_losses_read_whole_weights(teacher_folder, demo_lines, tmp_path):
    model, step = step_of(teacher_folder, demo_lines)
    loss = model(step=step)
    loss.backward()
    mp.spawn(work, (teacher_folder, demo_lines, str(tmp_path)), nprocs=WORLD)
    layers, theirs, grads = torch.load(tmp_path / "found.pt")
    assert layers == PRESET.layers
    torch.testing.assert_close(theirs, loss.detach())
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-6)
