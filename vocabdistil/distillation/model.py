"""What is trained: the student, with a projection to each teacher's width."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.architectures import body_of
from ..models.teachers import Reading, Teacher, head_input, read_body
from ..reference.layers import LayerAssignment
from ..reference.mlm import mlm_loss

__all__ = ["DistillModel"]


class DistillModel(nn.Module):
    """The student, and a projection to the teacher's width for every teacher and layer assignment.

    Args:
        student: the model that will be saved, of any architecture, with or without an MLM head.
        teacher_widths: hidden widths of the teachers.
        assignments: for each teacher, which of its layers teach which of the student's.
        seed: of the projections, orthonormal until :func:`vocabdistil.distillation.calibration.calibrate` fits them.
        train_projections: else they stay as fitted.
        known: weight ``[D_t, D_s]`` and bias ``[D_t]`` or None of the first teacher's last assignment, where the start
            came with them.
    """

    bias: Tensor | None

    def __init__(
        self,
        student: PreTrainedModel,
        teacher_widths: Sequence[int],
        assignments: Sequence[Sequence[LayerAssignment]],
        seed: int = 0,
        train_projections: bool = False,
        known: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.assignments = [list(group) for group in assignments]
        self.projections = nn.ModuleDict()
        width = student.config.hidden_size
        generator = torch.Generator().manual_seed(seed)
        for t, (teacher_width, group) in enumerate(zip(teacher_widths, self.assignments, strict=True)):
            if teacher_width == width:
                continue
            for i in range(len(group)):
                linear = nn.Linear(width, teacher_width, bias=False)
                nn.init.orthogonal_(linear.weight, generator=generator)
                self.projections[f"{t}_{i}"] = linear.requires_grad_(train_projections)
        self._known = None if known is None else self._key(0, -1)
        self.register_buffer("bias", None, persistent=False)
        if known is not None:
            with torch.no_grad():
                self.linears[self._key(0, -1)].weight.copy_(known[0])
            self.bias = known[1]

    def _key(self, teacher: int, assignment: int) -> str:
        return f"{teacher}_{assignment % len(self.assignments[teacher])}"

    def is_known(self, teacher: int, assignment: int = -1) -> bool:
        """Whether a projection came with the start."""
        return self._key(teacher, assignment) == self._known

    def projection_bias(self, teacher: int, assignment: int = -1) -> Tensor | None:
        """``[D_t]``, what a projection adds; None where it is linear."""
        return self.bias if self.is_known(teacher, assignment) else None

    def projection(self, teacher: int, assignment: int = -1) -> Tensor | None:
        """``[D_t, D_s]``, or None where the widths are equal."""
        key = self._key(teacher, assignment)
        return self.linears[key].weight if key in self.linears else None

    @property
    def linears(self) -> Mapping[str, nn.Linear]:
        """``projections``, which are linear layers."""
        return cast("Mapping[str, nn.Linear]", self.projections)

    @property
    def num_layers(self) -> int:
        return self.student.config.num_hidden_layers

    @property
    def has_head(self) -> bool:
        """Whether there is an MLM head to train."""
        return self.student.base_model is not self.student

    @property
    def all_layers(self) -> bool:
        return any(a.student != (self.num_layers,) for group in self.assignments for a in group)

    @property
    def output_layer(self) -> tuple[Tensor, Tensor | None]:
        """Weight ``[V_s, E]`` and bias ``[V_s]`` or None."""
        layer = self.student.get_output_embeddings()
        return layer.weight, getattr(layer, "bias", None)

    def before_output(self, hidden: Tensor) -> Tensor:
        """``[..., D_s]`` last hidden states -> ``[..., E]``, what the output layer reads."""
        return head_input(self.student, hidden)

    @property
    def _no_split_modules(self) -> list[str]:
        """What FSDP shards one by one: the student's layers."""
        stacks = [module for module in self.student.modules() if isinstance(module, nn.ModuleList) and len(module)]
        return list(dict.fromkeys(type(layer).__name__ for layer in max(stacks, key=len, default=())))

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As of the student's class in ``transformers``, but that layers are not run again as a part of the graph of
        their own, which DDP would take for a second use of their weights."""
        kwargs = {name: {"use_reentrant": False} if value is None else value for name, value in kwargs.items()}
        self._student("activation_checkpointing_enable", "gradient_checkpointing_enable")(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """As of the student's class in ``transformers``."""
        self._student("activation_checkpointing_disable", "gradient_checkpointing_disable")()

    # As transformers calls them from its version 5 on.
    activation_checkpointing_enable = gradient_checkpointing_enable
    activation_checkpointing_disable = gradient_checkpointing_disable

    def _student(self, *names: str) -> Any:
        """The student's method of the first of these names that it has."""
        return next(getattr(self.student, name) for name in names if hasattr(self.student, name))

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., D_s]`` last hidden states -> ``[..., V_s]``."""
        return F.linear(self.before_output(hidden), *self.output_layer)

    def as_teacher(self, tokenizer: PreTrainedTokenizerBase) -> Teacher:
        """The student as whatever looks at finished models sees it."""
        return Teacher("student", body_of(self.student), tokenizer, self.student if self.has_head else None)

    def forward(self, *args: Any, step: Callable[[DistillModel], Any] | None = None, **kwargs: Any) -> Any:
        """:meth:`read`, or a whole step.

        Args:
            step: computes losses of the model that it is given, by :meth:`read` and whatever weights it wants; what it
                returns is returned. What is wrapped around the model (autocast, DDP, FSDP) sees all that happens here.
        """
        return self.read(*args, **kwargs) if step is None else step(self)

    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        masked: Tensor | None = None,
        projections: Sequence[int] = (),
        attentions: bool = False,
    ) -> tuple[Reading, Tensor | None]:
        """One pass of the student.

        Args:
            labels: -100 where there is no target; None: nothing is to be guessed.
            masked: int64 ``[M]``, the other places among all, if they are known: no device is waited for then.
            projections, attentions: see :func:`vocabdistil.models.teachers.read_body`.

        Returns:
            What was read, and the loss on the labels or None.
        """
        reading = read_body(
            body_of(self.student), input_ids, attention_mask, self.all_layers, projections, attentions
        )
        return reading, None if labels is None else mlm_loss(reading.last, labels, self.logits, positions=masked)
