"""Diversity-enhanced autoregressive prediction: several tokens ahead, not only the next one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from SSL_cifar.methods.ar import AR
from SSL_cifar.methods.base import Batch


class DAR(AR):
    r"""Each state predicts the tokens 1 to K patches ahead, each offset with a head of its own; K = 1 is `AR`.

    .. math:: L = -\frac 1K \sum_{k=1}^K \frac 1{T-k} \sum_{s=1}^{T-k} \log P_k(y_{s+k} | c_s)

    Our reading of "Look Ahead or Look Around? A Theoretical Comparison Between Autoregressive and Masked Pretraining",
    Zhang, Du, Huang, Wang, Wang, ICML 2024, whose code was not released.
    """

    @dataclass(kw_only=True)
    class Settings(AR.Settings):
        """Diversity-enhanced autoregressive prediction."""

        TITLE: ClassVar[str] = "DAR"
        ORDER: ClassVar[float] = 41

        offsets: int = 4
        """K. In raster order, the patch below is as many tokens ahead as a row has patches."""
        draw_offset: bool = False
        """One offset drawn for each image and step, in place of all: the same loss in expectation, at the same cost."""

        def check(self) -> None:
            """Refuse what makes no sense."""
            super().check()
            if not 1 <= self.offsets < self.tokens:
                raise ValueError(
                    f"--offsets {self.offsets} must be at least 1 and below the {self.tokens} tokens of an image"
                )

        def knob(self) -> tuple[str, float]:
            """The number of offsets."""
            return f"K={self.offsets}" + (" (drawn)" if self.draw_offset else ""), self.offsets

    def __init__(self, settings: Settings, backbone: VisionTransformer, images: int) -> None:
        self.offsets = settings.offsets
        super().__init__(settings, backbone, images)

    def offset_weights(self, batch: Batch) -> Tensor:
        """Weight of each offset in each image of the step, (total, K): equal, or all on the one drawn."""
        if not self.settings.draw_offset:
            return super().offset_weights(batch)
        drawn = torch.randint(self.offsets, (batch.total,), generator=batch.generator())
        return F.one_hot(drawn, self.offsets).float()
