"""Norms for the nodes of one graph: GraphContraNorm, and the baselines of Table 3 that PyG has no equivalent of."""

from __future__ import annotations

from typing import Literal, Unpack

from torch import Tensor, nn
from torch.nn import functional as F

from contranorm.layer import ContraStep, Switches


class GraphContraNorm(ContraStep):
    """x - s·A·x over the nodes of one graph, adjacent pairs left out of A's softmax (Guo et al., ICLR 2023).

    Neighbours are meant to agree, so only the other nodes are pushed away. The LayerNorm that the experiments put after
    it (`--use_layer_norm`) is shared by all layers and belongs to the model. Arguments as of `ContraStep`.

    Raises:
        ValueError: axis="features", or as `ContraStep`.
    """

    def __init__(self, scale: float, tau: float = 1.0, *, dim: int | None = None, **switches: Unpack[Switches]) -> None:
        super().__init__(scale, tau, dim=dim, **switches)
        if self.axis == "features":
            raise ValueError("axis='features' compares features, not nodes: there are no adjacent pairs to leave out")

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:  # type: ignore[override]
        """Push apart the nodes that are not adjacent.

        Args:
            x: (N, D).
            adjacency: sparse CSR (N, N) with self-loops; its stored entries, whatever their values, are left out.

        Returns:
            (N, D). A node adjacent to all others has nothing to be pushed from: its contrast term is 0.
        """
        return self.take_step(x, exclude=adjacency)


class PairNorm(nn.Module):
    r"""PairNorm (Zhao and Akoglu, "PairNorm: Tackling Oversmoothing in GNNs", ICLR 2020).

    With :math:`\tilde x` the centred features (column means subtracted):

    - PN: :math:`s\,\tilde x \,/ \sqrt{\tfrac1N \sum_i \|\tilde x_i\|^2}`: the mean squared row norm becomes s²;
    - PN-SI (scale individually): :math:`s\,\tilde x_i / \|\tilde x_i\|`: every row has norm s;
    - PN-SCS (scale and centre simultaneously): :math:`s\, x_i / \|x_i\| - \bar x`, the mean taken before scaling.

    Args:
        mode: "PN", "PN-SI" or "PN-SCS".
        scale: s.
        eps: added to the squared norms, so that a collapsed input stays finite.
    """

    def __init__(self, mode: Literal["PN", "PN-SI", "PN-SCS"] = "PN", scale: float = 1.0, eps: float = 1e-6) -> None:
        super().__init__()
        if mode not in ("PN", "PN-SI", "PN-SCS"):
            raise ValueError(f"mode must be PN, PN-SI or PN-SCS, got {mode!r}")
        self.mode = mode
        self.scale = scale
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) → (N, D)."""
        mean = x.mean(dim=0)
        if self.mode == "PN":
            centred = x - mean
            return self.scale * centred / (self.eps + centred.square().sum(dim=1).mean()).sqrt()
        if self.mode == "PN-SI":
            centred = x - mean
            return self.scale * centred / (self.eps + centred.square().sum(dim=1, keepdim=True)).sqrt()
        return self.scale * x / (self.eps + x.square().sum(dim=1, keepdim=True)).sqrt() - mean

    def extra_repr(self) -> str:
        """Mode and scale."""
        return f"{self.mode}, scale={self.scale}"


class CentreAndNormalize(nn.Module):
    """The baseline that Table 3 calls LN: subtract each row's mean, then divide the row by its L2 norm.

    It is nn.LayerNorm without its parameters and √D times smaller. Centred over nodes instead, it would be PN-SI.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) → (N, D), rows of norm 1."""
        return F.normalize(x - x.mean(dim=1, keepdim=True), dim=1)
