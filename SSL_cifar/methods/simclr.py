"""SimCLR (Chen et al., ICML 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from SSL_cifar.heads import simclr_head
from SSL_cifar.methods.base import Batch, Method, Out, ProjectorSettings, nt_xent_terms


@dataclass(kw_only=True)
class ContrastSettings(ProjectorSettings):
    """Contrast within a batch or against a queue."""

    proj_hidden_dim: int = 0
    """Width of the projector's hidden layer; 0 is the backbone's."""
    proj_output_dim: int = 128
    """Width of the embedding."""
    temperature: float = 0.5
    """τ. SimCLR's for CIFAR; the released code of SimCLR-Attn has 0.7."""

    def check(self) -> None:
        """Refuse a temperature that is none."""
        super().check()
        if not self.temperature > 0:
            raise ValueError(f"--temperature must be above 0, got {self.temperature}")


class SimCLR(Method):
    """L = mean over the 2B rows of NT-Xent, see `nt_xent_terms`."""

    @dataclass(kw_only=True)
    class Settings(ContrastSettings):
        """SimCLR."""

        TITLE: ClassVar[str] = "SimCLR"
        ORDER: ClassVar[float] = 10

        def knob(self) -> tuple[str, float]:
            """τ."""
            return f"τ={self.temperature:g}", 0.0

    def __init__(self, settings: Settings, backbone: nn.Module, images: int) -> None:
        super().__init__(settings, backbone, images)
        hidden = settings.proj_hidden_dim or backbone.num_features
        self.projector = simclr_head(backbone.num_features, hidden, settings.proj_output_dim)

    def forward(self, views: list[Tensor], batch: Batch) -> Out:
        """Embeddings z, (B, V, d)."""
        return {"z": torch.stack([self.projector(self.backbone(view)) for view in views], 1)}

    def loss(self, out: Out, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """NT-Xent."""
        alignment, partition = nt_xent_terms(*out["z"].unbind(1), self.settings.temperature)
        return (alignment + partition).mean(), {}

    def project(self, h: Tensor) -> Tensor:
        """The projector's output."""
        z: Tensor = self.projector(h)
        return z
