"""GraphContraNorm with PyG's edges, batches and models."""

from __future__ import annotations

import copy

import pytest
import torch

import gnn.pyg  # noqa: F401  # isort: skip  (PyG without its deprecation warnings: before PyG's own names)
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GAT, GCN, GIN, GraphSAGE
from torch_geometric.utils import erdos_renyi_graph, to_dense_adj, to_undirected

from contranorm import GraphContraNorm, carry_edges, contra_norm
from contranorm.kernels import masks


def graph(n: int, seed: int = 0) -> Data:
    torch.manual_seed(seed)
    return Data(x=torch.randn(n, 6, dtype=torch.float64), edge_index=erdos_renyi_graph(n, 0.3))


def matrix(data: Data, self_loops: bool = True) -> torch.Tensor:
    dense = to_dense_adj(data.edge_index, max_num_nodes=len(data.x))[0].T  # rows are targets
    return dense + torch.eye(len(data.x)) if self_loops else dense


def test_what_is_remembered_of_a_batch_serves_training_and_does_not_pile_up():
    data, norm = graph(12), GraphContraNorm(0.5)
    batch = torch.zeros(12, dtype=torch.long)
    with torch.inference_mode():
        want = norm(data.x, data.edge_index, batch)
    torch.testing.assert_close(norm(data.x.clone().requires_grad_(), data.edge_index, batch), want)
    kept = [sum(len(known) for known in masks._cache.values())]
    for _ in range(5):  # a loader makes a new vector for each batch
        norm(data.x, data.edge_index, batch.clone())
        kept.append(sum(len(known) for known in masks._cache.values()))
    assert kept[1:] == kept[:1] * 5


@pytest.mark.parametrize("self_loops", [True, False])
@pytest.mark.parametrize("form", ["edge_index", "int32", "duplicates", "csr", "coo"])
def test_every_form_of_the_edges(form, self_loops):
    data = graph(12)
    edges = {
        "edge_index": lambda: data.edge_index,
        "int32": lambda: data.edge_index.int(),
        "duplicates": lambda: data.edge_index.repeat(1, 2),
        "csr": lambda: matrix(data, self_loops=False).to_sparse_csr(),
        "coo": lambda: matrix(data, self_loops=False).to_sparse_coo(),
    }[form]()
    want = contra_norm(data.x, 0.5, exclude=matrix(data, self_loops).to_sparse_csr(), implementation="plain")
    torch.testing.assert_close(GraphContraNorm(0.5, add_self_loops=self_loops)(data.x, edges), want)


def test_a_directed_edge_leaves_its_source_out_of_its_targets_softmax():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    y = GraphContraNorm(0.5)(x, torch.tensor([[0], [1]]))
    torch.testing.assert_close(y[1], x[1] - 0.5 * x[2])  # 0 is its neighbour: 2 is all that is left
    assert not torch.allclose(y[0], x[0] - 0.5 * x[2])


def test_a_graph_without_edges():
    x = torch.randn(5, 4)
    none = torch.empty(2, 0, dtype=torch.long)
    want = contra_norm(x, 0.5, exclude=torch.eye(5).to_sparse_csr())
    torch.testing.assert_close(GraphContraNorm(0.5)(x, none), want)
    torch.testing.assert_close(GraphContraNorm(0.5, add_self_loops=False)(x, none), contra_norm(x, 0.5))


@pytest.mark.parametrize("form", [{}, dict(symmetric=True, tau=0.5), dict(implementation="blocked")])
def test_the_graphs_of_a_batch_are_kept_apart(form):
    norm = GraphContraNorm(0.5, **form)
    graphs = [graph(n, seed) for seed, n in enumerate((7, 1, 12, 3))]
    batch = Batch.from_data_list(graphs)
    x = batch.x.requires_grad_()
    y = norm(x, batch.edge_index, batch.batch)
    torch.testing.assert_close(y, torch.cat([norm(g.x, g.edge_index) for g in graphs]))
    y[:7].square().sum().backward()
    assert x.grad[:7].abs().min() > 0 and not x.grad[7:].any()

    mixed = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    place = mixed.argsort()
    torch.testing.assert_close(norm(x[mixed], place[batch.edge_index], batch.batch[mixed]), y[mixed])
    gaps = batch.batch * 3 + 1  # numbers of graphs that are not there
    torch.testing.assert_close(norm(x, batch.edge_index, gaps), y)


def test_two_batch_vectors_of_the_same_edges():
    x, edges, norm = torch.randn(4, 3), torch.empty(2, 0, dtype=torch.long), GraphContraNorm(0.5)
    for batch in ([0, 0, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1]):
        parts = [norm(x[torch.tensor(batch) == g], edges.clone()) for g in (0, 1)]
        torch.testing.assert_close(norm(x, edges, torch.tensor(batch)), torch.cat(parts))


WRONG = [
    (torch.randn(5, 5), r"got torch.strided torch.float32 \(5, 5\); a dense matrix is made sparse"),
    (torch.zeros(3, 8, dtype=torch.long), r"got torch.strided torch.int64 \(3, 8\)"),
    (torch.randn(2, 8), r"got torch.strided torch.float32 \(2, 8\)"),
    (torch.eye(4).to_sparse_csr(), r"\(5, 5\) for x with 5 rows, got torch.sparse_csr torch.float32 \(4, 4\)"),
    (torch.tensor([[0, 7], [1, 2]]), "names node 7, but x has 5 rows"),
    (torch.tensor([[0, -1], [1, 2]]), "names node -1, but x has 5 rows"),
    (None, "needs the edges"),
]


@pytest.mark.parametrize("edges, message", WRONG)
def test_messages_name_what_was_given(edges, message):
    with pytest.raises(ValueError, match=message):
        GraphContraNorm(0.5)(torch.randn(5, 3), edges)


@pytest.mark.parametrize("batch", [torch.zeros(4, dtype=torch.long), torch.zeros(5)])
def test_a_batch_vector_that_does_not_fit(batch):
    with pytest.raises(ValueError, match=rf"got {batch.dtype} \({len(batch)},\)"):
        GraphContraNorm(0.5)(torch.randn(5, 3), torch.empty(2, 0, dtype=torch.long), batch)


def test_wrong_edges_are_refused_every_time():
    norm, edges = GraphContraNorm(0.5), torch.tensor([[0, 7], [1, 2]])
    for _ in range(2):
        with pytest.raises(ValueError, match="node 7"):
            norm(torch.randn(5, 3), edges)
    assert norm(torch.randn(8, 3), edges).shape == (8, 3)  # the same edges of a larger graph


@pytest.mark.parametrize("model_class", [GCN, GraphSAGE, GAT, GIN])
def test_as_norm_of_pygs_models(model_class):
    torch.manual_seed(0)
    model = carry_edges(model_class(6, 8, num_layers=3, out_channels=2, norm=GraphContraNorm(0.5)).double())
    graphs = [graph(n, seed) for seed, n in enumerate((7, 12))]
    batch = Batch.from_data_list(graphs)
    want = torch.cat([model(g.x, g.edge_index) for g in graphs])
    torch.testing.assert_close(model(batch.x, batch.edge_index, batch=batch.batch), want)
    torch.testing.assert_close(copy.deepcopy(model)(x=batch.x, edge_index=batch.edge_index, batch=batch.batch), want)
    plain = model_class(6, 8, num_layers=3, out_channels=2).double()
    plain.load_state_dict(model.state_dict(), strict=True)
    assert (plain(batch.x, batch.edge_index) - want).abs().max() > 1e-3
    h = plain.convs[0](graphs[0].x, graphs[0].edge_index)
    for conv in plain.convs[1:]:
        h = conv(GraphContraNorm(0.5)(h, graphs[0].edge_index).relu(), graphs[0].edge_index)
    torch.testing.assert_close(want[:7], h)


@pytest.mark.parametrize("batch", [None, torch.zeros(5, dtype=torch.long)])
def test_a_pyg_model_that_carries_no_edges_says_what_to_do(batch):
    model = GCN(3, 8, num_layers=2, norm=GraphContraNorm(0.5))
    with pytest.raises(ValueError, match=r"contranorm.carry_edges\(model\)"):
        model(torch.randn(5, 3), to_undirected(torch.tensor([[0, 1], [1, 2]])), batch=batch)


def test_carry_edges_refuses_models_that_it_cannot_serve():
    with pytest.raises(ValueError, match="GCN has no GraphContraNorm"):
        carry_edges(GCN(3, 8, num_layers=2))
    with pytest.raises(ValueError, match="takes no edge_index, but input"):
        carry_edges(torch.nn.Sequential(GraphContraNorm(0.5)))
    model = carry_edges(GCN(3, 8, num_layers=2, norm=GraphContraNorm(0.5)))
    edges = torch.tensor([[0, 1], [1, 2]])
    with pytest.raises(ValueError, match="trims the edges"):
        model(torch.randn(5, 3), edges, num_sampled_nodes_per_hop=[3, 2], num_sampled_edges_per_hop=[1, 1])
    model(torch.randn(5, 3), edges)
    with pytest.raises(ValueError, match="needs the edges"):
        model.norms[0](torch.randn(5, 8))  # nothing is left of the forward before
