"""Decoders that several processes teach: as torchrun starts them, and with weights that FSDP spreads over them."""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoTokenizer

import vocabdistil as vd
from tests.chats import BRACKETS, TURNS, chat_tokenizer, small_gpt2, small_llama
from tests.distillation.test_causal_job import CHATS, LINES, options
from tests.distillation.test_causal_trainer import CHATS as FEW
from tests.distillation.test_causal_trainer import trainer_of
from tests.distillation.test_processes import assert_same_run, kill_at_a_checkpoint, launch, losses
from vocabdistil.distillation.run_folder import last_checkpoint

WORLD = 2
needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


def job(folder, **changes):
    """Options of a run whose files are told by name, as on a command line."""
    text = folder / "text.txt"
    text.write_text("\n".join(LINES), encoding="utf-8")
    return options(folder / "one", **{"text": text, "log_every": 1, "lr": 1e-3, **changes})


@needs_gloo
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    base = job(tmp_path)
    process = launch(base | {"out": tmp_path / "two"})
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    one = vd.distill(**base | {"batch_size": 8})
    assert_same_run(one.path, tmp_path / "two")
    assert not (tmp_path / "two.partial").exists()
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert two["bits_per_byte"] == pytest.approx(one.metrics["bits_per_byte"], rel=1e-4)
    assert two["checkups"] == [pytest.approx(row, rel=1e-4) for row in one.metrics["checkups"]]


@needs_gloo
def test_a_process_that_is_killed_ends_the_run_and_another_number_continues_it(tmp_path):
    base = job(tmp_path, steps=600, save_every=3)
    kill_at_a_checkpoint(launch(base), tmp_path / "one.partial")
    step = int(last_checkpoint(tmp_path / "one.partial").name.rpartition("-")[2])
    file = tmp_path / "one.partial" / "run.json"
    record = json.loads(file.read_text())
    assert record["texts_per_step"] == 8
    file.write_text(json.dumps(record | {"steps": step + 3}))  # as if it had been shorter
    made = vd.distill(**base | {"resume": True})
    assert made.metrics["steps"] == step + 3
    assert len(losses(made.path)) >= 3


@needs_gloo
def test_a_failed_start_is_said_once_and_leaves_nothing(tmp_path):
    rows = tmp_path / "chats.jsonl"
    asked = {"messages": [{"role": "user", "content": "nobody answers"}]}
    rows.write_text("\n".join(map(json.dumps, [*CHATS, asked])), encoding="utf-8")
    process = launch(job(tmp_path, text=rows))
    _, said = process.communicate(timeout=300)
    assert process.returncode != 0
    ours = [line for line in said.splitlines() if line.startswith("vocabdistil: ")]
    assert len(ours) == 1 and "expected one of the assistant's, got none" in ours[0], said
    assert not list(tmp_path.glob("one*"))


# How the weights are spread: which of them are parts of their own beside the layers, and whether the rest is taken away
# after the forward pass.
WAYS = {"layers": ((), None), "whole": ((), True), "output layer": (("lm_head",), True)}


def sides_of(folder, tied):
    """Tokenizers and models of teacher and student, whose output layer is tied to its embeddings or not."""
    teacher, student = (AutoTokenizer.from_pretrained(folder / side) for side in ("teacher", "student"))
    model = small_gpt2(len(student)) if tied else small_llama(len(student), seed=1)
    return teacher, student, small_llama(len(teacher) + 5), model.eval()


def wrapped(model):
    """By FSDP's first kind, with a wrapper of its own around every linear layer."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy, device = ModuleWrapPolicy({torch.nn.Linear}), torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)


def gradients(model, way):
    """Of the whole weights, by name."""
    if way != "wrappers":
        assert all(p.placements[0].is_shard() for p in model.parameters())
        return {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    with type(model).summon_full_params(model, with_grads=True):
        named = model.named_parameters()
        return {name.replace("_fsdp_wrapped_module.", ""): p.grad.clone() for name, p in named}


def spread(model, way):
    from torch.distributed.fsdp import fully_shard

    own, reshard = WAYS[way]
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    kinds = model._no_split_modules
    modules = [m for name, m in model.named_modules() if type(m).__name__ in kinds or name in own]
    assert modules
    for module in (*modules, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    return model


def work(rank, tied, way, place):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=WORLD)
    sides = sides_of(place, tied)
    trainer = trainer_of(sides, place)
    model = wrapped(sides[3]) if way == "wrappers" else spread(sides[3], way)
    if way in WAYS:
        spread(trainer.teacher, way)
    batch = trainer.data_collator(FEW)
    loss, found = trainer.compute_loss(model, batch, return_outputs=True)
    loss.backward()
    grads = gradients(model, way)
    if rank == 0:
        torch.save((loss.detach(), found["terms"], grads), f"{place}/found.pt")
    dist.barrier()
    os._exit(0)  # as in test_ddp


@needs_gloo
@pytest.mark.parametrize("way", [*WAYS, "wrappers"])
def test_weights_that_fsdp_spreads(way, tmp_path):
    tied = way == "whole"
    # Training a tokenizer does not always give the same one.
    chat_tokenizer("byte-level split", TURNS).save_pretrained(tmp_path / "teacher")
    chat_tokenizer("llama", BRACKETS).save_pretrained(tmp_path / "student")
    sides = sides_of(tmp_path, tied)
    trainer = trainer_of(sides, tmp_path)
    model = copy.deepcopy(sides[3])
    loss, found = trainer.compute_loss(model, trainer.data_collator(FEW), return_outputs=True)
    loss.backward()
    mp.spawn(work, (tied, way, tmp_path), nprocs=WORLD)
    theirs, terms, grads = torch.load(tmp_path / "found.pt")
    torch.testing.assert_close(theirs, loss.detach())
    torch.testing.assert_close(terms, found["terms"])
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-6)
