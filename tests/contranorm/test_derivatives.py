"""Second derivatives, torch.func, and gradients of the temperature: right with every implementation."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import functional as autograd
from torch.func import functional_call, grad, jacrev, jvp, vmap

from contranorm import ContraNorm, GraphContraNorm, contra_norm

EXACT = ("auto", "fused", "blocked", "sdpa")
FORMS = [
    {},
    dict(identity=True),
    dict(scaled_identity=True),
    dict(pre_norm=True),
    dict(mask=torch.arange(5) < torch.tensor([[5], [3]])),
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def energy(implementation, **form):
    return lambda x: contra_norm(x, 0.7, implementation=implementation, **form).pow(3).sum()


@pytest.mark.parametrize("form", [{}, dict(pre_norm=True), dict(axis="features")], ids=str)
@pytest.mark.parametrize("implementation", ["plain", *EXACT, "linear"])
def test_a_zero_row_has_no_direction_and_a_gradient_of_the_size_of_the_others(implementation, form):
    """A dead ReLU's row, or one of zeros where padding was: its direction's gradient is 1 / 1e-12 of anything."""
    if form.get("axis") == "features" and implementation not in ("plain", "auto"):
        implementation = "auto"
    x = random(6, 4)
    x[2] = 0
    x.requires_grad_()
    out = contra_norm(x, 0.1, implementation=implementation, **form)
    (out * random(6, 4, seed=1)).sum().backward()
    assert out.isfinite().all() and x.grad.abs().max() < 100
    half = contra_norm(x.detach().half(), 0.1, implementation=implementation, **form)
    torch.testing.assert_close(half.double(), out.detach(), rtol=0, atol=0.02)


@pytest.mark.parametrize("implementation", [*EXACT, "linear"])
def test_batched_gradients(implementation):
    """jacobian(vectorize=True) hands every backward a batch of gradients, on which kernels of their own cannot run."""
    x = random(5, 3)
    step = lambda z: contra_norm(z, 0.7, implementation=implementation)  # noqa: E731
    at_once, one_by_one = (autograd.jacobian(step, x, vectorize=vectorize) for vectorize in (True, False))
    torch.testing.assert_close(at_once, one_by_one)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("implementation", EXACT)
def test_second_derivatives_are_the_plain_forms(implementation, form):
    x, v = random(2, 5, 3), random(2, 5, 3, seed=1)
    plain, fast = energy("plain", **form), energy(implementation, **form)
    hvp = autograd.hvp(plain, x, v)[1]
    assert hvp.norm() > 1
    torch.testing.assert_close(autograd.hvp(fast, x, v)[1], hvp)
    torch.testing.assert_close(autograd.hessian(fast, x), autograd.hessian(plain, x))


@pytest.mark.parametrize("n", [5, 20])
@pytest.mark.parametrize("implementation", EXACT)
def test_gradgradcheck(implementation, n, monkeypatch):
    monkeypatch.setattr("contranorm.kernels.blocked.TILE", 7)
    x = random(1, n, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: contra_norm(x, 0.7, implementation=implementation), (x,))


@pytest.mark.parametrize("symmetric_edges", [True, False])
@pytest.mark.parametrize("implementation", ["auto", "blocked"])
def test_second_derivatives_on_graphs(implementation, symmetric_edges, edges):
    x, v = random(9, 4), random(9, 4, seed=1)
    form = dict(exclude=edges(9, symmetric=symmetric_edges), symmetric=True)
    want = autograd.hvp(energy("plain", **form), x, v)[1]
    torch.testing.assert_close(autograd.hvp(energy(implementation, **form), x, v)[1], want)


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("excluding", [True, False])
def test_second_derivatives_of_linear_are_its_polynomials(degree, excluding, edges):
    """Its centre is a constant of the gradient: finite differences are those of the product of given deviations."""
    from contranorm.kernels.edges import edges_of
    from contranorm.kernels.linear import _product

    left_out = edges_of(edges(7, 0.2, symmetric=False)) if excluding else None
    d, w = (0.3 * random(7, 3)).requires_grad_(), random(7, 2, seed=1).requires_grad_()
    coefficients = (1.0, 0.9, 0.4)[: degree + 1]
    assert torch.autograd.gradgradcheck(lambda d, w: _product(d, w, coefficients, left_out), (d, w))
    x, v = random(300, 5).abs() + 0.5, random(300, 5, seed=1)
    form = dict(exclude=edges(300, 0.05)) if excluding else {}
    want = autograd.hvp(energy("plain", **form), x, v)[1]
    got = autograd.hvp(energy("linear", degree=degree, **form), x, v)[1]
    assert float((got - want).norm() / want.norm()) < 0.01
    first = grad_of(energy("linear", degree=degree, **form), x, create_graph=True)
    torch.testing.assert_close(first, grad_of(energy("linear", degree=degree, **form), x))


def grad_of(function, x, **how):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x, **how)[0].detach()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")  # torch's own use of it
@pytest.mark.parametrize("implementation", [*EXACT, "linear"])
def test_torch_func_transforms(implementation):
    x, v = random(3, 6, 4), random(3, 6, 4, seed=1)
    plain, fast = energy("plain"), energy(implementation)
    want = grad_of(plain, x)
    torch.testing.assert_close(grad(fast)(x), want)
    torch.testing.assert_close(vmap(grad(fast))(x), want)  # (N, D) each: samples do not mix
    torch.testing.assert_close(jvp(fast, (x,), (v,))[1], (want * v).sum())
    torch.testing.assert_close(torch.func.hessian(fast)(x[0]), autograd.hessian(plain, x[0]))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        tangent = torch.autograd.forward_ad.unpack_dual(fast(dual)).tangent
    torch.testing.assert_close(tangent, (want * v).sum())


def test_per_sample_gradients_of_a_layer():
    layer = ContraNorm(4, 0.3, learnable=True, dtype=torch.float64)
    x = random(3, 6, 4)
    parameters = dict(layer.named_parameters())

    def loss(parameters, sample):
        return functional_call(layer, parameters, (sample.unsqueeze(0),)).pow(3).sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    layer(x).pow(3).sum().backward()
    for name, parameter in parameters.items():
        assert each[name].shape == (3, *parameter.shape)
        torch.testing.assert_close(each[name].sum(dim=0), parameter.grad)


def test_a_graph_layer_under_torch_func(edges):
    x, adjacency = random(9, 4), edges(9)
    layer = GraphContraNorm(0.5)
    want = grad_of(lambda x: layer(x, adjacency).pow(3).sum(), x)
    torch.testing.assert_close(grad(lambda x: layer(x, adjacency).pow(3).sum())(x), want)
    assert jacrev(lambda x: layer(x, adjacency))(x).shape == (9, 4, 9, 4)


@pytest.mark.parametrize("axis", ["tokens", "features"])
@pytest.mark.parametrize("implementation", ["auto", "plain"])
def test_a_tensor_temperature_gets_its_gradient(axis, implementation):
    x, tau = random(2, 5, 4), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    settings = dict(axis=axis, implementation=implementation)
    assert torch.autograd.gradcheck(lambda tau: contra_norm(x, 0.5, tau=tau, **settings), (tau,))
    torch.testing.assert_close(contra_norm(x, 0.5, tau=tau, **settings), contra_norm(x, 0.5, tau=0.7, **settings))


@pytest.mark.parametrize("implementation", ["fused", "blocked", "sdpa", "linear"])
def test_other_kernels_refuse_a_tensor_temperature(implementation):
    with pytest.raises(ValueError, match="takes no tensor tau: use 'plain'"):
        contra_norm(random(2, 5, 4), 0.5, tau=torch.tensor(0.7, requires_grad=True), implementation=implementation)


def test_memory_of_second_derivatives_is_not_paid_by_first_ones():
    """The plain form is computed where a gradient is differentiated again, and nowhere else."""
    x = random(900, 4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        sizes: list[int] = []
        y = contra_norm(x, 0.5, implementation="blocked")
        y.sum().backward()
    assert max(sizes) < 900 * 900
