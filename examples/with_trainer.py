"""The same with ``transformers.Trainer``: checkpoints, schedules, mixed precision and many processes are its own.

    vocabdistil demo && python examples/with_trainer.py

The loss is a part of the module, so that whatever wraps the module (DDP, FSDP, torch.compile) sees all that it reads.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments

import vocabdistil as vd


class Distiller(nn.Module):
    """A student that learns its teacher's hidden states; called with the batches of ``vd.AlignmentCollator``."""

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel) -> None:
        super().__init__()
        self.teacher, self.student = teacher.requires_grad_(False), student
        self.projection = nn.Linear(student.config.hidden_size, teacher.config.hidden_size, bias=False)

    def train(self, mode: bool = True) -> Distiller:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, teacher: dict[str, Tensor], student: dict[str, Tensor], pairs: vd.SpanPairs) -> dict[str, Tensor]:
        with torch.no_grad():
            wanted = self.teacher(**teacher).last_hidden_state
        got = self.student(**student).last_hidden_state
        return {"loss": vd.span_kl(got, wanted, pairs, temperature=2.0, weight=self.projection.weight)}


def main(folder: str = "vocabdistil-demo", out: str = "with-trainer", **arguments: Any) -> list[float]:
    """Trains ``folder/student`` and saves it in ``out``; returns the losses that the Trainer logged."""
    places = [Path(folder, side) for side in ("teacher", "student")]
    tokenizers = [AutoTokenizer.from_pretrained(place) for place in places]
    teacher, student = (AutoModel.from_pretrained(place) for place in places)
    texts = Path(folder, "text.txt").read_text(encoding="utf-8").splitlines()[:512]
    torch.manual_seed(0)
    settings = {
        "output_dir": f"{out}/checkpoints",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 32,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "remove_unused_columns": False,  # the collator reads the text
    }
    trainer = Trainer(
        model=Distiller(teacher, student),
        args=TrainingArguments(**settings | arguments),
        train_dataset=[{"text": text} for text in texts],
        data_collator=vd.AlignmentCollator(*tokenizers, max_length=48),
    )
    trainer.train()
    student.save_pretrained(out)
    tokenizers[1].save_pretrained(out)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    found = main(*sys.argv[1:])
    print(f"loss {found[0]:.3f} -> {found[-1]:.3f} in {len(found)} steps")
