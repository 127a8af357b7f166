"""What a method is: the interface that the trainer knows, and pieces that several methods share."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn
from torch.nn import functional as F

from repro.parallel import gather
from SSL_cifar.config import Config

Out = dict[str, Tensor]  # what `forward` makes of a batch: every tensor has the batch's rows first


@dataclass
class Batch:
    """What is known of a step's images besides their views; rows are images.

    Attributes:
        index: (B,) numbers of the images in the data set.
        boxes: (B, V, 4) crops as fractions of the image: top, left, height, width.
        flips: (B, V) whether a view is mirrored.
        seed: of the step's own draws (masks, ratios, offsets); a function of the run's seed, epoch and step.
        first: place of row 0 in the step's whole batch.
        total: rows of the step's whole batch, over all processes.
    """

    index: Tensor
    boxes: Tensor
    flips: Tensor
    seed: int
    first: int
    total: int

    def generator(self) -> torch.Generator:
        """A generator on the CPU for the step's own draws, the same on every process: draw for all `total` rows."""
        return torch.Generator().manual_seed(self.seed)

    def mine(self, whole: Tensor) -> Tensor:
        """This process's rows of something drawn for the whole step."""
        return whole[self.first : self.first + len(self.index)].to(self.index.device)

    def gathered(self) -> Batch:
        """The whole step's batch, in order."""
        index, boxes, flips = gather(self.index), gather(self.boxes), gather(self.flips.to(torch.uint8)).bool()
        return Batch(index, boxes, flips, self.seed, 0, self.total)


class Method(nn.Module):
    """A self-supervised method. Everything it keeps is in its state dict: banks and counters are buffers.

    `forward` gets this process's images and is what DistributedDataParallel wraps; `loss` and what follows get the rows
    of all processes, in order. Every trainable parameter must take part in every `forward`.

    Args:
        settings: of the method's own class `Settings`.
        backbone: images (B, 3, S, S) to features (B, D); has `num_features`.
        images: how many training images there are.
    """

    Settings: type[Config] = Config
    views = 2  # augmented views of each image
    scratch: tuple[str, ...] = ()  # prefixes of what only training needs (banks): not in model.safetensors

    def __init__(self, settings: Any, backbone: nn.Module, images: int) -> None:
        super().__init__()
        self.settings = settings
        self.backbone = backbone

    def forward(self, views: list[Tensor], batch: Batch) -> Out:
        """What the loss needs of this process's images; views: V tensors (B, 3, S, S)."""
        raise NotImplementedError

    def loss(self, out: Out, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the whole batch, and numbers to log (averaged over an epoch)."""
        raise NotImplementedError

    def online_target(self, out: Out, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Online and target embeddings (N, d), as they enter the loss; None for methods without."""
        return None

    def after_step(self, out: Out, batch: Batch, done: float) -> None:
        """Update averages, queues and banks, without gradient; `done` in (0, 1] is the share of the run so far."""

    def after_epoch(self) -> None:
        """Close an epoch."""

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups; {"constant": True, "factor": 10.0} keeps a group at 10 times the peak rate throughout."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def features(self, images: Tensor) -> Tensor:
        """What evaluation sees of images (B, 3, S, S): (B, D)."""
        features: Tensor = self.backbone(images)
        return features

    def layers(self, images: Tensor) -> Tensor | None:
        """`features` of every layer, (B, L, D), of images (B, 3, S, S); None where there is one."""
        return None

    def likelihood(self, images: Tensor) -> Tensor | None:
        """Negative log-likelihood, in nats, of each token given those before it, (B, T - 1); None without tokens."""
        return None

    def project(self, h: Tensor) -> Tensor | None:
        """The embedding of features (B, D), for diagnostics; None for methods without."""
        return None


@dataclass(kw_only=True)
class ProjectorSettings(Config):
    """Sizes of the projector."""

    proj_hidden_dim: int = 2048
    """Width of its hidden layers; 0 is the backbone's."""
    proj_output_dim: int = 2048
    """Width of the embedding."""

    def check(self) -> None:
        """Refuse empty layers."""
        if self.proj_hidden_dim < 0 or self.proj_output_dim < 1:
            raise ValueError("--proj_hidden_dim must not be negative, and --proj_output_dim at least 1")


class MomentumCopy(nn.Module):
    """The exponential moving average of some modules, applied one after the other and without gradient.

    Only parameters are averaged: BatchNorm sees the batches itself, as in the authors' code.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.copies = nn.Sequential(*(copy.deepcopy(module) for module in modules))
        deactivate_requires_grad(self.copies)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, d) of images (B, 3, S, S)."""
        embedded: Tensor = self.copies(images)
        return embedded

    @torch.no_grad()
    def update(self, modules: Iterable[nn.Module], m: float) -> None:
        """θ' ← m θ' + (1 - m) θ."""
        for module, mine in zip(modules, self.copies, strict=True):
            update_momentum(module, mine, m)


def cosine_momentum(base: float, done: float) -> float:
    """1 - (1 - base)(1 + cos(π done)) / 2: from `base` at the start to 1 at the end (BYOL)."""
    return 1 - (1 - base) * (1 + math.cos(math.pi * done)) / 2


def negative_cosine(p: Tensor, target: Tensor) -> Tensor:
    """D(p, t) = -mean of cos(p_b, sg[t_b]), for (B, d) each; -1 is the minimum."""
    return -F.cosine_similarity(p, target.detach(), dim=1).mean()


def nt_xent_terms(first: Tensor, second: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """NT-Xent (SimCLR; Chen et al., ICML 2020) row by row, in its two terms.

    For the 2B unit rows u of [first; second] and S = u uᵀ / τ, row i with its other view π(i):
    ℓ_i = -S_iπ(i) + log Σ_{j≠i} exp S_ij. SimCLR's loss is the mean of both terms' sum.

    Args:
        first: (B, d) embeddings of one view.
        second: (B, d) of the other.
        tau: temperature.

    Returns:
        (-S_iπ(i), log Σ_{j≠i} exp S_ij), each (2B,).
    """
    rows = F.normalize(torch.cat([first, second]), dim=1)  # (2B, d)
    similarity = rows @ rows.T / tau  # (2B, 2B)
    similarity = similarity.masked_fill(torch.eye(len(rows), dtype=torch.bool, device=rows.device), -math.inf)
    alignment = -(rows * rows.roll(len(first), 0)).sum(dim=1) / tau
    return alignment, similarity.logsumexp(dim=1)
