"""BYOL (Grill et al., NeurIPS 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from SSL_cifar.heads import byol_head
from SSL_cifar.methods.base import (
    Batch,
    Method,
    MomentumCopy,
    Out,
    ProjectorSettings,
    cosine_momentum,
    negative_cosine,
)


@dataclass(kw_only=True)
class MomentumSettings(ProjectorSettings):
    """The moving average that makes the targets."""

    proj_hidden_dim: int = 4096
    """Width of the projector's hidden layer; 0 is the backbone's."""
    proj_output_dim: int = 256
    """Width of the embedding."""
    base_tau_momentum: float = 0.99
    """Share of the past in the moving average at the first step; it rises to 1 along a cosine."""

    def check(self) -> None:
        """Refuse an average that is none."""
        super().check()
        if not 0 <= self.base_tau_momentum <= 1:
            raise ValueError(f"--base_tau_momentum must be between 0 and 1, got {self.base_tau_momentum}")


class BYOL(Method):
    """L = Σ over (a, b) = (1, 2), (2, 1) of 2 + 2 D(q(z_a), z'_b), z' of the moving average of backbone and projector.

    The sum of the two directions, as in solo-learn, not their mean.
    """

    @dataclass(kw_only=True)
    class Settings(MomentumSettings):
        """BYOL."""

        TITLE: ClassVar[str] = "BYOL"
        ORDER: ClassVar[float] = 5

        pred_hidden_dim: int = 4096
        """Width of the predictor's hidden layer."""

        def check(self) -> None:
            """Refuse an empty predictor."""
            super().check()
            if self.pred_hidden_dim < 1:
                raise ValueError(f"--pred_hidden_dim must be at least 1, got {self.pred_hidden_dim}")

    def __init__(self, settings: Settings, backbone: nn.Module, images: int) -> None:
        super().__init__(settings, backbone, images)
        hidden = settings.proj_hidden_dim or backbone.num_features
        self.projector = byol_head(backbone.num_features, hidden, settings.proj_output_dim)
        self.predictor = self.build_predictor(settings)
        self.momentum = MomentumCopy(self.backbone, self.projector)

    def build_predictor(self, settings: Settings) -> nn.Module:
        """What the online embeddings go through."""
        return byol_head(settings.proj_output_dim, settings.pred_hidden_dim, settings.proj_output_dim)

    def forward(self, views: list[Tensor], batch: Batch) -> Out:
        """Predictions p and the moving average's embeddings, (B, 2, d) each."""
        p = [self.predictor(self.projector(self.backbone(view))) for view in views]
        return {"p": torch.stack(p, 1), "target": torch.stack([self.momentum(view) for view in views], 1)}

    def pair(self, online: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What is compared of online and target embeddings, (B, d) each."""
        return online, target

    def loss(self, out: Out, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """BYOL's."""
        p1, p2 = out["p"].unbind(1)
        t1, t2 = out["target"].unbind(1)
        return (2 + 2 * negative_cosine(*self.pair(p1, t2))) + (2 + 2 * negative_cosine(*self.pair(p2, t1))), {}

    def online_target(self, out: Out, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predictions of the first views and their targets."""
        return self.pair(out["p"][:, 0], out["target"][:, 1])

    def after_step(self, out: Out, batch: Batch, done: float) -> None:
        """Move the average."""
        m = cosine_momentum(self.settings.base_tau_momentum, done)
        self.momentum.update((self.backbone, self.projector), m)

    def project(self, h: Tensor) -> Tensor:
        """The projector's output."""
        z: Tensor = self.projector(h)
        return z
