"""A run of several processes, as torchrun starts them: the same run as one process makes of the same texts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import vocabdistil as vd
from tests.runs import at_step, interrupt, options
from vocabdistil.core.processes import Processes
from vocabdistil.distillation.run_folder import Interrupted, last_checkpoint

BODY = {"preset": None, "layers": 1, "vocabulary": "train", "vocab_size": 150}
BODY |= {"whiten": 0.0, "lr": 1e-4, "log_every": 1}


@pytest.fixture(scope="module")
def still_teacher(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose students have no dropout, which is drawn for a batch as a whole."""
    folder = tmp_path_factory.mktemp("still") / "teacher"
    shutil.copytree(teacher_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")
# The name is that of DDP on any device: with --cpu it would start one process and leave the others to MPI.
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--num_processes=2")
ACCELERATE += ("--mixed_precision=no", "--dynamo_backend=no")


def launch(arguments: dict[str, Any], launcher: tuple[str, ...] = TORCHRUN, **changes: Any) -> subprocess.Popen:
    """Two processes with the command that means ``arguments``."""
    command = [sys.executable, "-m", *launcher, "-m", "vocabdistil", "distill"]
    for name, value in {**arguments, **changes}.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            command.append(flag)
        elif value is not None and value is not False:
            command += [flag, str(value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def losses(folder: Path) -> list[dict[str, float]]:
    rows = map(json.loads, (folder / "training_log.jsonl").read_text().splitlines())
    kept = ("epoch", "step", "train_runtime", "grad_norm")
    return [{k: v for k, v in row.items() if k not in kept} for row in rows if "loss" in row]


def assert_same_run(one: Path, other: Path) -> None:
    for a, b in zip(losses(one), losses(other), strict=True):
        assert a.keys() == b.keys()
        assert all(b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-4) for name in a), (a, b)
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    for name in a:
        # Adam makes a step of any gradient, however small: where it is rounding alone the sides may part.
        assert float((a[name] - b[name]).abs().median()) < 1e-4, name


@pytest.mark.parametrize("recipe", ["masked", "paper"])
def test_a_step_is_the_same_however_it_is_cut(recipe, still_teacher, text_file, tmp_path):
    """16 x 1, 8 x 2 and 4 x 4 texts, and for one recipe twice 8 in two processes."""
    base = options(still_teacher, text_file, tmp_path / "16", **BODY) | {"recipe": recipe, "steps": 4}
    whole = vd.distill(**base | {"batch_size": 16})
    for size in (8, 4):
        cut = vd.distill(**base | {"batch_size": size, "accumulate": 16 // size, "out": tmp_path / str(size)})
        assert_same_run(whole.path, cut.path)
    if recipe == "masked":
        process = launch(base | {"batch_size": 8, "out": tmp_path / "two"})
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert_same_run(whole.path, tmp_path / "two")
        assert not (tmp_path / "two.partial").exists()


def kill_at_a_checkpoint(process: subprocess.Popen, partial: Path) -> None:
    """Kills one of the two processes as soon as there is a checkpoint, and waits for the other."""
    found, until = None, time.monotonic() + 240
    while found is None and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
        found = last_checkpoint(partial) if partial.exists() else None
    assert found is not None
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0


def test_a_process_that_is_killed_ends_the_run_and_another_number_continues_it(still_teacher, text_file, tmp_path):
    base = options(still_teacher, text_file, tmp_path / "whole", **BODY)
    base |= {"recipe": "embedding", "steps": 600, "save_every": 3, "batch_size": 4}
    process = launch(base | {"out": tmp_path / "killed"})
    partial = tmp_path / "killed.partial"
    kill_at_a_checkpoint(process, partial)
    step = int(last_checkpoint(partial).name.rpartition("-")[2])
    record = json.loads((partial / "run.json").read_text())
    assert record["texts_per_step"] == 8
    # What is left of so long a run is not needed: as if it had been shorter.
    record["steps"] = step + 3
    (partial / "run.json").write_text(json.dumps(record))
    result = vd.distill(**base | {"out": tmp_path / "killed", "resume": True})
    assert result.metrics["steps"] == step + 3
    rows = losses(result.path)
    assert len(rows) >= 3 and all(row["loss"] > 0 for row in rows)


def test_one_process_begins_and_two_continue(still_teacher, text_file, tmp_path, monkeypatch):
    base = options(still_teacher, text_file, tmp_path / "whole", **BODY)
    base |= {"recipe": "embedding", "steps": 6, "save_every": 2, "batch_size": 8}
    whole = vd.distill(**base)
    at_step(monkeypatch, 2, interrupt)
    with pytest.raises(Interrupted):
        vd.distill(**base | {"out": tmp_path / "parts"})
    monkeypatch.undo()
    process = launch(base | {"out": tmp_path / "parts", "resume": True}, ACCELERATE)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert_same_run(whole.path, tmp_path / "parts")


def test_all_processes_whiten_or_none(still_teacher, headless_folder, text_file, demo_lines, tmp_path):
    """As the first of them found by the dev pairs."""
    pairs = tmp_path / "pairs.csv"
    rows = [f'"{one}","{other}",{i % 7}' for i, (one, other) in enumerate(pairwise(demo_lines[:102]))]
    pairs.write_text("\n".join(rows) + "\n", encoding="utf-8")
    teacher = tmp_path / "teacher"
    shutil.copytree(headless_folder, teacher)
    shutil.copy(still_teacher / "config.json", teacher)
    base = options(teacher, text_file, tmp_path / "one", **BODY) | {"recipe": "embedding", "steps": 3, "dev": pairs}
    base |= {"whiten": None, "save_every": 1}
    process = launch(base | {"batch_size": 4, "out": tmp_path / "two"})
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    one = vd.distill(**base | {"batch_size": 8})
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert one.metrics["whitened"].keys() == two["whitened"].keys()
    assert_same_run(one.path, tmp_path / "two")


def test_a_failed_start_is_said_once_and_leaves_nothing(still_teacher, text_file, tmp_path):
    arguments = options(still_teacher, text_file, tmp_path / "student", **BODY)
    process = launch(arguments | {"recipe": "embedding", "vocab_size": 9})
    _, said = process.communicate(timeout=240)
    assert process.returncode != 0
    ours = [line for line in said.splitlines() if line.startswith("vocabdistil: ")]
    assert len(ours) == 1 and "--vocab-size" in ours[0], said
    assert not (tmp_path / "student.partial").exists() and not (tmp_path / "student").exists()


def test_one_process_leads_itself():
    processes = Processes()
    assert processes.main and processes.lead(lambda: 3) == 3 and processes.any(True) and not processes.any(False)
    with pytest.raises(ZeroDivisionError):
        processes.lead(lambda: 1 / 0)


def test_parameters_read_by_losses_alone_are_trained_in_several_processes(still_teacher, text_file, tmp_path):
    """The output layer, which logits without MLM read outside the model's pass, and projections that are trained."""
    base = options(still_teacher, text_file, tmp_path / "one", **BODY) | {"recipe": "masked", "steps": 3}
    base |= {"weights": "logits=1,kl=1,mlm=0", "dim": 16, "heads": 2, "ffn": 32, "layers": 2, "train_projection": True}
    process = launch(base | {"batch_size": 4, "out": tmp_path / "two"})
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    one = vd.distill(**base | {"batch_size": 8})
    assert_same_run(one.path, tmp_path / "two")
    a, b = (load_file(folder / "projection.safetensors") for folder in (one.path, tmp_path / "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)
