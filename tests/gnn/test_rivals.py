"""The rivals: each one's equation and fixture, and the setting at which it is vanilla, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gnn import rivals
from gnn.config import Config
from gnn.data import as_graph, features, half_hop
from gnn.layers import Adjacency
from gnn.models import build_model
from gnn.pyg import nn as pyg_nn
from gnn.pyg import utils
from gnn.rivals import G2, GCNII, gradient_gate
from repro.cost import multiply_adds
from repro.seeding import seed_everything

PATH = torch.tensor([[0, 1, 2], [1, 2, 3]])  # 0-1-2-3
Parameters = list[Tensor]


def fixture(rows: int, columns: int, offset: float) -> Tensor:
    """S(r, c, o) = sin(1..rc + o), reshaped."""
    return torch.sin(torch.arange(1, rows * columns + 1, dtype=torch.float64) + offset).reshape(rows, columns)


@pytest.fixture
def graph(make_data: Callable[..., Any]) -> tuple[Tensor, Adjacency, Tensor]:
    data = as_graph("small", make_data())
    return features(data, missing_rate=0, seed=0), Adjacency.from_edges(data.edge_index, len(data.y)), data.y


def train(
    net: nn.Module, x: Tensor, adjacency: Adjacency, y: Tensor, parameters: Parameters | None = None
) -> list[Any]:
    """Losses of ten steps, then the logits, the gradients and what was trained."""
    parameters = list(net.parameters()) if parameters is None else parameters
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    torch.manual_seed(7)
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(net(x, adjacency)[: len(y)], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return [losses, net.eval()(x, adjacency)[: len(y)], [p.grad for p in parameters], [p.detach() for p in parameters]]


def assert_same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def build(config: Callable[..., Config], **changes: Any) -> nn.Module:
    seed_everything(3)
    return build_model(config(nlayer=4, dropout=0.4, **changes), 12, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_mode": "DiffGroupNorm", "scale": 0.0},
        {"connection": "residual", "alpha": 0.0},
        {"connection": "initial", "alpha": 0.0},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_without_strength_it_is_vanilla(changes: dict[str, Any], config: Any, graph: Any) -> None:
    vanilla, rival = build(config), build(config, **changes)
    names = dict(vanilla.named_parameters())
    extra = set(rival.state_dict()) - set(vanilla.state_dict())
    assert set(vanilla.state_dict()) <= set(rival.state_dict()) and all(".norm." in name for name in extra)
    shared = [p for name, p in rival.named_parameters() if name in names]
    assert len(shared) == len(names)
    assert_same(train(rival, *graph, parameters=shared), train(vanilla, *graph))


def test_jumping_knowledge_of_one_layer_is_vanilla(config: Any, graph: Any) -> None:
    for kind in ("jumping_cat", "jumping_max"):
        seed_everything(3)
        vanilla = build_model(config(nlayer=2), 12, 3)
        seed_everything(3)
        rival = build_model(config(nlayer=2, connection=kind), 12, 3)
        assert rival.state_dict().keys() == vanilla.state_dict().keys()
        assert_same(train(rival, *graph), train(vanilla, *graph))


def test_extra_parameters_leave_the_generator_alone_and_differ_by_layer(config: Any) -> None:
    vanilla, rival = build(config), build(config, norm_mode="DiffGroupNorm", scale=0.01)
    after = torch.rand(3)
    build(config)
    assert_same(after, torch.rand(3))
    for name, value in vanilla.state_dict().items():
        assert_same(rival.state_dict()[name], value)
    first, second = rival.layers[0].norm.lin.weight, rival.layers[1].norm.lin.weight
    assert not torch.equal(first, second)
    assert_same(build(config, norm_mode="DiffGroupNorm", scale=0.01).layers[0].norm.lin.weight, first)


class PlainGCN(nn.Module):
    """Linear → ReLU → (dropout → P h W → ReLU) x L → linear, the vanilla of GCNII and, with one convolution, of G2."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, adjacency: Adjacency) -> Tensor:
        net, training = self.net, self.net.training
        h = F.relu(net.input(F.dropout(x, net.rate, training)))
        for layer in net.layers:
            if isinstance(net, GCNII):
                propagated = adjacency.propagation.csr @ F.dropout(h, net.rate, training)
                h = F.relu(propagated @ layer.convolution.weight1)
            else:
                h = F.relu(net.convolution(h, adjacency))
        logits: Tensor = net.output(F.dropout(h, net.rate, training))
        return logits


def test_gcnii_without_residual_and_identity_is_a_plain_gcn(config: Any, graph: Any) -> None:
    rival, vanilla = (build(config, model="GCNII", alpha=0.0) for _ in range(2))
    for layer in rival.layers:
        layer.convolution.beta = 1.0
    assert_same(train(rival, *graph), train(PlainGCN(vanilla), *graph))


def test_open_gates_are_a_plain_gcn(config: Any, graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rival, vanilla = build(config, model="G2"), build(config, model="G2")
    monkeypatch.setattr(rivals, "gradient_gate", lambda c, *_: torch.ones_like(c))
    assert_same(train(rival, *graph), train(PlainGCN(vanilla), *graph))


@pytest.mark.parametrize("symmetric", [False, True])
def test_gcnii_is_the_dense_equation(symmetric: bool, config: Any, graph: Any) -> None:
    x, adjacency, _ = graph
    adjacency = Adjacency(adjacency.pattern, symmetric=symmetric)
    net = build(config, model="GCNII", alpha=0.3, theta=0.7).eval()
    p = adjacency.propagation.to_dense()
    h = first = F.relu(net.input(x))
    for number, layer in enumerate(net.layers, start=1):
        beta = math.log(0.7 / number + 1)
        mixed = 0.7 * p @ h + 0.3 * first
        h = F.relu((1 - beta) * mixed + beta * mixed @ layer.convolution.weight1)
    torch.testing.assert_close(net(x, adjacency), net.output(h), rtol=1e-4, atol=1e-5)


def test_gcnii_s_fixture() -> None:
    conv = pyg_nn.GCN2Conv(3, 0.1, 0.5, layer=2, normalize=False).double()
    conv.weight1.data = fixture(3, 3, 0.3)
    p = Adjacency.from_edges(PATH, 4, symmetric=True).propagation.csr.double()
    out = conv(fixture(4, 3, 0), fixture(4, 3, 1), p)
    assert conv.beta == pytest.approx(0.223143551, abs=1e-9)
    assert pyg_nn.GCN2Conv(3, 0.1, 0.5, layer=64).beta == pytest.approx(0.007782140, abs=1e-9)
    assert out[0, 0].item() == pytest.approx(0.153666378, abs=1e-7)  # P is in float32


def test_the_first_features_keep_gcnii_apart() -> None:
    """64 steps with β = 0 on a connected graph: all rows alike without them, not so with a tenth."""
    edges = torch.stack([torch.arange(30), (torch.arange(30) + 1) % 30])
    edges = torch.cat([edges, torch.randint(0, 30, (2, 60), generator=torch.Generator().manual_seed(0))], dim=1)
    p = Adjacency.from_edges(edges, 30).propagation.csr
    first = torch.randn(30, 16, generator=torch.Generator().manual_seed(1))
    cosine = []
    for alpha in (0.0, 0.1):
        conv, h = pyg_nn.GCN2Conv(16, alpha, normalize=False), first
        conv.beta = 0.0
        for _ in range(64):
            h = conv(h, first, p)
        unit = F.normalize(h.detach(), dim=1)
        cosine.append((unit @ unit.T).mean().item())
    assert cosine[0] > 0.999 and cosine[1] < 0.6


def test_the_weight_decay_of_gcnii_s_matrices(config: Any) -> None:
    settings = config(model="GCNII", wd=0.0005, conv_wd=0.01)
    net = build_model(settings, 12, 3)
    others, matrices = net.parameter_groups(settings)
    assert "weight_decay" not in others and matrices["weight_decay"] == 0.01
    assert len(others["params"]) == 4 and [p.shape for p in matrices["params"]] == [(8, 8)] * 3
    assert {id(p) for g in (others, matrices) for p in g["params"]} == {id(p) for p in net.parameters()}
    assert net.parameter_groups(config(model="GCNII", wd=0.002))[1]["weight_decay"] == 0.002


def test_symmetric_propagation_is_pyg_s(graph: Any) -> None:
    _, adjacency, _ = graph
    symmetric = Adjacency(adjacency.pattern, symmetric=True)
    edges, weights = pyg_nn.conv.gcn_conv.gcn_norm(adjacency.edge_index(), num_nodes=60, add_self_loops=False)
    expected = utils.to_dense_adj(edges, edge_attr=weights, max_num_nodes=60)[0].T
    torch.testing.assert_close(symmetric.propagation.to_dense(), expected)
    torch.testing.assert_close(adjacency.propagation.to_dense().sum(dim=1), torch.ones(60))
    assert symmetric.drop(0.5).symmetric


def test_gates_are_the_mean_over_neighbours() -> None:
    adjacency = Adjacency.from_edges(PATH, 5)  # node 4 is isolated
    c = fixture(5, 3, 0).float()
    gate = gradient_gate(c, adjacency, 2.5)
    neighbours = [[1], [0, 2], [1, 3], [2]]
    for i, near in enumerate(neighbours):
        mean = torch.stack([(c[i] - c[j]).abs() ** 2.5 for j in near]).mean(dim=0)
        torch.testing.assert_close(gate[i], mean.tanh())
    assert not gate[4].any()
    # With the pattern's self-loops in the mean, ends of the path would get a half of it and its middle two thirds.
    looped = utils.scatter(
        (c[adjacency.pattern.row] - c[adjacency.pattern.col]).abs() ** 2.5, adjacency.pattern.row, dim_size=5,
        reduce="mean",
    )  # fmt: skip
    torch.testing.assert_close(
        looped[:4], gate[:4].atanh() * torch.tensor([[1 / 2], [2 / 3], [2 / 3], [1 / 2]]), rtol=1e-3, atol=1e-4
    )


def test_gates_have_finite_gradients_at_equal_features() -> None:
    adjacency = Adjacency.from_edges(PATH, 4)
    for power in (1.0, 2.0):
        c = torch.zeros(4, 3, requires_grad=True)
        gradient_gate(c, adjacency, power).sum().backward()
        assert c.grad is not None and torch.isfinite(c.grad).all()
    c = fixture(4, 3, 0).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: gradient_gate(c, adjacency, 2.0), (c,))


def test_an_isolated_node_never_moves(config: Any, graph: Any) -> None:
    x, adjacency, _ = graph
    net = build(config, model="G2").eval()
    isolated = torch.arange(55, 60)
    h = F.relu(net.input(x))
    torch.testing.assert_close(net(x, adjacency)[isolated], net.output(h)[isolated])
    assert isinstance(net, G2) and sum(p.numel() for p in net.parameters()) == 12 * 8 + 8 + 8 * 8 + 8 + 8 * 3 + 3


def test_dgn() -> None:
    """x + 2λ BN(x) where two groups share every node; training keeps the columns' means."""
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    norm = pyg_nn.DiffGroupNorm(4, 2, lamda=1.0)
    nn.init.zeros_(norm.lin.weight)
    batch = nn.BatchNorm1d(4, eps=4e-5)  # half of x in each group: the same but for eps
    torch.testing.assert_close(norm(x), x + 2 * batch(x))
    norm.reset_parameters()
    torch.testing.assert_close(norm(x).mean(dim=0), x.mean(dim=0), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in pyg_nn.DiffGroupNorm(32, 10).parameters()) == 960


def test_connections_mix(config: Any, graph: Any) -> None:
    x, adjacency, _ = graph
    for kind in ("residual", "initial"):
        net = build(config, connection=kind, alpha=0.3).eval()
        hidden = [net.layers[0](x, adjacency, None, None)]
        for layer in net.layers[1:]:
            before = hidden[0] if kind == "initial" else hidden[-1]
            hidden.append(0.7 * layer(hidden[-1], adjacency, None, None) + 0.3 * before)
        torch.testing.assert_close(net(x, adjacency), net.output(hidden[-1], adjacency))


def test_the_output_layer_sees_all_layers(config: Any, graph: Any) -> None:
    x, adjacency, _ = graph
    for kind in ("jumping_cat", "jumping_max"):
        net = build(config, connection=kind).eval()
        hidden, h = [], x
        for layer in net.layers:
            h = layer(h, adjacency, None, None)
            hidden.append(h)
        seen = torch.cat(hidden, dim=1) if kind == "jumping_cat" else torch.stack(hidden).amax(dim=0)
        torch.testing.assert_close(net(x, adjacency), net.output(seen, adjacency))


def test_half_hop(make_data: Any) -> None:
    data = make_data(nodes=6, classes=2).subgraph(torch.arange(4))
    data.edge_index = PATH
    data.train_mask, data.val_mask, data.test_mask = (
        torch.tensor(m).bool() for m in ([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0])
    )
    graph = as_graph("path", data)
    hopped, x = half_hop(graph, graph.x, p=1.0, alpha=0.25, seed=0)
    assert x.shape == (10, 12) and hopped.edge_index.shape == (2, 18)
    assert hopped.slow.tolist() == [False] * 4 + [True] * 6
    assert hopped.y[4:].tolist() == [-1] * 6 and hopped.classes == graph.classes
    for name in ("train", "validation", "test"):
        assert torch.equal(getattr(hopped, name)[:4], getattr(graph, name)) and not getattr(hopped, name)[4:].any()
    assert hopped.test_nodes("reference").tolist() == [False, False, True, True] + [False] * 6
    into = {tuple(edge) for edge in hopped.edge_index.T.tolist()}
    for source, target in [(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)]:
        (slow,) = [u for u in range(4, 10) if {(source, u), (u, target), (target, u)} <= into
                   and torch.allclose(x[u], 0.25 * x[source] + 0.75 * x[target])]  # fmt: skip
        assert (slow, source) not in into  # directed: symmetrizing would undo it
    adjacency = Adjacency.from_edges(hopped.edge_index, 10, directed=True)
    dense = adjacency.sum.to_dense()
    assert dense[1].nonzero().squeeze(1).min() >= 4  # a node gathers from slow nodes alone
    assert (dense[4:] != 0).sum(dim=1).tolist() == [2] * 6


def test_half_hop_of_no_node_is_vanilla(config: Any, make_data: Any) -> None:
    graph = as_graph("small", make_data())
    x = features(graph, missing_rate=0, seed=0)
    torch.manual_seed(5)
    hopped, same = half_hop(graph, x, p=0.0, alpha=0.5, seed=0)
    drawn = torch.rand(2)
    torch.manual_seed(5)
    assert_same(drawn, torch.rand(2))
    vanilla = Adjacency.from_edges(graph.edge_index, 60)
    adjacency = Adjacency.from_edges(hopped.edge_index, 60, directed=True)
    assert_same(train(build(config), same, adjacency, graph.y), train(build(config), x, vanilla, graph.y))


def test_half_hop_draws_by_seed(make_data: Any) -> None:
    graph = as_graph("small", make_data())
    sizes = [len(half_hop(graph, graph.x, p=0.5, alpha=0.5, seed=seed)[1]) for seed in (0, 0, 1)]
    assert sizes[0] == sizes[1] != sizes[2] and 60 < sizes[0] < 60 + graph.edge_index.shape[1] * 2


@pytest.mark.parametrize("trained", [False, True])
def test_multiply_adds_by_hand(trained: bool, config: Any, graph: Any) -> None:
    x, adjacency, y = graph
    (n, inputs), hid, classes, edges = x.shape, 8, 3, len(adjacency.pattern.row)

    def count(**changes: Any) -> int:
        net = build_model(config(**changes), inputs, classes)
        if trained:  # other values, the same work
            train(net, x, adjacency, y)
        return multiply_adds(net.eval(), x, adjacency)

    vanilla = n * inputs * hid + n * hid * hid + n * hid * classes + edges * (2 * hid + classes)
    assert count() == vanilla
    gcnii = n * inputs * hid + 3 * (edges * hid + n * hid * hid) + n * hid * classes
    assert count(model="GCNII") == gcnii
    contranorm: dict[str, Any] = {"norm_mode": "CN", "scale": 1.0}
    cosines, weighted = n * n * hid, n * n * hid  # x̂ x̂ᵀ and A x of each hidden layer
    assert count(**contranorm, implementation="plain") == vanilla + 2 * (cosines + weighted)
    row_sums = n * n  # one column more
    assert count(**contranorm, implementation="blocked") == vanilla + 2 * (cosines + weighted + row_sums)
