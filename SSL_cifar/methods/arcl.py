"""ArCL: "ArCL: Enhancing Contrastive Learning with Augmentation-Robust Representations" (Zhao et al., ICLR 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from SSL_cifar.methods.base import Batch, Out, nt_xent_terms
from SSL_cifar.methods.moco import Keys, QueueSettings, queue_loss
from SSL_cifar.methods.simclr import ContrastSettings, SimCLR


class ArCL(SimCLR):
    """Contrastive learning that aligns the worst pair of m views: s⁺_i = min over j<k of u_ij · u_ik.

    On SimCLR, `select`: NT-Xent of each image's worst pair; `swap`: NT-Xent of views 1 and 2 with s⁺ in the place of
    their similarity. On MoCo: the query's least similar key among views 2 to m. `--align average` (AAL) takes the mean
    over pairs in place of the worst one: it tells more views from the worst view. m = 2 is SimCLR, or MoCo.
    No code of the authors is known, and their equations could not be opened: this is our reading of the abstract.
    """

    @dataclass(kw_only=True)
    class Settings(QueueSettings):
        """ArCL."""

        ORDER: ClassVar[float] = 12

        base: Literal["simclr", "moco"] = "simclr"
        """What the worst pair is given to."""
        num_views: int = 4
        """m. More views cost as many passes through the backbone."""
        reading: Literal["select", "swap"] = "select"
        """Of `--base simclr`: contrast the worst pair, or only put its similarity in the place of the first pair's."""
        align: Literal["worst", "average"] = "worst"
        """average is the control: as many views, no worst one."""
        recompute: bool = False
        """With select and worst: find the pair without gradient, then run the two views again. Less work from 4 views
        on, at the price of BatchNorm statistics of mixed views."""

        def check(self) -> None:
            """Refuse fewer than two views, and flags of the other base."""
            fields = type(self).__dataclass_fields__
            if self.num_views < 2:
                raise ValueError(f"--num_views {self.num_views}: a pair needs at least two")
            if self.base == "moco":
                super().check()
                others = ("reading", "recompute")
            else:
                ContrastSettings.check(self)
                others = ("queue_size", "base_tau_momentum")
            for name in others:
                if getattr(self, name) != fields[name].default:
                    raise ValueError(f"--{name} has no meaning with --base {self.base}: leave it out")
            if self.recompute and (self.reading != "select" or self.align != "worst"):
                raise ValueError("--recompute is for --reading select --align worst: the others need all views")

        def knob(self) -> tuple[str, float]:
            """Worst or average, base, number of views."""
            words = [{"worst": "ArCL", "average": "AAL"}[self.align], f"m={self.num_views}"]
            words += ["MoCo"] if self.base == "moco" else ["swap"] if self.reading == "swap" else []
            return " ".join([*words, f"τ={self.temperature:g}"]), self.num_views + (self.align == "worst") / 2

    scratch = ("keys.queue.",)

    def __init__(self, settings: Settings, backbone: nn.Module, images: int) -> None:
        super().__init__(settings, backbone, images)  # type: ignore[arg-type]
        self.views = settings.num_views
        self.keys = Keys(settings, self.backbone, self.projector) if settings.base == "moco" else None

    def forward(self, views: list[Tensor], batch: Batch) -> Out:
        """Embeddings z, (B, m, d), of which `recompute` leaves the worst pair; on MoCo unit queries and keys."""
        if self.keys is not None:
            query = F.normalize(self.projector(self.backbone(views[0])), dim=1)
            return {"query": query, "keys": self.keys(views[1:])}
        if not self.settings.recompute:
            return super().forward(views, batch)
        with torch.no_grad():
            first, second = worst_pair(super().forward(views, batch)["z"])
        images, every = torch.stack(views, 1), torch.arange(len(first), device=first.device)
        return super().forward([images[every, first], images[every, second]], batch)

    def loss(self, out: Out, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """NT-Xent, or MoCo's loss, of the worst pairs or of the average over pairs."""
        tau, how = self.settings.temperature, self.settings.align
        if self.keys is not None:
            similarity = torch.einsum("bd,bkd->bk", out["query"], out["keys"])
            positive = similarity.amin(dim=1) if how == "worst" else similarity.mean(dim=1)
            return queue_loss(positive, out["query"], self.keys.queue.rows, tau), _distances(similarity)
        z = out["z"]
        similarity = pair_similarity(z)
        if self.settings.reading == "swap":
            positive = similarity.amin(dim=1) if how == "worst" else similarity.mean(dim=1)
            loss = swapped_nt_xent(z[:, 0], z[:, 1], positive, tau)
        elif how == "average":
            pairs = torch.combinations(torch.arange(z.shape[1])).tolist()
            loss = torch.stack([sum(nt_xent_terms(z[:, j], z[:, k], tau)).mean() for j, k in pairs]).mean()
        else:
            every = torch.arange(len(z), device=z.device)
            first, second = worst_pair(z)
            loss = sum(nt_xent_terms(z[every, first], z[every, second], tau)).mean()
        logs = _distances(similarity)
        return loss, {"worst_distance": logs["worst_distance"]} if self.settings.recompute else logs

    def after_step(self, out: Out, batch: Batch, done: float) -> None:
        """On MoCo: move the average, and let the keys that were used replace the oldest."""
        if self.keys is None:
            return
        used = torch.zeros(len(out["keys"]), dtype=torch.long, device=out["keys"].device)
        if self.settings.align == "worst":
            used = torch.einsum("bd,bkd->bk", out["query"], out["keys"]).argmin(dim=1)
        keys = out["keys"][torch.arange(len(used), device=used.device), used]
        self.keys.update(keys, self.backbone, self.projector)


def pair_similarity(z: Tensor) -> Tensor:
    """Cosines of the pairs j < k of views, (B, m(m-1)/2), of embeddings (B, m, d)."""
    u = F.normalize(z, dim=2)
    first, second = torch.triu_indices(z.shape[1], z.shape[1], 1, device=z.device)
    return (u[:, first] * u[:, second]).sum(dim=2)


def worst_pair(z: Tensor) -> tuple[Tensor, Tensor]:
    """The two views, (B,) each, whose embeddings of (B, m, d) are least similar: an index, without gradient."""
    first, second = torch.triu_indices(z.shape[1], z.shape[1], 1, device=z.device)
    worst = pair_similarity(z.detach()).argmin(dim=1)
    return first[worst], second[worst]


def swapped_nt_xent(first: Tensor, second: Tensor, positive: Tensor, tau: float) -> Tensor:
    """NT-Xent of views (B, d) with `positive`, (B,), in the place of the similarity of an image's two views."""
    rows = F.normalize(torch.cat([first, second]), dim=1)  # (2B, d)
    own = torch.eye(len(first), dtype=torch.bool, device=rows.device).repeat(2, 2)  # an image with itself
    others = (rows @ rows.T / tau).masked_fill(own, -torch.inf)
    positive = positive.repeat(2) / tau
    return (torch.cat([positive[:, None], others], 1).logsumexp(dim=1) - positive).mean()


def _distances(similarity: Tensor) -> dict[str, Tensor]:
    """Mean and, per image, largest squared distance 2 - 2 cos over its pairs, (B, pairs)."""
    distance = 2 - 2 * similarity.detach()
    return {"distance": distance.mean(), "worst_distance": distance.amax(dim=1).mean()}
