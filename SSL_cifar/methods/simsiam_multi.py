"""SimSiam-Multi: targets mixed with those of the epoch before.

"A Message Passing Perspective on Learning Dynamics of Contrastive Learning" (Wang et al., ICLR 2023); code:
PKU-ML/Message-Passing-Contrastive-Learning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from SSL_cifar.banks import IndexBank
from SSL_cifar.methods.base import Batch, Out
from SSL_cifar.methods.simsiam import SimSiam


class SimSiamMulti(SimSiam):
    """SimSiam whose targets are mixed with what the same image was in the epoch before.

    τ_v = (1-λ) z_v + λ M[i], v = 1, 2, with the raw (not unit) projector outputs and M[i] the second view's of the last
    epoch; the first `plain_epochs` epochs fill M and are SimSiam. As in MULTI-STAGE-GRAPH-AGGREGATION of the authors'
    repository, whose λ is ½. λ = 0 is SimSiam.
    """

    @dataclass(kw_only=True)
    class Settings(SimSiam.Settings):
        """SimSiam-Multi."""

        TITLE: ClassVar[str] = "SimSiam-Multi"
        ORDER: ClassVar[float] = 2

        lam: float = 0.5
        """Share of the last epoch's embedding in the target; 0 is SimSiam."""
        plain_epochs: int = 51
        """Epochs of plain SimSiam at the start."""
        bank_dtype: Literal["float32", "bfloat16"] = "float32"
        """Of the embeddings kept, two rows for each training image."""

        def check(self) -> None:
            """Refuse a mixture that is none, and a bank that is never read."""
            super().check()
            if not 0 <= self.lam <= 1:
                raise ValueError(f"--lam must be between 0 and 1, got {self.lam}")
            if not 1 <= self.plain_epochs < self.epochs:
                raise ValueError(
                    f"--plain_epochs {self.plain_epochs} must be at least 1, to fill the bank, and below --epochs "
                    f"{self.epochs}, to use it"
                )

        def knob(self) -> tuple[str, float]:
            """λ."""
            return f"λ={self.lam:g}", self.lam

    scratch = ("bank.",)

    def __init__(self, settings: Settings, backbone: nn.Module, images: int) -> None:
        super().__init__(settings, backbone, images)
        self.bank = IndexBank(images, settings.proj_output_dim, getattr(torch, settings.bank_dtype))
        self.register_buffer("epochs_done", torch.zeros((), dtype=torch.long))

    def targets(self, z: Tensor, batch: Batch) -> Tensor:
        """Embeddings, mixed with the bank's from epoch `plain_epochs` on, (B, 2, d)."""
        if self.epochs_done < self.settings.plain_epochs:
            return z
        past = self.bank.read(batch.index).to(z.dtype)
        return torch.lerp(z, past[:, None], self.settings.lam)

    def after_step(self, out: Out, batch: Batch, done: float) -> None:
        """Keep the second views' embeddings."""
        self.bank.write(batch.index, out["z"][:, 1])

    def after_epoch(self) -> None:
        """Let the next epoch read them."""
        self.bank.end_epoch()
        self.epochs_done += 1
