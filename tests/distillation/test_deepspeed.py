"""A run under DeepSpeed, which holds all weights in one tensor and spreads what Adam keeps over two processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vocabdistil as vd
from tests.distillation.test_processes import BODY, assert_same_run, kill_at_a_checkpoint, launch, still_teacher
from tests.runs import options

__all__ = ["still_teacher"]

pytest.importorskip("deepspeed", reason="deepspeed is not installed")


@pytest.fixture
def zero2(tmp_path: Path) -> Path:
    """The smallest configuration that works wherever DeepSpeed does: its own Adam would be compiled first."""
    path = tmp_path / "zero2.json"
    sizes = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True, **sizes}))
    return path


def test_a_run_is_the_one_of_a_single_process_even_after_a_kill(still_teacher, text_file, zero2, tmp_path):
    base = options(still_teacher, text_file, tmp_path / "one", **BODY)
    base |= {"recipe": "embedding", "steps": 40, "save_every": 3}
    one = vd.distill(**base | {"batch_size": 8})
    two = base | {"batch_size": 4, "out": tmp_path / "two", "training_arguments": f"deepspeed={zero2}"}
    kill_at_a_checkpoint(launch(two), tmp_path / "two.partial")
    process = launch(two | {"resume": True})
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert_same_run(one.path, tmp_path / "two")
