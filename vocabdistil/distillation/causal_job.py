"""The job of decoders: a teacher and a student with vocabularies of their own, and a text."""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..alignment.causal import CausalCollator
from ..alignment.conversations import Rendered, rendered
from ..alignment.coverage import coverage
from ..alignment.vocab import MatchedVocab
from ..core.console import Reporter
from ..core.errors import need
from ..core.options import names_of
from ..core.processes import Processes
from ..core.progress import counted
from ..core.values import INT32_MAX
from ..evaluation import report
from ..evaluation.bits_per_byte import bits_per_byte, need_start
from ..evaluation.card import causal_card
from ..models.architectures import move
from ..models.causal import check_causal, most_positions
from ..models.teachers import Teacher, load_teacher
from .batches import to_device
from .causal_rows import said_of_text
from .causal_trainer import CausalDistillTrainer
from .folder import DistillResult, write_card, write_model
from .joint_run import Fitted, JointRun, device_of, look_together, open_together
from .options import MOST_READ, DistillConfig
from .order import TrainingOrder
from .recipes import CAUSAL_RECIPES
from .run_folder import Diverged
from .runs import DistillTrainingArguments, SeededTrainer, seconds_per_step, training_arguments, try_arguments
from .text import GivenTexts, TextFiles
from .text_store import TextSplit, split_text, stored

__all__ = ["distill_causal"]

# Held-out rows: of which checkpoints are chosen by, and of which figures are reported.
_CHOOSING, _REPORTED = 256, 512
# Rows whose tokens are counted where nobody says how many are read; the share of them that is to be read whole, in
# multiples of so many tokens, but no more than that.
_MEASURED, _WHOLE, _STEP, _LONGEST = 512, 0.95, 32, 512


class _JobTrainer(CausalDistillTrainer, SeededTrainer):
    """Everything random follows from seed and step, and checkpoints say when they are whole."""


@dataclass
class _Rows:
    """Rows of the text's store for a collator: JSON again."""

    collator: CausalCollator

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        with said_of_text():
            return self.collator([json.loads(feature["text"]) for feature in features])


def distill_causal(config: DistillConfig) -> DistillResult:
    """:func:`vocabdistil.distill` of a decoder.

    Raises:
        VocabdistilError: bad input; nothing is left half-written.
        Interrupted: SIGINT, SIGTERM or SIGHUP; a checkpoint has been saved.
    """
    processes = Processes.join(config.device)
    text = look_together(config, processes)
    teacher, student = (
        load_teacher(name, argument, trust_remote_code=config.trust_remote_code, decoders=True)
        for name, argument in ((names_of(config.teacher)[0], "teacher"), (os.fspath(config.student or ""), "student"))
    )
    for name, model in (("teacher", teacher), ("student", student)):
        need(model.causal_lm is not None, name, "a decoder, as the other side is one", model.name)
        check_causal(model.causal_lm, name, len(model.tokenizer))
        need_start(model.tokenizer, name)
    quantized = getattr(student.causal_lm, "is_quantized", False)
    need(not quantized, "student", "weights in floating point", "quantized ones")
    if config.other_arguments:
        try_arguments(config.other_arguments, device_of(config, processes))
    folder = open_together(config, config.identity(), processes)
    with folder.held():
        say = Reporter(config.quiet or not processes.main)
        return _Run(config, folder, say, processes, teacher, student, text).finish()


@dataclass
class _Run(JointRun):
    """A run; what its stages found is in the folder's record, for one that is resumed.

    Attributes:
        teacher, student: decoders.
        given: the text, to be read from where it is.
        split: the rows of the text, each as JSON.
        lengths: tokens of a row that teacher and student read at most.
    """

    teacher: Teacher
    student: Teacher
    given: TextFiles | GivenTexts
    split: TextSplit = field(init=False)
    lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        name = next(iter(CAUSAL_RECIPES)) if config.recipe == "auto" else config.recipe
        self.recipe_name, self.recipe = name, CAUSAL_RECIPES[name]
        self.weights = config.recipe_weights(self.recipe)
        self.batch_size = config.batch_size or self.recipe.batch_size
        self.lr = config.lr or self.recipe.lr_whole

    def finish(self) -> DistillResult:
        say = self.say
        say.status("Reading the text")
        self.split = self.lead(self.read)
        self.lead(self.check_rows)
        self.lengths = self.lead(self.read_lengths)
        choosing, held_out = self.lead(self.held_out)
        covered = self.lead(lambda: self.coverage(held_out))
        move(self.teacher.whole, self.device)
        student: Any = move(self.student.whole, self.device)
        # Its file may be of half the precision, in which the small steps of training would be lost.
        dtype = student.dtype
        student.float().requires_grad_(True)
        self.lead(lambda: self.evaluate(choosing, held_out))
        say.print(report.bits_line(self.record["teacher"], self.record["before"], len(held_out)))
        by = f"of {report.many(len(choosing), 'other held-out text')}, by which checkpoints are compared"
        say.print(f"step 0: {self.record['start']['loss']:.4f} bits per byte {by}")
        steps = self.plan()
        fitted = self.train(
            student,
            self.arguments(steps),
            self.trainer,
            lambda: {"loss": self.bits(student, self.student.tokenizer, choosing, self.lengths[1])},
            lambda step, row: say.print(f"step {step}: {row['loss']:.4f} bits per byte"),
        )

        def result() -> DistillResult:
            student.to(dtype)  # as it is saved
            after = self.bits(student, self.student.tokenizer, held_out, self.lengths[1])
            return self.write(student, covered, fitted, after, len(held_out))

        return self.lead(result)

    def read(self) -> TextSplit:
        """The text, and what is held out of it."""
        texts = stored(self.given, self.folder, quiet=self.config.quiet)
        return split_text(texts, self.config.held_out, self.config.seed, most=_CHOOSING + _REPORTED)

    def held_out(self) -> tuple[list[Any], list[Any]]:
        """Rows that checkpoints are chosen by, and those that figures are reported of."""
        rows = [json.loads(row) for row in self.split.held_out]
        chosen_by = max(3, len(rows) // 3)
        return self.fitting(rows[:chosen_by]), self.fitting(rows[chosen_by:])

    def evaluate(self, choosing: list[Any], held_out: list[Any]) -> None:
        """What teacher and student are worth before any training; stored."""
        if "before" in self.record:
            return
        self.say.status("Evaluating teacher and student")
        teacher, student = self.teacher.whole, self.student.whole
        of_teacher = self.bits(teacher, self.teacher.tokenizer, held_out, self.lengths[0], "teacher")
        started = time.monotonic()
        before = self.bits(student, self.student.tokenizer, held_out, self.lengths[1])
        evaluated = time.monotonic()
        start = self.bits(student, self.student.tokenizer, choosing, self.lengths[1])
        self.folder.store(
            teacher=of_teacher,
            before=before,
            start={"loss": start},
            evaluation_seconds=evaluated - started,
            checkup_seconds=time.monotonic() - evaluated,
        )

    def check_rows(self) -> None:
        """Raises VocabdistilError for a row that a chat template of either side cannot show, before anything is
        trained."""
        if "checked" in self.record:
            return
        tokenizers = {"teacher": self.teacher.tokenizer, "student": self.student.tokenizer}
        for part in (self.split.train, self.split.held_out):
            for line in counted(part, "Looking at the rows", self.config.quiet):
                row = json.loads(line)
                for side, tokenizer in tokenizers.items():
                    with said_of_text():
                        rendered(row, tokenizer, side, f"the row {line[:60]}...")
        self.folder.store(checked=True)

    def read_lengths(self) -> list[int]:
        """As they were asked for; else as long as most rows are, up to what takes little memory; stored."""
        config = self.config
        if "lengths" not in self.record:
            most, rows = config.max_length or 0, []
            lengths = [most, config.student_max_length or 2 * most]
            if not all(lengths):
                texts = self.split.train
                measured = random.Random(config.seed).sample(texts, min(_MEASURED, len(texts)))
                measure = _Rows(CausalCollator(self.teacher.tokenizer, self.student.tokenizer, INT32_MAX))
                batches = [measure([{"text": text}]) for text in measured]
                rows = [[batch["teacher"]["input_ids"].numel(), batch["input_ids"].numel()] for batch in batches]
                sizes = np.quantile(rows, _WHOLE, axis=0, method="higher")
                rounded = np.minimum(-(-sizes // _STEP) * _STEP, _LONGEST).astype(int).tolist()
                lengths = [given or found for given, found in zip(lengths, rounded, strict=True)]
            models = self.teacher.causal_lm, self.student.causal_lm
            lengths = [min(n, most_positions(m) or n) for n, m in zip(lengths, models, strict=True)]
            if rows:
                self.say.print(report.lengths_line(lengths, float((np.array(rows) <= lengths).all(1).mean())))
            self.folder.store(lengths=lengths)
        return self.record["lengths"]

    def fitting(self, rows: list[Any]) -> list[Any]:
        """Of held-out rows those that both sides can read whole, so that both are measured on the same; texts alone are
        read in parts, so all of them."""
        if _are_texts(rows):
            return rows
        tokenizers = self.teacher.tokenizer, self.student.tokenizer
        collator = CausalCollator(*tokenizers, [length + 1 for length in self.lengths])

        def fits(row: Any) -> bool:
            batch = collator([row])
            sides = batch["teacher"]["input_ids"], batch["input_ids"]
            return all(ids.shape[1] <= length for ids, length in zip(sides, self.lengths, strict=True))

        kept = list(filter(fits, rows))
        if len(kept) < len(rows):
            self.say.print(f"{len(kept)} of {report.many(len(rows), 'held-out row')} fit in {self.lengths} tokens")
        need(bool(kept), "max_length", "room for some of the held-out rows", self.lengths)
        return kept

    def coverage(self, rows: list[Any]) -> dict[str, Any]:
        """How the vocabularies correspond on what is learned of held-out rows."""
        tokenizers = self.teacher.tokenizer, self.student.tokenizer
        texts = [part for row in rows for part in _learned(row, self.teacher.tokenizer, "teacher")[1] if part.strip()]
        need(bool(texts), "text", "held-out rows in which something is learned", "none")
        matched = MatchedVocab.from_tokenizers(*tokenizers)
        found = coverage(texts, *tokenizers, ["boundary"], matched=matched)
        self.say.print(*report.coverage_tables((self.teacher.name, self.student.name), tokenizers, found))
        return found.as_dict()

    def bits(self, model: Any, tokenizer: Any, rows: list[Any], length: int, side: str = "student") -> float:
        """Bits per byte: of texts, or of what is learned of completions and conversations after what stands before."""
        if _are_texts(rows):
            found = bits_per_byte(model, tokenizer, [row["text"] for row in rows], length)
        else:
            found = _bits_of_learned(model, tokenizer, rows, length, self.device, side)
        if not math.isfinite(found):
            raise Diverged.of("lr", "the training diverged, the student's losses are not finite; try a smaller one")
        return found

    def arguments(self, steps: int) -> DistillTrainingArguments:
        config, recipe = self.config, self.recipe
        batch_size, accumulate = self.batches(self.batch_size)
        return training_arguments(
            self.partial, steps=steps, batch_size=batch_size, lr=self.lr, seed=config.seed,
            warmup=recipe.warmup if config.warmup is None else config.warmup,
            schedule=config.schedule or recipe.schedule, accumulate=accumulate,
            weight_decay=config.weight_decay, save_every=config.save_every, log_every=config.log_every,
            least_warmup=report.FEW_STEPS if config.warmup is None else 0,
            bf16=config.precision == "bf16", device=self.device, others=config.other_arguments,
        )  # fmt: skip

    def trainer(self, model: Any, arguments: DistillTrainingArguments) -> _JobTrainer:
        config, steps = self.config, arguments.max_steps
        return _JobTrainer(
            model, arguments, teacher=self.teacher.causal_lm, teacher_tokenizer=self.teacher.tokenizer,
            processing_class=self.student.tokenizer, weights=self.weights,
            temperature=config.temperature or self.recipe.temperature, data_collator=self.collator,
            train_dataset=TrainingOrder(self.split.train, self.record["texts_per_step"], steps, config.seed),
        )  # fmt: skip

    @property
    def collator(self) -> _Rows:
        return _Rows(CausalCollator(self.teacher.tokenizer, self.student.tokenizer, self.lengths))

    def plan(self) -> int:
        """How many steps, and how long each takes; stored, and said before the first."""
        size = self.batch_size * self.config.accumulate * self.processes.size
        if "texts_per_step" not in self.record:
            self.lead(lambda: self.folder.store(texts_per_step=size))
        if "steps" not in self.record:
            trainer = self.trainer(self.student.causal_lm, self.arguments(1))
            self.lead(lambda: self._plan(trainer))
        steps, seconds, size = (self.record[name] for name in ("steps", "seconds_per_step", "texts_per_step"))
        self.say.print(report.plan_line(steps, size, len(self.split.train), seconds))
        return steps

    def _plan(self, trainer: _JobTrainer) -> None:
        config, texts, size = self.config, self.split.train, self.record["texts_per_step"]
        exact, count = config.minutes is not None, 22 if config.minutes is not None else 5
        order = TrainingOrder(texts, self.batch_size, count, config.seed)
        batches = ([order[i] for i in range(k * self.batch_size, (k + 1) * self.batch_size)] for k in range(count))
        model: Any = self.student.causal_lm

        def loss_of(batch: Sequence[Any]) -> Tensor:
            rows = to_device(self.collator(batch), self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss = trainer.compute_loss(model, rows)
            assert isinstance(loss, Tensor)
            return loss

        with torch.random.fork_rng():
            seconds = seconds_per_step(loss_of, model, batches, 20.0 if exact else 5.0) * config.accumulate
        model.zero_grad()
        steps = config.steps or max(1, round(config.epochs * len(texts) / size))
        if config.minutes is not None:
            # What is to come after training takes as long as the same did before it; fewer steps teach nothing.
            checkup = self.record["checkup_seconds"]
            left = config.minutes * 60 - self.say.seconds - self.record["evaluation_seconds"] - checkup
            steps = max(report.FEW_STEPS, int(left / (seconds + checkup / config.save_every)))
        argument = "epochs" if config.minutes is None else "minutes"
        need(steps <= MOST_READ // size, argument, "fewer", getattr(config, argument))
        self.folder.store(steps=steps, seconds_per_step=seconds)

    def write(
        self, model: Any, covered: dict[str, Any], fitted: Fitted, after: float, held_out_texts: int
    ) -> DistillResult:
        """Figures, folder, and what is said at the end."""
        config, folder = self.config, self.folder
        metrics: dict[str, Any] = {
            "teacher": [self.teacher.name],
            "student": self.student.name,
            "command": "distill",
            "settings": config.settings(),
            "recipe": self.recipe_name,
            "weights": asdict(self.weights),
            "architecture": type(model).__name__,
            "steps": fitted.steps,
            "lr": self.lr,
            "best_step": fitted.checkups.best["step"],
            "checkups": fitted.checkups.rows,
            "train_texts": len(self.split.train),
            "held_out_texts": held_out_texts,
            "max_length": self.lengths,
            "seed": config.seed,
            "coverage": covered,
            "bits_per_byte": {"teacher": self.record["teacher"], "before": self.record["before"], "after": after},
            "train_seconds": round(fitted.seconds, 1),
        }
        final = write_model(folder, model, self.student.tokenizer)
        write_card(final, config, metrics, causal_card, names_of(config.student or ""))
        out = folder.publish(final, metrics)
        best = metrics["best_step"]
        which = "" if best == metrics["steps"] else f"; the best was step {best}, which is kept"
        bits = f"{self.record['before']:.4f} -> {after:.4f} (teacher {self.record['teacher']:.4f})"
        self.say.print(f"Held-out bits per byte {bits}")
        done = f"{report.many(fitted.steps, 'step')} in {fitted.seconds:.0f} s{which}."
        self.say.print(f"{done} The student is {folder.place}")
        return DistillResult(out, metrics)


def _are_texts(rows: list[Any]) -> bool:
    return all(row.keys() == {"text"} for row in rows)


def _learned(row: Any, tokenizer: Any, side: str) -> tuple[Rendered, list[str]]:
    """A row as a tokenizer reads it, and what is learned of it."""
    with said_of_text():
        found = rendered(row, tokenizer, side, "row")
    return found, [found.text[start:end] for start, end in found.learned]


@torch.no_grad()
def _bits_of_learned(
    model: nn.Module, tokenizer: Any, rows: list[Any], length: int, device: torch.device, side: str
) -> float:
    """Of what is learned, with what ends it, after all that stands before it."""
    collator, bits, size, training = CausalCollator(tokenizer, tokenizer, length), 0.0, 0, model.training
    model.eval()
    for row in rows:
        found, parts = _learned(row, tokenizer, side)
        batch = collator([found])
        ids, wanted = batch["input_ids"].to(device), batch["labels"][0, 1:].to(device)
        kept = wanted != -100
        log_p = model(input_ids=ids, use_cache=False).logits[0, :-1][kept].float().log_softmax(-1)
        bits -= float(log_p.gather(1, wanted[kept][:, None]).sum(dtype=torch.float64)) / math.log(2)
        size += sum(len(part.encode()) for part in parts)
    model.train(training)
    return bits / max(size, 1)
