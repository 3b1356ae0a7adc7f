"""The trainer of causal students: :class:`CausalDistillTrainer`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from ..alignment.causal import CausalCollator
from ..alignment.loading import tokenizer_of
from ..alignment.remap import RemapTable
from ..alignment.vocab import MatchedVocab
from ..core.checks import UNMATCHED, check_choice, check_temperature
from ..core.errors import need
from ..core.options import ROW_COLUMNS
from ..models.causal import Readout, at_output_layer, check_causal, most_positions, read_causal
from .causal_objective import CausalObjective, causal_inputs
from .recipes import CausalWeights, need_weights
from .runs import StepTrainer

__all__ = ["CausalDistillTrainer"]

_MOST_SPARE = 1024  # rows of an output layer for no token, which are there for round numbers


class CausalDistillTrainer(StepTrainer):
    """Trains a causal language model on text and on a teacher with another tokenizer.

    It is a ``transformers.Trainer``: the model is a plain ``AutoModelForCausalLM``, with adapters of ``peft`` or
    without, and is saved, resumed, sharded (FSDP) and checkpointed (gradients) as there. Data sets are those of TRL's
    SFT, see :class:`vocabdistil.CausalCollator`. The losses read hidden states and output layers, so that no logits
    over all tokens exist, but for ``gold``. They are means over all that a step learns from, however it is cut into
    batches and spread over processes: 16 batches of one text give the gradient of 4 batches of four.

    Args:
        model: the student: a model whose logits are those of its output layer (not scaled or capped, as in Gemma 2,
            Cohere or Granite).
        args: any ``TrainingArguments``.
        teacher: a frozen model of the same kind, in any dtype, also of 8 bits; it is moved to the device, unless it was
            spread or quantized, and never cast. None: nothing but ``lm`` is learned.
        teacher_tokenizer: its fast tokenizer, or a name or folder; None: the student's, which it then has to fit.
        processing_class: the student's.
        weights: a :class:`vocabdistil.CausalWeights`, or its text form: ``"lm=1,likelihood=10"``.
        max_length: tokens of each side at most, or those of (teacher, student); never more than a model can read.
        packed: all texts of a batch in one row, see :class:`vocabdistil.CausalCollator`.
        likelihood_temperature, temperature, unmatched: see
            :class:`vocabdistil.distillation.causal_objective.CausalObjective`.
        data_collator: gives batches as :class:`vocabdistil.CausalCollator` does; None: that.
        others: as of ``transformers.Trainer``.

    Raises:
        VocabdistilError: a model of another kind, or that does not fit its tokenizer; weights that cannot be.

    Example::

        trainer = vd.CausalDistillTrainer(
            model=student, teacher=teacher, processing_class=student_tokenizer, teacher_tokenizer=teacher_tokenizer,
            args=TrainingArguments("out", learning_rate=1e-5), train_dataset=rows,
        )
        trainer.train()
    """

    objective: CausalObjective

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        *,
        processing_class: Any,
        teacher: Any = None,
        teacher_tokenizer: Any = None,
        weights: CausalWeights | str = "lm=1,matched=1",
        max_length: int | Sequence[int] = 1024,
        packed: bool = False,
        likelihood_temperature: float = 100.0,
        temperature: float = 1.0,
        unmatched: str = "renormalize",
        data_collator: Any = None,
        **others: Any,
    ) -> None:
        weights = CausalWeights.parse(weights) if isinstance(weights, str) else weights
        need(isinstance(weights, CausalWeights), "weights", "CausalWeights or their text form", type(weights).__name__)
        need_weights(weights)
        check_temperature(temperature)
        check_temperature(likelihood_temperature)
        check_choice(unmatched, "unmatched", UNMATCHED)
        alone = all(name == "lm" for name, value in asdict(weights).items() if value)
        need(alone or teacher is not None, "teacher", f"a model, as {weights} needs one", "none")
        student_tokenizer = tokenizer_of(processing_class, "processing_class")
        told = teacher_tokenizer is not None
        teacher_tokenizer = tokenizer_of(teacher_tokenizer or student_tokenizer, "teacher_tokenizer")
        sides = [("teacher", teacher or model, teacher_tokenizer), ("model", model, student_tokenizer)]
        for name, one, tokenizer in sides:
            check_causal(one, name, len(tokenizer), packed)
        if teacher is not None and not told:
            tokens = len(teacher.get_output_embeddings().weight)
            same = tokens - len(teacher_tokenizer) <= _MOST_SPARE
            need(same, "teacher_tokenizer", f"that of the teacher, which has {tokens:,} tokens", "none")
        if data_collator is None:
            data_collator = CausalCollator(teacher_tokenizer, student_tokenizer, max_length, packed=packed)
            data_collator.max_length = [
                min(length, most_positions(one) or length)
                for length, (_, one, _) in zip(data_collator.max_length, sides, strict=True)
            ]
        args = TrainingArguments("tmp_trainer") if args is None else args
        # Several GPUs are for several processes: batches of span pairs cannot be split by torch.nn.DataParallel.
        args._n_gpu = min(args.n_gpu, 1)
        accelerator: Any = args.accelerator_config
        if accelerator.dispatch_batches is None:  # nor can they be sent from one process to others
            accelerator.dispatch_batches = False
        super().__init__(model, args, data_collator, processing_class=student_tokenizer, **others)
        matched = MatchedVocab.from_tokenizers(teacher_tokenizer, student_tokenizer).to(self.args.device)
        table = RemapTable.from_tokenizers(teacher_tokenizer, student_tokenizer) if weights.remapped else None
        self.objective = CausalObjective(weights, matched, likelihood_temperature, temperature, unmatched, table)
        self.teacher = teacher
        if teacher is not None:
            teacher.requires_grad_(False).eval()
            # What was spread over devices or quantized stays where it is.
            if not (getattr(teacher, "hf_device_map", None) or getattr(teacher, "is_quantized", False)):
                teacher.to(self.args.device)

    def _set_signature_columns_if_needed(self) -> None:
        """The columns that the collator reads; the model reads none of them."""
        self._signature_columns: Any = list(ROW_COLUMNS)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The batches of a step, and what they have to learn from over all processes."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        self._totals = self.totals([batch["counts"] for batch in batches])
        return batches, self._totals

    def part_of_step(
        self, model: nn.Module, inputs: dict[str, Any], totals: dict[str, Any] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        teacher = self.teach(inputs) if self.objective.needs_teacher else None
        terms: dict[str, Tensor] = {}

        def compute(student: Readout) -> Tensor:
            terms.update(self.objective.terms(student, teacher, inputs, inputs["counts"] if totals is None else totals))
            return self.objective.loss(terms)

        plain = self.accelerator.unwrap_model(model)
        loss = at_output_layer(plain, causal_inputs(inputs), compute, model)
        return loss, {name: term.detach() for name, term in terms.items()}

    @torch.no_grad()
    def teach(self, inputs: dict[str, Any]) -> Readout:
        """What the teacher makes of its side of a batch."""
        device = self.teacher.get_input_embeddings().weight.device
        read = {name: value.to(device) for name, value in causal_inputs(inputs["teacher"]).items()}
        found = read_causal(self.teacher, read)
        return Readout(*(None if x is None else x.to(self.args.device) for x in found))  # type: ignore[arg-type]

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch on which nothing is learned; there are no predictions to be returned."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        assert isinstance(loss, Tensor)
        return loss.detach(), None, None
