"""A run of one process or of several, whatever it teaches: what the jobs of encoders and decoders have in common."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from ..core.console import Reporter
from ..core.processes import Processes
from .checkups import Checkups
from .run_folder import OtherRun, RunFolder, checkpoint_step, last_checkpoint

if TYPE_CHECKING:
    from .options import DistillConfig
    from .runs import DistillTrainingArguments, SeededTrainer
    from .text import GivenTexts, TextFiles

__all__ = ["Fitted", "JointRun", "device_of", "look_together", "open_together"]

_T = TypeVar("_T")


def look_together(config: DistillConfig, processes: Processes) -> TextFiles | GivenTexts:
    """The text, after the first process has looked at all that the run reads and writes.

    Raises:
        VocabdistilError: see :meth:`.options.StudentOptions.look`.
    """
    looked = processes.lead(config.look, send=False)
    return looked if processes.main else config.open_text()


def open_together(config: DistillConfig, identity: dict[str, Any], processes: Processes) -> RunFolder:
    """The folder of the run, which the first process makes and holds.

    Raises:
        VocabdistilError: see :meth:`.run_folder.RunFolder.open`.
    """
    opened: list[RunFolder] = []

    def first() -> dict[str, Any]:
        opened.append(RunFolder.open(config.out, identity, config.resume, config.overwrite))
        return opened[0].record

    record = processes.lead(first)
    return opened[0] if opened else RunFolder.follow(config.out, record)


def device_of(config: DistillConfig, processes: Processes) -> torch.device:
    """What this process trains on."""
    on_gpu = config.device == "cuda" or config.device == "auto" and torch.cuda.is_available()
    return torch.device("cuda", processes.local_rank) if on_gpu else torch.device("cpu")


@dataclass
class Fitted:
    """What training left beside the model.

    Attributes:
        log: what was logged, as transformers has it.
        checkups: what was seen at the checkpoints.
        seconds, lr, steps: how long it took, the peak rate, how many steps were done.
    """

    log: list[dict[str, Any]]
    checkups: Checkups
    seconds: float
    lr: float
    steps: int


@dataclass
class JointRun:
    """A run, and who does it.

    Attributes:
        config: its options.
        folder: of the run, with what its stages stored there.
        processes: that do the job; the first leads.
    """

    config: DistillConfig
    folder: RunFolder
    say: Reporter
    processes: Processes

    @property
    def partial(self) -> Path:
        return self.folder.path

    @property
    def record(self) -> dict[str, Any]:
        return self.folder.record

    @property
    def device(self) -> torch.device:
        return device_of(self.config, self.processes)

    def lead(self, stage: Callable[[], _T], send: bool = True) -> _T:
        """A stage of the first process, which alone writes, measures and prints. The others get what it returned, or
        None unless ``send``, and know from then on what it stored."""
        mine: list[_T] = []

        def told() -> tuple[_T | None, dict[str, Any]]:
            mine.append(stage())
            return mine[0] if send else None, self.folder.record

        value, self.folder.record = self.processes.lead(told)
        return mine[0] if mine else cast("_T", value)

    def batches(self, most: int) -> tuple[int, int]:
        """Texts of a batch, and batches of a step in each process: as they were asked for, unless the run began in
        another number of processes; then a step keeps its texts.

        Args:
            most: texts of a batch.

        Raises:
            OtherRun: they cannot be shared out evenly.
        """
        texts, size = self.record["texts_per_step"], self.processes.size
        if texts % size:
            problem = f"expected a number of processes that divides the {texts} texts of a step, got {size}"
            raise OtherRun.of("resume", problem)  # goes on in another
        batch = max(part for part in range(1, min(most, texts // size) + 1) if texts // size % part == 0)
        return batch, texts // size // batch

    def train(
        self,
        model: Any,
        arguments: DistillTrainingArguments,
        make: Callable[[Any, DistillTrainingArguments], SeededTrainer],
        examine: Callable[[], dict[str, float]],
        tell: Callable[[int, dict[str, float]], None],
        start_counts: bool = True,
    ) -> Fitted:
        """Trains a model, in every process, and leaves the best of it in the first one's.

        Args:
            arguments: of the trainer; without steps nothing is trained.
            make: a trainer of the model and on the arguments that it is given.
            examine, tell, start_counts: see :class:`.checkups.Checkups`; what is looked at is ``model``, in the first
                process.

        Raises:
            Interrupted: SIGINT, SIGTERM or SIGHUP; a checkpoint has been saved.
        """
        checkpoint = last_checkpoint(self.partial) if self.config.resume else None
        # The model of every process is examined whole; where FSDP spreads the weights a copy is trained.
        trained = copy.deepcopy(model) if arguments.shards else model

        def gather() -> None:
            if trained is not model:
                whole = trainer.accelerator.get_state_dict(trainer.model)
                if self.processes.main:
                    model.load_state_dict(whole)

        checkups = Checkups(
            self.partial, model, examine, self.config.save_every, self.config.patience, self.record["start"],
            checkpoint_step(checkpoint), tell, self.processes, gather, start_counts,
        )  # fmt: skip
        if not arguments.max_steps:
            return self._fitted(Fitted([], checkups, 0.0, arguments.learning_rate, 0))
        if checkups.ended_early:  # and was stopped before it was written
            arguments.max_steps = checkpoint_step(checkpoint)
        from .runs import fit  # brings transformers' trainer, which takes a while to import

        trainer = make(trained, arguments)
        trainer.add_callback(checkups)
        seconds = fit(trainer, self.say, checkpoint, processes=self.processes)
        gather()
        if self.processes.main:
            checkups.restore()
        state = trainer.state
        return self._fitted(
            Fitted(state.log_history, checkups, seconds, arguments.learning_rate, state.global_step)
        )

    def _fitted(self, found: Fitted) -> Fitted:
        if self.processes.main:
            with open(self.partial / "training_log.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in found.log)
        return found
