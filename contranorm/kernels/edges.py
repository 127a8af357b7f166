"""A sparse CSR pattern as the linear kernel uses it: products along the edges, forwards and transposed."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from contranorm.kernels.masks import entries, is_symmetric, remembered, rows_of


@dataclass(eq=False)
class Edges:
    """The stored entries (i, j) of an (N, N) pattern, row by row.

    Attributes:
        crow: where each row's entries start, (N + 1,).
        columns: column of each entry, (E,).
        order: place among these entries of each entry of the transposed pattern, (E,).
        symmetric: (j, i) is stored whenever (i, j) is.
        transposed: the pattern with i and j swapped.
    """

    crow: Tensor
    columns: Tensor
    order: Tensor
    symmetric: bool
    transposed: Edges = field(init=False)

    @cached_property
    def fullest(self) -> float:
        """The largest share of the N columns that a row or column stores, but for those which store all N."""
        n = self.crow.numel() - 1
        counts = torch.cat([self.crow.diff(), self.columns.bincount(minlength=n)])
        return float(counts.masked_fill(counts == n, 0).max()) / n

    @property
    def rows(self) -> Tensor:
        """Row of each entry, (E,)."""
        return rows_of(self.crow, self.columns)

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
        return self.transposed.subtract(out, self._transpose(weights), w)

    def subtract_both(self, out: Tensor, weights: Tensor, w: Tensor) -> Tensor:
        """Out - (W + Wᵀ) w in place."""
        if self.symmetric:  # one product: column by column, the entries are those of the transposed pattern
            return self.subtract(out, weights + self._transpose(weights), w)
        return self.subtract_transposed(self.subtract(out, weights, w), weights, w)

    def empty_is_zero(self, sums: Tensor) -> Tensor:
        """Sums (N, 1) over the pairs not stored, exactly 0 where all N are stored."""
        return sums.masked_fill((self.crow.diff() == self.crow.numel() - 1).unsqueeze(1), 0.0)

    def _transpose(self, weights: Tensor) -> Tensor:
        """The weights in the order of the transposed pattern; index_select takes a quarter of indexing's time."""
        return weights.index_select(0, self.order)

    def _matrix(self, weights: Tensor) -> Tensor:
        n = self.crow.numel() - 1
        return torch.sparse_csr_tensor(self.crow, self.columns, weights, (n, n), check_invariants=False)


def edges_of(pattern: Tensor) -> Edges:
    """The entries of a sparse CSR (N, N); remembered per tensor, which must not change afterwards."""

    def make() -> Edges:
        n = pattern.shape[0]
        rows, columns = entries(pattern)
        order = (columns * n + rows).argsort()
        symmetric = is_symmetric(rows, columns, n)
        crow_t = torch.zeros(n + 1, dtype=torch.long, device=columns.device)
        crow_t[1:] = torch.bincount(columns, minlength=n).cumsum(0)
        edges = Edges(pattern.crow_indices().long(), columns, order, symmetric)
        edges.transposed = Edges(crow_t, rows[order], order.argsort(), symmetric)
        edges.transposed.transposed = edges
        return edges

    return remembered(pattern, Edges, make)
