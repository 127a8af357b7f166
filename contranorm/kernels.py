"""The implementations behind `contra_norm`. They compute the contrast term alone: A·v for A = softmax(x̂ x̂ᵀ / τ).

Shapes: `unit` x̂ and `values` v are (B, N, D), `keep` is a bool (B, N), `exclude` a sparse CSR (N, N).
"""

from __future__ import annotations

import torch
from torch import Tensor

TOKEN_KERNELS = ("plain", "blocked")


def token_contrast(
    unit: Tensor,
    values: Tensor,
    *,
    tau: float,
    symmetric: bool,
    keep: Tensor | None,
    exclude: Tensor | None,
    implementation: str,
) -> Tensor:
    """A·v, or (A + softmax over columns)·v, by the named implementation; (B, N, D)."""
    return plain(unit, values, tau=tau, symmetric=symmetric, keep=keep, exclude=exclude)


def plain(
    unit: Tensor, values: Tensor, *, tau: float, symmetric: bool, keep: Tensor | None, exclude: Tensor | None
) -> Tensor:
    """The definition, with the N x N matrix in memory. The oracle for the others."""
    logits = unit @ unit.mT / tau  # (B, N, N)
    if keep is not None:
        logits = logits.masked_fill(~(keep.unsqueeze(-1) & keep.unsqueeze(-2)), -torch.inf)
    if exclude is not None:
        logits = logits.masked_fill(stored_entries(exclude), -torch.inf)
    weights = softmax_or_zero(logits, dim=-1)
    if symmetric:
        weights = weights + softmax_or_zero(logits, dim=-2)
    return weights @ values


def feature_contrast(unit: Tensor, values: Tensor, *, tau: float, symmetric: bool, keep: Tensor | None) -> Tensor:
    """v·softmax_rows(x̂ᵀx̂ / τ), similarities over the kept rows only; (B, N, D)."""
    if keep is not None:
        unit = unit * keep.unsqueeze(-1)
    logits = unit.mT @ unit / tau  # (B, D, D)
    weights = logits.softmax(dim=-1)
    if symmetric:
        weights = weights + logits.softmax(dim=-2)
    return values @ weights


def softmax_or_zero(logits: Tensor, dim: int) -> Tensor:
    """Softmax in which a line of nothing but -inf is zero rather than NaN, in its gradient too."""
    empty = (logits == -torch.inf).all(dim=dim, keepdim=True)
    return logits.masked_fill(empty, 0.0).softmax(dim=dim).masked_fill(empty, 0.0)


def stored_entries(pattern: Tensor) -> Tensor:
    """Dense bool (N, N): True where the sparse CSR `pattern` stores an entry, explicit zeros included."""
    rows = torch.repeat_interleave(
        torch.arange(pattern.shape[0], device=pattern.device), pattern.crow_indices().diff().long()
    )
    dense = torch.zeros(pattern.shape, dtype=torch.bool, device=pattern.device)
    dense[rows, pattern.col_indices().long()] = True
    return dense
