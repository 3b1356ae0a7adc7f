"""After training: a student between its start and its end, where that follows the teacher better than either."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["SHARES", "mix"]

# Of the trained weights: 0 is the start, 1 the trained student.
SHARES = (0.0, 0.15, 0.3, 0.5, 0.7, 0.85, 1.0)


@torch.no_grad()
def mix(model: nn.Module, start: Mapping[str, Tensor], score: Callable[[], float]) -> dict[float, float]:
    """Gives a model the best of ``share * trained + (1 - share) * start``; of equal ones that with the larger share.

    A start that was fitted to the teacher knows of texts that training did not show; what lies between keeps that and
    most of what was learned. Weights of a fine-tuned model averaged with those that it started from: Wortsman et al.,
    arXiv 2109.01903, equation 1.

    Args:
        model: trained.
        start: its state before, by name; what it lacks stays as trained.
        score: of the model as it then is; the higher the better.

    Returns:
        The score of each share.
    """
    trained = {name: value.clone() for name, value in model.state_dict().items() if name in start}

    def blend(share: float) -> None:
        for name, value in model.state_dict().items():
            if name in start and value.is_floating_point():
                value.copy_(trained[name].lerp(start[name].to(value.device), 1 - share))

    found = {}
    for share in SHARES:
        blend(share)
        found[share] = score()
    finite = {share: score if math.isfinite(score) else -math.inf for share, score in found.items()}
    blend(max(SHARES, key=lambda share: (finite[share], share)))
    return found
