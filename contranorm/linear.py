"""The contrast term in time linear in N: exp(t/τ) as a polynomial of the cosine t, no pair ever formed.

A power of a cosine is an inner product of monomials, (x̂_i·x̂_j)^p = Σ_α (p!/α!) x̂_i^α x̂_j^α, so with Φ the N x F
matrix of all monomials of x̂ up to degree p (without repeats, F = C(D + p, p)) and Ω the diagonal of coefficients,

    K ≈ Φ Ω Φᵀ,        K w ≈ Φ (Ω (Φᵀ w)).

Forward and backward cost O(N·F·D). Excluded pairs are subtracted along the edges with the same polynomial, so that
what remains is exactly the polynomial's softmax over the other pairs.

Error. If the polynomial is within a factor 1 ± ε of exp(t/τ) for every cosine that occurs, each weight of the softmax
is within (1 + ε)/(1 - ε), and the contrast of row i within 2ε/(1 - ε)·Σ_j A_ij ‖v_j‖. `Polynomial.error` is that ε,
measured on a grid of the range. The range is bounded without looking at pairs: two rows at angles α and β to the mean
direction are at most α + β apart, and rows without negative entries have no negative cosine. What that amounts to for
the layer's output is measured by benchmarks/layer.py.
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

# Largest ε for which the polynomial is used; above it the exact form answers, with a warning.
MAX_ERROR = 0.1
# Elements of one block of Φ: half as many or twice as many are slower, for degree 2 and 3.
BLOCK = 1 << 21
# Edges handled at once by the subtraction.
EDGES = 1 << 18


@dataclass(frozen=True)
class Polynomial:
    """c_0 + c_1 t + … ≈ exp(t/τ) on [low, high].

    Attributes:
        coefficients: c_0 … c_p.
        error: ε, the largest relative error on the range.
    """

    coefficients: tuple[float, ...]
    error: float


def cosine_range(unit: Tensor) -> tuple[float, float, float, float]:
    """(low, high, mean, standard deviation) of the cosines between the rows of `unit` (N, D), no pair formed.

    low and high are bounds; mean and deviation are exact over all ordered pairs, i = j included.
    """
    unit = unit.detach().double()
    n = unit.shape[0]
    total = unit.sum(dim=0)
    mean = float(total.square().sum()) / n**2
    second = float((unit.mT @ unit).square().sum()) / n**2
    centre = total / total.norm().clamp_min(1e-300)
    angles = (unit @ centre).clamp(-1, 1).acos()
    widest = float(angles.topk(min(2, n)).values.sum())
    low = math.cos(min(math.pi, widest))
    if bool((unit.norm(dim=1) < 0.5).any()):
        low = min(low, 0.0)  # a zero row has cosine 0 with all others, wherever they point
    if float(unit.min()) >= 0:
        low = max(low, 0.0)
    return low, 1.0, mean, math.sqrt(max(second - mean**2, 0.0))


def fit_polynomial(tau: float, degree: int, low: float, high: float, mean: float, deviation: float) -> Polynomial:
    """Weighted least squares in the relative error, on Chebyshev points of [low, high].

    Half of the weight goes to where the cosines are (a bell of the given mean and deviation), half to the whole range.
    """
    grid = torch.cos(torch.linspace(0, math.pi, 257, dtype=torch.float64)) * (high - low) / 2 + (high + low) / 2
    bell = torch.exp(-0.5 * ((grid - mean) / max(deviation, 0.05 * (high - low), 1e-3)) ** 2)
    weight = (0.5 / grid.numel() + 0.5 * bell / bell.sum().clamp_min(1e-300)).sqrt()
    powers = torch.stack([grid**p for p in range(degree + 1)], dim=1) / torch.exp(grid / tau)[:, None]
    solution = torch.linalg.lstsq(powers * weight[:, None], weight[:, None], driver="gelsd").solution
    error = float((powers @ solution - 1).abs().max())
    return Polynomial(tuple(solution.squeeze(1).tolist()), error)


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
    """(M ∘ p(x̂ x̂ᵀ)) w for unit rows x̂ (N, D), w (N, C) and a polynomial p; M leaves out the edges (rows, columns)."""

    @staticmethod
    def forward(
        ctx: Any,
        unit: Tensor,
        w: Tensor,
        coefficients: tuple[float, ...],
        edges: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        blocks = _Blocks(unit, coefficients)
        wt = w.mT.contiguous()  # (C, N): the products run faster on long rows
        moments = blocks.moments(wt)  # Ω Φᵀ w, (F, C)
        out = blocks.product(moments)
        ctx.save_for_backward(unit, w, moments)
        ctx.settings = (coefficients, edges)
        if edges is not None:
            for rows, columns, t in _edge_cosines(unit, edges):
                out.index_add_(0, rows, w[columns] * _evaluate(coefficients, t)[:, None], alpha=-1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        unit, w, moments = ctx.saved_tensors
        coefficients, edges = ctx.settings
        blocks = _Blocks(unit, coefficients)
        gt = grad.mT.contiguous()  # (C, N)
        swapped = torch.cat([gt, w.mT])  # (2C, N)
        of_grad = blocks.moments(gt)  # Ω Φᵀ g, (F, C)
        both = torch.cat([moments, of_grad], dim=1)  # (F, 2C)
        grad_wt, grad_unit_t = torch.empty_like(gt), torch.empty_like(blocks.unit_t)
        for part, features in blocks:
            grad_wt[:, part] = of_grad.mT @ features
            grad_features = torch.mm(both, swapped[:, part], out=blocks.second[:, : features.shape[1]])  # (F, n)
            grad_unit_t[:, part] = _features_backward(features, grad_features, blocks.tables)
        grad_w, grad_unit = grad_wt.mT.contiguous(), grad_unit_t.mT.contiguous()
        if edges is not None:
            slope = tuple(p * c for p, c in enumerate(coefficients))[1:]
            for rows, columns, t in _edge_cosines(unit, edges):
                value = _evaluate(coefficients, t)[:, None]
                grad_w.index_add_(0, columns, grad[rows] * value, alpha=-1)
                inner = ((grad[rows] * w[columns]).sum(dim=1) * _evaluate(slope, t))[:, None]
                grad_unit.index_add_(0, rows, unit[columns] * inner, alpha=-1)
                grad_unit.index_add_(0, columns, unit[rows] * inner, alpha=-1)
        return grad_unit, grad_w, None, None


class _Blocks:
    """Walks over Φ a block of rows at a time; each visit has Φᵀ's block in a buffer that the next visit overwrites."""

    def __init__(self, unit: Tensor, coefficients: tuple[float, ...]) -> None:
        self.unit_t = unit.mT.contiguous()  # (D, N)
        self.n = unit.shape[0]
        self.tables = monomials(unit.shape[1], len(coefficients) - 1, unit.device)
        values = torch.tensor(coefficients, device=unit.device, dtype=torch.float64)[self.tables.degree_of]
        self.omega = (values * self.tables.multiplicity).to(unit.dtype)[:, None]  # Ω's diagonal, (F, 1)
        self.rows = min(self.n, max(64, BLOCK // self.tables.count))
        self.buffer = unit.new_empty(self.tables.count, self.rows)

    @functools.cached_property
    def second(self) -> Tensor:
        """Another buffer of that size, for the gradient of Φᵀ."""
        return torch.empty_like(self.buffer)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.n, self.rows):
            part = slice(start, min(start + self.rows, self.n))
            yield part, _features(self.unit_t[:, part], self.tables, self.buffer[:, : part.stop - start])

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


def _edge_cosines(unit: Tensor, edges: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(rows, columns, cosines) of the edges, a part at a time."""
    for start in range(0, edges[0].numel(), EDGES):
        rows, columns = edges[0][start : start + EDGES], edges[1][start : start + EDGES]
        yield rows, columns, (unit[rows] * unit[columns]).sum(dim=1)


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
        degree: of the polynomial; 2 and 3 pay.

    Returns:
        (N, C), or None, after a warning, when no polynomial of that degree is within `MAX_ERROR` on the range.
    """
    polynomial = fit_polynomial(tau, degree, *cosine_range(unit))
    if polynomial.error > MAX_ERROR:
        warnings.warn(
            f"implementation='linear': a polynomial of degree {degree} misses exp(cos/{tau:g}) by up to "
            f"{polynomial.error:.0%} on these features, more than {MAX_ERROR:.0%}: the exact form is used instead",
            stacklevel=2,
        )
        return None
    n = unit.shape[0]
    edges, left_rows, left_columns = None, None, None
    if exclude is not None:
        counts = exclude.crow_indices().diff().long()
        columns = exclude.col_indices().long()
        edges = (torch.repeat_interleave(torch.arange(n, device=columns.device), counts), columns)
        left_rows = n - counts
        left_columns = n - torch.bincount(columns, minlength=n)

    def product(w: Tensor, edges: tuple[Tensor, Tensor] | None) -> Tensor:
        result: Tensor = _PolynomialProduct.apply(unit, w, polynomial.coefficients, edges)
        return result

    ones = values.new_ones(n, 1)
    sums = product(torch.cat([values, ones], dim=1), edges)  # (N, C + 1)
    contrast = _ratio(sums[:, :-1], sums[:, -1:], left_rows)
    if symmetric:
        column_sums = sums[:, -1:] if edges is None else product(ones, (edges[1], edges[0]))
        contrast = contrast + product(_ratio(values, column_sums, left_columns), edges)
    return contrast


def _ratio(numerator: Tensor, denominator: Tensor, left: Tensor | None) -> Tensor:
    """Numerator / denominator, and 0 where no pair is left (the difference of two sums is not exactly 0 there)."""
    if left is None:
        return numerator / denominator
    empty = (left == 0)[:, None]
    return (numerator / denominator.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)
