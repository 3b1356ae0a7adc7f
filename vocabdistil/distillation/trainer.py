"""The trainer of the main job."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.seeds import mix_seed
from .hiding import counts_of
from .objective import Objective
from .runs import SeededTrainer

__all__ = ["DistillTrainer"]


class DistillTrainer(SeededTrainer):
    """Trains a :class:`vocabdistil.DistillModel` on batches of a :class:`vocabdistil.DistillCollator` by an
    :class:`vocabdistil.Objective`, in one process or in several (DDP, FSDP, DeepSpeed).

    The loss is :meth:`vocabdistil.Objective.loss` of all texts of a step: however they are cut into batches,
    accumulated and spread over processes, the same texts give the same loss and gradient, but for ``similarity``, which
    compares the texts of a batch, and for dropout. What is hidden in a batch follows from the seed, the step and the
    process, unless the collator has hidden it.
    """

    objective: Objective

    def __init__(self, *args: Any, objective: Objective, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective
        self._evaluated = 0

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        """The batches of a step, and of what they have to learn from the totals over all processes."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        ready = []
        for micro, batch in enumerate(batches):
            batch = self.objective.mask(batch, self.seed_of(micro))
            ready.append(batch if "counts" in batch else batch | {"counts": counts_of(batch)})
        self._totals = self.totals([batch["counts"] for batch in ready])
        return ready, self._totals

    def part_of_step(
        self, model: nn.Module, inputs: dict[str, Any], totals: dict[str, Any] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, terms = model(step=partial(self.objective.loss, batch=inputs, seed=self.step_seed, totals=totals))
        return loss, terms

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._evaluated = 0  # so that the same is hidden every time
        return super().evaluate(*args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch on which nothing is learned; there are no predictions to be returned."""
        batch = self._prepare_inputs(inputs)
        batch = self.objective.mask(batch, mix_seed(self.args.seed, self._evaluated))
        self._evaluated += 1
        with torch.no_grad():
            loss = self.compute_loss(model, batch)
        assert isinstance(loss, Tensor)
        return loss.detach(), None, None
