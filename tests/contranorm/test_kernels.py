"""The kernels beside each other: tiles, polynomial, choice."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from contranorm import contra_norm
from contranorm.kernels.blocked import TILE, blocked_contrast, excluded_pairs
from contranorm.kernels.edges import edges_of
from contranorm.kernels.fused import fused_step
from contranorm.kernels.linear import _Blocks, linear_contrast, remainder, taylor, visible_degree
from contranorm.kernels.masks import stored_entries


def unit_rows(n: int, d: int, seed: int = 0, positive: bool = False) -> torch.Tensor:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x.abs() if positive else x, dim=1)


@pytest.mark.parametrize("tile", [1, 3, 16, 40, 41, 64])
@pytest.mark.parametrize("symmetric_edges", [None, True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_tile_size_does_not_matter(tile, symmetric_edges, symmetric, edges, monkeypatch):
    unit = unit_rows(41, 5).requires_grad_()
    values = unit_rows(41, 3, seed=1).requires_grad_()
    upstream = unit_rows(41, 3, seed=2)
    exclude = None if symmetric_edges is None else edges(41, 0.2, symmetric_edges)
    whole = blocked_contrast(unit, values, exclude, tau=0.7, symmetric=symmetric)
    monkeypatch.setattr("contranorm.kernels.blocked.TILE", tile)
    parts = blocked_contrast(unit, values, exclude, tau=0.7, symmetric=symmetric)
    torch.testing.assert_close(whole, parts, atol=1e-12, rtol=1e-12)
    for a, b in zip(
        torch.autograd.grad(whole, (unit, values), upstream),
        torch.autograd.grad(parts, (unit, values), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_excluded_pairs_hold_every_entry_once(edges):
    pattern = edges(50, 0.1, symmetric=False)
    tiles = excluded_pairs(pattern, tile=16)
    entries = set()
    for (i, j), positions in tiles.rows.items():
        width = min(16, 50 - 16 * j)
        entries |= {(16 * i + p // width, 16 * j + p % width) for p in positions.tolist()}
    for (i, j), positions in tiles.columns.items():
        width = min(16, 50 - 16 * j)
        entries |= {(16 * j + p % width, 16 * i + p // width) for p in positions.tolist()}
    assert entries == {tuple(e) for e in stored_entries(pattern).nonzero().tolist()}
    assert not tiles.symmetric and excluded_pairs(pattern, tile=16) is tiles


@pytest.mark.parametrize("tau", [1.0, 1 / 39, 1 / 41, 0.001])
def test_small_temperatures_neither_overflow_nor_vanish(tau, edges):
    x = unit_rows(300, 8).float().requires_grad_()
    upstream = unit_rows(300, 8, seed=1).float()
    results = []
    for implementation in ("plain", "blocked"):
        y = contra_norm(x, 1.0, tau=tau, exclude=edges(300, 0.05), implementation=implementation)
        results.append((y, torch.autograd.grad(y, x, upstream)[0]))
    assert results[1][1].isfinite().all()
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(results[0][1], results[1][1], atol=2e-3 / min(1, tau * 40), rtol=1e-3)


@given(st.integers(1, 2), st.floats(1e-3, 9.9), st.floats(-1.0, 1.0))
@settings(max_examples=100, deadline=None)
def test_the_remainder_bounds_the_polynomials_error(degree, largest, share):
    with localcontext() as context:
        context.prec = 1500  # in float64 the difference of two near numbers would be noise
        s = Decimal(share) * Decimal(largest)
        value = sum(s**k / math.factorial(k) for k in range(1, degree + 1)) + 1
        assert abs(s.exp() - value) <= Decimal(remainder(degree, largest)) * s**2 * (1 + Decimal("1e-9"))
    assert taylor(degree, 2.0)[degree] == 0.5**degree / math.factorial(degree)
    assert remainder(degree, 10.0) == math.inf


def test_edges_are_products_along_the_pattern(edges):
    pattern = edges(30, 0.1, symmetric=False)
    dense = stored_entries(pattern)
    a, b, w = unit_rows(30, 4), unit_rows(30, 4, seed=1), unit_rows(30, 3, seed=2)
    for these, matrix in ((edges_of(pattern), dense), (edges_of(pattern).transposed, dense.T)):
        rows, columns = matrix.nonzero(as_tuple=True)
        inner = these.inner(a, b)
        torch.testing.assert_close(inner, (a[rows] * b[columns]).sum(dim=1))
        weights = torch.zeros(30, 30, dtype=torch.float64).index_put((rows, columns), inner)
        torch.testing.assert_close(these.subtract(w.clone(), inner, w), w - weights @ w)
        torch.testing.assert_close(these.subtract_transposed(w.clone(), inner, w), w - weights.T @ w)
        torch.testing.assert_close(these.subtract_both(w.clone(), inner, w), w - (weights + weights.T) @ w)
        empty = these.empty_is_zero(torch.ones(30, 1)).squeeze(1) == 0
        assert torch.equal(empty, matrix.all(dim=1))
    assert edges_of(pattern) is edges_of(pattern) and not edges_of(pattern).symmetric
    both = edges_of(edges(30, 0.1, symmetric=True))
    weights = torch.rand(both.columns.numel(), dtype=torch.float64)
    once = both.subtract_transposed(both.subtract(w.clone(), weights, w), weights, w)
    assert both.symmetric
    torch.testing.assert_close(both.subtract_both(w.clone(), weights, w), once)
    assert both.empty_is_zero(torch.ones(30, 1)).squeeze(1).eq(0).nonzero().flatten().tolist() == [2]


def test_monomials_are_counted_once():
    d = unit_rows(4, 5)
    blocks = _Blocks(d, (3.0, 2.0, 1.0))
    ((part, features),) = blocks
    assert part == slice(0, 4) and features.shape == (math.comb(5 + 2, 2), 4)
    torch.testing.assert_close(features.T @ (blocks.omega * features), 3 + 2 * (d @ d.T) + (d @ d.T) ** 2)
    assert float(blocks.omega[6:].sum()) == 5**2  # (1 + 1 + 1 + 1 + 1)²


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("excluding", [True, False])
def test_linear_is_the_softmax_of_its_polynomial(degree, symmetric, excluding, edges):
    """Values and gradients against dense float64 autograd of the same polynomial."""
    unit = unit_rows(40, 6, positive=True).requires_grad_()
    values = unit_rows(40, 3, seed=1).requires_grad_()
    exclude = edges(40, 0.2, symmetric=False) if excluding else None
    mean = unit.detach().mean(dim=0)
    logits = (unit - mean) @ (unit - mean).T
    kernel = sum(c * logits**k for k, c in enumerate(taylor(degree, 1.0)))
    outer = torch.exp((unit - mean) @ mean)
    kernel = outer[:, None] * kernel * outer
    if exclude is not None:
        kernel = kernel.masked_fill(stored_entries(exclude), 0.0)
    rows, columns = kernel.sum(1, keepdim=True), kernel.sum(0, keepdim=True)
    weights = kernel / rows.where(rows > 0, 1.0)
    if symmetric:
        weights = weights + kernel / columns.where(columns > 0, 1.0)
    want = weights @ values
    got = linear_contrast(unit, values, exclude, tau=1.0, symmetric=symmetric, degree=degree)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    upstream = unit_rows(40, 3, seed=2)
    for a, b in zip(
        torch.autograd.grad(got, (unit, values), upstream),
        torch.autograd.grad(want, (unit, values), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("degree", "bound"), [(1, 2e-3), (2, 5e-4)])
@pytest.mark.parametrize("kind", ["relu", "gaussian", "cone"])
def test_linear_is_close_to_exact(degree, bound, kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 32, generator=generator)
    x = {"relu": x.relu(), "gaussian": x, "cone": 0.3 * x + torch.randn(32, generator=generator)}[kind]
    x = x.requires_grad_()
    exact = contra_norm(x, 1.0, identity=True, implementation="blocked")
    fast = contra_norm(x, 1.0, identity=True, implementation="linear", degree=degree)
    error = (fast - exact).detach()
    assert float(error.norm() / exact.detach().norm()) < bound
    # The bound of the module's docstring, row by row, from the pairs themselves.
    unit = F.normalize(x.detach().double(), dim=1)
    mean = unit.mean(dim=0)
    logits, r = (unit - mean) @ (unit - mean).T, torch.exp((unit - mean) @ mean)
    total = sum(c * logits**k for k, c in enumerate(taylor(degree, 1.0))) @ r
    b = remainder(degree, float(logits.diagonal().max())) * (logits**2 @ r) / total
    assert (error.norm(dim=1) <= 2 * b * x.detach().norm(dim=1).max() + 1e-4).all()
    upstream = torch.randn(2000, 32, generator=generator)
    a, b = (torch.autograd.grad(y, x, upstream)[0] for y in (fast, exact))
    assert float((a - b).norm() / b.norm()) < 4 * bound


def test_linear_does_not_depend_on_its_block(monkeypatch):
    unit, values = unit_rows(200, 6), unit_rows(200, 3, seed=1)
    whole = linear_contrast(unit, values, None, tau=1.0, symmetric=False, degree=2)
    monkeypatch.setattr("contranorm.kernels.linear.BLOCK", 1)
    torch.testing.assert_close(linear_contrast(unit, values, None, tau=1.0, symmetric=False, degree=2), whole)


def test_linear_takes_the_next_degree_where_the_bound_is_broken(monkeypatch):
    x = unit_rows(300, 6)
    monkeypatch.setattr("contranorm.kernels.linear.MAX_ERROR", 0.2)
    answers = {p: contra_norm(x, 1.0, implementation="linear", degree=p) for p in (1, 2)}
    for limit, degree in ((0.2, 1), (0.05, 2)):  # the bounds are .13 and .037
        monkeypatch.setattr("contranorm.kernels.linear.MAX_ERROR", limit)
        torch.testing.assert_close(contra_norm(x, 1.0, implementation="linear", degree=1), answers[degree])
    with pytest.warns(UserWarning, match="exact form"):  # 28 monomials of degree 2 are no gain for 25 rows
        contra_norm(x[:25], 1.0, implementation="linear", degree=1)
    monkeypatch.setattr("contranorm.kernels.linear.MAX_ERROR", 0.02)
    with pytest.warns(UserWarning, match="exact form"):
        y = contra_norm(x, 1.0, implementation="linear", degree=1)
    torch.testing.assert_close(y, contra_norm(x, 1.0, implementation="plain"))


@pytest.mark.parametrize("spread", [0.0, 1e-12, 1e-6, 1e-3])
def test_linear_on_collapsed_rows(spread):
    """Rows that all but agree: terms below rounding are left out, and nothing else changes."""
    x = (unit_rows(300, 6, positive=True)[:1] + spread * unit_rows(300, 6, seed=1)).requires_grad_()
    upstream = unit_rows(300, 6, seed=2)
    found = {}
    for implementation in ("linear", "plain"):
        y = contra_norm(x, 1.0, implementation=implementation, degree=2)
        found[implementation] = (y, torch.autograd.grad(y, x, upstream)[0])
    for got, want in zip(found["linear"], found["plain"], strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    assert visible_degree(2, 1e-9, torch.float64) == 1 and visible_degree(2, 1e-2, torch.float64) == 2
    assert visible_degree(2, 1e-4, torch.float32) == 2 and visible_degree(1, 0.0, torch.float32) == 1


def test_linear_falls_back_to_exact_with_a_warning():
    x = unit_rows(50, 6)
    with pytest.warns(UserWarning, match="exact form is used instead"):
        y = contra_norm(x, 1.0, tau=0.1, implementation="linear")
    torch.testing.assert_close(y, contra_norm(x, 1.0, tau=0.1, implementation="plain"))


@pytest.mark.parametrize("tau", [1.0, 0.001])
@pytest.mark.parametrize("own", [0.0, 1.0, 1.3])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("chunk", [1, 100, 1 << 30])
def test_fused_is_its_equation_whatever_the_chunk(tau, own, masked, chunk, monkeypatch):
    monkeypatch.setattr("contranorm.kernels.fused.CHUNK", chunk)
    x = torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    keep = None
    weights = F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).mT / tau
    if masked:
        keep = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.6
        keep[1], keep[2] = False, True
        weights = weights.masked_fill(~keep[:, None, :], -1e9)
    weights = weights.softmax(dim=-1)
    want = own * x - 0.3 * weights @ x
    if keep is not None:
        want = torch.where(keep.unsqueeze(-1), want, x)
    got = fused_step(x, own=own, scale=0.3, tau=tau, keep=keep)
    upstream = torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (got, want)]
    torch.testing.assert_close(*gradients, atol=1e-9 / tau, rtol=1e-9)


def test_auto_is_exact_at_every_size(edges):
    for n in (5, 300, TILE + 10):
        x = unit_rows(n, 8)
        for exclude in (None, edges(n, 0.01)):
            auto, plain = (contra_norm(x, 1.0, exclude=exclude, implementation=i) for i in ("auto", "plain"))
            torch.testing.assert_close(auto, plain, atol=1e-10, rtol=1e-10)


def test_blocked_never_stores_the_matrix():
    """The largest tensor that autograd keeps or a kernel makes is a tile."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    x = unit_rows(3000, 8).float().requires_grad_()
    with Watch():
        contra_norm(x, 1.0, implementation="blocked").sum().backward()
    assert TILE**2 <= largest < 3000**2 / 4


@pytest.mark.parametrize("tau", [1.0, 0.2, 0.05])
@pytest.mark.parametrize("symmetric", [False, True])
def test_factors_in_float16_do_not_overflow(tau, symmetric):
    """The products' dtype under a GPU's autocast; it is given here, as on a CPU nothing asks for it."""
    x = torch.randn(600, 8, generator=torch.Generator().manual_seed(0)).abs().requires_grad_()
    unit = torch.nn.functional.normalize(x, dim=1)
    half, full = (blocked_contrast(unit, x, None, tau=tau, symmetric=symmetric, dtype=d) for d in (torch.float16, None))
    torch.testing.assert_close(half, full, rtol=1e-2, atol=1e-2)
    assert torch.autograd.grad(half.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("degree", [1, 2])
def test_a_hub_with_few_nodes_left_keeps_its_digits(degree):
    """Its row is a small difference of two large sums."""
    x = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0)) * 0.05 + 1
    stored = torch.zeros(3000, 3000)
    stored[0, :-2] = 1
    exclude = stored.to_sparse_csr()
    form = dict(scale=1.0, exclude=exclude)
    hub = contra_norm(x, implementation="linear", degree=degree, **form)[0]
    torch.testing.assert_close(
        hub, contra_norm(x.double(), implementation="plain", **form)[0].float(), rtol=0, atol=1e-4
    )


def test_numpys_numbers_are_numbers():
    x = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.1 + 1
    for implementation in ("plain", "linear", "blocked"):
        for tau in (np.float32(0.5), np.int64(1)):
            moved = contra_norm(x, np.float32(0.5), tau=tau, implementation=implementation)
            assert torch.equal(moved, contra_norm(x, 0.5, tau=float(tau), implementation=implementation))
