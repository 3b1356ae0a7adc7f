"""A decoder learns from a teacher with another tokenizer, in ``transformers.Trainer``.

    python examples/decoder.py TEACHER STUDENT ROWS.jsonl [OUT]

TEACHER and STUDENT are folders or names of models, each with its tokenizer. A row has a ``text``, a ``prompt`` and a
``completion``, or ``messages``, which both sides read through their own chat templates.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import vocabdistil as vd


def main(teacher: str, student: str, rows: str, out: str = "decoder", **arguments: Any) -> list[float]:
    """Trains the student and saves it in ``out``; returns the losses that the Trainer logged."""
    tokenizers = [AutoTokenizer.from_pretrained(name) for name in (teacher, student)]
    models = [AutoModelForCausalLM.from_pretrained(name).float() for name in (teacher, student)]
    data = [json.loads(line) for line in Path(rows).read_text(encoding="utf-8").splitlines()]
    settings = {
        "output_dir": f"{out}/checkpoints",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
    }
    trainer = vd.CausalDistillTrainer(
        model=models[1],
        teacher=models[0],
        processing_class=tokenizers[1],
        teacher_tokenizer=tokenizers[0],
        weights="lm=1,matched=1",  # the next token of the text, and what the teacher thinks of the tokens both know
        max_length=512,
        args=TrainingArguments(**settings | arguments),
        train_dataset=data,
    )
    trainer.train()
    trainer.save_model(out)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    found = main(*sys.argv[1:])
    print(f"loss {found[0]:.3f} -> {found[-1]:.3f}")
