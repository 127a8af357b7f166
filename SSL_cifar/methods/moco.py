"""MoCo (He et al., CVPR 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from SSL_cifar.banks import Queue
from SSL_cifar.methods.base import Batch, MomentumCopy, Out
from SSL_cifar.methods.simclr import ContrastSettings, SimCLR


@dataclass(kw_only=True)
class QueueSettings(ContrastSettings):
    """The queue of keys, and the moving average that makes them."""

    queue_size: int = 4096
    """Keys that a query is told apart from. 4,096 is customary on CIFAR, 65,536 MoCo's on ImageNet."""
    base_tau_momentum: float = 0.99
    """Share of the past in the moving average. MoCo's for ImageNet is 0.999."""

    def check(self) -> None:
        """Refuse an average that is none, and a queue that a batch overflows."""
        super().check()
        if not 0 <= self.base_tau_momentum <= 1:
            raise ValueError(f"--base_tau_momentum must be between 0 and 1, got {self.base_tau_momentum}")
        if self.queue_size < self.batch_size:
            raise ValueError(f"--queue_size {self.queue_size} does not hold the {self.batch_size} keys of one step")


class Keys(nn.Module):
    """The moving average of some modules, which makes keys, and the queue of past keys."""

    def __init__(self, settings: QueueSettings, *modules: nn.Module) -> None:
        super().__init__()
        self.m = settings.base_tau_momentum
        self.momentum = MomentumCopy(*modules)
        self.queue = Queue(settings.queue_size, settings.proj_output_dim)

    def forward(self, views: list[Tensor]) -> Tensor:
        """Unit keys of K views (B, 3, S, S): (B, K, d)."""
        return F.normalize(torch.stack([self.momentum(view) for view in views], 1), dim=2)

    def update(self, keys: Tensor, *modules: nn.Module) -> None:
        """Move the average, and let keys (B, d) replace the oldest."""
        self.momentum.update(modules, self.m)
        self.queue.push(keys)


class MoCo(SimCLR):
    """ℓ = -u·k/τ + log(exp(u·k/τ) + Σ_m exp(u·Q_m/τ)), for the unit query u of view 1, key k of view 2, past keys Q.

    Keys come from the moving average of backbone and projector, and enter the queue after the step.
    """

    @dataclass(kw_only=True)
    class Settings(QueueSettings):
        """MoCo."""

        TITLE: ClassVar[str] = "MoCo"
        ORDER: ClassVar[float] = 15

        temperature: float = 0.2
        """τ. MoCo v2's."""

        def knob(self) -> tuple[str, float]:
            """τ."""
            return f"τ={self.temperature:g}", 0.0

    scratch = ("keys.queue.",)

    def __init__(self, settings: Settings, backbone: nn.Module, images: int) -> None:
        super().__init__(settings, backbone, images)  # type: ignore[arg-type]
        self.keys = Keys(settings, self.backbone, self.projector)

    def forward(self, views: list[Tensor], batch: Batch) -> Out:
        """Unit queries of the first view, (B, d), and unit keys of the second, (B, 1, d)."""
        query = F.normalize(self.projector(self.backbone(views[0])), dim=1)
        return {"query": query, "keys": self.keys(views[1:])}

    def loss(self, out: Out, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of ℓ."""
        positive = (out["query"] * out["keys"][:, 0]).sum(dim=1)
        return queue_loss(positive, out["query"], self.keys.queue.rows, self.settings.temperature), {}

    def after_step(self, out: Out, batch: Batch, done: float) -> None:
        """Move the average, and let the keys replace the oldest."""
        self.keys.update(out["keys"][:, 0], self.backbone, self.projector)


def queue_loss(positive: Tensor, query: Tensor, queue: Tensor, tau: float) -> Tensor:
    """Mean cross-entropy of the positive similarity, (B,), among those with the queue, (M, d); query (B, d), unit."""
    logits = torch.cat([positive[:, None], query @ queue.to(query.dtype).T], 1) / tau
    return (logits.logsumexp(dim=1) - logits[:, 0]).mean()
