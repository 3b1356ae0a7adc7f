"""The distillation loop: a trainer on ``transformers.Trainer``, and :func:`distill`, which does the whole job."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    AutoTokenizer,
    DistilBertForMaskedLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from . import report
from .data import (
    DistillCollator,
    coverage,
    read_text,
    save_tokenizer,
    split_text,
    token_counts,
    wordpiece_like,
)
from .errors import VocabdistilError
from .loyalty import regression
from .ops import span_loss
from .reference.layers import LayerAssignment, layer_map
from .reference.mlm import mask_tokens, masking_probabilities, mlm_loss
from .remap import RemapTable
from .students import PRESETS, build_student, initialise_from_teacher, principal_axes
from .teachers import Teacher, load_teacher
from .vocab import MatchedVocab

__all__ = [
    "DistillConfig",
    "DistillModel",
    "DistillResult",
    "DistillTrainer",
    "Interrupted",
    "LossWeights",
    "distill",
    "evaluate",
]

_MAX_EVAL_TEXTS = 512
_RUN_FILE = "run.json"


class Interrupted(KeyboardInterrupt):
    """Training stopped on a signal after it saved a checkpoint; the text says how to go on."""


# ---------------------------------------------------------------- configuration


@dataclass
class LossWeights:
    """What each loss counts; ``mse`` is summed over features, ``cosine`` is 1 - cos (both of the span means)."""

    kl: float = 2.0
    mlm: float = 0.5
    cosine: float = 0.0
    mse: float = 0.0

    @classmethod
    def parse(cls, text: str) -> LossWeights:
        """From ``"kl=2,mlm=0.5"``; what is not named keeps its default."""
        weights = cls()
        names = [f.name for f in fields(cls)]
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = part.partition("=")
            if name not in names:
                raise VocabdistilError(f"--weights: unknown loss {name!r}; expected {', '.join(names)}")
            try:
                number = float(value)
            except ValueError:
                raise VocabdistilError(f"--weights: {name}: expected a number, got {value!r}") from None
            setattr(weights, name, number)
        return weights


@dataclass
class DistillConfig:
    """Everything that :func:`distill` needs to know.

    Attributes:
        teacher: a folder or a name, or a list of them: the student takes its tokenizer's rules and its first
            weights from the first, and learns from all.
        text: UTF-8 files.
        out: the folder to write; ``out + ".partial"`` holds the run while it lasts.
        preset: a key of ``students.PRESETS``.
        vocab_size: tokens of the student; None: the preset's.
        steps, epochs: how long; ``steps`` wins.
        batch_size, max_length: texts per step, teacher tokens of each.
        student_max_length: student tokens of each; None: twice ``max_length``, at most 512.
        lr, warmup, weight_decay: AdamW's peak rate, the share of steps in which it rises, decay.
        temperature: of the span KL.
        weights: a :class:`LossWeights` or its text form.
        teacher_weights: what each teacher counts; None: alike.
        layer_map: which teacher layers teach which student layers: ``last skip average average_all``.
        held_out: the share of texts kept for evaluation.
        unit: ``"line"`` or ``"paragraph"``, see :func:`vocabdistil.data.read_text`.
        seed: of the split, the weights, the order of texts, masks and dropout.
        device, precision: ``"auto" "cpu" "cuda"``; ``"fp32" "bf16"`` (autocast).
        save_every, log_every: steps between checkpoints and between progress lines.
        threads: of torch on the CPU; None: leave it.
        time_batch, time_length: the batch and the length in tokens at which CPU time is measured.
        resume, overwrite, quiet: continue from ``out + ".partial"``; replace ``out``; print nothing.
    """

    teacher: str | os.PathLike | Sequence[str | os.PathLike]
    text: str | os.PathLike | Sequence[str | os.PathLike]
    out: str | os.PathLike
    preset: str = "tiny-5k"
    vocab_size: int | None = None
    steps: int | None = None
    epochs: float = 3.0
    batch_size: int = 32
    max_length: int = 128
    student_max_length: int | None = None
    lr: float = 5e-4
    warmup: float = 0.05
    weight_decay: float = 0.01
    temperature: float = 2.0
    weights: LossWeights | str = field(default_factory=LossWeights)
    teacher_weights: Sequence[float] | None = None
    layer_map: str = "last"
    held_out: float = 0.05
    unit: str = "line"
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    save_every: int = 500
    log_every: int = 50
    threads: int | None = None
    time_batch: int = 16
    time_length: int = 512
    resume: bool = False
    overwrite: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        def paths(value: Any) -> list[str]:
            return [os.fspath(value)] if isinstance(value, (str, os.PathLike)) else [os.fspath(v) for v in value]

        self.teacher, self.text, self.out = paths(self.teacher), paths(self.text), os.fspath(self.out)
        if isinstance(self.weights, str):
            self.weights = LossWeights.parse(self.weights)
        self._check()

    def _check(self) -> None:
        def need(ok: bool, name: str, expected: str, value: object) -> None:
            if not ok:
                raise VocabdistilError(f"--{name.replace('_', '-')}: expected {expected}, got {value}")

        need(bool(self.teacher), "teacher", "at least one", "none")
        need(self.preset in PRESETS, "preset", " or ".join(PRESETS), repr(self.preset))
        for name in ("batch_size", "max_length", "save_every", "log_every", "time_batch", "time_length"):
            need(getattr(self, name) > 0, name, "a number above 0", getattr(self, name))
        for name in ("vocab_size", "steps", "student_max_length", "threads"):
            value = getattr(self, name)
            need(value is None or value > 0, name, "a number above 0", value)
        for name in ("epochs", "lr", "temperature"):
            value = getattr(self, name)
            need(0 < value < float("inf"), name, "a number above 0", value)
        need(0 <= self.warmup < 1, "warmup", "a share from 0 to below 1", self.warmup)
        need(self.weight_decay >= 0, "weight_decay", "a number of at least 0", self.weight_decay)
        need(0 < self.held_out < 1, "held_out", "a share between 0 and 1", self.held_out)
        need(self.unit in ("line", "paragraph"), "unit", "line or paragraph", repr(self.unit))
        need(self.precision in ("fp32", "bf16"), "precision", "fp32 or bf16", repr(self.precision))
        need(self.device in ("auto", "cpu", "cuda"), "device", "auto, cpu or cuda", repr(self.device))
        need(
            self.layer_map in ("last", "skip", "average", "average_all"),
            "layer_map",
            "last, skip, average or average_all",
            repr(self.layer_map),
        )
        values = asdict(self.weights).values()
        need(all(v >= 0 for v in values) and any(values), "weights", "numbers of at least 0, one above", self.weights)
        if self.teacher_weights is not None:
            need(
                len(self.teacher_weights) == len(self.teacher) and min(self.teacher_weights) > 0,
                "teacher_weights",
                "one number above 0 per teacher",
                list(self.teacher_weights),
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise VocabdistilError("--device: cuda was asked for, but torch sees no CUDA device")

    def identity(self) -> dict[str, Any]:
        """What must not change between an interrupted run and its continuation."""
        free = ("out", "resume", "overwrite", "quiet", "threads", "save_every", "log_every", "time_batch", "time_length")
        return {k: v for k, v in asdict(self).items() if k not in free}


@dataclass
class DistillResult:
    """What :func:`distill` did: the student's folder and the contents of its ``metrics.json``."""

    path: Path
    metrics: dict[str, Any]


# ---------------------------------------------------------------- model and losses


class DistillModel(nn.Module):
    """The student, and a projection to the teacher's width for every teacher and layer assignment.

    Args:
        student: the model that will be saved.
        teacher_widths: hidden widths of the teachers.
        assignments: for each teacher, which of its layers teach which of the student's.
        axes: ``[D_t, D_s]`` of the first teacher: where its projections start (orthonormal otherwise).
    """

    def __init__(
        self,
        student: DistilBertForMaskedLM,
        teacher_widths: Sequence[int],
        assignments: Sequence[Sequence[LayerAssignment]],
        axes: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.student = student
        self.assignments = [list(group) for group in assignments]
        self.projections = nn.ModuleDict()
        width = student.config.dim
        generator = torch.Generator().manual_seed(seed)
        for t, (teacher_width, group) in enumerate(zip(teacher_widths, self.assignments, strict=True)):
            if teacher_width == width:
                continue
            for i in range(len(group)):
                linear = nn.Linear(width, teacher_width, bias=False)
                nn.init.orthogonal_(linear.weight, generator=generator)
                if t == 0 and axes is not None:
                    linear.weight.data.copy_(axes)
                self.projections[f"{t}_{i}"] = linear

    def projection(self, teacher: int, assignment: int = -1) -> Tensor | None:
        """``[D_t, D_s]``, or None where the widths are equal."""
        key = f"{teacher}_{assignment % len(self.assignments[teacher])}"
        return self.projections[key].weight if key in self.projections else None

    @property
    def all_layers(self) -> bool:
        last = self.student.config.n_layers
        return any(a.student != (last,) for group in self.assignments for a in group)

    def _head(self, hidden: Tensor) -> Tensor:
        student = self.student
        hidden = student.activation(student.vocab_transform(hidden))
        return student.vocab_projector(student.vocab_layer_norm(hidden))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Hidden states ``[B, L, D_s]`` by layer (0: the embedding) and the loss on ``labels`` (-100: no target)."""
        out = self.student.distilbert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_hidden_states=self.all_layers,
            return_dict=True,
        )
        last = out.last_hidden_state
        # Without the other layers, their places stay empty: assignments count layers from the embedding up.
        layers = list(out.hidden_states) if self.all_layers else [None] * self.student.config.n_layers + [last]
        return layers, None if labels is None else mlm_loss(last, labels, self._head)


@dataclass
class Objective:
    """The losses of one batch: what is compared, and what each comparison counts.

    Attributes:
        teachers: frozen, on the student's device.
        weights, temperature: see :class:`DistillConfig`.
        teacher_weights: sum to 1.
        mask_probabilities: ``[V_s]``, by id.
        mask_id: the student's MASK.
    """

    teachers: list[Teacher]
    weights: LossWeights
    teacher_weights: list[float]
    temperature: float
    mask_probabilities: Tensor
    mask_id: int

    def mask(self, batch: dict[str, Any], seed: int) -> tuple[Tensor, Tensor]:
        """The student's inputs with the own tokenization masked, and the labels; ``reduce`` rows stay whole."""
        ids, size = batch["student_ids"], batch["teacher_ids"][0].shape[0]
        generator = torch.Generator(ids.device).manual_seed(seed)
        masked = mask_tokens(
            ids[-size:],
            self.mask_probabilities,
            self.mask_id,
            attention_mask=batch["student_mask"][-size:],
            generator=generator,
        )
        labels = torch.full_like(ids, -100)
        labels[-size:] = masked.labels
        return torch.cat([ids[:-size], masked.input_ids]), labels

    def teach(self, model: DistillModel, batch: dict[str, Any]) -> list[list[Tensor]]:
        """Hidden states of every teacher."""
        return [
            teacher.hidden_states(ids, mask, all_layers=any(a.teacher != (teacher.num_layers,) for a in group))
            for teacher, ids, mask, group in zip(
                self.teachers, batch["teacher_ids"], batch["teacher_mask"], model.assignments, strict=True
            )
        ]

    def compare(
        self, model: DistillModel, hidden: list[Tensor], taught: list[list[Tensor]], batch: dict[str, Any], divergence: str
    ) -> tuple[Tensor, Tensor]:
        """The divergence under ``reduce`` and on the own tokenization: means over assignments, then teachers."""
        size = batch["teacher_ids"][0].shape[0]
        totals = [hidden[-1].new_zeros(()), hidden[-1].new_zeros(())]
        for t, layers in enumerate(taught):
            group = model.assignments[t]
            for i, assignment in enumerate(group):
                teacher_side = [layers[k if len(layers) > 1 else -1] for k in assignment.teacher]
                for which, (rows, pairs) in enumerate(
                    (
                        (slice(t * size, (t + 1) * size), batch["reduce_pairs"][t]),
                        (slice(len(taught) * size, None), batch["own_pairs"][t]),
                    )
                ):
                    loss = span_loss(
                        [hidden[k][rows] for k in assignment.student],
                        teacher_side,
                        pairs.to(hidden[-1].device),
                        divergence=divergence,
                        temperature=self.temperature,
                        weight=model.projection(t, i),
                    )
                    totals[which] = totals[which] + self.teacher_weights[t] / len(group) * loss
        return totals[0], totals[1]


def _mix(seed: int, step: int) -> int:
    """One seed for each step: everything random in a step depends on the two alone, so that resuming is exact."""
    return (seed * 0x9E3779B1 + step * 0x85EBCA77 + 0x2545F491) % (1 << 62)


class DistillTrainer(Trainer):
    """``transformers.Trainer`` over a :class:`DistillModel`, batches of a :class:`DistillCollator`, an :class:`Objective`.

    ``loss = sum_d weight_d * (d_reduce + d_own) / 2 + weight_mlm * MLM``, ``d`` the span divergences with a weight.

    Args:
        objective: the losses.
        sequential: the data set is in the order in which to read it (as :class:`TrainingOrder` is).
    """

    def __init__(self, *args: Any, objective: Objective, sequential: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective
        self._sequential = sequential
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._micro = (-1, 0)

    def _get_train_sampler(self, *args: Any, **kwargs: Any):
        return SequentialSampler(self.train_dataset) if self._sequential else super()._get_train_sampler(*args, **kwargs)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        step, micro = self._micro
        self._micro = (self.state.global_step, micro + 1 if step == self.state.global_step else 0)
        self._step_seed = _mix(
            self.args.seed, self.state.global_step * self.args.gradient_accumulation_steps + self._micro[1]
        )
        torch.manual_seed(self._step_seed)
        return super().training_step(model, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any):
        objective, plain = self.objective, self.accelerator.unwrap_model(model)
        weights = objective.weights
        try:
            taught = objective.teach(plain, inputs)
        except VocabdistilError as error:
            raise VocabdistilError(f"{error} at step {self.state.global_step + 1}") from None
        ids, labels = objective.mask(inputs, self._step_seed)
        hidden, mlm = model(ids, inputs["student_mask"], labels if weights.mlm else None)
        terms = {}
        loss = hidden[-1].new_zeros(())
        for name in ("kl", "cosine", "mse"):
            if weight := getattr(weights, name):
                reduce, own = objective.compare(plain, hidden, taught, inputs, name)
                terms[f"{name}_reduce"], terms[f"{name}_own"] = reduce.detach(), own.detach()
                loss = loss + weight * (reduce + own) / 2
        if mlm is not None:
            terms["mlm"] = mlm.detach()
            loss = loss + weights.mlm * mlm
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0) + value
        self._count += 1
        return (loss, {"terms": terms}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._count and "loss" in logs:
            logs.update({name: round(float(value) / self._count, 5) for name, value in self._sums.items()})
            self._sums, self._count = {}, 0
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # The base class cannot save tied weights of a module that is no PreTrainedModel.
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.accelerator.unwrap_model(self.model), str(folder / "model.safetensors"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_model(
            self.accelerator.unwrap_model(model or self.model), str(Path(resume_from_checkpoint) / "model.safetensors")
        )


class TrainingOrder(Dataset):
    """A whole run's texts in the order in which they are read: one item per text and epoch.

    Every epoch is a fresh permutation. Texts of similar length share a batch, drawn from windows of 32 batches, so
    that little padding is computed. As the order of the run is one sequence, continuing it means skipping items.
    """

    def __init__(self, texts: Sequence[str], batch_size: int, steps: int, seed: int) -> None:
        self.texts = texts
        lengths = torch.tensor([len(text) for text in texts])
        generator = torch.Generator().manual_seed(seed)
        order: list[Tensor] = []
        while sum(map(len, order)) < steps * batch_size:
            order.append(torch.randperm(len(texts), generator=generator))
        indices = torch.cat(order)[: steps * batch_size]
        window = 32 * batch_size
        batches: list[Tensor] = []
        for start in range(0, len(indices), window):
            part = indices[start : start + window]
            part = part[lengths[part].argsort(stable=True)].view(-1, batch_size)
            batches.append(part[torch.randperm(len(part), generator=generator)].flatten())
        self.indices = torch.cat(batches).tolist()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict[str, str]:
        return {"text": self.texts[self.indices[i]]}


# ---------------------------------------------------------------- evaluation


def _pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the attended tokens: ``[B, L, D]``, ``[B, L]`` -> ``[B, D]``."""
    mask = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


def pairwise_cosine(x: Tensor) -> Tensor:
    """Cosine similarities of all pairs of rows: ``[N, D]`` -> ``[N (N - 1) / 2]``."""
    x = nn.functional.normalize(x.double(), dim=-1)
    i, j = torch.triu_indices(len(x), len(x), 1)
    return (x @ x.T)[i, j]


@torch.no_grad()
def evaluate(
    model: DistillModel, objective: Objective, collator: DistillCollator, texts: Sequence[str], batch_size: int, seed: int
) -> dict[str, Any]:
    """Losses and loyalty on held-out texts; dropout off, masks the same on every call with the same seed.

    Returns:
        ``kl_reduce``, ``kl_own`` (unmasked student inputs), ``mlm``, and of the embeddings pooled over tokens (the
        student's from its own tokenization): ``cosine`` (mean cosine between student, projected, and first teacher)
        and ``pearson``, ``spearman`` (regression loyalty of the cosine similarities of all pairs of texts; no
        projection takes part in these).
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}

    def add(name: str, value: Tensor, count: int) -> None:
        sums[name] = sums.get(name, 0.0) + float(value) * count
        counts[name] = counts.get(name, 0) + count

    ours, theirs = [], []
    for b, start in enumerate(range(0, len(texts), batch_size)):
        batch = _to_device(collator(texts[start : start + batch_size]), device)
        size = batch["teacher_ids"][0].shape[0]
        taught = objective.teach(model, batch)
        hidden, _ = model(batch["student_ids"], batch["student_mask"])
        reduce, own = objective.compare(model, hidden, taught, batch, "kl")
        add("kl_reduce", reduce, sum(p.num_nonempty for p in batch["reduce_pairs"]))
        add("kl_own", own, sum(p.num_nonempty for p in batch["own_pairs"]))
        ids, labels = objective.mask(batch, _mix(seed, b))
        _, mlm = model(ids[-size:], batch["student_mask"][-size:], labels[-size:])
        add("mlm", mlm, int((labels != -100).sum()))
        ours.append(_pool(hidden[-1][-size:], batch["student_mask"][-size:]).float().cpu())
        theirs.append(_pool(taught[0][-1], batch["teacher_mask"][0]).float().cpu())
    model.train(training)
    student, teacher = torch.cat(ours), torch.cat(theirs)
    projection = model.projection(0)
    projected = student if projection is None else student @ projection.detach().float().cpu().T
    pearson, spearman = regression(pairwise_cosine(student), pairwise_cosine(teacher))
    return {
        **{name: value / max(counts[name], 1) for name, value in sums.items()},
        "cosine": float(nn.functional.cosine_similarity(projected, teacher).mean()),
        "pearson": float(pearson),
        "spearman": float(spearman),
    }


def _to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    def move(value: Any) -> Any:
        return [move(v) for v in value] if isinstance(value, list) else value.to(device)

    return {key: move(value) for key, value in batch.items()}


# ---------------------------------------------------------------- the main job


class _StopOnSignal(TrainerCallback):
    """SIGINT and SIGTERM end the run after the step in progress, with a checkpoint; a second one ends it at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def on_step_end(self, args, state, control, **kwargs):
        if self.received is not None and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        return control


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end (the trainer's state is what it writes last)."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _open_partial(config: DistillConfig, digest: str) -> tuple[Path, dict[str, Any] | None]:
    """Makes ``out.partial`` or, to resume, checks that it belongs to the same run; returns it and its record."""
    out = Path(config.out)
    partial = out.with_name(out.name + ".partial")
    record_path = partial / _RUN_FILE
    identity = json.loads(json.dumps({**config.identity(), "text_digest": digest}))
    if partial.exists():
        if config.resume:
            if not record_path.exists():
                raise VocabdistilError(f"--resume: {partial} holds no run to continue")
            record = json.loads(record_path.read_text(encoding="utf-8"))
            for name, value in identity.items():
                before = record["identity"].get(name)
                if before != value:
                    if name == "text_digest":
                        raise VocabdistilError("--text: the text has changed since the run that --resume would continue")
                    raise VocabdistilError(
                        f"--{name.replace('_', '-')}: {value} differs from the run that --resume would continue ({before})"
                    )
            return partial, record
        if not config.overwrite:
            raise VocabdistilError(
                f"--out: {partial} holds an interrupted run; --resume continues it, --overwrite starts anew"
            )
        shutil.rmtree(partial)
    elif config.resume:
        raise VocabdistilError(f"--resume: no interrupted run at {partial}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise VocabdistilError(f"--out: cannot make {partial}: {error.strerror}") from None
    return partial, {"identity": identity}


def _training_arguments(config: DistillConfig, folder: Path, steps: int, device: torch.device) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        warmup_steps=round(config.warmup * steps),
        lr_scheduler_type="linear",
        bf16=config.precision == "bf16",
        seed=config.seed,
        save_steps=config.save_every,
        save_total_limit=2,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=device.type == "cpu",
    )


def distill(config: DistillConfig | None = None, **options: Any) -> DistillResult:
    """Distils a teacher into a student with a smaller vocabulary of its own, and writes the student to a folder.

    Args:
        config: everything; or give the fields of :class:`DistillConfig` by name.

    Returns:
        The folder, and what ``metrics.json`` in it says.

    Raises:
        VocabdistilError: bad input; nothing is left half-written.
        Interrupted: SIGINT or SIGTERM; a checkpoint has been saved.

    Example::

        import vocabdistil as vd
        result = vd.distill(teacher="bert-base-cased", text=["corpus.txt"], out="student", vocab_size=5000)
        result.metrics["after"]["cosine"]
    """
    if config is None:
        config = DistillConfig(**options)
    elif options:
        raise TypeError("distill: give a config or options, not both")
    out = Path(config.out)
    if out.exists() and not config.overwrite:
        raise VocabdistilError(f"--out: {out} exists; --overwrite replaces it")
    if out.exists() and not out.is_dir():
        raise VocabdistilError(f"--out: {out} is not a folder")
    if config.threads:
        torch.set_num_threads(config.threads)
    split = split_text(read_text(config.text, config.unit), config.held_out, config.seed)
    teachers = [load_teacher(source) for source in config.teacher]
    partial, record = _open_partial(config, split.digest)
    try:
        return _run(config, split, teachers, partial, record)
    except BaseException as error:
        if not isinstance(error, Interrupted) and _last_checkpoint(partial) is None:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _run(config: DistillConfig, split, teachers: list[Teacher], partial: Path, record: dict[str, Any]) -> DistillResult:
    out = Path(config.out)
    say = report.Reporter(config.quiet)
    device = torch.device("cuda" if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()) else "cpu")
    preset = PRESETS[config.preset]
    first = teachers[0]
    max_length = min([config.max_length, *(teacher.max_positions for teacher in teachers)])
    student_max_length = min(config.student_max_length or 2 * max_length, 512)

    tokenizer_folder = partial / "tokenizer"
    if not (tokenizer_folder / "tokenizer_config.json").exists():
        say.status("Training the student's vocabulary")
        trained = wordpiece_like(first.tokenizer, split.train, config.vocab_size or preset.vocab_size, 512)
        save_tokenizer(trained, tokenizer_folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tables = [RemapTable.from_tokenizers(teacher.tokenizer, tokenizer) for teacher in teachers]
    matched = [MatchedVocab.from_tokenizers(teacher.tokenizer, tokenizer) for teacher in teachers]

    reports = [
        coverage(split.held_out, teacher.tokenizer, tokenizer, table, match)
        for teacher, table, match in zip(teachers, tables, matched, strict=True)
    ]
    for teacher, coverage_report in zip(teachers, reports, strict=True):
        say.coverage(teacher.name, coverage_report)

    student = build_student(preset, tokenizer, seed=config.seed)
    start = initialise_from_teacher(student, first.model, tables[0], first.tokenizer, tokenizer, config.seed)
    axes = None
    if first.width != preset.dim:
        axes = principal_axes(first.model.get_input_embeddings().weight, preset.dim)
    try:
        assignments = [layer_map(config.layer_map, preset.layers, teacher.num_layers) for teacher in teachers]
    except ValueError as error:
        raise VocabdistilError(f"--layer-map: {error}") from None
    model = DistillModel(student, [t.width for t in teachers], assignments, axes, config.seed).to(device)
    for teacher in teachers:
        teacher.model.to(device)
    shares = config.teacher_weights or [1.0] * len(teachers)
    objective = Objective(
        teachers,
        config.weights,
        [share / sum(shares) for share in shares],
        config.temperature,
        masking_probabilities(token_counts(tokenizer, split.train), tokenizer.all_special_ids).to(device),
        tokenizer.mask_token_id,
    )
    collator = DistillCollator(
        [teacher.tokenizer for teacher in teachers], tokenizer, tables, matched, max_length, student_max_length
    )
    held_out = split.held_out[:_MAX_EVAL_TEXTS]
    if "before" not in record:
        say.status("Evaluating the untrained student")
        record["before"] = evaluate(model, objective, collator, held_out, config.batch_size, config.seed)
        _write_json(partial / _RUN_FILE, record)

    steps = config.steps or max(1, round(config.epochs * len(split.train) / config.batch_size))
    stop = _StopOnSignal()
    checkpoint = _last_checkpoint(partial) if config.resume else None
    with say.progress(steps) as progress, stop.installed():
        trainer = DistillTrainer(
            model=model,
            args=_training_arguments(config, partial, steps, device),
            train_dataset=TrainingOrder(split.train, config.batch_size, steps, config.seed),
            data_collator=collator,
            callbacks=[stop, progress],
            objective=objective,
            sequential=True,
        )
        # What the trainer prints of itself would break the progress bar.
        for callback in ("PrinterCallback", "ProgressCallback"):
            for present in list(trainer.callback_handler.callbacks):
                if type(present).__name__ == callback:
                    trainer.remove_callback(present)
        trained = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < steps:
        raise Interrupted(
            f"interrupted at step {trainer.state.global_step} of {steps}; the same command with --resume continues"
        )
    say.status("Evaluating the student")
    model.eval()
    after = evaluate(model, objective, collator, held_out, config.batch_size, config.seed)
    metrics = {
        "teacher": [teacher.name for teacher in teachers],
        "preset": config.preset,
        "steps": steps,
        "train_texts": len(split.train),
        "held_out_texts": len(held_out),
        "max_length": max_length,
        "seed": config.seed,
        "initialisation": start,
        "coverage": [r.as_dict() for r in reports],
        "before": record["before"],
        "after": after,
        "train_seconds": round(trained.metrics.get("train_runtime", 0.0), 1),
        "models": report.compare_models(
            first, student, tokenizer, held_out, batch=config.time_batch, length=config.time_length
        ),
    }
    final = partial / "final"
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir()
    student.to("cpu").save_pretrained(final)
    shutil.copytree(tokenizer_folder, final, dirs_exist_ok=True)
    for t, table in enumerate(tables):
        table.save(final / ("remap.vdrt" if t == 0 else f"remap_{t}.vdrt"))
    if len(model.projections):
        weights = {key: linear.weight.detach().cpu().contiguous() for key, linear in model.projections.items()}
        save_file(weights, final / "projection.safetensors")
    with open(final / "training_log.jsonl", "w", encoding="utf-8") as file:
        for entry in trainer.state.log_history:
            file.write(json.dumps(entry) + "\n")
    _write_json(final / "metrics.json", metrics)
    (final / "README.md").write_text(report.model_card(config, metrics), encoding="utf-8")
    _move_into_place(final, out)
    shutil.rmtree(partial)
    say.results(metrics, out)
    return DistillResult(out, metrics)


def _move_into_place(final: Path, out: Path) -> None:
    """Renames; an old folder steps aside first and is removed last."""
    old = out.with_name(out.name + ".old.partial")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(out, old)
    os.rename(final, out)
    shutil.rmtree(old, ignore_errors=True)
