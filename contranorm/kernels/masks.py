"""Which pairs count: kept rows, excluded pairs, and rows with nothing left. One place for the rules of all kernels.

`keep` is a bool (B, N), True for the rows that take part. `exclude` is a sparse CSR (N, N) whose stored entries (i, j),
whatever their values, are left out of row i's softmax. A row with an empty softmax has a contrast term and a gradient
of 0, never NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")
OneSample = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def kept_columns(keep: Tensor) -> Tensor:
    """`keep`, and every column of a sample that keeps nothing: its rows are discarded and must only not be NaN."""
    return keep | ~keep.any(dim=-1, keepdim=True)


def softmax_or_zero(logits: Tensor, dim: int) -> Tensor:
    """Softmax in which a line of nothing but -inf is zero."""
    empty = (logits == -torch.inf).all(dim=dim, keepdim=True)
    return logits.masked_fill(empty, 0.0).softmax(dim=dim).masked_fill(empty, 0.0)


def ratio_or_zero(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Numerator / denominator, and 0 where the denominator is 0."""
    return numerator / denominator.masked_fill(denominator == 0, torch.inf)


def on_kept_rows(
    compute: OneSample, unit: Tensor, values: Tensor, keep: Tensor | None, exclude: Tensor | None
) -> Tensor:
    """compute(unit, values, exclude) for each sample's kept rows alone, 0 for its other rows; (B, N, D)."""
    samples = []
    for index, (u, v) in enumerate(zip(unit, values, strict=True)):  # (N, D) each
        kept = None if keep is None else keep[index].nonzero().squeeze(1)
        if kept is None or kept.numel() == u.shape[0]:
            samples.append(compute(u, v, exclude))
        elif kept.numel() == 0:
            samples.append(torch.zeros_like(v))
        else:
            among = None if exclude is None else restrict(exclude, kept)
            samples.append(torch.zeros_like(v).index_copy(0, kept, compute(u[kept], v[kept], among)))
    return torch.stack(samples)


def entries(pattern: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the stored entries, (E,) each, row by row."""
    counts = pattern.crow_indices().diff().long()
    return torch.arange(len(counts), device=counts.device).repeat_interleave(counts), pattern.col_indices().long()


def stored_entries(pattern: Tensor) -> Tensor:
    """Dense bool (N, N): True where an entry is stored, explicit zeros included."""
    dense = torch.zeros(pattern.shape, dtype=torch.bool, device=pattern.device)
    dense[entries(pattern)] = True
    return dense


def is_symmetric(rows: Tensor, columns: Tensor, n: int) -> bool:
    """Whether (j, i) is among the entries, each there once, of an (n, n) pattern whenever (i, j) is."""
    return torch.equal((rows * n + columns).sort().values, (columns * n + rows).sort().values)


def restrict(pattern: Tensor, kept: Tensor) -> Tensor:
    """The pattern among the kept rows alone."""
    coo: Tensor = pattern.to_sparse_coo()  # type: ignore[no-untyped-call]
    return coo.index_select(0, kept).index_select(1, kept).to_sparse_csr()


_cache: WeakIdKeyDictionary = WeakIdKeyDictionary()


def remembered(pattern: Tensor, key: Hashable, make: Callable[[], T]) -> T:
    """make(), computed once per key and tensor; the tensor must not change afterwards."""
    if pattern not in _cache:
        _cache[pattern] = {}
    known: dict[Hashable, T] = _cache[pattern]
    if key not in known:
        known[key] = make()
    return known[key]
