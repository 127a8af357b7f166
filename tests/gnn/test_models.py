"""Each model and norm: constructible, equal to a dense reading of its equation, trainable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from contranorm import GraphContraNorm
from gnn.config import Config, ModelName, NormName
from gnn.data import as_graph, features
from gnn.layers import Adjacency, Layer
from gnn.models import SGC, DeepGCN, build_model, describe
from gnn.pyg import nn as pyg_nn
from gnn.sparse import Sparse

MODELS, NORMS = get_args(ModelName), get_args(NormName)


@pytest.fixture
def graph(make_data: Callable[..., Any]) -> tuple[torch.Tensor, Adjacency, torch.Tensor]:
    data = as_graph("small", make_data())
    x = features(data, missing_rate=0, seed=0)
    return x, Adjacency.from_edges(data.edge_index, len(data.y)), data.y


def norms_of(net: nn.Module) -> list[nn.Module]:
    return [layer.norm for layer in net.layers]


def settings(config: Callable[..., Config], norm: str, **changes: Any) -> Config:
    return config(norm_mode=norm, scale=1.0 if norm == "CN" else None, **changes)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_learns_with_every_norm(model: str, norm: str, config: Any, graph: Any) -> None:
    x, adjacency, y = graph
    torch.manual_seed(0)
    net = build_model(settings(config, norm, model=model, use_layer_norm=True, dropout=0.0), 12, 3)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(net(Sparse.from_dense(x), adjacency), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters() if p.requires_grad)


@pytest.mark.parametrize("model", MODELS)
def test_sparse_and_dense_features_give_the_same_logits(model: str, config: Any, graph: Any) -> None:
    x, adjacency, _ = graph
    net = build_model(settings(config, "PN", model=model, dropout=0.5), 12, 3).eval()
    torch.testing.assert_close(net(x, adjacency), net(Sparse.from_dense(x), adjacency))


def test_deep_gcn_is_the_dense_equation(config: Any, graph: Any) -> None:
    x, adjacency, _ = graph
    net = build_model(settings(config, "CN", use_layer_norm=True, nlayer=4), 12, 3).eval()
    a = adjacency.propagation.to_dense()
    allowed = a == 0
    h = x
    for layer in net.layers:
        h = a @ h @ layer.convolution.weight + layer.convolution.bias
        unit = F.normalize(h, dim=1)
        weights = torch.zeros_like(a)
        for i in range(len(h)):
            logits = (unit @ unit[i])[allowed[i]]
            weights[i, allowed[i]] = logits.exp() / logits.exp().sum()
        h = 2 * h - weights @ h
        h = F.layer_norm(h, (8,), net.shared_norm.weight, net.shared_norm.bias)
        h = h.relu()
    expected = a @ h @ net.output.weight + net.output.bias
    torch.testing.assert_close(net(x, adjacency), expected, rtol=1e-4, atol=1e-5)


def test_gin_is_the_dense_equation(config: Any, graph: Any) -> None:
    x, adjacency, _ = graph
    net = build_model(settings(config, "None", model="GIN", nlayer=2), 12, 3).eval()
    nn.init.constant_(net.layers[0].convolution.eps, 0.3)
    a, h = adjacency.sum.to_dense(), x
    for convolution in (net.layers[0].convolution, net.output):
        h = convolution.second(F.relu(convolution.first(a @ h + (1 + convolution.eps) * h)))
        h = h.relu() if convolution is not net.output else h
    torch.testing.assert_close(net(x, adjacency), h, rtol=1e-4, atol=1e-5)


def test_heads_share_the_width(config: Any, graph: Any) -> None:
    x, adjacency, y = graph
    net = build_model(settings(config, "PN", model="DeepGAT", nhead=4, hid=8), 12, 3)
    assert [layer.convolution.heads for layer in net.layers] == [4, 4] and net.output.heads == 1
    assert [layer.convolution.out_channels for layer in net.layers] == [2, 2]
    F.cross_entropy(net(x, adjacency), y).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_sgc_takes_its_constant_steps_once(config: Any, graph: Any) -> None:
    x, adjacency, _ = graph
    net = build_model(settings(config, "PN", model="SGC", nlayer=3), 12, 3)
    assert isinstance(net, SGC) and net.constant
    calls: list[int] = []
    net.layers[0].register_forward_hook(lambda *_: calls.append(1))
    for _ in range(4):
        net(x, adjacency)
    assert len(calls) == 1
    assert net(x[:5], Adjacency.from_edges(torch.tensor([[0], [1]]), 5)).shape == (5, 3)  # another graph
    assert not build_model(settings(config, "PN", model="SGC", use_layer_norm=True), 12, 3).constant
    assert not build_model(settings(config, "BatchNorm", model="SGC"), 12, 3).constant
    plain = build_model(settings(config, "None", model="SGC", nlayer=3), 12, 3).eval()
    a = adjacency.propagation.to_dense()
    torch.testing.assert_close(plain(x, adjacency), plain.output(a @ a @ a @ x), rtol=1e-4, atol=1e-6)


def test_residual_joins_every_k_layers(config: Any, graph: Any) -> None:
    x, adjacency, _ = graph
    net = build_model(settings(config, "None", nlayer=6, residual=2), 12, 3).eval()
    skips: list[bool] = []
    for layer in net.layers:
        layer.register_forward_pre_hook(lambda module, inputs: skips.append(inputs[3] is not None))
    out = [layer for layer in net.layers]
    assert all(isinstance(layer, Layer) for layer in out)
    net(x, adjacency)
    assert skips == [False, False, True, False, True]


def test_dropedge_acts_in_training_only(config: Any, graph: Any) -> None:
    x, adjacency, _ = graph
    net = build_model(settings(config, "None", dropedge=0.5, dropout=0.0), 12, 3)
    assert not torch.equal(net(x, adjacency), net(x, adjacency))
    net.eval()
    assert torch.equal(net(x, adjacency), net(x, adjacency))


def test_weights_start_within_one_over_root_of_the_width(config: Any) -> None:
    net = build_model(settings(config, "None", hid=16), 500, 3)
    weight = net.layers[0].convolution.weight
    assert 0.24 < weight.abs().max().item() <= 0.25


def test_layer_norm_is_one_and_shared(config: Any) -> None:
    net = build_model(settings(config, "PN", nlayer=5, use_layer_norm=True), 12, 3)
    assert sum(isinstance(m, nn.LayerNorm) for m in net.modules()) == 1
    assert sum("shared_norm" in key for key in net.state_dict()) == 2


def test_the_printed_line_is_read_off_the_model(config: Any) -> None:
    cn = settings(config, "CN", nlayer=5, use_layer_norm=True)
    net = build_model(cn, 12, 3)
    assert sum(isinstance(m, GraphContraNorm) for m in net.modules()) == 4
    line = describe(net, cn)
    assert "scale=1.0" in line and "layers 1-4" in line and "shared" in line
    message = settings(config, "MessageNorm", nlayer=5)  # the first layer changes the width: nothing to add it to
    net = build_model(message, 12, 3)
    assert [isinstance(norm, pyg_nn.MessageNorm) for norm in norms_of(net)] == [False, True, True, True]
    assert "layers 2-4" in describe(net, message)
    none = settings(config, "None")
    assert "no norm" in describe(build_model(none, 12, 3), none)


def test_depth_one_is_a_single_convolution(config: Any, graph: Any) -> None:
    x, adjacency, _ = graph
    net = build_model(settings(config, "None", nlayer=1), 12, 3)
    assert isinstance(net, DeepGCN) and len(net.layers) == 0
    assert net(x, adjacency).shape == (60, 3)


def test_both_forms_agree_behind_the_layer_norm(config: Any, graph: Any) -> None:
    # (1+s)x - sAx = (1+s)(x - s'Ax) with s' = s/(1+s), and the LayerNorm takes the factor out (up to its epsilon).
    x, adjacency, _ = graph
    logits = []
    for identity, scale in ((True, 1.0), (False, 0.5)):
        torch.manual_seed(0)
        flags = dict(norm_mode="CN", use_layer_norm=True, nlayer=4, scale=scale, identity=identity)
        net = build_model(config(**flags), 12, 3).eval()
        assert norms_of(net)[0].identity is identity
        logits.append(net(x, adjacency))
    torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("model", ["DeepGCN", "SGC"])
@pytest.mark.parametrize(
    "switches",
    [
        {"symmetric": True}, {"pre_norm": True}, {"learnable": True}, {"learnable": True, "positive": True},
        {"implementation": "linear", "degree": 1}, {"tau": 0.3, "implementation": "blocked"},
    ],
    ids=str,
)  # fmt: skip
def test_every_switch_reaches_the_layer_and_trains(
    switches: dict[str, Any], model: str, config: Any, graph: Any
) -> None:
    x, adjacency, y = graph
    net = build_model(config(norm_mode="CN", scale=0.5, model=model, **switches), 12, 3)
    assert all(getattr(norm, name) == value for norm in norms_of(net) for name, value in switches.items())
    F.cross_entropy(net(x, adjacency), y).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    assert sum("step" in name for name, _ in net.named_parameters()) == ("learnable" in switches) * len(norms_of(net))
