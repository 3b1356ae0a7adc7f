"""The trainer of the main job."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..core.errors import VocabdistilError
from .objective import Objective
from .runs import SeededTrainer

__all__ = ["DistillTrainer"]


class DistillTrainer(SeededTrainer):
    """Trains a :class:`vocabdistil.DistillModel` on batches of a :class:`vocabdistil.DistillCollator` by an
    :class:`vocabdistil.Objective`.

    The loss is :meth:`vocabdistil.Objective.loss`.
    """

    def __init__(self, *args: Any, objective: Objective, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any):
        plain = self.accelerator.unwrap_model(model)
        try:
            loss, terms = self.objective.loss(plain, inputs, self.step_seed, model)
        except VocabdistilError as error:
            raise VocabdistilError(f"{error} at step {self.state.global_step + 1}") from None
        self.note(terms)
        return (loss, {"terms": terms}) if return_outputs else loss
