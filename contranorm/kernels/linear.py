"""The contrast term in time linear in N: exp by its Taylor polynomial about the mean direction, no pair ever formed.

With the mean m of the unit rows and d_i = x̂_i - m, the kernel splits exactly into

    exp(x̂_i·x̂_j / τ) = const · r_i exp(s_ij) r_j,        r_j = exp(d_j·m / τ),        s_ij = d_i·d_j / τ.

r_i cancels in row i's softmax and r_j is a weight of row j, so that only exp(s_ij) has to be approximated, and s is
much smaller than the cosine when the rows lie in a cone. Its Taylor polynomial p, of degree 1 or 2, needs no pair: a
power of an inner product is an inner product of monomials, (d_i·d_j)² = Σ_{a ≤ b} (1 or 2) d_ia d_ib · d_ja d_jb, so
with Φ the N x F matrix of all monomials of d up to that degree and Ω the diagonal of coefficients,

    p(s) = Φ Ω Φᵀ,        p(s) w = Φ (Ω (Φᵀ w)).

Forward and backward cost O(N·F·D), with F = 1 + D or (D + 1)(D + 2) / 2. Excluded pairs are subtracted along the edges
with the same polynomial, so that what remains is exactly the polynomial's softmax Ã over the other pairs; in float64
where few pairs of some row remain, since the difference of two nearly equal sums keeps few digits. The gradient takes m
as a constant, which it is to the exact kernel.

Error. |exp(s) - p(s)| ≤ κ s² for |s| ≤ H, with κ = Σ_{k > degree} H^(k-2) / k! and H the largest ‖d_i‖² / τ, and the
sums q_i = Σ_j r_j s_ij² need no pair either. With Z̃_i the polynomial's sum over row i,

    Σ_j |Ã_ij - A_ij| ≤ 2 b_i,        b_i = κ q_i / Z̃_i,

so that row i's contrast is off by at most 2 b_i max_j ‖v_j‖. The mean of b over the rows decides whether the
approximation is used. What that amounts to for the layer's output is measured by benchmarks/layer.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from contranorm.kernels.autograd import differentiable_twice
from contranorm.kernels.blocked import blocked_contrast
from contranorm.kernels.edges import Edges, edges_of
from contranorm.kernels.masks import ratio_or_zero

# Largest mean of b (see above) for which the polynomial is used; above it the exact form answers, with a warning.
MAX_ERROR = 0.1
# Share of a row's pairs from which, if that many are excluded, all is computed in float64.
CANCELS = 0.95
# Elements of one block of Φ: half as many or twice as many are slower.
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
    """1 where the square, below rounding for |s| ≤ largest, would only be slow: its factors are subnormal numbers."""
    return degree if largest**2 / 2 >= 0.01 * torch.finfo(dtype).eps else 1


class _PolynomialProduct(torch.autograd.Function):
    """(M ∘ p(d dᵀ)) w for rows d (N, D), w (N, C) and a polynomial p; M leaves out the edges."""

    @staticmethod
    def forward(ctx: Any, d: Tensor, w: Tensor, coefficients: tuple[float, ...], edges: Edges | None) -> Tensor:
        out, moments = (_affine if len(coefficients) == 2 else _quadratic)(d, w, coefficients)
        ctx.settings = (coefficients, edges)
        ctx.set_materialize_grads(False)
        if edges is None:
            ctx.save_for_backward(d, w, moments)
            return out
        t = edges.inner(d, d)  # (E,)
        ctx.save_for_backward(d, w, moments, t)
        return edges.subtract(out, _evaluate(coefficients, t), w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 4
        d, w, moments, *at_edges = ctx.saved_tensors
        coefficients, edges = ctx.settings
        grad = grad.contiguous()
        gradients = _affine_backward if len(coefficients) == 2 else _quadratic_backward
        grad_d, grad_w = gradients(d, w, grad, moments, coefficients)
        if edges is not None:
            (t,) = at_edges
            transposed = edges.subtract if edges.symmetric else edges.subtract_transposed  # t_ij = t_ji
            grad_w = transposed(grad_w, _evaluate(coefficients, t), grad)
            slope = tuple(k * c for k, c in enumerate(coefficients))[1:]
            inner = edges.inner(grad, w).mul_(_evaluate(slope, t))  # (E,)
            grad_d = edges.subtract_both(grad_d, inner, d)
        return grad_d, grad_w, None, None


def _product(d: Tensor, w: Tensor, coefficients: tuple[float, ...], edges: Edges | None) -> Tensor:
    """`_PolynomialProduct`, differentiable twice."""

    def definition(d: Tensor, w: Tensor) -> Tensor:
        powers = [torch.ones_like(d[:, :1]), d, (d.unsqueeze(2) * d.unsqueeze(1)).flatten(1)]
        out = torch.zeros_like(w)
        for c, x in zip(coefficients, powers[: len(coefficients)], strict=True):
            out = out + c * (x @ (x.mT @ w))
        if edges is None:
            return out
        rows, columns = edges.rows, edges.columns
        at_edges = _evaluate(coefficients, (d[rows] * d[columns]).sum(dim=1, keepdim=True))
        return out.index_add(0, rows, at_edges * w[columns], alpha=-1)

    return differentiable_twice(_PolynomialProduct.apply(d, w, coefficients, edges), definition, d, w)


def _affine(d: Tensor, w: Tensor, coefficients: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """(c_0 + c_1 d dᵀ) w and the moments dᵀ w, (D, C): degree 1, whose monomials are d itself."""
    moments = d.mT @ w
    return torch.addmm(coefficients[0] * w.sum(dim=0), d, moments, alpha=coefficients[1]), moments


def _affine_backward(
    d: Tensor, w: Tensor, grad: Tensor, moments: Tensor, coefficients: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    grad_w, of_grad = _affine(d, grad, coefficients)
    return (grad @ moments.mT).addmm_(w, of_grad.mT).mul_(coefficients[1]), grad_w


def _quadratic(d: Tensor, w: Tensor, coefficients: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """p(d dᵀ) w and the moments Ω Φᵀ w, (F, C): degree 2."""
    blocks = _Blocks(d, coefficients)
    moments = blocks.moments(w.mT.contiguous())  # the products run faster on long rows
    return blocks.product(moments), moments


def _quadratic_backward(
    d: Tensor, w: Tensor, grad: Tensor, moments: Tensor, coefficients: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    blocks = _Blocks(d, coefficients)
    gt = grad.mT.contiguous()  # (C, N)
    swapped = torch.cat([gt, w.mT])  # (2C, N)
    of_grad = blocks.moments(gt)  # Ω Φᵀ g, (F, C)
    both = torch.cat([moments, of_grad], dim=1)  # (F, 2C)
    grad_wt, grad_dt = torch.empty_like(gt), torch.empty_like(blocks.d_t)
    second = torch.empty_like(blocks.buffer)
    for part, features in blocks:
        grad_wt[:, part] = of_grad.mT @ features
        grad_features = torch.mm(both, swapped[:, part], out=second[:, : features.shape[1]])  # (F, n)
        grad_dt[:, part] = _monomials_backward(blocks.d_t[:, part], grad_features)
    return grad_dt.mT.contiguous(), grad_wt.mT.contiguous()


def _squares(dim: int) -> Iterator[tuple[int, slice]]:
    """For each variable a: (a, where the products x_a x_b, b = a … D - 1, stand among the monomials)."""
    start = 1 + dim  # behind 1, x_0, …, x_(D-1)
    for a in range(dim):
        yield a, slice(start, start + dim - a)
        start += dim - a


def _monomials(xt: Tensor, out: Tensor) -> Tensor:
    """Φᵀ of one block, the monomials of degree 0, 1 and 2: xt (D, n) → (F, n), written to `out`."""
    dim = xt.shape[0]
    out[0] = 1.0
    out[1 : 1 + dim] = xt
    for a, group in _squares(dim):
        torch.mul(xt[a:], xt[a], out=out[group])
    return out


def _monomials_backward(xt: Tensor, grad: Tensor) -> Tensor:
    """Gradient with respect to xt (D, n) from `grad`, that of Φᵀ (F, n), which is overwritten."""
    dim = xt.shape[0]
    out, linear = torch.zeros_like(xt), grad[1 : 1 + dim]
    for a, group in _squares(dim):
        linear[a:].addcmul_(grad[group], xt[a])
        out[a] += grad[group].mul_(xt[a:]).sum(dim=0)
    return out.add_(linear)


class _Blocks:
    """Walks over Φ a block of rows at a time; each visit has Φᵀ's block in a buffer that the next visit overwrites."""

    def __init__(self, d: Tensor, coefficients: tuple[float, ...]) -> None:
        self.d_t = d.mT.contiguous()  # (D, N)
        dim, self.n = self.d_t.shape
        constant, slope, square = coefficients
        omega = torch.full((math.comb(dim + 2, 2),), 2 * square, dtype=torch.float64)
        omega[0], omega[1 : 1 + dim] = constant, slope
        for _, group in _squares(dim):
            omega[group.start] = square  # x_a x_a: once, where x_a x_b stands for x_b x_a too
        self.omega = omega.to(d)[:, None]  # Ω's diagonal, (F, 1)
        self.rows = min(self.n, max(64, BLOCK // len(omega)))
        self.buffer = d.new_empty(len(omega), self.rows)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.n, self.rows):
            part = slice(start, min(start + self.rows, self.n))
            yield part, _monomials(self.d_t[:, part], self.buffer[:, : part.stop - start])

    def moments(self, wt: Tensor) -> Tensor:
        """Ω Φᵀ w for wᵀ (C, N); (F, C)."""
        total = wt.new_zeros(len(self.omega), wt.shape[0])
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


def linear_contrast(
    unit: Tensor,
    values: Tensor,
    exclude: Tensor | None,
    *,
    tau: float,
    symmetric: bool,
    degree: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`blocked_contrast` with exp replaced by a polynomial of `degree`, 1 or 2.

    Instead of 1, 2 is taken where the bound on 1's error is above `MAX_ERROR` and there are fewer monomials than rows
    (with more, the exact form is the faster one). The exact form answers, after a warning, where neither will do.
    """
    edges = None if exclude is None else edges_of(exclude)
    if edges is not None and edges.fullest > CANCELS and unit.dtype != torch.float64:
        form: dict[str, Any] = {"tau": tau, "symmetric": symmetric, "degree": degree}
        return linear_contrast(unit.double(), values.double(), exclude, **form).to(values.dtype)
    mean = unit.detach().mean(dim=0)
    d = unit - mean
    exponent = d @ mean / tau  # (N,)
    r = (exponent - exponent.detach().max()).exp().unsqueeze(1)  # (N, 1)
    weighted = torch.cat([values * r, r], dim=1)  # (N, C + 1)
    largest = float(torch.linalg.vector_norm(d.detach(), dim=1).max()) ** 2 / tau
    spread = d.detach().mT @ (d.detach() * (r.detach() / tau**2))  # Σ_j r_j d_j d_jᵀ / τ², (D, D)
    error = math.inf
    degree = visible_degree(degree, largest, d.dtype)
    for power in range(degree, 3):
        kappa = remainder(power, largest)
        if kappa == math.inf or (power > degree and math.comb(unit.shape[1] + power, power) >= unit.shape[0]):
            break
        coefficients = taylor(power, tau)
        sums = _product(d, weighted, coefficients, edges)  # (N, C + 1)
        row_sums = sums[:, -1:] if edges is None else edges.empty_is_zero(sums[:, -1:])  # Z̃, (N, 1)
        column_sums = row_sums
        if symmetric and edges is not None and not edges.symmetric:
            column_sums = edges.transposed.empty_is_zero(_product(d, r, coefficients, edges.transposed))
        error = kappa * max(_mean_bound(d, spread, total) for total in {row_sums, column_sums})
        if error <= MAX_ERROR:
            contrast = ratio_or_zero(sums[:, :-1], row_sums)
            if symmetric:
                share = ratio_or_zero(values, column_sums)
                contrast = contrast + r * _product(d, share, coefficients, edges)
            return contrast
    warnings.warn(
        f"implementation='linear': a polynomial may miss the softmax of cos/{tau:g} by {error:.0%} on these features, "
        f"more than {MAX_ERROR:.0%}: the exact form is used instead",
        stacklevel=2,
    )
    return blocked_contrast(unit, values, exclude, tau=tau, symmetric=symmetric, dtype=dtype)


@torch.no_grad()
def _mean_bound(d: Tensor, spread: Tensor, total: Tensor) -> float:
    """The mean of b / κ, with Σ_i q_i / Z̃_i = ⟨Σ_j r_j d_j d_jᵀ, Σ_i d_i d_iᵀ / Z̃_i⟩ / τ²; infinite where a Z̃ < 0."""
    if bool((total < 0).any()):
        return math.inf
    inverse = torch.where(total > 0, total.reciprocal(), 0.0)
    return float((spread * (d.mT @ (d * inverse))).sum()) / d.shape[0]
