"""Small training runs, and ways to stop them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from vocabdistil.distillation.runs import SeededTrainer
from vocabdistil.models.students import Preset

PRESET = Preset(layers=2, dim=24, heads=4, ffn=48, vocab_size=150)


def options(teacher: Path, text: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Of the paper's recipe, which goes through every stage, unless ``changes`` say otherwise."""
    small = {"recipe": "paper", "preset": PRESET, "steps": 12, "batch_size": 8, "max_length": 32, "lr": 5e-4}
    # Few steps, which are to come to the full rate.
    small |= {"warmup": 0.05, "log_every": 4, "time_batch": 2, "time_length": 16, "quiet": True}
    return {"teacher": teacher, "text": text, "out": out, **small, **changes}


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action) -> None:
    """Calls ``action`` before the step (counted from 0) is computed."""
    original, done = SeededTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step and not done:  # a step may have several batches
            done.append(step)
            action()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SeededTrainer, "training_step", training_step)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
