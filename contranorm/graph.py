"""Norms for the nodes of graphs: GraphContraNorm, and the baselines of Table 3 that PyG has no equivalent of."""

from __future__ import annotations

import functools
import inspect
from typing import Any, Literal, TypeVar, Unpack

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from contranorm.functional import apply_step
from contranorm.kernels.autograd import is_traced, is_transformed
from contranorm.kernels.masks import entries, remembered, restrict
from contranorm.layer import ContraStep, Switches

T = TypeVar("T", bound=nn.Module)


class GraphContraNorm(ContraStep):
    """x - s·A·x over the nodes of a graph, adjacent pairs left out of A's softmax (Guo et al., ICLR 2023).

    Neighbours are meant to agree, so only the other nodes are pushed away. The LayerNorm that the experiments put after
    it (`--use_layer_norm`) is shared by all layers and belongs to the model.

    In PyG's BasicGNN (GCN, GraphSAGE, GAT, ...), whose norms see no edges, `carry_edges` brings them:
    ```
    model = carry_edges(GCN(16, 64, num_layers=8, norm=GraphContraNorm(1.0)))
    model(data.x, data.edge_index, batch=data.batch)
    ```

    Args:
        scale, tau, dim, switches: as of `ContraStep`.
        add_self_loops: leave each node out of its own softmax, whether or not the edges say so.

    Raises:
        ValueError: axis="features", an implementation that leaves out no pairs, or as `ContraStep`.
    """

    def __init__(
        self,
        scale: float,
        tau: float = 1.0,
        *,
        dim: int | None = None,
        add_self_loops: bool = True,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(scale, tau, dim=dim, **switches)
        if self.axis == "features":
            raise ValueError("axis='features' compares features, not nodes: there are no adjacent pairs to leave out")
        if self.implementation in ("fused", "sdpa"):
            raise ValueError(f"implementation {self.implementation!r} leaves out no pairs: use 'blocked', or leave it")
        self.add_self_loops = add_self_loops
        self.carried: tuple[Tensor, Tensor | None] | None = None

    def forward(self, x: Tensor, adjacency: Tensor | None = None, batch: Tensor | None = None) -> Tensor:
        """Push apart the nodes that are not adjacent.

        Args:
            x: (N, D).
            adjacency: PyG's edge_index (2, E), sources and targets, or a sparse CSR or COO matrix (N, N) whose stored
                entries, whatever their values, are (target, source): a source is left out of its target's softmax. The
                tensor must not be changed in place afterwards.
            batch: the graph of each node, (N,) integers; nodes are contrasted with those of their own graph only.

        Returns:
            (N, D). A node adjacent to all others has nothing to be pushed from: its contrast term is 0.

        Raises:
            ValueError: none of these, with what was given instead.
        """
        if self.carried is not None:
            adjacency, batch = self.carried
        return _step_on_graphs(x, adjacency, batch, self.add_self_loops, **self.settings())


def _step_on_graphs(
    x: Tensor, adjacency: Tensor | None, batch: Tensor | None, add_self_loops: bool, **settings: Any
) -> Tensor:
    if adjacency is None or (adjacency.dim() == 1 and adjacency.shape == x.shape[:1]):
        raise ValueError(
            "GraphContraNorm needs the edges: norm(x, edge_index). PyG's BasicGNN gives its norms none: call "
            "contranorm.carry_edges(model) once, and the model as a whole"
        )
    if is_traced(x) or is_transformed():
        exclude = _excluded_as_a_mask(adjacency, batch, x, add_self_loops)
        return apply_step(x, mask=None, exclude=exclude, **settings)
    exclude = _excluded(adjacency, len(x), add_self_loops)
    if batch is None:
        return apply_step(x, mask=None, exclude=exclude, **settings)
    graphs = _graphs(exclude, batch, len(x))
    moved = [apply_step(x[nodes], mask=None, exclude=among, **settings) for nodes, among in graphs]
    return torch.cat(moved)[torch.cat([nodes for nodes, _ in graphs]).argsort()] if moved else x


torch.fx.wrap("_step_on_graphs")  # symbolic tracing calls it as it is, whatever the edges will be


def carry_edges(model: T) -> T:
    """Have each GraphContraNorm in a PyG model see the edge_index and batch with which the model is called.

    Args:
        model: a BasicGNN, or any module with `edge_index` among the arguments of its forward; changed in place.

    Raises:
        ValueError: no GraphContraNorm, or no edge_index.
    """
    if not any(isinstance(module, GraphContraNorm) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no GraphContraNorm: build it with norm=GraphContraNorm(scale)")
    parameters = list(inspect.signature(model.forward).parameters)
    if "edge_index" not in parameters:
        raise ValueError(f"{type(model).__name__}.forward takes no edge_index, but {', '.join(parameters)}")
    if hasattr(model, "supports_norm_batch"):
        setattr(model, "supports_norm_batch", False)  # noqa: B010 - BasicGNN then calls norm(x) and nothing more
    model.register_forward_pre_hook(functools.partial(_bring_edges, parameters), with_kwargs=True)
    model.register_forward_hook(_drop_edges, always_call=True)
    return model


def _bring_edges(parameters: list[str], model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    given = dict(zip(parameters, args, strict=False)) | kwargs
    if given.get("num_sampled_nodes_per_hop") is not None:
        raise ValueError("num_sampled_nodes_per_hop trims the edges layer by layer, where the norms cannot see it")
    for module in model.modules():
        if isinstance(module, GraphContraNorm):
            module.carried = given["edge_index"], given.get("batch")


def _drop_edges(model: nn.Module, args: Any, output: Any) -> None:
    for module in model.modules():
        if isinstance(module, GraphContraNorm):
            module.carried = None


def _excluded(adjacency: Tensor, n: int, add_self_loops: bool) -> Tensor:
    """The pairs left out as a sparse CSR (n, n): the adjacency itself where it is that already."""
    given = f"{adjacency.layout} {adjacency.dtype} {tuple(adjacency.shape)}"
    wanted = f"edge_index, integers (2, E), or a sparse CSR or COO matrix ({n}, {n}) for x with {n} rows"
    if adjacency.layout == torch.strided:
        fits = adjacency.dim() == 2 and len(adjacency) == 2 and adjacency.dtype in (torch.long, torch.int)
    else:
        fits = adjacency.layout in (torch.sparse_csr, torch.sparse_coo) and adjacency.shape == (n, n)
    if not fits:
        dense = "; a dense matrix is made sparse by .to_sparse_csr()" if adjacency.shape == (n, n) else ""
        raise ValueError(f"adjacency must be {wanted}, got {given}{dense}")

    def make() -> Tensor | None:
        if adjacency.layout == torch.strided:
            columns, rows = adjacency.long()
        elif adjacency.layout == torch.sparse_csr:
            rows, columns = entries(adjacency)
            if not add_self_loops or int((rows == columns).sum()) == n:
                return None  # the matrix itself: a cached value must not keep its own key alive
        else:
            rows, columns = adjacency.coalesce().indices()
        wrong = rows[(rows < 0) | (rows >= n)], columns[(columns < 0) | (columns >= n)]
        if node := torch.cat(wrong).tolist():
            raise ValueError(f"edge_index names node {node[0]}, but x has {n} rows")
        loops = torch.arange(n if add_self_loops else 0, device=rows.device)
        pairs: Tensor = torch.cat([rows * n + columns, loops * (n + 1)]).unique()  # type: ignore[no-untyped-call]
        indices = torch.stack([pairs // n, pairs % n])
        ones = torch.ones(len(pairs), device=pairs.device)
        return torch.sparse_coo_tensor(indices, ones, (n, n), is_coalesced=True, check_invariants=True).to_sparse_csr()

    made = remembered(adjacency, ("excluded", n, add_self_loops), make)
    return adjacency if made is None else made


def _excluded_as_a_mask(adjacency: Tensor, batch: Tensor | None, x: Tensor, add_self_loops: bool) -> Tensor:
    """The pairs left out as a bool (N, N), nodes of other graphs among them: nothing that the data decides."""
    n = x.shape[0]
    if adjacency.layout == torch.strided:
        columns, rows = adjacency.long()
    else:
        rows, columns = entries(adjacency if adjacency.layout == torch.sparse_csr else adjacency.to_sparse_csr())
    exclude = torch.zeros(n, n, dtype=torch.bool, device=x.device).index_put((rows, columns), rows.new_ones(()) > 0)
    if add_self_loops:
        exclude = exclude | torch.eye(n, dtype=torch.bool, device=x.device)
    return exclude if batch is None else exclude | (batch[:, None] != batch)


def _graphs(exclude: Tensor, batch: Tensor, n: int) -> list[tuple[Tensor, Tensor]]:
    """Of each graph its nodes and the pairs left out among them."""
    if batch.shape != (n,) or batch.dtype not in (torch.long, torch.int):
        raise ValueError(f"batch must be integers ({n},), a graph per row of x, got {batch.dtype} {tuple(batch.shape)}")

    def make() -> list[tuple[Tensor, Tensor]]:
        sizes = torch.bincount(batch)
        graphs = torch.split(batch.argsort(stable=True), sizes[sizes > 0].tolist())
        return [(nodes, restrict(exclude, nodes)) for nodes in graphs]

    return remembered(exclude, "graphs", make, of=batch)


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
