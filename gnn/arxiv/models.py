"""RevGAT (Li et al., "Training Graph Neural Networks with 1000 Layers", ICML 2021), with a norm after every layer:

    dropout → GAT → norm → (reversible block → norm) x (layers - 2) → BatchNorm → ReLU → dropout → GAT → + bias

Shapes: N nodes, E edges (both directions and loops), F input features, H heads of width O, D = H·O, C classes.
"""  # noqa: D205, D415  (the diagram is the summary)

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gnn.arxiv.config import Config
from gnn.arxiv.norms import build_norm
from gnn.layers import Adjacency, dropout
from gnn.pyg import nn as pyg_nn
from gnn.sparse import Pattern, Sparse

SLOPE = 0.2  # of the scores' LeakyReLU
# How far a head's scores may be apart: exp of the highest and lowest, taken about their middle, is then 1e26 and 1e-26,
# which leaves room in float32 for features and sums over neighbours. Deep networks can be beyond it at initialization.
MAX_SPREAD = {torch.float32: 120.0, torch.float64: 1200.0}


class LayerGraph:
    """The graph as one layer sees it during one training step: the edges that were kept, and whether this is a replay.

    Not a tensor, so that GroupAddRev passes it on whole.

    Args:
        adjacency: the whole graph.
        degree: (N,) of the whole graph, loops included.
        kept: (E,) bool, False for the edges left out; None for all. Bool, as each layer holds one until the backward
            pass.
    """

    def __init__(self, adjacency: Adjacency, degree: Tensor, kept: Tensor | None = None) -> None:
        self.adjacency = adjacency
        self.degree = degree
        self.kept = kept
        self.first_pass = True  # False in the replays of a reversible block, which must not count a batch twice

    @property
    def pattern(self) -> Pattern:
        """Where the edges are, (N, N): row receives from column."""
        return self.adjacency.pattern

    def matrix(self, dtype: torch.dtype) -> Sparse:
        """1 for every kept edge."""
        ones = torch.ones(len(self.pattern.row), dtype=dtype, device=self.degree.device)
        return Sparse(self.pattern, ones if self.kept is None else self.kept.to(dtype))


def layer_graphs(adjacency: Adjacency, layers: int, drop: float) -> list[LayerGraph]:
    """One for each layer, each without a random `drop` of the edges: exactly int(drop · E) of them, loops too."""
    rows = adjacency.pattern.row
    degree = torch.bincount(rows, minlength=adjacency.pattern.shape[0])
    graphs = []
    for _ in range(layers):
        kept = None
        if drop:
            kept = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
            kept[torch.randperm(len(rows), device=rows.device)[: int(drop * len(rows))]] = False
        graphs.append(LayerGraph(adjacency, degree, kept))
    return graphs


def project(parts: Sequence[Tensor | Sparse], weight: Tensor) -> Tensor:
    """X Wᵀ for x given by its columns' parts, some of them sparse: the parts are never copied side by side."""
    columns = weight.T.split([part.shape[1] for part in parts])
    products = [part @ columns_of for part, columns_of in zip(parts, columns, strict=True)]
    total = products[0]
    for product in products[1:]:
        total = total + product
    return total


class GraphAttention(nn.Module):
    """Multi-head graph attention with a linear residual branch, as DGL's GATConv in the released code.

    Without destination attention a score depends on the source node alone, e_ij = e_j. With w_j = exp(e_j) the softmax
    over the kept in-edges and the sum are then one sparse product, of width H·O + H:

        out_i = Σ_j w_j f_j / Σ_j w_j.

    Where the scores of a head are too far apart for float32 that product is taken in float64. With destination
    attention it is computed edge by edge.

    Args:
        inputs: F.
        width: O, the width of a head.
        heads: H.
        use_norm: features times degree^-1/2 before the scores, result times degree^1/2.
        attn_dst: scores depend on the destination node too.
    """

    def __init__(self, inputs: int, width: int, heads: int, *, use_norm: bool, attn_dst: bool) -> None:
        super().__init__()
        self.heads, self.width, self.use_norm = heads, width, use_norm
        self.weight = nn.Parameter(torch.empty(heads * width, inputs))
        self.residual = nn.Parameter(torch.empty(heads * width, inputs))
        self.attention_source = nn.Parameter(torch.empty(1, heads, width))
        self.attention_target = nn.Parameter(torch.empty(1, heads, width)) if attn_dst else None
        for parameter in self.parameters():
            nn.init.xavier_normal_(parameter, gain=nn.init.calculate_gain("relu"))

    def forward(self, parts: Sequence[Tensor | Sparse], graph: LayerGraph) -> Tensor:
        """Parts of the columns of x, (N, F) together → (N, H·O)."""
        f = project(parts, self.weight).view(-1, self.heads, self.width)
        target = None if self.attention_target is None else (f * self.attention_target).sum(dim=-1)  # (N, H)
        degree = graph.degree.to(f.dtype).sqrt()[:, None, None]
        if self.use_norm:
            f = f / degree
        source = (f * self.attention_source).sum(dim=-1)  # (N, H)
        spread = self._spread(source)
        wide_enough = [dtype for dtype in (f.dtype, torch.float64) if spread <= MAX_SPREAD[dtype]]
        if target is None and wide_enough:
            out = self.by_source(f, source, graph, wide_enough[0])
        else:
            out = self.by_edge(f, source, target, graph)
        if self.use_norm:
            out = out * degree
        return out.flatten(start_dim=1) + project(parts, self.residual)

    @staticmethod
    @torch.no_grad()
    def _spread(source: Tensor) -> float:
        """Largest distance between two scores of a head."""
        scores = F.leaky_relu(source, SLOPE)
        return float((scores.amax(dim=0) - scores.amin(dim=0)).max())

    def by_source(self, f: Tensor, source: Tensor, graph: LayerGraph, dtype: torch.dtype = torch.float32) -> Tensor:
        """Attention by one sparse product in `dtype`; f (N, H, O), scores of the sources (N, H) → (N, H, O)."""
        scores = F.leaky_relu(source, SLOPE).to(dtype)
        middle = torch.stack(scores.detach().aminmax(dim=0)).mean(dim=0)
        w = (scores - middle).exp()
        both = torch.cat([(f * w.unsqueeze(-1)).flatten(start_dim=1), w], dim=1)  # (N, H·O + H)
        total, weight = (graph.matrix(dtype) @ both).split([self.heads * self.width, self.heads], dim=1)
        weight = weight.masked_fill(weight == 0, 1.0)  # a node without in-edges gets 0
        return (total.reshape(f.shape) / weight.unsqueeze(-1)).to(f.dtype)

    def by_edge(self, f: Tensor, source: Tensor, target: Tensor | None, graph: LayerGraph) -> Tensor:
        """Attention along the edges, head by head; f (N, H, O), scores (N, H) → (N, H, O)."""
        row, col = graph.pattern.row, graph.pattern.col
        if graph.kept is not None:
            row, col = row[graph.kept], col[graph.kept]
        out = []
        for head in range(self.heads):
            e = source[col, head] if target is None else source[col, head] + target[row, head]  # (E,)
            e = F.leaky_relu(e, SLOPE)
            highest = e.new_full(f.shape[:1], -torch.inf).scatter_reduce(0, row, e.detach(), "amax")
            w = (e - highest[row]).exp()
            weight = w.new_zeros(f.shape[0]).index_add(0, row, w)
            message = f[col, head] * (w / weight[row]).unsqueeze(1)  # (E, O)
            out.append(torch.zeros_like(f[:, head]).index_add(0, row, message))
        return torch.stack(out, dim=1)


class ReplayBatchNorm(nn.BatchNorm1d):
    """BatchNorm whose running statistics stand still when a reversible block computes the same batch again."""

    def forward(self, x: Tensor, first_pass: bool) -> Tensor:  # type: ignore[override]
        """(N, D) → (N, D)."""
        if self.training and not first_pass:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        return super().forward(x)


class Branch(nn.Module):
    """F of a reversible block: BatchNorm → ReLU → dropout by a given mask → graph attention, for one column group."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        heads, width = config.n_heads, config.n_hidden // config.group
        self.norm = ReplayBatchNorm(heads * width)
        self.conv = GraphAttention(
            heads * width, width, heads, use_norm=config.use_norm, attn_dst=not config.no_attn_dst
        )

    def forward(self, x: Tensor, graph: LayerGraph, mask: Tensor | None) -> Tensor:
        """(N, D / group) → (N, D / group)."""
        h = F.relu(self.norm(x, graph.first_pass))
        return self.conv([h if mask is None else h * mask], graph)  # type: ignore[no-any-return]


class RevGAT(nn.Module):
    """The network.

    Args:
        config: n_layers, n_hidden, n_heads, ..., and the norm.
        inputs: F, the label channels included.
        classes: C.
    """

    def __init__(self, config: Config, inputs: int, classes: int) -> None:
        super().__init__()
        width = config.n_heads * config.n_hidden
        attention = {"use_norm": config.use_norm, "attn_dst": not config.no_attn_dst}
        self.first = GraphAttention(inputs, config.n_hidden, config.n_heads, **attention)
        self.blocks = nn.ModuleList()
        for _ in range(config.n_layers - 2):
            branch = Branch(config)
            # A list: from one module GroupAddRev would make copies with weights of their own. They start out equal.
            self.blocks.append(pyg_nn.GroupAddRev(nn.ModuleList([copy.deepcopy(branch) for _ in range(config.group)])))
        self.norms = nn.ModuleList([build_norm(config) for _ in range(config.n_layers - 1)])
        self.batch_norm = nn.BatchNorm1d(width)
        self.last = GraphAttention(width, classes, 1, **attention)
        self.bias = nn.Parameter(torch.zeros(classes))
        self.dropout, self.input_drop, self.edge_drop = config.dropout, config.input_drop, config.edge_drop
        self.reversible = config.reversible

    def forward(self, parts: Sequence[Tensor | Sparse], adjacency: Adjacency) -> Tensor:
        """Parts of the columns of the input, (N, F) together → logits (N, C)."""
        graphs = layer_graphs(adjacency, len(self.norms) + 1, self.edge_drop if self.training else 0.0)
        x = self.first([dropout(part, self.input_drop, self.training) for part in parts], graphs[0])
        x = self.norms[0](x, adjacency)
        mask = None
        if self.training and self.blocks:  # GroupAddRev keeps no random state: its replays get the same mask
            mask = F.dropout(torch.ones_like(x), self.dropout)
        for block, norm, graph in zip(self.blocks, self.norms[1:], graphs[1:-1], strict=True):
            block.disable = not (self.reversible and torch.is_grad_enabled())  # it frees its input without a need, too
            x = norm(block(x, graph, mask), adjacency)
        for graph in graphs:
            graph.first_pass = False
        x = F.dropout(F.relu(self.batch_norm(x)), self.dropout, self.training)
        logits: Tensor = self.last([x], graphs[-1]) + self.bias
        return logits

    def describe(self) -> str:
        """One line: what was built, read off the modules."""
        count = sum(p.numel() for p in self.parameters())
        blocks = f"{len(self.blocks)} reversible blocks" if self.blocks else "no reversible block"
        size = f"{len(self.norms) + 1} layers, {blocks}, {count:,} parameters"
        return f"RevGAT: {size}; after every layer but the last: {self.norms[0]!r}"
