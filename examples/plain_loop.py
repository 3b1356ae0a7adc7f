"""A student's hidden states come near to its teacher's in a loop of one's own.

    vocabdistil demo && python examples/plain_loop.py

Two models with different tokenizers read the same texts; the loss compares the averages of their hidden states over
the span pairs, the stretches of text that both cut out. The README's loop beside it accumulates gradients.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer, get_scheduler

import vocabdistil as vd


def main(folder: str = "vocabdistil-demo", out: str = "plain-loop", epochs: int = 2) -> list[float]:
    """Trains ``folder/student`` and saves it in ``out``; returns the loss of every step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    places = [Path(folder, side) for side in ("teacher", "student")]
    tokenizers = [AutoTokenizer.from_pretrained(place) for place in places]
    teacher, student = (AutoModel.from_pretrained(place).to(device) for place in places)
    texts = Path(folder, "text.txt").read_text(encoding="utf-8").splitlines()[:512]

    # From the student's width to the teacher's; where they are equal, leave it out.
    torch.manual_seed(0)
    projection = torch.nn.Linear(student.config.hidden_size, teacher.config.hidden_size, bias=False).to(device)
    parameters = [*student.parameters(), *projection.parameters()]
    collator = vd.AlignmentCollator(*tokenizers, max_length=48)
    loader = DataLoader(texts, batch_size=32, shuffle=True, collate_fn=collator)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    steps = epochs * len(loader)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)

    losses = []
    student.train()
    for _ in range(epochs):
        for batch in loader:
            batch = batch.to(device)
            with torch.no_grad():
                wanted = teacher(**batch.teacher).last_hidden_state
            got = student(**batch.student).last_hidden_state
            loss = vd.span_kl(got, wanted, batch.pairs, temperature=2.0, weight=projection.weight)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.detach())
    student.save_pretrained(out)
    tokenizers[1].save_pretrained(out)
    return torch.stack(losses).tolist()  # here, not in the loop: the host never waits for the device


if __name__ == "__main__":
    found = main(*sys.argv[1:])
    print(f"loss {found[0]:.3f} -> {found[-1]:.3f} in {len(found)} steps")
