"""Sparse products whose structure is fixed while the values may change (dropout, DropEdge)."""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

with warnings.catch_warnings():  # torch warns once per process that CSR is in beta: trigger that here, silenced
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
    torch.eye(1).to_sparse_csr()


class Pattern:
    """Where the entries of a sparse (N, M) matrix are, in CSR, together with its transpose's.

    Args:
        row: (E,) row of each entry.
        col: (E,) column of each entry. Entries are sorted and must be unique.
        shape: (N, M).
    """

    def __init__(self, row: Tensor, col: Tensor, shape: tuple[int, int]) -> None:
        order = torch.argsort(row * shape[1] + col)
        self.row, self.col = row[order], col[order]  # int64, for indexing
        self.shape = shape
        self.crow = _offsets(self.row, shape[0])
        self.to_transposed = torch.argsort(self.col * shape[0] + self.row)  # entry order of the transpose
        self.t_crow = _offsets(self.col, shape[1])
        self.col32, self.t_col32 = self.col.int(), self.row[self.to_transposed].int()  # what the BLAS kernels want

    def csr(self, values: Tensor) -> Tensor:
        """The matrix with these (E,) values, as torch.sparse_csr."""
        return torch.sparse_csr_tensor(self.crow, self.col32, values, self.shape, check_invariants=False)

    def csr_transposed(self, values: Tensor) -> Tensor:
        """Its transpose."""
        values = values[self.to_transposed]
        return torch.sparse_csr_tensor(self.t_crow, self.t_col32, values, self.shape[::-1], check_invariants=False)


def _offsets(numbers: Tensor, size: int) -> Tensor:
    counts = torch.bincount(numbers, minlength=size)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


class _Product(torch.autograd.Function):
    """A·x for a matrix A that needs no gradient; the backward Aᵀ·g is a CSR product too."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, matrix: Sparse) -> Tensor:
        ctx.matrix = matrix
        return matrix.csr @ dense

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.matrix.csr_transposed @ grad.contiguous(), None


class Sparse:
    """A constant sparse matrix that multiplies dense ones: `matrix @ x`, differentiable in x.

    Args:
        pattern: where its entries are.
        values: (E,) their values, without gradient.
    """

    def __init__(self, pattern: Pattern, values: Tensor) -> None:
        self.pattern = pattern
        self.values = values
        self.shape = pattern.shape

    @classmethod
    def from_dense(cls, dense: Tensor) -> Sparse:
        """The nonzero entries of `dense` (N, M)."""
        row, col = dense.nonzero(as_tuple=True)
        return cls(Pattern(row, col, (dense.shape[0], dense.shape[1])), dense[row, col])

    @cached_property
    def csr(self) -> Tensor:
        """As torch.sparse_csr."""
        return self.pattern.csr(self.values)

    @cached_property
    def csr_transposed(self) -> Tensor:
        """The transpose as torch.sparse_csr."""
        return self.pattern.csr_transposed(self.values)

    def __matmul__(self, dense: Tensor) -> Tensor:
        """(N, M) @ (M, D) → (N, D)."""
        product: Tensor = _Product.apply(dense, self)
        return product

    def to_dense(self) -> Tensor:
        """(N, M)."""
        return self.csr.to_dense()
