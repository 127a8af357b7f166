"""Deep graph networks for node classification, each one a stack of

    dropout → convolution → norm → (LayerNorm shared by all layers) → ReLU → (+ features of k layers before)

with a last dropout → convolution to the classes. Shapes: N nodes, F input features, D width, C classes, E edges.
"""  # noqa: D205, D415  (the diagram is the summary)

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from gnn.config import Config
from gnn.layers import (
    Adjacency,
    AttentionConvolution,
    GraphConvolution,
    GraphNetwork,
    IsomorphismConvolution,
    Layer,
    apply_norm,
    build_norms,
    dense,
    dropout,
)
from gnn.rivals import G2, GCNII, Connection
from gnn.sparse import Sparse


class DeepGCN(GraphNetwork):
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
        for before, after, norm in zip(widths[:-1], widths[1:], build_norms(config, widths[1:]), strict=True):
            fits = config.norm_mode != "MessageNorm" or before == after  # it adds the message to the layer's input
            convolution = self.convolution(before, after, **heads)
            self.layers.append(Layer(convolution, norm if fits else nn.Identity(), config.dropout))
        self.shared_norm = nn.LayerNorm(config.hid) if config.use_layer_norm else None
        self.connection = Connection(config.connection, config.alpha) if config.connection else None
        last = widths[-1] if self.connection is None else self.connection.width(config.hid, len(self.layers))
        self.output = self.convolution(last, classes)
        self.rate, self.dropedge, self.residual = config.dropout, config.dropedge, config.residual

    def forward(self, x: Tensor | Sparse, adjacency: Adjacency) -> Tensor:
        """(N, F) → logits (N, C)."""
        adjacency = self.thinned(adjacency)
        skip: Tensor | None = None  # features of `residual` layers before
        hidden: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            joins = self.residual > 0 and i % self.residual == 0
            x = layer(x, adjacency, self.shared_norm, skip if joins else None)
            skip = x if joins else skip
            if self.connection is not None:
                x = self.connection.mix(x, hidden)
                hidden.append(x)
        if self.connection is not None:
            x = self.connection.join(hidden)
        logits: Tensor = self.output(dropout(x, self.rate, self.training), adjacency)
        return logits


class DeepGAT(DeepGCN):
    """`nlayer` attention convolutions, the last with a single head."""

    convolution = AttentionConvolution


class GIN(DeepGCN):
    """`nlayer` isomorphism convolutions."""

    convolution = IsomorphismConvolution


class SGC(GraphNetwork):
    """`nlayer` propagation steps, each followed by the norm, then dropout and one linear layer (Wu et al., ICML 2019).

    The features keep their input width. Without parameters or chance in the steps they are taken once, not per epoch.
    """

    def __init__(self, config: Config, inputs: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Propagation(norm) for norm in build_norms(config, [inputs] * config.nlayer))
        self.shared_norm = nn.LayerNorm(inputs) if config.use_layer_norm else None
        self.constant = not config.dropedge and not any(p.requires_grad for p in self.parameters())
        self.output = nn.Linear(inputs, classes)
        self.rate, self.dropedge = config.dropout, config.dropedge
        self._propagated: tuple[Any, Any, Tensor] | None = None  # features, adjacency, and what the steps make of them

    def propagate(self, x: Tensor | Sparse, adjacency: Adjacency) -> Tensor:
        """The steps; (N, F) → (N, F)."""
        h = dense(x)
        for layer in self.layers:
            h = layer(h, adjacency, self.shared_norm)
        return h

    def forward(self, x: Tensor | Sparse, adjacency: Adjacency) -> Tensor:
        """(N, F) → logits (N, C)."""
        if self.constant and self.training:
            known = self._propagated
            if known is None or known[0] is not x or known[1] is not adjacency:
                known = self._propagated = (x, adjacency, self.propagate(x, adjacency))
            h = known[2]
        else:
            h = self.propagate(x, self.thinned(adjacency))
        logits: Tensor = self.output(F.dropout(h, self.rate, self.training))
        return logits


class Propagation(nn.Module):
    """One step of SGC: A·x → norm → shared LayerNorm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, adjacency: Adjacency, shared: nn.LayerNorm | None) -> Tensor:
        """(N, F) → (N, F)."""
        h = apply_norm(self.norm, adjacency.propagation @ x, x, adjacency)
        return h if shared is None else shared(h)


MODELS: dict[str, type[GraphNetwork]] = {
    "DeepGCN": DeepGCN, "SGC": SGC, "DeepGAT": DeepGAT, "GIN": GIN, "GCNII": GCNII, "G2": G2,
}  # fmt: skip


def build_model(config: Config, inputs: int, classes: int) -> GraphNetwork:
    """The model that `--model` names."""
    return MODELS[config.model](config, inputs, classes)  # type: ignore[call-arg]


def describe(model: GraphNetwork, config: Config) -> str:
    """One line: which layers carry which norm, read off the model that was built."""
    norms = [layer.norm for layer in model.layers]
    carriers = [str(i + 1) for i, norm in enumerate(norms) if not isinstance(norm, nn.Identity)]
    span = "-".join(carriers[:1] + carriers[1:][-1:])  # "1" or "1-15"
    what = f"{norms[-1]!r} on layers {span}" if carriers else "no norm"
    shared = "one LayerNorm shared by all hidden layers" if model.shared_norm is not None else "no LayerNorm"
    linear = isinstance(model.output, nn.Linear)
    last = "a linear output layer" if linear else f"a plain output layer {len(norms) + 1}"
    connection = f"; {model.connection!r}" if model.connection is not None else ""
    return f"{config.model}: {len(norms)} hidden layers and {last}; {what}; {shared}{connection}"
