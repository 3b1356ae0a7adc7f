"""Looks at the student while it learns: held-out loss at every checkpoint, the best student kept, an early end."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn
from transformers import TrainerCallback

from ..core.files import whole_file, whole_path
from ..core.processes import Processes
from .weights import load_weights, save_weights

__all__ = ["Checkups"]

_FILE = "checkups.jsonl"


def _lowest(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The first with the lowest loss."""
    return min(rows, key=lambda row: row["loss"])


class Checkups(TrainerCallback):
    """Examines a student every so many steps and at the last one.

    Args:
        folder: of the run; gets ``checkups.jsonl``, a row per look, and the two best students so far, as a run that is
            resumed may go back behind the last of them.
        model: what is trained.
        examine: its figures, ``"loss"`` among them: the lower the better.
        every: steps between looks.
        patience: looks without a better loss after which training ends; None: none.
        first: the figures of the student before any step.
        start: the step that the run goes on from: later rows are forgotten.
        tell: says the figures of a step.
        processes: the first of which looks, for all.
        gather: called in all of them before a look, to bring the model's weights together where they are spread.
        start_counts: whether the student before any step may be the best.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        examine: Callable[[], dict[str, float]],
        every: int,
        patience: int | None,
        first: dict[str, float],
        start: int,
        tell: Callable[[int, dict[str, float]], None],
        processes: Processes | None = None,
        gather: Callable[[], None] = lambda: None,
        start_counts: bool = True,
    ) -> None:
        self.folder, self.model, self.examine = folder, model, examine
        self.every, self.patience, self.tell = every, patience, tell
        self.processes, self.gather, self._start_counts = processes or Processes(), gather, start_counts
        self.rows = [{"step": 0, **first}]
        if (folder / _FILE).exists():
            rows = map(json.loads, (folder / _FILE).read_text(encoding="utf-8").splitlines())
            self.rows += [row for row in rows if 0 < row["step"] <= start]
        self.processes.lead(self._begin)

    def _begin(self) -> None:
        if self._start_counts and not self._student(0).exists() and len(self.rows) == 1:
            self._save(0)
        self._write()

    def look(self, step: int) -> None:
        """Examines the student once, after some step."""
        self.gather()
        row = self.processes.lead(lambda: self._look(step))
        if row is not self.rows[-1]:
            self.rows.append(row)

    def _look(self, step: int) -> dict[str, float]:
        training = self.model.training
        self.model.eval()
        row = {"step": step, **self.examine()}
        self.model.train(training)
        before = self.best["step"]
        self.rows.append(row)
        if self.best is row:
            self._save(step)
            for path in self.folder.glob("best-*.safetensors"):
                if path not in (self._student(step), self._student(before)):
                    path.unlink()
        self._write()
        self.tell(step, row)
        return row

    @property
    def best(self) -> dict[str, float]:
        """The row with the lowest loss, the first of them; the start if it counts, or there is no other."""
        return _lowest(self.rows[not self._start_counts :] or self.rows)

    @property
    def stale(self) -> int:
        """Looks since the best one after a step: a loss that rises at first may yet fall below that of the start."""
        looks = self.rows[1:]
        return len(looks) - 1 - looks.index(_lowest(looks)) if looks else 0

    @property
    def ended_early(self) -> bool:
        return self.patience is not None and self.stale >= self.patience

    def restore(self) -> None:
        """Gives the model the weights of the best student."""
        if self.best["step"] != self.rows[-1]["step"]:
            load_weights(self.model, self._student(self.best["step"]))

    def _student(self, step: float) -> Path:
        return self.folder / f"best-{step}.safetensors"

    def _save(self, step: int) -> None:
        with whole_path(self._student(step)) as path:
            save_weights(self.model, path)

    def _write(self) -> None:
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        with whole_file(self.folder / _FILE) as file:
            file.write(text.encode())

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        if step % self.every == 0 or step == state.max_steps:
            self.look(step)
            if self.ended_early:
                control.should_save = control.should_training_stop = True
        return control
