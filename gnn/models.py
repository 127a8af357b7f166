"""Deep graph networks for node classification, each one a stack of

    dropout → convolution → norm → (LayerNorm shared by all layers) → ReLU → (+ features of k layers before)

with a last dropout → convolution to the classes. Shapes: N nodes, F input features, D width, C classes, E edges.
"""  # noqa: D205, D415  (the diagram is the summary)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contranorm import CentreAndNormalize, GraphContraNorm, PairNorm
from gnn import pyg
from gnn.config import PAIR_NORMS, Config
from gnn.sparse import Pattern, Sparse

GROUPS = 10  # of DiffGroupNorm, its paper's value for citation graphs


class Adjacency:
    """The symmetric neighbourhood pattern with self-loops, and the weights that convolutions use.

    Args:
        pattern: N x N, self-loops stored.
        kept: (E,) 1 for edges in use, 0 for those left out by DropEdge; None for all.
    """

    def __init__(self, pattern: Pattern, kept: Tensor | None = None) -> None:
        self.pattern = pattern
        self.loops = pattern.row == pattern.col
        ones = torch.ones(len(pattern.row), device=pattern.row.device)
        self.kept = ones if kept is None else kept
        degree = ones.new_zeros(pattern.shape[0]).index_add(0, pattern.row, self.kept)
        self.mean = Sparse(pattern, self.kept / degree[pattern.row])  # row-normalized, D⁻¹A
        self.sum = Sparse(pattern, self.kept.masked_fill(self.loops, 0.0))  # A without self-loops
        self.excluded = pattern.csr(ones)  # what leaves ContraNorm's softmax: all neighbours, dropped edges too

    @classmethod
    def from_edges(cls, edge_index: Tensor, nodes: int) -> Adjacency:
        """Make (2, E) edges undirected, each once, and add self-loops."""
        loops = torch.arange(nodes, device=edge_index.device).expand(2, -1)
        row, col = torch.cat([edge_index, edge_index.flip(0), loops], dim=1)
        unique = torch.unique(row * nodes + col)
        return cls(Pattern(unique // nodes, unique % nodes, (nodes, nodes)))

    def edge_index(self) -> Tensor:
        """(2, E) kept edges as source, target, the form PyG takes."""
        used = self.kept > 0
        return torch.stack([self.pattern.col[used], self.pattern.row[used]])

    def drop(self, rate: float) -> Adjacency:
        """DropEdge (Rong et al., ICLR 2020): leave out a random share of the edges and renormalize the rows."""
        kept = (torch.rand_like(self.kept) >= rate).float()
        return Adjacency(self.pattern, torch.where(self.loops, 1.0, kept))


def dropout(x: Tensor | Sparse, rate: float, training: bool) -> Tensor | Sparse:
    """Dropout; of a sparse matrix on its stored values only (a dropped zero is a zero)."""
    if isinstance(x, Sparse):
        return Sparse(x.pattern, F.dropout(x.values, rate)) if training else x
    return F.dropout(x, rate, training)


def dense(x: Tensor | Sparse) -> Tensor:
    """X as a dense tensor."""
    return x.to_dense() if isinstance(x, Sparse) else x


class GraphConvolution(nn.Module):
    """Mean over the neighbourhood, A(xW) + b: the product with W first, since W makes x narrow (Kipf and Welling)."""

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
        return adjacency.mean @ (x @ self.weight) + self.bias


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
        "DiffGroupNorm": lambda: pyg.nn.DiffGroupNorm(width, GROUPS),
        "MeanSubtractionNorm": pyg.nn.MeanSubtractionNorm,
        "GraphNorm": lambda: pyg.nn.GraphNorm(width),
        "MessageNorm": pyg.nn.MessageNorm,
    }
    norm: nn.Module = makers[mode]()
    return norm


def apply_norm(norm: nn.Module, message: Tensor, x: Tensor | Sparse, adjacency: Adjacency) -> Tensor:
    """Normalize a convolution's output `message` (N, D); x is what the convolution was given."""
    if isinstance(norm, GraphContraNorm):
        return norm(message, adjacency.excluded)  # type: ignore[no-any-return]
    if isinstance(norm, pyg.nn.MessageNorm):
        return dense(x) + norm(dense(x), message)  # type: ignore[no-any-return]
    return norm(message)  # type: ignore[no-any-return]


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
        h = apply_norm(self.norm, h, x, adjacency)
        if shared is not None:
            h = shared(h)
        h = F.relu(h)
        return h if skip is None else h + skip


class DeepGCN(nn.Module):
    """`nlayer` graph convolutions (Table 3's model); the sub-classes differ in the convolution alone.

    Args:
        config: nlayer, hid, dropout, residual, dropedge, norm_mode, use_layer_norm, ...
        inputs: F.
        classes: C.
    """

    convolution: type[nn.Module] = GraphConvolution

    def __init__(self, config: Config, inputs: int, classes: int) -> None:
        super().__init__()
        widths = [inputs, *[config.hid] * (config.nlayer - 1)]
        heads = {"heads": config.nhead} if config.nhead > 1 else {}
        self.layers = nn.ModuleList()
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            fits = config.norm_mode != "MessageNorm" or before == after  # it adds the message to the layer's input
            norm = build_norm(config, after) if fits else nn.Identity()
            self.layers.append(Layer(self.convolution(before, after, **heads), norm, config.dropout))
        self.shared_norm = nn.LayerNorm(config.hid) if config.use_layer_norm else None
        self.output = self.convolution(widths[-1], classes)
        self.rate, self.dropedge, self.residual = config.dropout, config.dropedge, config.residual

    def forward(self, x: Tensor | Sparse, adjacency: Adjacency) -> Tensor:
        """(N, F) → logits (N, C)."""
        if self.training and self.dropedge:
            adjacency = adjacency.drop(self.dropedge)
        skip: Tensor | None = None  # features of `residual` layers before
        for i, layer in enumerate(self.layers):
            joins = self.residual > 0 and i % self.residual == 0
            x = layer(x, adjacency, self.shared_norm, skip if joins else None)
            skip = x if joins else skip
        logits: Tensor = self.output(dropout(x, self.rate, self.training), adjacency)
        return logits


class DeepGAT(DeepGCN):
    """`nlayer` attention convolutions, the last with a single head."""

    convolution = AttentionConvolution


class GIN(DeepGCN):
    """`nlayer` isomorphism convolutions."""

    convolution = IsomorphismConvolution


class SGC(nn.Module):
    """`nlayer` propagation steps, each followed by the norm, then dropout and one linear layer (Wu et al., ICML 2019).

    The features keep their input width. Without parameters or chance in the steps they are taken once, not per epoch.
    """

    def __init__(self, config: Config, inputs: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Propagation(build_norm(config, inputs)) for _ in range(config.nlayer)])
        self.shared_norm = nn.LayerNorm(inputs) if config.use_layer_norm else None
        self.constant = not config.dropedge and not any(p.requires_grad for p in self.parameters())
        self.output = nn.Linear(inputs, classes)
        self.rate, self.dropedge = config.dropout, config.dropedge
        self._propagated: Tensor | None = None

    def propagate(self, x: Tensor | Sparse, adjacency: Adjacency) -> Tensor:
        """The steps; (N, F) → (N, F)."""
        h = dense(x)
        for layer in self.layers:
            h = layer(h, adjacency, self.shared_norm)
        return h

    def forward(self, x: Tensor | Sparse, adjacency: Adjacency) -> Tensor:
        """(N, F) → logits (N, C)."""
        if self.constant and self.training:
            if self._propagated is None:
                self._propagated = self.propagate(x, adjacency)
            h = self._propagated
        else:
            h = self.propagate(x, adjacency.drop(self.dropedge) if self.training and self.dropedge else adjacency)
        logits: Tensor = self.output(F.dropout(h, self.rate, self.training))
        return logits


class Propagation(nn.Module):
    """One step of SGC: A·x → norm → shared LayerNorm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, adjacency: Adjacency, shared: nn.LayerNorm | None) -> Tensor:
        """(N, F) → (N, F)."""
        h = apply_norm(self.norm, adjacency.mean @ x, x, adjacency)
        return h if shared is None else shared(h)


MODELS: dict[str, type[DeepGCN | SGC]] = {"DeepGCN": DeepGCN, "SGC": SGC, "DeepGAT": DeepGAT, "GIN": GIN}


def build_model(config: Config, inputs: int, classes: int) -> DeepGCN | SGC:
    """The model that `--model` names."""
    return MODELS[config.model](config, inputs, classes)


def describe(model: DeepGCN | SGC, config: Config) -> str:
    """One line: which layers carry which norm, read off the model that was built."""
    norms = [layer.norm for layer in model.layers]
    carriers = [str(i + 1) for i, norm in enumerate(norms) if not isinstance(norm, nn.Identity)]
    span = "-".join(carriers[:1] + carriers[1:][-1:])  # "1" or "1-15"
    what = f"{norms[-1]!r} on layers {span}" if carriers else "no norm"
    shared = "one LayerNorm shared by all hidden layers" if model.shared_norm is not None else "no LayerNorm"
    last = "a linear output layer" if config.model == "SGC" else f"a plain output layer {len(norms) + 1}"
    return f"{config.model}: {len(norms)} hidden layers and {last}; {what}; {shared}"
