"""Sparse products against dense ones."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from gnn.layers import Adjacency, dropout
from gnn.sparse import Pattern, Sparse


def random_sparse(rows: int = 7, columns: int = 5, seed: int = 0) -> tuple[Sparse, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    dense = dense * (torch.rand(rows, columns, generator=generator) < 0.4)
    dense[2] = 0  # an empty row
    dense[:, 3] = 0  # and an empty column
    return Sparse.from_dense(dense), dense


def test_product_and_gradient_equal_the_dense_ones() -> None:
    sparse, dense = random_sparse()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(sparse.to_dense(), dense)
    torch.testing.assert_close(sparse @ x, dense @ x)
    assert torch.autograd.gradcheck(lambda z: sparse @ z, x)


def test_gradient_of_a_non_contiguous_output() -> None:
    sparse, dense = random_sparse()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    (sparse @ x).T.reshape(-1).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(dim=0)[:, None].expand(-1, 3))


def test_pattern_sorts_its_entries() -> None:
    row, col = torch.tensor([2, 0, 1, 0]), torch.tensor([1, 2, 0, 0])
    pattern = Pattern(row, col, (3, 3))
    assert pattern.row.tolist() == [0, 0, 1, 2]
    assert pattern.col.tolist() == [0, 2, 0, 1]
    assert pattern.csr(torch.ones(4)).to_dense().nonzero().tolist() == [[0, 0], [0, 2], [1, 0], [2, 1]]


def test_adjacency_is_the_row_normalized_undirected_graph_with_loops() -> None:
    edges = torch.tensor([[0, 1, 1, 3, 0], [1, 2, 0, 3, 1]])  # directed, doubled, with a self-loop; node 4 is alone
    adjacency = Adjacency.from_edges(edges, 5)
    a = torch.zeros(5, 5)
    for i, j in edges.T.tolist():
        a[i, j] = a[j, i] = 1
    a.fill_diagonal_(0)
    looped = a + torch.eye(5)
    torch.testing.assert_close(adjacency.propagation.to_dense(), looped / looped.sum(dim=1, keepdim=True))
    assert torch.equal(adjacency.sum.to_dense(), a)
    assert torch.equal(adjacency.excluded.to_dense() != 0, looped != 0)
    source, target = adjacency.edge_index()
    back = torch.zeros(5, 5)
    back[target, source] = 1
    assert torch.equal(back, looped)


def test_dropedge_leaves_out_a_share_and_renormalizes() -> None:
    torch.manual_seed(0)
    adjacency = Adjacency.from_edges(torch.randint(0, 200, (2, 5000)), 200)
    dropped = adjacency.drop(0.3)
    edges = ~adjacency.loops
    assert abs(1 - dropped.kept[edges].mean().item() - 0.3) < 0.03
    assert (dropped.kept[adjacency.loops] == 1).all()
    torch.testing.assert_close(dropped.propagation.to_dense().sum(dim=1), torch.ones(200))
    assert dropped.edge_index().shape[1] == int(dropped.kept.sum())
    assert torch.equal(dropped.excluded.values(), torch.ones(len(dropped.kept)))  # ContraNorm's neighbours stay


def test_dropout_of_sparse_features_is_dropout_of_the_dense_ones() -> None:
    sparse, dense = random_sparse(400, 50)
    torch.manual_seed(0)
    dropped = dropout(sparse, 0.6, training=True)
    assert isinstance(dropped, Sparse)
    kept = dropped.values != 0
    assert abs(kept.double().mean().item() - 0.4) < 0.03
    torch.testing.assert_close(dropped.values[kept], sparse.values[kept] / 0.4)
    assert dropout(sparse, 0.6, training=False) is sparse
    torch.testing.assert_close(dropout(dense, 0.0, training=True), F.dropout(dense, 0.0))
