"""The exact contrast term with memory linear in N: the N x N matrix is walked in tiles that stay in the cache.

Everything is built on one product. With K = exp(x̂ x̂ᵀ / τ) and M the 0/1 pattern of the pairs that count,

    P w = (M ∘ K) w,        A v = (P v) / (P 1),        softmax over columns: P (v / (Pᵀ 1)).

Three facts make it fast. Cosines are bounded, so exp needs no running maximum unless τ is very small. K is symmetric,
so only the tiles on and above the diagonal are computed, and each serves its mirror image. And the gradient with
respect to x̂ needs dS + dSᵀ only, which is K ∘ (M ∘ g wᵀ + Mᵀ ∘ w gᵀ): one product with inner size 2(D + 1). Together
10·N²·D operations, forward and backward, where recomputing without the symmetry takes 14·N²·D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from contranorm.kernels import masks

# Edge of a tile: the two float32 tiles of the backward fill the second-level caches of two to four cores
# (`python -m benchmarks.layer --tiles` measures other edges).
TILE = 768
# Largest 1/τ for which exp(cos/τ) and its products stay well inside float32's range without subtracting a maximum.
MAX_LOGIT = 40.0
_Key = tuple[int, int]


@dataclass(frozen=True)
class ExcludedPairs:
    """Positions of the excluded pairs in the tiles on and above the diagonal.

    Attributes:
        rows: (I, J) → flat positions in that tile of the excluded pairs (i, j).
        columns: the same for the pairs (j, i), whose mirror image lies in the tile; `rows` itself when symmetric.
        symmetric: (i, j) is excluded whenever (j, i) is.
    """

    rows: dict[_Key, Tensor]
    columns: dict[_Key, Tensor]
    symmetric: bool

    def transpose(self) -> ExcludedPairs:
        """The pattern with i and j swapped."""
        return ExcludedPairs(self.columns, self.rows, self.symmetric)


def excluded_pairs(pattern: Tensor, tile: int = TILE) -> ExcludedPairs:
    """Sort the entries of a sparse CSR (N, N) into tiles; remembered per tensor, which must not change afterwards."""

    def make() -> ExcludedPairs:
        n = pattern.shape[0]
        rows, columns = masks.entries(pattern)
        symmetric = masks.is_symmetric(rows, columns, n)
        direct = _by_tile(rows, columns, n, tile)
        return ExcludedPairs(direct, direct if symmetric else _by_tile(columns, rows, n, tile), symmetric)

    return masks.remembered(pattern, (ExcludedPairs, tile), make)


def _by_tile(rows: Tensor, columns: Tensor, n: int, tile: int) -> dict[_Key, Tensor]:
    """(I, J) with I ≤ J → flat positions of the entries (row, column) inside that tile."""
    upper = rows // tile <= columns // tile
    rows, columns = rows[upper], columns[upper]
    across = -(-n // tile)  # tiles per side
    key = (rows // tile) * across + columns // tile
    order = key.argsort()
    rows, columns, key = rows[order], columns[order], key[order]
    width = (n - columns // tile * tile).clamp_max(tile)  # the last tile of a row is narrower
    position = (rows % tile) * width + columns % tile
    keys, counts = torch.unique_consecutive(key, return_counts=True)
    parts = torch.split(position, counts.tolist())
    return {(k // across, k % across): part for k, part in zip(keys.tolist(), parts, strict=True)}


class _Tiles:
    """Walks the tiles (I, J), I ≤ J, of K; each visit has K's tile in a buffer that the next visit overwrites."""

    def __init__(self, unit: Tensor, tau: float, dtype: torch.dtype, tile: int) -> None:
        self.left = unit.to(dtype)
        self.right = (unit / tau).to(dtype)
        self.n = unit.shape[0]
        self.tile = tile

    def __iter__(self) -> Any:
        edge = min(self.tile, self.n)
        buffer = self.left.new_empty(edge * edge)
        for i in range(0, self.n, self.tile):
            rows = slice(i, min(i + self.tile, self.n))
            for j in range(i, self.n, self.tile):
                columns = slice(j, min(j + self.tile, self.n))
                k = buffer[: (rows.stop - i) * (columns.stop - j)].view(rows.stop - i, columns.stop - j)
                torch.mm(self.left[rows], self.right[columns].mT, out=k)
                yield (i // self.tile, j // self.tile), rows, columns, k.exp_()


def _without(k: Tensor, positions: Tensor | None) -> Tensor | None:
    """Zero the excluded entries of a tile in place; returns what stood there, for `_put_back`."""
    if positions is None:
        return None
    flat = k.view(-1)
    saved = flat[positions]
    flat.index_fill_(0, positions, 0.0)
    return saved


def _put_back(k: Tensor, positions: Tensor | None, saved: Tensor | None) -> None:
    if positions is not None and saved is not None:
        k.view(-1)[positions] = saved


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Out += a b, accumulated in out's dtype over the tiles."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out.add_(a @ b)


class _KernelProduct(torch.autograd.Function):
    """(M ∘ exp(x̂ x̂ᵀ / τ)) w for unit rows x̂ (N, D) and w (N, C); its backward recomputes the tiles."""

    @staticmethod
    def forward(
        ctx: Any,
        unit: Tensor,
        w: Tensor,
        tau: float,
        excluded: ExcludedPairs | None,
        dtype: torch.dtype,
        tile: int,
    ) -> Tensor:
        ctx.save_for_backward(unit, w)
        ctx.settings = (tau, excluded, dtype, tile)
        out = torch.zeros_like(w)
        factor = w.to(dtype)
        for key, rows, columns, k in _Tiles(unit, tau, dtype, tile):
            _add_both_sides(out, k, factor, key, rows, columns, excluded)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        unit, w = ctx.saved_tensors
        tau, excluded, dtype, tile = ctx.settings
        grad = grad.contiguous()
        g, factor = grad.to(dtype), w.to(dtype)
        grad_unit, grad_w = torch.zeros_like(unit), torch.zeros_like(w)
        transposed = None if excluded is None else excluded.transpose()
        edge = min(tile, unit.shape[0])
        one_pattern = excluded is None or excluded.symmetric  # M = Mᵀ
        buffers = [g.new_empty(edge * edge) for _ in range(1 if one_pattern else 2)]
        if one_pattern:
            both, swapped = torch.cat([g, factor], dim=1), torch.cat([factor, g], dim=1)  # (N, 2C)
        tiles = _Tiles(unit, tau, dtype, tile)
        for key, rows, columns, k in tiles:
            if ctx.needs_input_grad[1]:  # Pᵀ g
                _add_both_sides(grad_w, k, g, key, rows, columns, transposed)
            if not ctx.needs_input_grad[0]:
                continue
            h = buffers[0][: k.numel()].view_as(k)  # M ∘ g wᵀ + Mᵀ ∘ w gᵀ
            if one_pattern:
                torch.mm(both[rows], swapped[columns].mT, out=h)
                _without(h, None if excluded is None else excluded.rows.get(key))
            else:
                mirror = buffers[1][: k.numel()].view_as(k)
                torch.mm(g[rows], factor[columns].mT, out=h)
                torch.mm(factor[rows], g[columns].mT, out=mirror)
                _without(h, excluded.rows.get(key))
                _without(mirror, excluded.columns.get(key))
                h.add_(mirror)
            h.mul_(k)  # dS + dSᵀ
            _add_product(grad_unit[rows], h, tiles.right[columns])
            if columns.start > rows.start:
                _add_product(grad_unit[columns], h.mT, tiles.right[rows])
        return grad_unit, grad_w, None, None, None, None


def _add_both_sides(
    out: Tensor, k: Tensor, w: Tensor, key: _Key, rows: slice, columns: slice, excluded: ExcludedPairs | None
) -> None:
    """Out += (M ∘ K) w for the pairs of one tile and for their mirror images below the diagonal. Leaves k as it was.

    With a symmetric pattern k is left with its excluded entries at zero, where every later use wants them.
    """
    if excluded is None or excluded.symmetric:
        _without(k, None if excluded is None else excluded.rows.get(key))
        _add_product(out[rows], k, w[columns])
        if columns.start > rows.start:
            _add_product(out[columns], k.mT, w[rows])
        return
    saved = _without(k, excluded.rows.get(key))
    _add_product(out[rows], k, w[columns])
    _put_back(k, excluded.rows.get(key), saved)
    if columns.start > rows.start:
        saved = _without(k, excluded.columns.get(key))
        _add_product(out[columns], k.mT, w[rows])
        _put_back(k, excluded.columns.get(key), saved)


def blocked_contrast(
    unit: Tensor,
    values: Tensor,
    exclude: Tensor | None,
    *,
    tau: float,
    symmetric: bool,
    dtype: torch.dtype | None = None,
    tile: int = TILE,
) -> Tensor:
    """A·v, or (A + softmax over columns)·v, for one set of rows.

    Args:
        unit: x̂, (N, D).
        values: v, (N, C).
        exclude: sparse CSR (N, N) of pairs that do not count, or None.
        tau: temperature.
        symmetric: add the softmax over columns.
        dtype: type of the factors of the matrix products; None is the type of `unit`. Sums stay in that of `unit`.
        tile: edge of the tiles; the result depends on it by rounding only.

    Returns:
        (N, C).
    """
    if 1 / tau > MAX_LOGIT:
        return _blocked_with_maximum(unit, values, exclude, tau=tau, symmetric=symmetric, tile=tile)
    excluded = None if exclude is None else excluded_pairs(exclude, tile)
    dtype = dtype or unit.dtype

    def product(w: Tensor, excluded: ExcludedPairs | None) -> Tensor:
        result: Tensor = _KernelProduct.apply(unit, w, tau, excluded, dtype, tile)
        return result

    ones = values.new_ones(values.shape[0], 1)
    sums = product(torch.cat([values, ones], dim=1), excluded)  # (N, C + 1): P v, P 1
    contrast = masks.ratio_or_zero(sums[:, :-1], sums[:, -1:])
    if symmetric:
        if excluded is None or excluded.symmetric:
            column_sums = sums[:, -1:]
        else:
            column_sums = product(ones, excluded.transpose())
        contrast = contrast + product(masks.ratio_or_zero(values, column_sums), excluded)
    return contrast


def _blocked_with_maximum(
    unit: Tensor, values: Tensor, exclude: Tensor | None, *, tau: float, symmetric: bool, tile: int
) -> Tensor:
    """The same for a τ so small that each row needs its maximum subtracted: strips of rows, recomputed by autograd."""
    n = unit.shape[0]
    height = max(1, min(tile * tile // n, n))

    def logits_of(unit: Tensor, start: int) -> Tensor:
        logits = unit[start : start + height] @ unit.mT / tau  # (height, N)
        if exclude is None:
            return logits
        return logits.masked_fill(masks.stored_entries(exclude, start, start + logits.shape[0]), -torch.inf)

    def row_part(start: int, unit: Tensor, values: Tensor) -> Tensor:
        return masks.softmax_or_zero(logits_of(unit, start), dim=-1) @ values

    def column_logsums(start: int, unit: Tensor) -> Tensor:
        return masks.logsumexp_or(logits_of(unit, start), -torch.inf)

    def column_part(start: int, unit: Tensor, values: Tensor, logsums: Tensor) -> Tensor:
        return (logits_of(unit, start) - logsums).exp() @ values

    def strips(part: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
        return [checkpoint(part, start, *tensors, use_reentrant=False) for start in range(0, n, height)]

    contrast = torch.cat(strips(row_part, unit, values))
    if symmetric:
        logsums = masks.logsumexp_or(torch.stack(strips(column_logsums, unit)), 0.0)  # (N,)
        contrast = contrast + torch.cat(strips(column_part, unit, values, logsums))
    return contrast
