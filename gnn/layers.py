"""What graph networks are made of: the adjacency, convolutions, norms, and one hidden layer.

Shapes: N nodes, F input features, D width, C classes, E edges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contranorm import CentreAndNormalize, GraphContraNorm, PairNorm
from gnn import pyg
from gnn.config import PAIR_NORMS, Config
from gnn.sparse import Pattern, Sparse

GROUPS = 10  # of DiffGroupNorm, its paper's value for citation graphs
EXTRA = 2**32  # added to the seed for parameters that vanilla lacks


class Adjacency:
    """The neighbourhood pattern with self-loops, and the weights that convolutions use. A row gathers its columns.

    Args:
        pattern: N x N, self-loops stored.
        kept: (E,) 1 for edges in use, 0 for those left out by DropEdge; None for all.
        symmetric: propagate by P = D^-½ (A+I) D^-½ (Kipf and Welling, ICLR 2017), not by D⁻¹(A+I).
    """

    def __init__(self, pattern: Pattern, kept: Tensor | None = None, *, symmetric: bool = False) -> None:
        self.pattern = pattern
        self.symmetric = symmetric
        self.loops = pattern.row == pattern.col
        ones = torch.ones(len(pattern.row), device=pattern.row.device)
        self.kept = ones if kept is None else kept
        degree = ones.new_zeros(pattern.shape[0]).index_add(0, pattern.row, self.kept)
        scaled = self.kept / degree[pattern.row]
        if symmetric:
            root = degree.rsqrt()
            scaled = self.kept * root[pattern.row] * root[pattern.col]
        self.propagation = Sparse(pattern, scaled)
        self.sum = Sparse(pattern, self.kept.masked_fill(self.loops, 0.0))  # A without self-loops
        self.excluded = pattern.csr(ones)  # what leaves ContraNorm's softmax: all neighbours, dropped edges too

    @classmethod
    def from_edges(
        cls, edge_index: Tensor, nodes: int, *, symmetric: bool = False, directed: bool = False
    ) -> Adjacency:
        """Make (2, E) edges (source, target) undirected unless they are `directed`, each once, and add self-loops."""
        loops = torch.arange(nodes, device=edge_index.device).expand(2, -1)
        col, row = torch.cat([edge_index, *([] if directed else [edge_index.flip(0)]), loops], dim=1)
        unique = torch.unique(row * nodes + col)
        return cls(Pattern(unique // nodes, unique % nodes, (nodes, nodes)), symmetric=symmetric)

    @cached_property
    def neighbours(self) -> tuple[Tensor, Tensor]:
        """(source, target) of the kept edges without self-loops, the neighbours j of each node i."""
        used = (self.kept > 0) & ~self.loops
        return self.pattern.col[used], self.pattern.row[used]

    def edge_index(self) -> Tensor:
        """(2, E) kept edges as source, target, the form PyG takes."""
        used = self.kept > 0
        return torch.stack([self.pattern.col[used], self.pattern.row[used]])

    def drop(self, rate: float) -> Adjacency:
        """DropEdge (Rong et al., ICLR 2020): leave out a random share of the edges and renormalize the rows."""
        kept = (torch.rand_like(self.kept) >= rate).float()
        return Adjacency(self.pattern, torch.where(self.loops, 1.0, kept), symmetric=self.symmetric)


def dropout(x: Tensor | Sparse, rate: float, training: bool) -> Tensor | Sparse:
    """Dropout; of a sparse matrix on its stored values only (a dropped zero is a zero)."""
    if isinstance(x, Sparse):
        return Sparse(x.pattern, F.dropout(x.values, rate)) if training else x
    return F.dropout(x, rate, training)


def dense(x: Tensor | Sparse) -> Tensor:
    """X as a dense tensor."""
    return x.to_dense() if isinstance(x, Sparse) else x


class GraphConvolution(nn.Module):
    """P(xW) + b, P the propagation matrix: the product with W first, since W makes x narrow (Kipf and Welling)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±1/√outputs, as the reference has it."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor | Sparse, adjacency: Adjacency) -> Tensor:
        """(N, F) → (N, D)."""
        return adjacency.propagation @ (x @ self.weight) + self.bias


class AttentionConvolution(pyg.nn.GATConv):  # type: ignore[misc]
    """Graph attention (Velickovic et al., ICLR 2018), PyG's; several heads share the outputs."""

    def __init__(self, inputs: int, outputs: int, heads: int = 1) -> None:
        super().__init__(inputs, outputs // heads, heads, add_self_loops=False)  # the pattern has them

    def forward(self, x: Tensor | Sparse, adjacency: Adjacency) -> Tensor:
        """(N, F) → (N, D)."""
        out: Tensor = super().forward(dense(x), adjacency.edge_index())
        return out


class IsomorphismConvolution(nn.Module):
    """MLP((1 + ε) x + Σ over neighbours) (Xu et al., ICLR 2019); the MLP's first matrix goes before the sum."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, outputs)
        self.second = nn.Linear(outputs, outputs)
        self.eps = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor | Sparse, adjacency: Adjacency) -> Tensor:
        """(N, F) → (N, D)."""
        narrow = x @ self.first.weight.T  # (N, D)
        total = (1 + self.eps) * narrow + adjacency.sum @ narrow + self.first.bias
        out: Tensor = self.second(F.relu(total))
        return out


def build_norm(config: Config, width: int) -> nn.Module:
    """The norm that `--norm_mode` names."""
    mode, scale = config.norm_mode, config.scale
    if mode == "CN":
        return GraphContraNorm(scale, dim=width, **config.switches())
    if mode in PAIR_NORMS:
        return PairNorm(mode, scale)
    makers: dict[str, Any] = {
        "None": nn.Identity,
        "LN": CentreAndNormalize,
        "BatchNorm": lambda: pyg.nn.BatchNorm(width),
        "DiffGroupNorm": lambda: pyg.nn.DiffGroupNorm(width, GROUPS, lamda=scale),
        "MeanSubtractionNorm": pyg.nn.MeanSubtractionNorm,
        "GraphNorm": lambda: pyg.nn.GraphNorm(width),
        "MessageNorm": pyg.nn.MessageNorm,
    }
    norm: nn.Module = makers[mode]()
    return norm


@contextmanager
def own_generator() -> Iterator[None]:
    """Draw a method's extra parameters from a generator of their own, so that all others are those of vanilla."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(torch.initial_seed() + EXTRA)
        yield


def build_norms(config: Config, widths: Sequence[int]) -> nn.ModuleList:
    """One norm for each width."""
    with own_generator():
        return nn.ModuleList(build_norm(config, width) for width in widths)


def apply_norm(norm: nn.Module, message: Tensor, x: Tensor | Sparse, adjacency: Adjacency) -> Tensor:
    """Normalize a convolution's output `message` (N, D); x is what the convolution was given."""
    if isinstance(norm, GraphContraNorm):
        return norm(message, adjacency.excluded)  # type: ignore[no-any-return]
    if isinstance(norm, pyg.nn.MessageNorm):
        return dense(x) + norm(dense(x), message)  # type: ignore[no-any-return]
    return norm(message)  # type: ignore[no-any-return]


def activate(
    norm: nn.Module, message: Tensor, x: Tensor | Sparse, adjacency: Adjacency, shared: nn.LayerNorm | None
) -> Tensor:
    """Norm → shared LayerNorm → ReLU, the end of every hidden layer."""
    h = apply_norm(norm, message, x, adjacency)
    return F.relu(h if shared is None else shared(h))


class Layer(nn.Module):
    """One hidden layer: dropout → convolution → norm → shared LayerNorm → ReLU → + skip."""

    def __init__(self, convolution: nn.Module, norm: nn.Module, rate: float) -> None:
        super().__init__()
        self.convolution = convolution
        self.norm = norm
        self.rate = rate

    def forward(
        self, x: Tensor | Sparse, adjacency: Adjacency, shared: nn.LayerNorm | None, skip: Tensor | None
    ) -> Tensor:
        """(N, F or D) → (N, D)."""
        h = self.convolution(dropout(x, self.rate, self.training), adjacency)
        h = activate(self.norm, h, x, adjacency, shared)
        return h if skip is None else h + skip


class GraphNetwork(nn.Module):
    """What training and the probe need to know of a network: its hidden layers, and how its parameters are trained."""

    layers: nn.ModuleList  # each with its `norm`
    output: nn.Module
    shared_norm: nn.LayerNorm | None
    connection: nn.Module | None  # between hidden layers
    dropedge: float

    def __init__(self) -> None:
        super().__init__()
        self.connection = None

    def thinned(self, adjacency: Adjacency) -> Adjacency:
        """The adjacency, during training without the edges that DropEdge leaves out."""
        return adjacency.drop(self.dropedge) if self.training and self.dropedge else adjacency

    def parameter_groups(self, config: Config) -> list[dict[str, Any]]:
        """The optimizer's groups of parameters; what a group does not name is as for all."""
        return [{"params": list(self.parameters())}]
