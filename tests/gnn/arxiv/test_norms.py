"""D-ContraNorm between layers: `contra_norm`'s values and gradients, its invariances, and when it does nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from contranorm import contra_norm
from gnn.arxiv import norms
from gnn.arxiv.norms import FeatureContraNorm, NodeContraNorm
from gnn.layers import Adjacency
from repro.errors import UserError

N, D = 40, 6


def rows(seed: int = 0, n: int = N, d: int = D) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def apply(x: Tensor, scale: float = 1.0, tau: float = 5.0, **switches: Any) -> Tensor:
    out: Tensor = FeatureContraNorm(scale, tau, **switches)(x, None)
    return out


SWITCHES = [
    {"identity": identity, "pre_norm": pre_norm, "centre": centre}
    for identity in (True, False) for pre_norm in (True, False) for centre in (True, False)
]  # fmt: skip


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("reversible", [True, False])
def test_it_is_contra_norm_over_features(switches: dict[str, bool], reversible: bool) -> None:
    x, weight = rows(), rows(1)
    x[3] = 0
    results = []
    for ours in (True, False):
        leaf = x.clone().requires_grad_()
        middle = leaf * 1.0  # its memory may be given back
        if ours:
            y = apply(middle, 0.7, reversible=reversible, **switches)
        else:
            centred = middle - middle.mean(dim=1, keepdim=True) if switches["centre"] else middle
            options = {name: switches[name] for name in ("identity", "pre_norm")}
            y = contra_norm(centred, 0.7, tau=5.0, axis="features", **options)
        results.append((y.detach().clone(), torch.autograd.grad((y * weight).sum(), leaf)[0]))
    # The row of zeros has no direction: with pre_norm its gradient is that of a division by 1e-12.
    finite = torch.arange(N) != 3
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(results[0][1][finite], results[1][1][finite], rtol=1e-11, atol=1e-13)


def test_memory_is_given_back_and_restored() -> None:
    leaf = rows().requires_grad_()
    x = leaf * 1.0
    before = x.detach().clone()
    y = apply(x, reversible=True)
    assert x.untyped_storage().size() == 0
    y.square().sum().backward()
    torch.testing.assert_close(x.detach(), before, rtol=0, atol=1e-14)
    for switches in ({"identity": False}, {"pre_norm": True}):  # no inverse, or a badly conditioned one
        kept = leaf * 1.0
        apply(kept, reversible=True, **switches)
        assert kept.untyped_storage().size() > 0


def test_with_the_identity_kept_row_sums_stay_and_the_matrix_can_be_inverted() -> None:
    x = rows()
    torch.testing.assert_close(apply(x).sum(dim=1), x.sum(dim=1))
    torch.testing.assert_close(apply(x, 0.3, identity=False).sum(dim=1), 0.7 * x.sum(dim=1))
    torch.testing.assert_close(
        apply(x, 1.0, identity=False).sum(dim=1), torch.zeros(N, dtype=x.dtype), atol=1e-13, rtol=0
    )
    form = FeatureContraNorm(0.8, 3.0).form
    values = torch.linalg.eigvals(form.matrix(form.weights(form.normalized(x)[-1])))
    assert float(values.imag.abs().max()) < 1e-12
    assert 1 - 1e-12 <= float(values.real.min()) and float(values.real.max()) <= 1.8 + 1e-12


def test_invariances() -> None:
    x = rows()
    nodes, features = torch.randperm(N), torch.randperm(D)
    torch.testing.assert_close(apply(x[nodes]), apply(x)[nodes])
    torch.testing.assert_close(apply(x[:, features]), apply(x)[:, features])
    rotation = torch.linalg.qr(rows(2, D, D)).Q
    assert float((apply(x @ rotation) - apply(x) @ rotation).norm()) > 1e-2  # columns have a meaning
    c = torch.rand(N, 1, dtype=x.dtype) + 0.1
    torch.testing.assert_close(apply(c * x), c * apply(x))
    with_zeros = torch.cat([x, torch.zeros(5, D, dtype=x.dtype)])
    torch.testing.assert_close(apply(with_zeros)[:N], apply(x))
    torch.testing.assert_close(
        apply(torch.cat([x, x]), tau=10.0)[:N], apply(x, tau=5.0)
    )  # twice the nodes, half of tau


def test_saturation_and_its_cure() -> None:
    """Many nodes per feature: A is the identity matrix, and Eq. 6 at s = 1 leaves nothing of x."""
    x = rows(n=4000, d=16)
    with torch.no_grad():
        layer = FeatureContraNorm(1.0).eval()
        layer(x, None)
        move, off_diagonal = layer.activity
        assert move < 1e-9 and off_diagonal < 1e-9
        assert float(apply(x, 1.0, 1.0, identity=False).norm() / x.norm()) < 1e-9
        scaled = FeatureContraNorm(1.0, scaled_tau=True).eval()
        scaled(x, None)
        assert scaled.activity[0] > 0.5 and scaled.activity[1] > 0.5
        torch.testing.assert_close(scaled(x, None), apply(x, tau=4000 / 16))


def test_the_form_over_nodes(adjacency: Adjacency) -> None:
    x = rows(n=60, d=8)
    expected = contra_norm(x, 1.0, identity=True, exclude=adjacency.excluded)
    torch.testing.assert_close(NodeContraNorm(1.0, identity=True)(x, adjacency), expected)
    linear = {"identity": True, "implementation": "linear", "degree": 1}
    assert NodeContraNorm(1.0, tau=20.0, **linear)(x, adjacency).shape == x.shape
    with pytest.raises(UserError, match=r"--axis tokens: implementation='linear'.*larger --tau") as caught:
        NodeContraNorm(1.0, tau=0.05, **linear)(x, adjacency)
    assert "\n" not in str(caught.value) and "exact form is used" not in str(caught.value)


def test_there_is_no_norm_without_being_asked() -> None:
    x = rows()
    assert norms.NoNorm()(x, None) is x
