"""RevGAT: published sizes, the sparse product against the edges, reversible blocks against plain ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gnn.arxiv import models
from gnn.arxiv.config import Config
from gnn.arxiv.models import Branch, GraphAttention, LayerGraph, RevGAT, layer_graphs, project
from gnn.layers import Adjacency
from gnn.pyg import nn as pyg_nn
from gnn.sparse import Sparse

Make = Callable[..., Config]
NODES, INPUTS, CLASSES = 60, 8, 3
BY_EDGE = {torch.float32: -1.0, torch.float64: -1.0}  # no spread is that small


@pytest.fixture(autouse=True)
def double_precision() -> object:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def whole(adjacency: Adjacency, drop: float = 0.0) -> LayerGraph:
    return layer_graphs(adjacency, 1, drop)[0]


def attention(**switches: bool) -> GraphAttention:
    return GraphAttention(INPUTS, 5, 3, **{"use_norm": True, "attn_dst": False} | switches)


# -- sizes and initialization ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "inputs", "published"), [(2, 768 + 40, 1_304_912), (5, 128 + 40, 2_098_256), (2, 128 + 40, 321_872)]
)
def test_number_of_parameters(layers: int, inputs: int, published: int, config: Make) -> None:
    model = RevGAT(config(n_layers=layers, n_hidden=256, n_heads=3), inputs, 40)
    assert sum(p.numel() for p in model.parameters()) == published
    assert f"{published:,} parameters" in model.describe()


def test_initialization() -> None:
    conv = GraphAttention(808, 256, 3, use_norm=True, attn_dst=False)
    assert float(conv.attention_source.detach().std()) == pytest.approx(0.0625, rel=0.1)
    assert float(conv.weight.detach().std()) == pytest.approx((2 * 2 / (808 + 768)) ** 0.5, rel=0.01)
    assert float(conv.residual.detach().std()) == pytest.approx(float(conv.weight.detach().std()), rel=0.01)


def test_the_branches_of_a_block_start_equal_and_are_trained_apart(config: Make) -> None:
    first, second = RevGAT(config(), INPUTS, CLASSES).blocks[0].convs
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert a is not b and torch.equal(a, b)


# -- the convolution ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("use_norm", [False, True])
def test_sparse_product_and_edges_agree(
    use_norm: bool, drop: float, adjacency: Adjacency, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv, graph = attention(use_norm=use_norm), whole(adjacency, drop)
    x, weight = torch.randn(NODES, INPUTS, requires_grad=True), torch.randn(NODES, 15)
    results = []
    for limits in (models.MAX_SPREAD, BY_EDGE):
        monkeypatch.setattr(models, "MAX_SPREAD", limits)
        out = conv([x], graph)
        results.append([out, *torch.autograd.grad((out * weight).sum(), [x, *conv.parameters()])])
    for by_source, by_edge in zip(*results, strict=True):
        torch.testing.assert_close(by_source, by_edge, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("spread", [1.0, 110.0, 200.0, 2000.0])  # in float32, float32, float64, edge by edge
def test_far_apart_scores(spread: float, adjacency: Adjacency, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far apart the scores are, a node that sees only low ones does not lose them."""
    conv, graph = attention(use_norm=False).float(), whole(adjacency)
    x = torch.randn(NODES, INPUTS, dtype=torch.float32, requires_grad=True)
    with torch.no_grad():
        f = (x @ conv.weight.T).view(NODES, 3, 5)
        conv.attention_source *= spread / conv._spread((f * conv.attention_source).sum(-1))
    results = []
    for limits in (models.MAX_SPREAD, BY_EDGE):
        monkeypatch.setattr(models, "MAX_SPREAD", limits)
        out = conv([x], graph)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), [x, *conv.parameters()])])
    for by_source, by_edge in zip(*results, strict=True):
        assert float((by_source - by_edge).norm() / by_edge.norm()) < 1e-4


@pytest.mark.parametrize("attn_dst", [False, True])
def test_a_node_without_edges_gets_the_residual_alone(attn_dst: bool, adjacency: Adjacency) -> None:
    conv, x = attention(attn_dst=attn_dst), torch.randn(NODES, INPUTS)
    kept = adjacency.pattern.row != 7
    graph = LayerGraph(adjacency, whole(adjacency).degree, kept)
    torch.testing.assert_close(conv([x], graph)[7], conv.residual @ x[7])


def test_without_scores_it_is_the_normalized_adjacency(adjacency: Adjacency) -> None:
    conv, x = attention(), torch.randn(NODES, INPUTS)
    for parameter in (conv.attention_source, conv.residual):
        nn.init.zeros_(parameter)
    dense = adjacency.pattern.csr(torch.ones(len(adjacency.pattern.row))).to_dense()
    scale = dense.sum(dim=1).rsqrt()
    expected = scale[:, None] * dense * scale @ x @ conv.weight.T
    torch.testing.assert_close(conv([x], whole(adjacency)), expected)


@pytest.mark.parametrize("attn_dst", [False, True])
def test_it_is_pyg_s_convolution(attn_dst: bool, adjacency: Adjacency) -> None:
    ours = attention(use_norm=False, attn_dst=attn_dst)
    theirs = pyg_nn.GATConv(INPUTS, 5, heads=3, add_self_loops=False, bias=False, residual=True)
    with torch.no_grad():
        theirs.lin.weight.copy_(ours.weight)
        theirs.res.weight.copy_(ours.residual)
        theirs.att_src.copy_(ours.attention_source)
        theirs.att_dst.copy_(torch.zeros(1, 3, 5) if ours.attention_target is None else ours.attention_target)
    x = torch.randn(NODES, INPUTS)
    torch.testing.assert_close(ours([x], whole(adjacency)), theirs(x, adjacency.edge_index()))


def test_the_target_s_score_is_of_unnormalized_features(adjacency: Adjacency) -> None:
    conv, graph, x = attention(attn_dst=True), whole(adjacency), torch.randn(NODES, INPUTS)
    f, out = (x @ conv.weight.T).view(NODES, 3, 5), torch.zeros(NODES, 3, 5)
    degree = graph.degree.sqrt()
    for node in range(NODES):
        near = adjacency.pattern.col[adjacency.pattern.row == node]
        source = f[near] / degree[near, None, None]
        e = (source * conv.attention_source).sum(-1) + (f[node] * conv.attention_target).sum(-1)
        a = nn.functional.leaky_relu(e, 0.2).softmax(dim=0)
        out[node] = (a.unsqueeze(-1) * source).sum(0) * degree[node]
    torch.testing.assert_close(conv([x], graph), out.flatten(1) + x @ conv.residual.T)


def test_parts_of_the_input_are_not_copied_side_by_side() -> None:
    parts = [torch.randn(9, 4).relu(), torch.randn(9, 3)]
    weight = torch.randn(5, 7)
    for first in (parts[0], Sparse.from_dense(parts[0])):
        torch.testing.assert_close(project([first, parts[1]], weight), torch.cat(parts, dim=1) @ weight.T)


def test_edges_are_dropped_by_number_and_anew_for_each_layer(adjacency: Adjacency) -> None:
    graphs = layer_graphs(adjacency, 3, 0.3)
    edges = len(adjacency.pattern.row)
    assert [int((~graph.kept).sum()) for graph in graphs] == [int(0.3 * edges)] * 3
    assert not torch.equal(graphs[0].kept, graphs[1].kept)
    loops = adjacency.pattern.row == adjacency.pattern.col
    assert any(not graph.kept[loops].all() for graph in graphs)
    assert all(torch.equal(graph.degree, whole(adjacency).degree) for graph in graphs)


# -- reversible blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [2, 4])
def test_a_block_is_undone_by_its_inverse(group: int, config: Make, adjacency: Adjacency) -> None:
    settings = config(n_hidden=8, group=group)
    block = pyg_nn.GroupAddRev(nn.ModuleList([Branch(settings) for _ in range(group)]), disable=True)
    x = torch.randn(NODES, 16)
    with torch.no_grad():
        y = block(x.clone(), whole(adjacency, 0.3), torch.ones_like(x))
        graph = whole(adjacency)
        y = block(x.clone(), graph, torch.ones_like(x))
        torch.testing.assert_close(block._inverse(y, graph, torch.ones_like(x)), x, rtol=0, atol=1e-13)


def test_a_block_is_the_published_recursion(config: Make, adjacency: Adjacency) -> None:
    branches = nn.ModuleList([Branch(config()) for _ in range(2)])
    x, mask, graph = torch.randn(NODES, 8), torch.randn(NODES, 8), whole(adjacency)
    y = pyg_nn.GroupAddRev(branches, disable=True)(x, graph, mask)
    first = x[:, :4] + branches[0](x[:, 4:], graph, mask[:, :4])
    second = x[:, 4:] + branches[1](first, graph, mask[:, 4:])
    torch.testing.assert_close(y, torch.cat([first, second], dim=1))


def step(model: RevGAT, x: Tensor, adjacency: Adjacency) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(1)
    with torch.no_grad():
        model([x], adjacency)  # as the label pass, which updates the statistics and needs no memory back
    out = model([x], adjacency)
    model.zero_grad()
    out.square().sum().backward()
    return out.detach(), [p.grad for p in model.parameters()]


NORMS = [
    {},
    {"norm": "ContraNorm", "scale": 1.0},
    {"norm": "ContraNorm", "scale": 0.5, "scaled_tau": True, "pre_norm": True, "dcn_use_mean": True},
    {"norm": "ContraNorm", "scale": 1.0, "tau": 20.0, "identity": False},
    {"norm": "ContraNorm", "scale": 1.0, "axis": "tokens"},
]


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: "-".join(n) or "vanilla")
@pytest.mark.parametrize("layers", [2, 3, 8])
def test_reversible_on_and_off_give_the_same_training(
    layers: int, norm: dict[str, object], config: Make, adjacency: Adjacency
) -> None:
    x = torch.randn(NODES, INPUTS)
    results = []
    for reversible in (True, False):
        torch.manual_seed(0)
        model = RevGAT(config(n_layers=layers, reversible=reversible, **norm), INPUTS, CLASSES)
        results.append((*step(model, x, adjacency), dict(model.named_buffers())))
    (out, grads, buffers), (out_off, grads_off, buffers_off) = results
    torch.testing.assert_close(out, out_off, rtol=0, atol=0)
    for a, b in zip(grads, grads_off, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    for name, value in buffers.items():  # running statistics of BatchNorm: not counted again in replays
        torch.testing.assert_close(value, buffers_off[name], rtol=0, atol=0)
    assert int(buffers["batch_norm.num_batches_tracked"]) == 2


def test_as_many_edges_as_columns(config: Make) -> None:
    """GroupAddRev splits any tensor whose last size is the width: the edges are passed as an object."""
    adjacency = Adjacency.from_edges(torch.tensor([[0, 1], [1, 2]]), 4)
    assert len(adjacency.pattern.row) == 8  # D = heads x hidden
    model = RevGAT(config(edge_drop=0.3), INPUTS, CLASSES)
    model([torch.randn(4, INPUTS)], adjacency).sum().backward()


def test_evaluation_is_deterministic_and_frees_nothing(config: Make, adjacency: Adjacency) -> None:
    model = RevGAT(config(norm="ContraNorm", scale=1.0), INPUTS, CLASSES).eval()
    x = torch.randn(NODES, INPUTS)
    with torch.no_grad():
        assert torch.equal(model([x], adjacency), model([x], adjacency))
    assert x.untyped_storage().size() > 0
    assert all(len(norm.activity) == 2 for norm in model.norms)
