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
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils.weak import WeakIdKeyDictionary

from contranorm.kernels.autograd import is_traced, is_transformed

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


def without_padding(x: Tensor, keep: Tensor) -> Tensor:
    """X (B, N, D), 0 in the rows that are not kept: whatever they hold, NaN included, must not count."""
    if x.is_cuda or is_traced(x) or is_transformed():
        return x.masked_fill(~keep.unsqueeze(-1), 0.0)
    dropped = (~keep).flatten().nonzero().squeeze(1)  # rows by number: several times faster on a CPU
    return x.flatten(0, 1).index_fill(0, dropped, 0.0).view_as(x)


def with_padding(moved: Tensor, x: Tensor, keep: Tensor) -> Tensor:
    """`moved` (B, N, D), with x in the rows that are not kept."""
    if x.is_cuda or is_traced(x) or is_transformed():
        return torch.where(keep.unsqueeze(-1), moved, x)
    dropped = (~keep).flatten().nonzero().squeeze(1)
    return moved.flatten(0, 1).index_copy(0, dropped, x.flatten(0, 1).index_select(0, dropped)).view_as(moved)


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
    with temporarily_clear_interpreter_stack():  # torch.func cannot carry sparse tensors
        crow, columns = pattern.crow_indices(), pattern.col_indices().long()
    return rows_of(crow, columns), columns


def rows_of(crow: Tensor, columns: Tensor) -> Tensor:
    """Row of each entry, (E,), from where the rows start, (N + 1,), and each entry's column."""
    rows = torch.arange(crow.shape[0] - 1, device=crow.device)
    size = columns.shape[0] if crow.is_meta else None  # else it may be another when an exported program runs
    return rows.repeat_interleave(crow.diff(), output_size=size)


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


def remembered(pattern: Tensor, key: Hashable, make: Callable[[], T], *, of: Tensor | None = None) -> T:
    """make(), computed once per key and tensor, which must not change afterwards; anew where it is `of` another."""
    if pattern not in _cache:
        _cache[pattern] = {}
    known: dict[Hashable, tuple[Tensor | None, T]] = _cache[pattern]
    if key not in known or known[key][0] is not of:
        with torch.inference_mode(False):  # what is kept serves training, too
            known[key] = of, make()
    return known[key][1]
