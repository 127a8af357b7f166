"""SimSiam (Chen and He, CVPR 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightly.models.modules.heads import SimSiamPredictionHead, SimSiamProjectionHead
from torch import Tensor, nn

from SSL_cifar.methods.base import Batch, Method, Out, ProjectorSettings, negative_cosine


class SimSiam(Method):
    """L = ½ D(q(z_1), z_2) + ½ D(q(z_2), z_1), z = g(f(x)), D the negative cosine with a target without gradient."""

    @dataclass(kw_only=True)
    class Settings(ProjectorSettings):
        """SimSiam."""

        TITLE: ClassVar[str] = "SimSiam"
        ORDER: ClassVar[float] = 1

        pred_hidden_dim: int = 512
        """Width of the predictor's hidden layer."""
        pred_lr_factor: float = 1.0
        """The predictor's learning rate is constant, at this multiple of the peak rate. The authors' is 1; with few
        steps 10 keeps SimSiam from collapsing."""

        def check(self) -> None:
            """Refuse an empty or still predictor."""
            super().check()
            if self.pred_hidden_dim < 1 or not self.pred_lr_factor > 0:
                raise ValueError("--pred_hidden_dim must be at least 1, and --pred_lr_factor above 0")

    def __init__(self, settings: Settings, backbone: nn.Module, images: int) -> None:
        super().__init__(settings, backbone, images)
        hidden = settings.proj_hidden_dim or backbone.num_features
        self.projector = SimSiamProjectionHead(backbone.num_features, hidden, settings.proj_output_dim)
        self.predictor = SimSiamPredictionHead(
            settings.proj_output_dim, settings.pred_hidden_dim, settings.proj_output_dim
        )

    def forward(self, views: list[Tensor], batch: Batch) -> Out:
        """Embeddings z and predictions p, (B, 2, d) each."""
        z = [self.projector(self.backbone(view)) for view in views]
        return {"z": torch.stack(z, 1), "p": torch.stack([self.predictor(one) for one in z], 1)}

    def targets(self, z: Tensor, batch: Batch) -> Tensor:
        """What predictions are compared with, (B, 2, d): the embeddings."""
        return z

    def loss(self, out: Out, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """SimSiam's."""
        p1, p2 = out["p"].unbind(1)
        t1, t2 = self.targets(out["z"], batch).unbind(1)
        return (negative_cosine(p1, t2) + negative_cosine(p2, t1)) / 2, {}

    def online_target(self, out: Out, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predictions of the first views and their targets."""
        return out["p"][:, 0], self.targets(out["z"], batch)[:, 1]

    def groups(self) -> list[dict[str, Any]]:
        """The predictor at a constant rate (Chen and He, section 4.2)."""
        rest = [*self.backbone.parameters(), *self.projector.parameters()]
        predictor = list(self.predictor.parameters())
        return [{"params": rest}, {"params": predictor, "constant": True, "factor": self.settings.pred_lr_factor}]

    def project(self, h: Tensor) -> Tensor:
        """The projector's output."""
        z: Tensor = self.projector(h)
        return z
