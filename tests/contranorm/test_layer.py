"""ContraNorm, GraphContraNorm and the baselines."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from contranorm import CentreAndNormalize, ContraNorm, ContraStep, GraphContraNorm, PairNorm, contra_norm


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(0))


def test_repr_names_the_switches():
    text = repr(ContraNorm(6, 0.1, tau=2.0, symmetric=True))
    assert text.startswith("ContraNorm((6,), eps=1e-05") and "scale=0.1, tau=2.0" in text and "symmetric=True" in text
    text = repr(GraphContraNorm(0.5))
    assert text.startswith("GraphContraNorm(scale=0.5, tau=1.0, identity=False, scaled_identity=False, axis=tokens")
    assert repr(PairNorm("PN-SI", 2.0)) == "PairNorm(PN-SI, scale=2.0)"


def test_scale_has_no_default():
    with pytest.raises(TypeError, match="scale"):
        ContraNorm(6)
    with pytest.raises(TypeError, match="scale"):
        GraphContraNorm()


@pytest.mark.parametrize(
    "kwargs", [{}, {"identity": True}, {"symmetric": True}, {"pre_norm": True}, {"axis": "features"}]
)
def test_is_a_layer_norm_after_the_contrastive_step(x, kwargs):
    layer = ContraNorm(6, 0.3, tau=0.5, **kwargs)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    want = nn.functional.layer_norm(
        contra_norm(x, 0.3, tau=0.5, **{"identity": False, **kwargs}), (6,), layer.weight, layer.bias
    )
    torch.testing.assert_close(layer(x), want)


def test_a_small_scale_is_nearly_a_layer_norm(x):
    difference = (ContraNorm(6, 1e-3)(x) - nn.LayerNorm(6)(x)).abs().max()
    assert 0 < difference < 1e-2
    torch.testing.assert_close(ContraNorm(6, 1e-30)(x), nn.LayerNorm(6)(x))


def test_state_dict_of_a_vanilla_model_loads():
    vanilla = nn.LayerNorm(6)
    layer = ContraNorm(6, 0.1)
    layer.load_state_dict(vanilla.state_dict(), strict=True)
    assert list(layer.state_dict()) == list(vanilla.state_dict())
    assert list(ContraNorm(6, 0.1, bias=False).state_dict()) == ["weight"]
    assert list(ContraNorm(6, 0.1, elementwise_affine=False).state_dict()) == []


def test_samples_do_not_mix(x):
    layer = ContraNorm(6, 0.5)
    torch.testing.assert_close(layer(x)[1], layer(x[1:2])[0])


def test_mask_reaches_the_step(x):
    layer = ContraNorm(6, 0.5)
    mask = torch.arange(7) < torch.tensor([[7], [4], [2]])
    torch.testing.assert_close(layer(x, mask)[1, :4], layer(x[1:2, :4])[0])


@pytest.mark.parametrize("positive", [False, True])
def test_a_learnable_scale_starts_where_it_should_and_learns(x, positive):
    fixed = ContraNorm(6, 0.3)
    layer = ContraNorm(6, 0.3, learnable=True, positive=positive)
    torch.testing.assert_close(layer(x), fixed(x))
    layer(x).square().mul(x).sum().backward()
    assert layer.step.grad.abs().min() > 0
    with torch.no_grad():
        layer.step.fill_(-5.0)
    assert bool((layer.effective_scale() > 0).all()) == positive
    layer.reset_parameters()
    torch.testing.assert_close(layer(x), fixed(x))


def test_positive_needs_a_learnable_scale():
    with pytest.raises(ValueError, match="positive needs learnable"):
        ContraNorm(6, 0.1, positive=True)


def test_a_learned_step_may_have_any_sign(x):
    layer = ContraNorm(6, 0.3, learnable=True)
    with torch.no_grad():
        layer.step.fill_(-0.2)
    assert layer(x).isfinite().all()
    layer.requires_grad_(False)
    assert layer(x).isfinite().all()


def test_scaled_identity_is_the_released_learnable_form(x):
    layer = ContraNorm(6, 0.3, learnable=True, scaled_identity=True)
    with torch.no_grad():
        layer.step.uniform_(-1, 1)
    moved = layer.step * x - layer.step * (x - contra_norm(x, 1.0))  # s x - s A x
    torch.testing.assert_close(layer(x), F.layer_norm(moved, (6,)), atol=1e-5, rtol=1e-4)
    fixed = (ContraNorm(6, s, scaled_identity=True, eps=0.0)(x) for s in (0.1, 5.0))
    torch.testing.assert_close(*fixed)  # a constant step drops out


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 5, 6)])
def test_refuses_what_is_not_a_sequence(shape):
    with pytest.raises(ValueError, match="qk_norm"):
        ContraNorm(6, 0.1)(torch.randn(shape))


def test_device_and_dtype():
    layer = ContraNorm(6, 0.1, learnable=True, device="meta", dtype=torch.float64)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert {p.dtype for p in layer.parameters()} == {torch.float64}


def test_graph_layer_leaves_neighbours_out(edges):
    x = torch.randn(12, 4, dtype=torch.float64)
    adjacency = edges(12)
    y = GraphContraNorm(1.0)(x, adjacency)
    torch.testing.assert_close(y, contra_norm(x, 1.0, exclude=adjacency, implementation="plain"))
    assert list(GraphContraNorm(1.0).parameters()) == []


FORMS = [
    dict(identity=True, tau=0.5),
    dict(symmetric=True),
    dict(pre_norm=True),
    dict(implementation="blocked"),
    dict(implementation="linear", degree=1),
]


@pytest.mark.parametrize("form", [*FORMS, dict(axis="features")])
def test_the_step_alone_is_contra_norm_and_every_layer_takes_every_switch(form, edges):
    x = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0)).relu() + 0.1
    mask = torch.arange(12) < torch.tensor([[12], [8]])
    moved = contra_norm(x, 0.3, mask=mask, **form)
    torch.testing.assert_close(ContraStep(0.3, **form)(x, mask), moved)
    torch.testing.assert_close(ContraNorm(4, 0.3, **form)(x, mask), F.layer_norm(moved, (4,)))
    assert list(ContraStep(0.3, **form).state_dict()) == []
    if "axis" not in form:
        adjacency = edges(12)
        want = contra_norm(x[0], 0.3, exclude=adjacency, **form)
        torch.testing.assert_close(GraphContraNorm(0.3, **form)(x[0], adjacency), want)


@pytest.mark.parametrize("layer", [ContraStep, GraphContraNorm])
def test_a_learnable_step_needs_the_number_of_features(layer):
    assert torch.equal(layer(0.3, dim=4, learnable=True).step, torch.full((4,), 0.3))
    with pytest.raises(ValueError, match="needs dim"):
        layer(0.3, learnable=True)


WRONG = [dict(axis="rows"), dict(degree=3), dict(implementation="fast")]
WRONG += [{name: value} for name in ("tau", "scale") for value in (0.0, -1.0, float("nan"), float("inf"), None, "0.1")]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_senseless_switches_are_named_when_a_layer_is_made(wrong):
    (name,) = wrong
    for make in (functools.partial(ContraNorm, 6), ContraStep, GraphContraNorm):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            make(**{"scale": 0.1, **wrong})
    with pytest.raises(ValueError, match="not nodes"):
        GraphContraNorm(0.1, axis="features")


def test_pair_norm_modes():
    x = torch.randn(50, 8, dtype=torch.float64) * 3 + 2
    pn, si, scs = (PairNorm(mode, 2.0, eps=0.0)(x) for mode in ("PN", "PN-SI", "PN-SCS"))
    torch.testing.assert_close(pn.mean(dim=0), torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close(pn.square().sum(dim=1).mean(), torch.tensor(4.0, dtype=torch.float64))
    torch.testing.assert_close(si.norm(dim=1), torch.full((50,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(scs + x.mean(dim=0), 2.0 * x / x.norm(dim=1, keepdim=True))
    with pytest.raises(ValueError, match="PN-SCS"):
        PairNorm("PN-XX")


def test_pair_norm_keeps_total_pairwise_distance():
    """The paper's aim: the mean squared distance between nodes is the same whatever goes in (2 s²)."""
    for factor in (0.01, 1.0, 100.0):
        y = PairNorm("PN", eps=0.0)(factor * torch.randn(40, 5, dtype=torch.float64) + 7)
        distance = torch.cdist(y, y).square().mean()
        torch.testing.assert_close(distance, torch.tensor(2.0, dtype=torch.float64))


@pytest.mark.parametrize("norm", [PairNorm("PN"), PairNorm("PN-SI"), PairNorm("PN-SCS"), CentreAndNormalize()])
def test_a_collapsed_graph_stays_finite(norm):
    assert norm(torch.ones(5, 3)).isfinite().all()


def test_the_references_ln_is_a_small_layer_norm():
    x = torch.randn(30, 6, dtype=torch.float64) + 1
    y = CentreAndNormalize()(x)
    torch.testing.assert_close(y.norm(dim=1), torch.ones(30, dtype=torch.float64))
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (6,), eps=0.0) / 6**0.5)
    for row in range(30):  # of its own row alone: no other node can keep it from collapsing
        torch.testing.assert_close(CentreAndNormalize()(x[row : row + 1]), y[row : row + 1])


def test_one_default_form_everywhere(edges):
    # Eq. 6, x - s·A·x, for the function, the layer and the graph layer alike.
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    form = dict(identity=False, implementation="plain")
    layer = ContraNorm(4, 0.5, elementwise_affine=False, dtype=torch.float64)
    torch.testing.assert_close(contra_norm(x, 0.5), contra_norm(x, 0.5, **form))
    torch.testing.assert_close(layer(x), F.layer_norm(contra_norm(x, 0.5, **form), (4,)))
    adjacency = edges(9)
    torch.testing.assert_close(GraphContraNorm(0.5)(x[0], adjacency), contra_norm(x[0], 0.5, exclude=adjacency, **form))
