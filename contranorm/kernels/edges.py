"""A sparse CSR pattern as the linear kernel uses it: products along the edges, forwards and transposed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from contranorm.kernels.masks import entries, is_symmetric, remembered


@dataclass(frozen=True, eq=False)
class Edges:
    """The stored entries (i, j) of an (N, N) pattern, row by row, and the same entries column by column.

    Attributes:
        crow: where each row's entries start, (N + 1,).
        columns: column of each entry, (E,).
        crow_t: where each column's entries start, (N + 1,).
        columns_t: row of each entry in that order, (E,).
        order: place in the first order of each entry of the second, (E,).
        symmetric: (j, i) is stored whenever (i, j) is.
        full: True for the rows that store all N pairs, (N,); None when there is none.
    """

    crow: Tensor
    columns: Tensor
    crow_t: Tensor
    columns_t: Tensor
    order: Tensor
    symmetric: bool
    full: Tensor | None

    def transpose(self) -> Edges:
        """The pattern with i and j swapped."""
        inverse = torch.empty_like(self.order)
        inverse[self.order] = torch.arange(self.order.numel(), device=self.order.device)
        full = _full(self.crow_t)
        return Edges(self.crow_t, self.columns_t, self.crow, self.columns, inverse, self.symmetric, full)

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """a_i·b_j of every entry (i, j), (E,), for a and b (N, D)."""
        unread = self._matrix(a.new_zeros(self.columns.numel()))  # beta = 0
        result: Tensor = torch.sparse.sampled_addmm(unread, a, b.mT, beta=0.0).values()
        return result

    def subtract(self, out: Tensor, weights: Tensor, w: Tensor) -> Tensor:
        """Out - W w in place, for the matrix W with `weights` (E,) at its entries and w (N, C)."""
        return out.addmm_(self._matrix(weights), w, alpha=-1)

    def subtract_transposed(self, out: Tensor, weights: Tensor, w: Tensor) -> Tensor:
        """Out - Wᵀ w in place."""
        n = self.crow.numel() - 1
        return out.addmm_(_csr(self.crow_t, self.columns_t, weights[self.order], n), w, alpha=-1)

    def subtract_both(self, out: Tensor, weights: Tensor, w: Tensor) -> Tensor:
        """Out - (W + Wᵀ) w in place."""
        if self.symmetric:  # one product: column by column, the entries are those of the transposed pattern
            return self.subtract(out, weights + weights[self.order], w)
        return self.subtract_transposed(self.subtract(out, weights, w), weights, w)

    def _matrix(self, weights: Tensor) -> Tensor:
        return _csr(self.crow, self.columns, weights, self.crow.numel() - 1)


def _csr(crow: Tensor, columns: Tensor, values: Tensor, n: int) -> Tensor:
    return torch.sparse_csr_tensor(crow, columns, values, (n, n), check_invariants=False)


def _full(crow: Tensor) -> Tensor | None:
    full = crow.diff() == crow.numel() - 1
    return full if bool(full.any()) else None


def edges_of(pattern: Tensor) -> Edges:
    """The entries of a sparse CSR (N, N); remembered per tensor, which must not change afterwards."""

    def make() -> Edges:
        n = pattern.shape[0]
        rows, columns = entries(pattern)
        order = (columns * n + rows).argsort()
        crow_t = torch.zeros(n + 1, dtype=torch.long, device=columns.device)
        crow_t[1:] = torch.bincount(columns, minlength=n).cumsum(0)
        crow = pattern.crow_indices().long()
        return Edges(crow, columns, crow_t, rows[order], order, is_symmetric(rows, columns, n), _full(crow))

    return remembered(pattern, Edges, make)
