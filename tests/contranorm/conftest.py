"""A slow, independent oracle: ContraNorm written row by row, pair by pair, in Python."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def _contrast_by_rows(x: Tensor, tau: float, symmetric: bool, keep: Tensor, excluded: Tensor) -> Tensor:
    """Σ_j A_ij x_j (+ the column softmax's share) for one sample, pairs visited one at a time."""
    n = x.shape[0]
    unit = [row / row.norm() if bool(row.detach().norm() > 0) else row for row in x]
    weight: dict[tuple[int, int], Tensor] = {}
    for i in range(n):
        for j in range(n):
            if keep[i] and keep[j] and not excluded[i, j]:
                weight[i, j] = torch.exp((unit[i] * unit[j]).sum() / tau)
    rows = []
    for i in range(n):
        total = torch.zeros_like(x[0])
        for j in range(n):
            if (i, j) not in weight:
                continue
            row_sum = torch.stack([weight[i, k] for k in range(n) if (i, k) in weight]).sum()
            share = weight[i, j] / row_sum
            if symmetric:
                column_sum = torch.stack([weight[k, j] for k in range(n) if (k, j) in weight]).sum()
                share = share + weight[i, j] / column_sum
            total = total + share * x[j]
        rows.append(total)
    return torch.stack(rows)


def _feature_contrast(unit: Tensor, x: Tensor, tau: float, symmetric: bool, keep: Tensor) -> Tensor:
    d = x.shape[1]
    logits = [
        [torch.stack([unit[n, i] * unit[n, j] for n in range(len(x)) if keep[n]]).sum() / tau for j in range(d)]
        for i in range(d)
    ]
    columns = []
    for j in range(d):
        total = torch.zeros_like(x[:, 0])
        for i in range(d):
            share = torch.exp(logits[i][j]) / sum(torch.exp(logits[i][k]) for k in range(d))
            if symmetric:
                share = share + torch.exp(logits[i][j]) / sum(torch.exp(logits[k][j]) for k in range(d))
            total = total + x[:, i] * share
        columns.append(total)
    return torch.stack(columns, dim=1)


def _oracle(
    x: Tensor,
    scale: float | Tensor,
    *,
    tau: float = 1.0,
    identity: bool = False,
    axis: str = "tokens",
    symmetric: bool = False,
    pre_norm: bool = False,
    mask: Tensor | None = None,
    exclude: Tensor | None = None,
) -> Tensor:
    if x.dim() == 3:
        masks = [None] * len(x) if mask is None else list(mask)
        samples = [
            _oracle(s, scale, tau=tau, identity=identity, axis=axis, symmetric=symmetric, pre_norm=pre_norm, mask=m)
            for s, m in zip(x, masks, strict=True)
        ]
        return torch.stack(samples)
    keep = torch.ones(len(x), dtype=torch.bool) if mask is None else mask
    excluded = torch.zeros(len(x), len(x), dtype=torch.bool)
    if exclude is not None:
        crow, columns = exclude.crow_indices().tolist(), exclude.col_indices().tolist()
        for i in range(len(x)):
            for j in columns[crow[i] : crow[i + 1]]:
                excluded[i, j] = True
    unit = torch.stack([row / row.norm() if bool(row.detach().norm() > 0) else row for row in x])
    base = unit if pre_norm else x
    if axis == "features":
        contrast = _feature_contrast(unit, base, tau, symmetric, keep)
    else:
        contrast = _contrast_by_rows(base, tau, symmetric, keep, excluded)
    moved = base + (scale * base if identity else 0) - scale * contrast
    return torch.stack([moved[i] if keep[i] else x[i] for i in range(len(x))])


@pytest.fixture(scope="session")
def oracle() -> Callable[..., Tensor]:
    """`contra_norm` by nested loops, for small (B, N, D) or (N, D) float64 inputs."""
    return _oracle


@pytest.fixture(scope="session")
def edges() -> Callable[..., Tensor]:
    """edges(n, probability, symmetric, seed): a random pattern with self-loops; row 2 is adjacent to all others."""

    def make(n: int, probability: float = 0.3, symmetric: bool = True, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        dense = torch.rand(n, n, generator=generator) < probability
        if symmetric:
            dense |= dense.T.clone()
        dense |= torch.eye(n, dtype=torch.bool)
        dense[2] = True
        if symmetric:
            dense[:, 2] = True
        indices = dense.nonzero().T
        return torch.sparse_coo_tensor(
            indices, torch.zeros(indices.shape[1]), (n, n), is_coalesced=True, check_invariants=True
        ).to_sparse_csr()

    return make
