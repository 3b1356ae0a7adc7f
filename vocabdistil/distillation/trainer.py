"""The trainer of the main job."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..core.errors import VocabdistilError
from .objective import Objective
from .runs import SeededTrainer

__all__ = ["DistillTrainer"]


class DistillTrainer(SeededTrainer):
    """Trains a :class:`DistillModel` on batches of a :class:`DistillCollator` by an :class:`Objective`.

    ``loss = sum_d weight_d * (d_reduce + d_own) / 2 + weight_logits * logits_KL + weight_mlm * MLM``, ``d`` the span
    divergences with a weight; without ``reduce`` rows ``d_own`` alone, without an MLM head no MLM.
    """

    def __init__(self, *args: Any, objective: Objective, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any):
        objective, plain = self.objective, self.accelerator.unwrap_model(model)
        weights = objective.weights
        inputs = objective.mask(inputs, self.step_seed)
        try:
            taught = objective.teach(plain, inputs, head=True)
        except VocabdistilError as error:
            raise VocabdistilError(f"{error} at step {self.state.global_step + 1}") from None
        hidden, mlm = model(inputs["student_ids"], inputs["student_mask"], inputs["labels"] if weights.mlm else None)
        terms = {}
        loss = hidden[-1].new_zeros(())
        for name in ("kl", "cosine", "mse"):
            if weight := getattr(weights, name):
                found = objective.compare(plain, hidden, taught, inputs, name)
                terms |= {f"{name}_{which}": value for which, value in found.items()}
                loss = loss + weight * sum(found.values()) / len(found)
        if any(pairs is not None for pairs in inputs["hidden_pairs"]):
            terms["logits_kl"] = objective.logits_loss(plain, hidden, taught, inputs)
            loss = loss + weights.logits * terms["logits_kl"]
        if mlm is not None:
            terms["mlm"] = mlm
            loss = loss + weights.mlm * mlm
        self.note(terms)
        return (loss, {"terms": terms}) if return_outputs else loss
