"""SimCLR-Attn: rows of NT-Xent weighted by the agreement of their views.

"A Message Passing Perspective on Learning Dynamics of Contrastive Learning" (Wang et al., ICLR 2023); code:
PKU-ML/Message-Passing-Contrastive-Learning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from SSL_cifar.methods.base import Batch, Out, nt_xent_terms
from SSL_cifar.methods.simclr import SimCLR


class SimCLRAttn(SimCLR):
    """SimCLR whose rows count by how much their two views agree: L = Σ_i a_i ℓ_i, a = softmax(β cos(u_i, u_π(i))).

    The weights have no gradient. u are the backbone's features, or with `--d_ratio 0` the embeddings z. As in
    GRAPH-ATTENTION/models/losses.py of the authors' repository, where β is 1. β = 0 is SimCLR.
    """

    @dataclass(kw_only=True)
    class Settings(SimCLR.Settings):
        """SimCLR-Attn."""

        TITLE: ClassVar[str] = "SimCLR-Attn"
        ORDER: ClassVar[float] = 11

        beta: float = 1.0
        """Sharpness of the weights; 0 is SimCLR."""
        d_ratio: float = -1.0
        """0 compares the embeddings, any other value the backbone's features: the authors' flag."""
        align_only: bool = False
        """Weight the alignment term only, and leave log Σ exp as it is: the argument speaks of the former, the authors'
        code weights both."""

        def check(self) -> None:
            """Refuse weights that grow with disagreement."""
            super().check()
            if not self.beta >= 0:
                raise ValueError(f"--beta must not be negative, got {self.beta}")

        def knob(self) -> tuple[str, float]:
            """β and τ."""
            words = f"β={self.beta:g} τ={self.temperature:g}"
            words += (" embeddings" if self.d_ratio == 0 else "") + (" align only" if self.align_only else "")
            return words, self.beta

    def forward(self, views: list[Tensor], batch: Batch) -> Out:
        """Features h, (B, 2, D), and embeddings z, (B, 2, d)."""
        h = [self.backbone(view) for view in views]
        return {"h": torch.stack(h, 1).detach(), "z": torch.stack([self.projector(one) for one in h], 1)}

    def weights(self, u: Tensor) -> Tensor:
        """Weights of the 2B rows, of sum 1, from features (B, 2, D) of the views."""
        cosine = F.cosine_similarity(u[:, 0], u[:, 1], dim=1).detach()  # (B,)
        return (self.settings.beta * cosine).repeat(2).softmax(dim=0)

    def loss(self, out: Out, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted NT-Xent; its weights' effective share of the rows and correlation with the views' overlap."""
        alignment, partition = nt_xent_terms(*out["z"].unbind(1), self.settings.temperature)
        u = (out["z"] if self.settings.d_ratio == 0 else out["h"]).detach()
        a = self.weights(u)
        spread = a.new_full(a.shape, 1 / len(a)) if self.settings.align_only else a
        overlap = box_overlap(batch.boxes[:, 0], batch.boxes[:, 1])
        logs = {
            "effective_sample_size": 1 / (len(a) * a.square().sum()),
            "weight_overlap": rank_correlation(F.cosine_similarity(u[:, 0], u[:, 1], dim=1), overlap),
        }
        return (a * alignment).sum() + (spread * partition).sum(), logs


def box_overlap(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of crops, (B, 4) each: top, left, height, width."""
    top_left = torch.maximum(first[:, :2], second[:, :2])
    bottom_right = torch.minimum(first[:, :2] + first[:, 2:], second[:, :2] + second[:, 2:])
    shared = (bottom_right - top_left).clamp(min=0).prod(dim=1)
    return shared / (first[:, 2:].prod(dim=1) + second[:, 2:].prod(dim=1) - shared)


def rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's correlation of two vectors without ties."""
    ranks = torch.stack([x.argsort().argsort(), y.argsort().argsort()]).to(torch.float64)
    return torch.corrcoef(ranks)[0, 1]
