"""Where a training stands, as a checkpoint holds it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Progress:
    """Where a training is; an experiment adds what else it counts."""

    epoch: int = 0
    step: int = 0  # finished steps of this epoch
    steps_per_epoch: int = 0
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros(()))  # mean losses of this epoch's steps, added up
    train_seconds: float = 0.0  # in training, evaluation left out
    processor_seconds: float = 0.0  # of the main process, workers left out
    images_total: int = 0
    bad_images: list[str] = field(default_factory=list)

    @property
    def images_per_second(self) -> float:
        """Training speed by the clock."""
        return self.images_total / max(self.train_seconds, 1e-9)
