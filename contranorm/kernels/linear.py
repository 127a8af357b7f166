"""The contrast term in time linear in N: exp by its Taylor polynomial about the mean direction, no pair ever formed.

With the mean m of the unit rows and d_i = x̂_i - m, the kernel splits exactly into

    exp(x̂_i·x̂_j / τ) = const · r_i exp(s_ij) r_j,        r_j = exp(d_j·m / τ),        s_ij = d_i·d_j / τ.

r_i cancels in row i's softmax and r_j is a weight of row j, so that only exp(s_ij) has to be approximated, and s is
much smaller than the cosine when the rows lie in a cone. Its Taylor polynomial p needs no pair: a power of an inner
product is an inner product of monomials, (d_i·d_j)^k = Σ_α (k!/α!) d_i^α d_j^α, so with Φ the N x F matrix of all
monomials of d up to that degree (without repeats, F = C(D + degree, degree)) and Ω the diagonal of coefficients,

    p(s) = Φ Ω Φᵀ,        p(s) w = Φ (Ω (Φᵀ w)).

Forward and backward cost O(N·F·D). Excluded pairs are subtracted along the edges with the same polynomial, so that
what remains is exactly the polynomial's softmax Ã over the other pairs. The gradient takes m as a constant, which it is
to the exact kernel.

Error. |exp(s) - p(s)| ≤ κ s² for |s| ≤ H, with κ = Σ_{k > degree} H^(k-2) / k! and H the largest ‖d_i‖² / τ, and the
sums q_i = Σ_j r_j s_ij² need no pair either. With Z̃_i the polynomial's sum over row i,

    Σ_j |Ã_ij - A_ij| ≤ 2 b_i,        b_i = κ q_i / Z̃_i,

so that row i's contrast is off by at most 2 b_i max_j ‖v_j‖. The mean of b over the rows decides whether the
approximation is used. What that amounts to for the layer's output is measured by benchmarks/layer.py.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from contranorm.kernels.blocked import ratio
from contranorm.kernels.edges import Edges, edges_of

# Largest mean of b (see above) for which the polynomial is used; above it the exact form answers, with a warning.
MAX_ERROR = 0.1
# Elements of one block of Φ: half as many or twice as many are slower, for degree 2 and 3.
BLOCK = 1 << 21


def taylor(degree: int, tau: float) -> tuple[float, ...]:
    """c_0 … c_degree of the polynomial of d_i·d_j."""
    return tuple(tau**-k / math.factorial(k) for k in range(degree + 1))


def remainder(degree: int, largest: float) -> float:
    """κ: |exp(s) - p(s)| ≤ κ s² wherever |s| ≤ largest; infinite where exp is out of a polynomial's reach."""
    if not largest < 10:
        return math.inf
    # The series of positive terms is largest at the right end, and after that many terms it has converged.
    return math.fsum(largest ** (k - 2) / math.factorial(k) for k in range(degree + 1, degree + 60))


def visible_degree(degree: int, largest: float, dtype: torch.dtype) -> int:
    """The degree without the terms that are below rounding wherever |s| ≤ largest.

    They change nothing, and on collapsed rows the products of their factors are subnormal numbers, which processors
    handle a hundred times slower than others.
    """
    while degree > 1 and largest**degree / math.factorial(degree) < 0.01 * torch.finfo(dtype).eps:
        degree -= 1
    return degree


@dataclass(frozen=True)
class Monomials:
    """The monomials of D variables of degree 0 to p, without repeats, x_a x_b x_c with a ≤ b ≤ c in lexical order.

    In that order the monomials of degree q that begin with x_a are x_a times the *tail* of the level below, from its
    first one that begins with x_a: whole blocks are built, and differentiated, without any table of indices.

    Attributes:
        levels: for each degree the (start, stop) of its monomials.
        heads: for each degree q ≥ 1 and each variable a, where in level q those that begin with x_a start.
        multiplicity: q!/α! of every monomial, (F,).
        degree_of: degree of every monomial, (F,).
    """

    levels: tuple[tuple[int, int], ...]
    heads: tuple[tuple[int, ...], ...]
    multiplicity: Tensor
    degree_of: Tensor

    @property
    def count(self) -> int:
        """F = C(D + p, p)."""
        return self.levels[-1][1]


@functools.lru_cache(maxsize=32)
def monomials(dim: int, degree: int, device: torch.device) -> Monomials:
    """The monomials of `dim` variables up to `degree`."""
    levels, heads = [(0, 1)], [(0,) * dim]
    multiplicity, degrees = [1.0], [0]
    for q in range(1, degree + 1):
        choices = list(combinations_with_replacement(range(dim), q))
        levels.append((levels[-1][1], levels[-1][1] + len(choices)))
        first = {c[0]: index for index, c in reversed(list(enumerate(choices)))}
        heads.append(tuple(first[a] for a in range(dim)))
        repeats = (math.prod(math.factorial(c.count(v)) for v in set(c)) for c in choices)
        multiplicity += [math.factorial(q) / r for r in repeats]
        degrees += [q] * len(choices)
    return Monomials(
        tuple(levels),
        tuple(heads),
        torch.tensor(multiplicity, device=device, dtype=torch.float64),
        torch.tensor(degrees, device=device),
    )


def _groups(tables: Monomials, q: int) -> Iterator[tuple[int, slice, slice]]:
    """For each variable a: (a, its monomials of degree q ≥ 2, the tail of the level below that they are x_a times)."""
    below, level = tables.levels[q - 1], tables.levels[q]
    ends = (*tables.heads[q][1:], level[1] - level[0])
    for a, (start, stop) in enumerate(zip(tables.heads[q], ends, strict=True)):
        yield a, slice(level[0] + start, level[0] + stop), slice(below[0] + tables.heads[q - 1][a], below[1])


def _features(xt: Tensor, tables: Monomials, out: Tensor) -> Tensor:
    """Φᵀ of one block: xt (D, n) → (F, n), written to `out`."""
    out[0] = 1.0
    out[slice(*tables.levels[1])] = xt
    for q in range(2, len(tables.levels)):
        for a, group, tail in _groups(tables, q):
            torch.mul(out[tail], xt[a], out=out[group])
    return out


def _features_backward(features: Tensor, grad: Tensor, tables: Monomials) -> Tensor:
    """Gradient with respect to x̂ᵀ (D, n) from `grad`, that of Φᵀ (F, n), which is overwritten."""
    variables = slice(*tables.levels[1])
    xt, out = features[variables], torch.zeros_like(features[variables])
    for q in range(len(tables.levels) - 1, 1, -1):
        for a, group, tail in _groups(tables, q):
            grad[tail].addcmul_(grad[group], xt[a])
            out[a] += grad[group].mul_(features[tail]).sum(dim=0)
    return out.add_(grad[variables])


class _PolynomialProduct(torch.autograd.Function):
    """(M ∘ p(d dᵀ)) w for rows d (N, D), w (N, C) and a polynomial p; M leaves out the edges."""

    @staticmethod
    def forward(ctx: Any, d: Tensor, w: Tensor, coefficients: tuple[float, ...], edges: Edges | None) -> Tensor:
        out, moments = (_affine if len(coefficients) == 2 else _polynomial)(d, w, coefficients)
        ctx.settings = (coefficients, edges)
        if edges is None:
            ctx.save_for_backward(d, w, moments)
            return out
        t = edges.inner(d, d)  # (E,)
        ctx.save_for_backward(d, w, moments, t)
        return edges.subtract(out, _evaluate(coefficients, t), w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d, w, moments, *at_edges = ctx.saved_tensors
        coefficients, edges = ctx.settings
        grad = grad.contiguous()
        gradients = _affine_backward if len(coefficients) == 2 else _polynomial_backward
        grad_d, grad_w = gradients(d, w, grad, moments, coefficients)
        if edges is not None:
            (t,) = at_edges
            grad_w = edges.subtract_transposed(grad_w, _evaluate(coefficients, t), grad)
            slope = tuple(k * c for k, c in enumerate(coefficients))[1:]
            inner = edges.inner(grad, w).mul_(_evaluate(slope, t))  # (E,)
            grad_d = edges.subtract_both(grad_d, inner, d)
        return grad_d, grad_w, None, None


def _affine(d: Tensor, w: Tensor, coefficients: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """(c_0 + c_1 d dᵀ) w and the moments dᵀ w, (D, C): degree 1, whose monomials are d itself."""
    moments = d.mT @ w
    return torch.addmm(coefficients[0] * w.sum(dim=0), d, moments, alpha=coefficients[1]), moments


def _affine_backward(
    d: Tensor, w: Tensor, grad: Tensor, moments: Tensor, coefficients: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients by d and w of `_affine`, whose matrix is symmetric."""
    grad_w, of_grad = _affine(d, grad, coefficients)
    return (grad @ moments.mT).addmm_(w, of_grad.mT).mul_(coefficients[1]), grad_w


def _polynomial(d: Tensor, w: Tensor, coefficients: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """p(d dᵀ) w and the moments Ω Φᵀ w, (F, C)."""
    blocks = _Blocks(d, coefficients)
    moments = blocks.moments(w.mT.contiguous())  # the products run faster on long rows
    return blocks.product(moments), moments


def _polynomial_backward(
    d: Tensor, w: Tensor, grad: Tensor, moments: Tensor, coefficients: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients by d and w of `_polynomial`."""
    blocks = _Blocks(d, coefficients)
    gt = grad.mT.contiguous()  # (C, N)
    swapped = torch.cat([gt, w.mT])  # (2C, N)
    of_grad = blocks.moments(gt)  # Ω Φᵀ g, (F, C)
    both = torch.cat([moments, of_grad], dim=1)  # (F, 2C)
    grad_wt, grad_dt = torch.empty_like(gt), torch.empty_like(blocks.d_t)
    for part, features in blocks:
        grad_wt[:, part] = of_grad.mT @ features
        grad_features = torch.mm(both, swapped[:, part], out=blocks.second[:, : features.shape[1]])  # (F, n)
        grad_dt[:, part] = _features_backward(features, grad_features, blocks.tables)
    return grad_dt.mT.contiguous(), grad_wt.mT.contiguous()


class _Blocks:
    """Walks over Φ a block of rows at a time; each visit has Φᵀ's block in a buffer that the next visit overwrites."""

    def __init__(self, d: Tensor, coefficients: tuple[float, ...]) -> None:
        self.d_t = d.mT.contiguous()  # (D, N)
        self.n = d.shape[0]
        self.tables = monomials(d.shape[1], len(coefficients) - 1, d.device)
        values = torch.tensor(coefficients, device=d.device, dtype=torch.float64)[self.tables.degree_of]
        self.omega = (values * self.tables.multiplicity).to(d.dtype)[:, None]  # Ω's diagonal, (F, 1)
        self.rows = min(self.n, max(64, BLOCK // self.tables.count))
        self.buffer = d.new_empty(self.tables.count, self.rows)

    @functools.cached_property
    def second(self) -> Tensor:
        """Another buffer of that size, for the gradient of Φᵀ."""
        return torch.empty_like(self.buffer)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.n, self.rows):
            part = slice(start, min(start + self.rows, self.n))
            yield part, _features(self.d_t[:, part], self.tables, self.buffer[:, : part.stop - start])

    def moments(self, wt: Tensor) -> Tensor:
        """Ω Φᵀ w for wᵀ (C, N); (F, C)."""
        total = wt.new_zeros(self.tables.count, wt.shape[0])
        for part, features in self:
            total.addmm_(features, wt[:, part].mT)
        return total.mul_(self.omega)

    def product(self, moments: Tensor) -> Tensor:
        """Φ m for m (F, C); (N, C)."""
        out = moments.new_empty(moments.shape[1], self.n)
        for part, features in self:
            out[:, part] = moments.mT @ features
        return out.mT.contiguous()


def _evaluate(coefficients: tuple[float, ...], t: Tensor) -> Tensor:
    """The polynomial at t, by Horner's rule."""
    value = torch.full_like(t, coefficients[-1])
    for c in coefficients[-2::-1]:
        value = value * t + c
    return value


def linear(
    unit: Tensor,
    values: Tensor,
    *,
    tau: float,
    symmetric: bool,
    exclude: Tensor | None,
    degree: int,
) -> Tensor | None:
    """A·v, or (A + softmax over columns)·v, for one set of rows, with exp replaced by a polynomial of `degree`.

    Args:
        unit: x̂, (N, D).
        values: v, (N, C).
        tau: temperature.
        symmetric: add the softmax over columns.
        exclude: sparse CSR (N, N) of pairs that do not count, or None.
        degree: the lowest to use, 1 to 3; the next one is taken where the bound on its error is above `MAX_ERROR`, as
            long as there are fewer monomials than rows (with more, the exact form is the faster one).

    Returns:
        (N, C), or None, after a warning, when no degree is good enough on these features.
    """
    mean = unit.detach().mean(dim=0)
    d = unit - mean
    exponent = d @ mean / tau  # (N,)
    r = (exponent - exponent.detach().max()).exp().unsqueeze(1)  # (N, 1)
    weighted = torch.cat([values * r, r], dim=1)  # (N, C + 1)
    edges = None if exclude is None else edges_of(exclude)
    largest = float(torch.linalg.vector_norm(d.detach(), dim=1).max()) ** 2 / tau
    swapped = edges.transpose() if symmetric and edges is not None and not edges.symmetric else None
    bound = _Bound(d.detach(), r.detach() / tau**2)
    error = math.inf
    degree = visible_degree(degree, largest, d.dtype)
    for power in range(degree, 4):
        kappa = remainder(power, largest)
        if kappa == math.inf or (power > degree and math.comb(unit.shape[1] + power, power) >= unit.shape[0]):
            break
        product = functools.partial(_product, d, coefficients=taylor(power, tau))
        sums = product(weighted, edges=edges)  # (N, C + 1)
        row_sums = _empty_is_zero(sums[:, -1:], edges)  # Z̃, (N, 1)
        column_sums = row_sums
        if swapped is not None:
            column_sums = _empty_is_zero(product(r, edges=swapped), swapped)
        error = kappa * max(bound.mean(total) for total in {row_sums, column_sums})
        if error <= MAX_ERROR:
            contrast = ratio(sums[:, :-1], row_sums)
            return contrast + r * product(ratio(values, column_sums), edges=edges) if symmetric else contrast
    warnings.warn(
        f"implementation='linear': a polynomial may miss the softmax of cos/{tau:g} by {error:.0%} on these features, "
        f"more than {MAX_ERROR:.0%}: the exact form is used instead",
        stacklevel=2,
    )
    return None


def _product(d: Tensor, w: Tensor, coefficients: tuple[float, ...], edges: Edges | None) -> Tensor:
    result: Tensor = _PolynomialProduct.apply(d, w, coefficients, edges)
    return result


def _empty_is_zero(sums: Tensor, edges: Edges | None) -> Tensor:
    """Row sums (N, 1), 0 where no pair is left: the difference of two sums is not exactly that."""
    if edges is None or edges.full is None:
        return sums
    return sums.masked_fill(edges.full.unsqueeze(1), 0.0)


class _Bound:
    """The mean of b_i / κ = q_i / Z̃_i over the rows: Σ_i q_i / Z̃_i = ⟨Σ_j r_j d_j d_jᵀ, Σ_i d_i d_iᵀ / Z̃_i⟩ / τ²."""

    def __init__(self, d: Tensor, weights: Tensor) -> None:
        self.d = d
        self.weighted = d.mT @ (d * weights)  # (D, D), from r / τ²

    @torch.no_grad()
    def mean(self, total: Tensor) -> float:
        """For the sums Z̃ (N, 1), rows with nothing in their sum left out; infinite where a sum is negative."""
        if bool((total < 0).any()):
            return math.inf
        inverse = torch.where(total > 0, total.reciprocal(), 0.0)
        return float((self.weighted * (self.d.mT @ (self.d * inverse))).sum()) / self.d.shape[0]
