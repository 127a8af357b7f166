"""RDM-SimSiam: a spectral filter in place of SimSiam's predictor.

"Towards a Unified Theoretical Understanding of Non-contrastive Learning via Rank Differential Mechanism"
(Zhuo et al., ICLR 2023); code: PKU-ML/Rank-Differential-Mechanism.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from lightly.models.modules.heads import SimSiamProjectionHead
from torch import Tensor, nn

from contranorm import spectral_filter
from contranorm.options import Filter, Location, check_filter
from SSL_cifar.methods.base import Batch, Method, Out, ProjectorSettings, negative_cosine


@dataclass(kw_only=True)
class FilterSettings(ProjectorSettings):
    """The spectral filter that stands in for a predictor."""

    pred_type: Filter = "poly"
    """Function of the singular values: s^σ, log s, log(1+s), log(1+s²), or ContraNorm's 1 - σ (s/s_max)²."""
    pred_location: Location = "online"
    """Side of the filter. The log types are for online."""
    sigma: float = 1.0
    """σ of poly and contranorm. The target must keep the higher rank: poly takes σ > 0 online and -1 ≤ σ < 0 on the
    target, contranorm the other signs. 0 is the symmetric network without predictor."""
    negative_control: bool = False
    """Allow the sign that collapses, such as the `--sigma 1 --pred_location target` of the authors' README."""

    def check(self) -> None:
        """Refuse filters that are not defined, and the sign that collapses unless that is what is wanted."""
        super().check()
        check_filter(self.pred_type, self.sigma, self.pred_location)
        if self.pred_type.startswith("log") and self.sigma != 1:
            raise ValueError(f"--pred_type {self.pred_type} takes no --sigma: leave it out")
        if self.collapses and not self.negative_control:
            raise ValueError(
                f"--sigma {self.sigma:g} --pred_location {self.pred_location} with --pred_type {self.pred_type} gives "
                "the target the lower rank and collapses: take the other sign, or add --negative_control to see it"
            )
        if self.negative_control and not self.collapses:
            raise ValueError("--negative_control is for the sign that collapses, and this is not it: leave it out")

    @property
    def collapses(self) -> bool:
        """Whether the filter gives the target a lower rank than the online side."""
        lifts = -self.sigma if self.pred_type == "poly" else self.sigma
        if self.pred_type.startswith("log"):
            lifts = -1.0
        return lifts < 0 if self.pred_location == "target" else lifts > 0

    def knob(self) -> tuple[str, float]:
        """Side, filter and σ."""
        words = f"{self.pred_location} {self.pred_type}"
        if not self.pred_type.startswith("log"):
            words += f" σ={self.sigma:g}"
        return words + (" (negative control)" if self.negative_control else ""), self.sigma

    def filtered(self, online: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Online and target embeddings (N, d) with the filter on its side."""
        z = online if self.pred_location == "online" else target
        z = spectral_filter(z, self.pred_type, self.sigma, location=self.pred_location)
        return (z, target) if self.pred_location == "online" else (online, z)


class RDMSimSiam(Method):
    """L = ½ L_12 + ½ L_21 without predictor: a filter of the batch's singular values makes the asymmetry.

    Online: L_ab = D(z_a W, z_b), W = V diag(g(s)) Vᵀ of the batch z_a = U diag(s) Vᵀ, frozen. Target: L_ab = D(z_a, t),
    t = U diag(s h(s)) Vᵀ of z_b, without gradient. σ = 0 is the symmetric network, which collapses.
    """

    @dataclass(kw_only=True)
    class Settings(FilterSettings):
        """RDM-SimSiam."""

        TITLE: ClassVar[str] = "RDM-SimSiam"
        ORDER: ClassVar[float] = 3

    def __init__(self, settings: Settings, backbone: nn.Module, images: int) -> None:
        super().__init__(settings, backbone, images)
        hidden = settings.proj_hidden_dim or backbone.num_features
        self.projector = SimSiamProjectionHead(backbone.num_features, hidden, settings.proj_output_dim)

    def forward(self, views: list[Tensor], batch: Batch) -> Out:
        """Embeddings z, (B, 2, d)."""
        return {"z": torch.stack([self.projector(self.backbone(view)) for view in views], 1)}

    def loss(self, out: Out, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """RDM-SimSiam's."""
        z1, z2 = out["z"].unbind(1)
        pair = self.settings.filtered
        return (negative_cosine(*pair(z1, z2)) + negative_cosine(*pair(z2, z1))) / 2, {}

    def online_target(self, out: Out, batch: Batch) -> tuple[Tensor, Tensor]:
        """Both sides of the first direction."""
        return self.settings.filtered(out["z"][:, 0], out["z"][:, 1])

    def project(self, h: Tensor) -> Tensor:
        """The projector's output."""
        z: Tensor = self.projector(h)
        return z
