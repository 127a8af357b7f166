"""Other remedies against oversmoothing, for the tables that hold ContraNorm: GCNII, gradient gating, connections.

Half-Hop, which changes the graph and not the network, is in `gnn.data`; PairNorm, DGN and the other norms are in
`gnn.layers`. Sources and where released code and paper differ:

GCNII (Chen et al., ICML 2020): h ← ReLU(((1−α) P h + α h⁰)((1−β_l) I + β_l W_l)), β_l = log(θ/l + 1), l from 1; h⁰ is a
    linear layer with ReLU, the output linear. α = 0.1, θ = 0.5, and weight decay 0.01 on the W_l. The authors train 64
    columns for 1,500 epochs and stop by validation loss; here width and epochs are those of every other method.
Gradient gating, G² (Rusch et al., ICLR 2023): c = ReLU(conv(h)), τ = tanh(mean over neighbours j of |c_i − c_j|^p) for
    each feature, h ← (1−τ) h + τ c, with one convolution for all layers, for c and for the gates alike (the released
    default). The mean leaves self-loops out, where the pattern has them. p = 2. The released scripts count patience
    so that every run ends at epoch 200.
Residual and initial connections (Chen et al., "Bag of Tricks for Training Deeper Graph Neural Networks", TPAMI 2022):
    h_l ← (1−α) h_l + α h_{l−1}, or + α h_1; α = 0.5. h_1 is the first hidden layer's output; the released code has a
    linear layer of its own. Jumping knowledge (Xu et al., ICML 2018): the output layer sees all hidden layers, side by
    side or their maximum.

Shapes: N nodes, F input features, D width, C classes, L hidden layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gnn import pyg
from gnn.config import Config
from gnn.layers import Adjacency, GraphConvolution, GraphNetwork, activate, build_norms, dropout
from gnn.sparse import Sparse

ALPHA, THETA, POWER = 0.1, 0.5, 2.0  # GCNII's α and θ, and the p of the gates


class Projection(nn.Linear):
    """A linear layer that takes sparse features too."""

    def forward(self, x: Tensor | Sparse) -> Tensor:
        """(N, F) → (N, D)."""
        return x @ self.weight.T + self.bias


class InitialResidualLayer(nn.Module):
    """One layer of GCNII: dropout → GCN2Conv → norm → shared LayerNorm → ReLU."""

    def __init__(self, convolution: nn.Module, norm: nn.Module, rate: float) -> None:
        super().__init__()
        self.convolution = convolution
        self.norm = norm
        self.rate = rate

    def forward(self, x: Tensor, initial: Tensor, adjacency: Adjacency, shared: nn.LayerNorm | None) -> Tensor:
        """(N, D), (N, D) → (N, D)."""
        h = F.dropout(x, self.rate, self.training)
        h = self.convolution(h, initial, adjacency.propagation.csr)
        return activate(self.norm, h, x, adjacency, shared)


class GCNII(GraphNetwork):
    """Dropout → linear → ReLU → `nlayer` x (GCN2Conv with a share α of the first features) → dropout → linear.

    With α = 0 and β = 1 (`theta` None in GCN2Conv) it is a plain GCN without biases, ReLU(P h W).
    """

    def __init__(self, config: Config, inputs: int, classes: int) -> None:
        super().__init__()
        self.input = Projection(inputs, config.hid)
        alpha = ALPHA if config.alpha is None else config.alpha
        theta = THETA if config.theta is None else config.theta
        self.layers = nn.ModuleList(
            InitialResidualLayer(
                pyg.nn.GCN2Conv(config.hid, alpha, theta, layer=i, normalize=False), norm, config.dropout
            )
            for i, norm in enumerate(build_norms(config, [config.hid] * config.nlayer), start=1)
        )
        self.shared_norm = nn.LayerNorm(config.hid) if config.use_layer_norm else None
        self.output = Projection(config.hid, classes)
        self.rate, self.dropedge = config.dropout, config.dropedge

    def forward(self, x: Tensor | Sparse, adjacency: Adjacency) -> Tensor:
        """(N, F) → logits (N, C)."""
        adjacency = self.thinned(adjacency)
        h = initial = F.relu(self.input(dropout(x, self.rate, self.training)))
        for layer in self.layers:
            h = layer(h, initial, adjacency, self.shared_norm)
        logits: Tensor = self.output(F.dropout(h, self.rate, self.training))
        return logits

    def parameter_groups(self, config: Config) -> list[dict[str, Any]]:
        """The convolutions' matrices have a weight decay of their own."""
        matrices = [layer.convolution.weight1 for layer in self.layers]
        decay = config.wd if config.conv_wd is None else config.conv_wd
        others = [p for p in self.parameters() if all(p is not matrix for matrix in matrices)]
        return [{"params": others}, {"params": matrices, "weight_decay": decay}]


def gradient_gate(c: Tensor, adjacency: Adjacency, power: float) -> Tensor:
    """τ = tanh(mean over neighbours j of |c_i − c_j|^p), (N, D) → (N, D); 0, no change, at isolated nodes."""
    source, target = adjacency.neighbours
    gradient = (c[target] - c[source]).abs() ** power  # (E, D)
    return torch.tanh(pyg.utils.scatter(gradient, target, dim_size=len(c), reduce="mean"))


class GatedLayer(nn.Module):
    """One layer of gradient gating: h ← (1−τ) h + τ c, c = ReLU(LayerNorm(norm(conv(h))))."""

    def __init__(self, norm: nn.Module, power: float) -> None:
        super().__init__()
        self.norm = norm
        self.power = power

    def forward(self, h: Tensor, convolution: nn.Module, adjacency: Adjacency, shared: nn.LayerNorm | None) -> Tensor:
        """(N, D) → (N, D)."""
        c = activate(self.norm, convolution(h, adjacency), h, adjacency, shared)
        gate = gradient_gate(c, adjacency, self.power)
        return (1 - gate) * h + gate * c


class G2(GraphNetwork):
    """Dropout → linear → ReLU → `nlayer` x (gated step of one convolution for all) → dropout → linear.

    With τ = 1 it is a GCN whose hidden layers share their weights.
    """

    def __init__(self, config: Config, inputs: int, classes: int) -> None:
        super().__init__()
        self.input = Projection(inputs, config.hid)
        self.convolution = GraphConvolution(config.hid, config.hid)
        power = POWER if config.gate_power is None else config.gate_power
        norms = build_norms(config, [config.hid] * config.nlayer)
        self.layers = nn.ModuleList(GatedLayer(norm, power) for norm in norms)
        self.shared_norm = nn.LayerNorm(config.hid) if config.use_layer_norm else None
        self.output = Projection(config.hid, classes)
        self.rate, self.dropedge = config.dropout, config.dropedge

    def forward(self, x: Tensor | Sparse, adjacency: Adjacency) -> Tensor:
        """(N, F) → logits (N, C)."""
        adjacency = self.thinned(adjacency)
        h = F.relu(self.input(dropout(x, self.rate, self.training)))
        for layer in self.layers:
            h = layer(h, self.convolution, adjacency, self.shared_norm)
        logits: Tensor = self.output(F.dropout(h, self.rate, self.training))
        return logits


class Connection(nn.Module):
    """What a hidden layer gets from those before it, and what the output layer sees of them all.

    Args:
        kind: "residual" and "initial" mix the previous or the first hidden layer into each other one; "jumping_cat" and
            "jumping_max" show the output layer every one (PyG's JumpingKnowledge).
        alpha: the share α that is mixed in.
    """

    def __init__(self, kind: str, alpha: float | None) -> None:
        super().__init__()
        self.kind = kind
        self.alpha = 0.5 if alpha is None else alpha
        self.jump = pyg.nn.JumpingKnowledge(kind.removeprefix("jumping_")) if kind.startswith("jumping") else None

    def mix(self, h: Tensor, before: list[Tensor]) -> Tensor:
        """(N, D) of this layer and of those before it → (N, D)."""
        if self.jump is not None or not before:
            return h
        return (1 - self.alpha) * h + self.alpha * before[0 if self.kind == "initial" else -1]

    def join(self, hidden: list[Tensor]) -> Tensor:
        """L x (N, D) → (N, D), side by side (N, L·D)."""
        joined: Tensor = hidden[-1] if self.jump is None else self.jump(hidden)
        return joined

    def width(self, hid: int, layers: int) -> int:
        """Columns of what `join` returns."""
        return hid * layers if self.kind == "jumping_cat" else hid

    def extra_repr(self) -> str:
        """Kind and share."""
        return self.kind if self.jump is not None else f"{self.kind}, alpha={self.alpha:g}"
