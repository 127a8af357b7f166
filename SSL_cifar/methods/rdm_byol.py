"""RDM-BYOL: BYOL whose predictor is a spectral filter; see `rdm_simsiam`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from SSL_cifar.methods.byol import BYOL, MomentumSettings
from SSL_cifar.methods.rdm_simsiam import FilterSettings


class RDMBYOL(BYOL):
    """L = Σ over (a, b) = (1, 2), (2, 1) of 2 + 2 D(·, ·) of z_a and z'_b, one of them filtered; no predictor."""

    @dataclass(kw_only=True)
    class Settings(MomentumSettings, FilterSettings):
        """RDM-BYOL."""

        TITLE: ClassVar[str] = "RDM-BYOL"
        ORDER: ClassVar[float] = 6

    def build_predictor(self, settings: Settings) -> nn.Module:  # type: ignore[override]
        """None."""
        return nn.Identity()

    def pair(self, online: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings with the filter on its side."""
        filtered: tuple[Tensor, Tensor] = self.settings.filtered(online, target)
        return filtered
