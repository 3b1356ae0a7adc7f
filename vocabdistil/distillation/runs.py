"""Long runs: everything random follows from (seed, step), a signal saves a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..core.console import Reporter
from ..core.errors import VocabdistilError, need, spell
from ..core.processes import Processes
from ..core.seeds import mix_seed
from ..evaluation.report import FEW_STEPS
from .run_folder import Interrupted, seal
from .weights import load_weights, save_weights

__all__ = [
    "DistillTrainingArguments",
    "SeededTrainer",
    "StepTrainer",
    "fit",
    "seconds_per_step",
    "training_arguments",
    "try_arguments",
]

# Seconds after which a signal is another one, where there are several processes.
_SECOND_SIGNAL = 5.0
# Fields of TrainingArguments that would undo what a run promises: to be resumed exactly, with so many texts in a step.
_REFUSED = {
    "accelerator_config", "auto_find_batch_size", "do_eval", "do_predict", "do_train", "eval_strategy",
    "ignore_data_skip", "load_best_model_at_end", "num_train_epochs", "push_to_hub", "resume_from_checkpoint",
    "save_only_model", "save_strategy",
}  # fmt: skip
_WEIGHTS, _OTHERS = "model.safetensors", "training_arguments"
# Processes that make batches for a GPU: see benchmarks/collate.py.
_WORKERS = 2
# What transformers calls them.
_SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


class StepTrainer(Trainer):
    """``transformers.Trainer`` whose losses are parts of the loss of a whole step, however its texts are cut into
    batches, accumulated and spread over processes.

    Subclasses keep the :meth:`totals` of a step when its batches are there, and divide by them in :meth:`part_of_step`.
    """

    # By these names transformers 5 and 4 ask whether losses are parts already.
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True
        self._sums: dict[str, Tensor] = {}
        self._steps_noted = 0
        self._totals: dict[str, Any] | None = None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._steps_noted += bool(batches)
        return batches, items

    def totals(self, counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What the batches of a step have to learn from, by name, over all processes.

        Args:
            counts: of each batch in this process.
        """
        totals = {name: sum(count[name] for count in counts) for name in counts[0]} if counts else {}
        if self.args.world_size == 1 or not totals:
            return totals
        # On the device, where nothing waits for them.
        device = self.args.device
        mine = torch.stack([torch.as_tensor(value, device=device).double() for value in totals.values()])
        return dict(zip(totals, self.accelerator.reduce(mine, "sum"), strict=True))

    def part_of_step(
        self, model: nn.Module, inputs: dict[str, Any], totals: dict[str, Any] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and what it is made of, as parts of the step with these totals; None: of its own."""
        raise NotImplementedError

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """In training the batch's part of the loss of its step, else its own loss."""
        # Not every version of transformers hands on what get_batch_samples gave.
        totals = self._totals if model.training else None
        try:
            loss, terms = self.part_of_step(model, inputs, totals)
        except VocabdistilError as error:
            raise VocabdistilError(f"{error} at step {self.state.global_step + 1}") from None
        if totals is not None:
            # Gradients of several processes are averaged.
            size = self.args.world_size
            loss, terms = loss * size, {name: value * size for name, value in terms.items()}
        if model.training:
            self.note(terms)
        return (loss, {"terms": terms}) if return_outputs else loss

    def note(self, terms: dict[str, Tensor]) -> None:
        """Adds the losses of one batch to the means over steps that the next log entry shows."""
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._sums and "loss" in logs:
            means = torch.stack([value.float() for value in self._sums.values()]) / self._steps_noted
            if self.args.world_size > 1:
                means = self.accelerator.reduce(means, "mean")
            logs.update({name: round(value, 5) for name, value in zip(self._sums, means.tolist(), strict=True)})
            self._sums, self._steps_noted = {}, 0
        super().log(logs, *args, **kwargs)


class SeededTrainer(StepTrainer):
    """``transformers.Trainer`` that draws everything random in a step from the seed and the step's number.

    Subclasses compute the loss with ``self.step_seed``.

    What it needs to know is in a :class:`DistillTrainingArguments`, or in any ``TrainingArguments``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._micro = (-1, 0)
        self.step_seed = self.seed_of(0)

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any):
        # transformers 4 would take that of the checkpoint, which another number of processes may have written.
        size = batch_size if self.args.auto_find_batch_size else self.args.train_batch_size
        return super()._inner_training_loop(size, *args, **kwargs)

    def seed_of(self, micro: int) -> int:
        """Of a batch of the next step in this process."""
        number = self.state.global_step * self.args.gradient_accumulation_steps + micro
        return mix_seed(self.args.seed, number * self.args.world_size + self.args.process_index)

    def _get_train_sampler(self, *args: Any, **kwargs: Any):
        if getattr(self.args, "in_order", False):
            return SequentialSampler(cast("Sized", self.train_dataset))
        return super()._get_train_sampler(*args, **kwargs)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        step, micro = self._micro
        self._micro = (self.state.global_step, micro + 1 if step == self.state.global_step else 0)
        self.step_seed = self.seed_of(self._micro[1])
        torch.manual_seed(self.step_seed)
        return super().training_step(model, *args, **kwargs)

    @property
    def _run_folder(self) -> Path:
        # Never None: TrainingArguments name a folder where nobody else does.
        return Path(cast("str", self.args.output_dir))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # The base class cannot save tied weights of a module that is no PreTrainedModel.
        folder, model = Path(output_dir or self._run_folder), self.accelerator.unwrap_model(self.model)
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(model, folder / _WEIGHTS, state_dict)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        self.accelerator.wait_for_everyone()  # each writes a part
        if self.args.should_save:
            seal(self._run_folder / f"checkpoint-{self.state.global_step}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            plain = self.accelerator.unwrap_model(model or self.model)
            load_weights(plain, Path(resume_from_checkpoint) / _WEIGHTS)


class _StopOnSignal(TrainerCallback):
    """SIGINT, SIGTERM and SIGHUP end the run after the step in progress, with a checkpoint; a second one ends it at
    once. What the process was told to ignore, as nohup does, stays ignored."""

    _SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.received: int | None = None
        self.stops, self._since = False, 0.0

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
        # A launcher that is told to stop tells its processes, which may have been told themselves.
        elif self.processes.size == 1 or time.monotonic() - self._since > _SECOND_SIGNAL:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heeded = [number for number in self._SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        old = {number: signal.signal(number, self._handle) for number in heeded}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def on_step_end(self, args, state, control, **kwargs):
        # All end at the same step, whichever of them was told to.
        self.stops = self.processes.any(self.received is not None) and state.global_step < state.max_steps
        if self.stops:
            control.should_save = control.should_training_stop = True
        return control


@dataclass
class DistillTrainingArguments(TrainingArguments):
    """``transformers.TrainingArguments`` for :class:`vocabdistil.DistillTrainer`: it keeps all columns of a data set,
    logs losses that are not finite, and reports to nobody unless told to.

    Attributes:
        in_order: the data set is in the order in which to read it.
    """

    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False
    report_to: None | str | list[str] = "none"
    in_order: bool = field(default=False, metadata={"help": "read the data set in its own order"})

    def __post_init__(self) -> None:
        super().__post_init__()
        # Several GPUs are for several processes: batches of span pairs cannot be split by torch.nn.DataParallel.
        if self.n_gpu > 1:
            self._n_gpu = 1

    @property
    def shards(self) -> bool:
        """Whether FSDP leaves each process a part of the weights."""
        return bool(self.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def training_arguments(
    folder: Path,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    warmup: float = 0.05,
    least_warmup: int = FEW_STEPS,
    weight_decay: float = 0.01,
    schedule: str = "linear",
    accumulate: int = 1,
    save_every: int = 500,
    log_every: int = 50,
    bf16: bool = False,
    device: torch.device | None = None,
    others: Mapping[str, Any] | None = None,
) -> DistillTrainingArguments:
    """AdamW with a linear warm-up, then a decay or none; checkpoints in ``folder``.

    Args:
        warmup: the share of the steps in which the rate rises.
        least_warmup: steps in which it does at least: a first step at the full rate moves a student far, and fewer
            steps than these never come to that rate.
        others: any other fields of ``TrainingArguments``.

    Raises:
        VocabdistilError: ``others`` has a field that is ours to fill or that there is not, or a value that cannot be.
    """
    on_gpu = device is not None and device.type == "cuda"
    ours = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": lr,
        "weight_decay": weight_decay,
        "warmup_steps": max(round(warmup * steps), least_warmup),
        "lr_scheduler_type": _SCHEDULERS[schedule],
        "gradient_accumulation_steps": accumulate,
        "bf16": bf16,
        "seed": seed,
        "save_steps": save_every,
        "save_total_limit": 2,
        "logging_steps": log_every,
        "disable_tqdm": True,
        "in_order": True,
        "use_cpu": not on_gpu,
    }
    # A GPU should not wait for its batches to be made.
    defaults = {"dataloader_pin_memory": on_gpu, "dataloader_num_workers": _WORKERS if on_gpu else 0}
    known = {f.name for f in fields(DistillTrainingArguments) if f.init} - ours.keys() - _REFUSED
    for name in others or {}:
        need(name in known, _OTHERS, "fields of transformers.TrainingArguments that can be given here", name)
    try:
        return DistillTrainingArguments(**defaults | dict(others or {}) | ours)
    except (TypeError, ValueError, ImportError) as error:
        raise VocabdistilError.of(_OTHERS, f"{error}") from None


def try_arguments(others: Mapping[str, Any], device: torch.device) -> None:
    """Raises VocabdistilError where a trainer would not begin with such fields of ``TrainingArguments``."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            Path(folder), steps=1, batch_size=1, lr=1.0, seed=0, device=device, others=others
        )
        try:
            SeededTrainer(model=nn.Linear(1, 1), args=arguments).create_optimizer()
        except (ValueError, RuntimeError, ImportError, AttributeError) as error:
            raise VocabdistilError.of(_OTHERS, f"{error}") from None
        plugin: Any = getattr(arguments, "deepspeed_plugin", None)
        # One process alone looks at the student, which has to have all of it.
        need(plugin is None or plugin.zero_stage < 3, _OTHERS, "DeepSpeed's ZeRO up to stage 2", "stage 3")


def seconds_per_step(
    loss_of: Callable[[Sequence[Any]], Tensor], model: nn.Module, batches: Iterable[Sequence[Any]], most: float
) -> float:
    """How long a step takes: the batch made, the loss, its gradient, the optimizer; nothing is learned.

    Args:
        loss_of: the loss of the examples of one batch.
        batches: the first two warm up, the others are timed.
        most: seconds after which it is enough.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    # A rate of 0 computes all of a step and changes nothing.
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    taken: list[float] = []
    start = time.perf_counter()
    for batch in batches:
        before = time.perf_counter()
        loss_of(batch).backward()
        for p in trained:
            if p.grad is not None:
                p.grad.zero_()  # one that is not finite would stay in the weights whatever the rate
        optimizer.step()
        optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - before)
        if len(taken) > 2 and time.perf_counter() - start > most:
            break
    timed = taken[2:] or taken
    return sum(timed) / len(timed)


def fit(
    trainer: Trainer,
    say: Reporter,
    checkpoint: Path | None = None,
    label: str = "Distilling",
    processes: Processes | None = None,
) -> float:
    """Trains to the end or to a signal, with a progress bar; returns the seconds that it took.

    Raises:
        Interrupted: SIGINT, SIGTERM or SIGHUP; a checkpoint has been saved.
    """
    steps, stop = trainer.args.max_steps, _StopOnSignal(processes or Processes())
    # What the trainer prints of itself would break the progress bar.
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(callback)
    with _ProgressCallback(say.console, steps, label) as progress, stop.installed():
        trainer.add_callback(stop)
        trainer.add_callback(progress)
        done = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.stops:
        raise Interrupted(
            f"interrupted at step {trainer.state.global_step} of {steps}, which {trainer.args.output_dir} holds; "
            f"the same with {spell('resume', True)} continues"
        )
    return done.metrics.get("train_runtime", 0.0)


# What transformers logs beside the terms of the loss.
_NOT_LOSSES = ("loss", "grad_norm", "learning_rate", "epoch")


class _ProgressCallback(TrainerCallback):
    """A bar with the losses on a terminal; elsewhere a line at every log, and at the last step; nothing if quiet."""

    def __init__(self, console: Console | None, steps: int, label: str) -> None:
        self.console, self.steps, self.label = console, steps, label
        self.bar: Progress | None = None

    def __enter__(self) -> _ProgressCallback:
        if self.console is not None and self.console.is_terminal:
            self.bar = Progress(
                TextColumn(self.label),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[losses]}"),
                console=self.console,
            )
            self.task = self.bar.add_task("", total=self.steps, losses="")
            self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)
        if control.should_training_stop:
            control.should_log = True
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}) or self.console is None:
            return
        losses = "  ".join(f"{name} {value:.4g}" for name, value in logs.items() if name not in _NOT_LOSSES)
        if self.bar is not None:
            self.bar.update(self.task, losses=losses)
        else:
            self.console.print(f"step {state.global_step}/{self.steps}  {losses}", highlight=False)
