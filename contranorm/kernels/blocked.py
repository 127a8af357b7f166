"""The exact contrast term with memory linear in N: the N x N matrix is walked in tiles that stay in the cache.

Everything is built on one product. With K = exp(x̂ x̂ᵀ / τ) and M the 0/1 pattern of the pairs that count,

    P w = (M ∘ K) w,        A v = (P v) / (P 1),        softmax over columns: P (v / (Pᵀ 1)).

Three facts make it fast. Cosines are bounded, so exp needs no running maximum (a small τ needs float64, one below 1/600
the plain form). K is symmetric, so only the tiles on and above the diagonal are computed, and each serves its mirror
image. And the gradient with respect to x̂ needs dS + dSᵀ only, which is K ∘ (M ∘ g wᵀ + Mᵀ ∘ w gᵀ): one product with
inner size 2(D + 1). Together 10·N²·D operations, forward and backward; without the symmetry it would be 14·N²·D.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from contranorm.kernels import masks
from contranorm.kernels.autograd import differentiable_twice
from contranorm.kernels.plain import plain_contrast

# Edge of a tile: the two float32 tiles of the backward fill the second-level caches of two to four cores
# (`python -m benchmarks.layer --tiles` measures other edges).
TILE = 768
# Largest 1/τ for which exp(cos/τ) and its products stay well inside the range of float32, and of float64.
MAX_LOGIT, MAX_LOGIT_DOUBLE = 40.0, 600.0
_Key = tuple[int, int]


@dataclass(frozen=True)
class ExcludedPairs:
    """Positions of the excluded pairs in the tiles on and above the diagonal.

    Attributes:
        rows: (I, J) → flat positions in that tile of the excluded pairs (i, j).
        columns: the same for the pairs (j, i), whose mirror image lies in the tile; `rows` itself when symmetric.
    """

    rows: dict[_Key, Tensor]
    columns: dict[_Key, Tensor]

    @property
    def symmetric(self) -> bool:
        """(i, j) is excluded whenever (j, i) is."""
        return self.rows is self.columns

    def transpose(self) -> ExcludedPairs:
        """The pattern with i and j swapped."""
        return ExcludedPairs(self.columns, self.rows)


_NONE: dict[_Key, Tensor] = {}
_NOTHING = ExcludedPairs(_NONE, _NONE)


def excluded_pairs(pattern: Tensor, tile: int) -> ExcludedPairs:
    """Sort the entries of a sparse CSR (N, N) into tiles; remembered per tensor, which must not change afterwards."""

    def make() -> ExcludedPairs:
        n = pattern.shape[0]
        rows, columns = masks.entries(pattern)
        direct = _by_tile(rows, columns, n, tile)
        symmetric = masks.is_symmetric(rows, columns, n)
        return ExcludedPairs(direct, direct if symmetric else _by_tile(columns, rows, n, tile))

    return masks.remembered(pattern, (ExcludedPairs, tile), make)


def _by_tile(rows: Tensor, columns: Tensor, n: int, tile: int) -> dict[_Key, Tensor]:
    """(I, J) with I ≤ J → flat positions of the entries (row, column) inside that tile."""
    upper = rows // tile <= columns // tile
    rows, columns = rows[upper], columns[upper]
    across = -(-n // tile)  # tiles per side
    key, order = ((rows // tile) * across + columns // tile).sort()
    rows, columns = rows[order], columns[order]
    width = (n - columns // tile * tile).clamp_max(tile)  # the last tile of a row is narrower
    position = (rows % tile) * width + columns % tile
    keys, counts = torch.unique_consecutive(key, return_counts=True)
    parts = torch.split(position, counts.tolist())
    return {divmod(k, across): part for k, part in zip(keys.tolist(), parts, strict=True)}


def _tiles(unit: Tensor, tau: float, dtype: torch.dtype, tile: int) -> Iterator[tuple[_Key, slice, slice, Tensor]]:
    """The tiles (I, J), I ≤ J, of K: key, rows, columns, and K there, in a buffer that the next tile overwrites."""
    n, left, right = unit.shape[0], unit.to(dtype), (unit / tau).to(dtype)
    buffer = left.new_empty(min(tile, n) ** 2)
    for i in range(0, n, tile):
        rows = slice(i, min(i + tile, n))
        for j in range(i, n, tile):
            columns = slice(j, min(j + tile, n))
            k = buffer[: (rows.stop - i) * (columns.stop - j)].view(rows.stop - i, columns.stop - j)
            torch.mm(left[rows], right[columns].mT, out=k)
            yield (i // tile, j // tile), rows, columns, k.exp_()


def _zero(tile: Tensor, positions: Tensor | None) -> None:
    if positions is not None:
        tile.view(-1).index_fill_(0, positions, 0.0)


@contextmanager
def _without(tile: Tensor, positions: Tensor | None) -> Iterator[None]:
    """The tile with its excluded entries at zero, for the length of a block."""
    if positions is None:
        yield
        return
    saved = tile.view(-1)[positions]
    _zero(tile, positions)
    yield
    tile.view(-1)[positions] = saved


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Out += a b, accumulated in out's dtype over the tiles."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out.add_(a @ b)


def _add_both_sides(
    out: Tensor, k: Tensor, w: Tensor, key: _Key, rows: slice, columns: slice, excluded: ExcludedPairs
) -> None:
    """Out += (M ∘ K) w for the pairs of one tile and for their mirror images below the diagonal."""
    with _without(k, excluded.rows.get(key)):
        _add_product(out[rows], k, w[columns])
    if columns.start > rows.start:
        with _without(k, excluded.columns.get(key)):
            _add_product(out[columns], k.mT, w[rows])


class _KernelProduct(torch.autograd.Function):
    """(M ∘ exp(x̂ x̂ᵀ / τ)) w for unit rows x̂ (N, D) and w (N, C); its backward recomputes the tiles."""

    @staticmethod
    def forward(
        ctx: Any, unit: Tensor, w: Tensor, tau: float, excluded: ExcludedPairs, dtype: torch.dtype, tile: int
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(unit, w)
        ctx.settings = (tau, excluded, dtype, tile)
        out = torch.zeros_like(w)
        factor = w.to(dtype)
        for key, rows, columns, k in _tiles(unit, tau, dtype, tile):
            _add_both_sides(out, k, factor, key, rows, columns, excluded)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        unit, w = ctx.saved_tensors
        tau, excluded, dtype, tile = ctx.settings
        g, factor = grad.to(dtype).contiguous(), w.to(dtype)
        grad_unit, grad_w = torch.zeros_like(unit), torch.zeros_like(w)
        both, swapped = torch.cat([g, factor], dim=1), torch.cat([factor, g], dim=1)  # (N, 2C)
        edge = min(tile, unit.shape[0])
        buffers = g.new_empty(1 if excluded.symmetric else 2, edge * edge)
        right = (unit / tau).to(dtype)
        for key, rows, columns, k in _tiles(unit, tau, dtype, tile):
            if ctx.needs_input_grad[1]:  # Pᵀ g
                _add_both_sides(grad_w, k, g, key, rows, columns, excluded.transpose())
            if not ctx.needs_input_grad[0]:
                continue
            h = buffers[0, : k.numel()].view_as(k)  # M ∘ g wᵀ + Mᵀ ∘ w gᵀ
            if excluded.symmetric:  # M = Mᵀ
                torch.mm(both[rows], swapped[columns].mT, out=h)
                _zero(h, excluded.rows.get(key))
            else:
                mirror = buffers[1, : k.numel()].view_as(k)
                torch.mm(g[rows], factor[columns].mT, out=h)
                torch.mm(factor[rows], g[columns].mT, out=mirror)
                _zero(h, excluded.rows.get(key))
                _zero(mirror, excluded.columns.get(key))
                h.add_(mirror)
            h.mul_(k)  # dS + dSᵀ
            _add_product(grad_unit[rows], h, right[columns])
            if columns.start > rows.start:
                _add_product(grad_unit[columns], h.mT, right[rows])
        return grad_unit, grad_w, None, None, None, None


def blocked_contrast(
    unit: Tensor,
    values: Tensor,
    exclude: Tensor | None,
    *,
    tau: float,
    symmetric: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A·v, or (A + softmax over columns)·v, for one set of rows: x̂ (N, D), v (N, C), excluded pairs CSR (N, N).

    `dtype` is that of the factors of the products, None that of x̂, in which sums stay. It is not taken where it is
    float16: exp(1/τ) and sums over many rows are above its range.
    """
    dtype = None if dtype == torch.float16 else dtype
    if 1 / tau > MAX_LOGIT and unit.dtype != torch.float64:
        wide = blocked_contrast(unit.double(), values.double(), exclude, tau=tau, symmetric=symmetric)
        return wide.to(values.dtype)
    excluded = _NOTHING if exclude is None else excluded_pairs(exclude, TILE)

    def product(w: Tensor, excluded: ExcludedPairs) -> Tensor:
        result: Tensor = _KernelProduct.apply(unit, w, tau, excluded, dtype or unit.dtype, TILE)
        return result

    ones = values.new_ones(values.shape[0], 1)
    sums = product(torch.cat([values, ones], dim=1), excluded)  # (N, C + 1): P v, P 1
    contrast = masks.ratio_or_zero(sums[:, :-1], sums[:, -1:])
    if symmetric:
        column_sums = sums[:, -1:] if excluded.symmetric else product(ones, excluded.transpose())
        contrast = contrast + product(masks.ratio_or_zero(values, column_sums), excluded)

    def definition(unit: Tensor, values: Tensor) -> Tensor:
        form: dict[str, Any] = dict(tau=tau, symmetric=symmetric, keep=None, exclude=exclude, dtype=unit.dtype)
        return plain_contrast(unit.unsqueeze(0), values.unsqueeze(0), **form).squeeze(0)

    return differentiable_twice(contrast, definition, unit, values)
