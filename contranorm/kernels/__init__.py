"""The implementations behind `contra_norm`. They compute the contrast term alone: A·v for A = softmax(x̂ x̂ᵀ / τ).

Shapes: `unit` x̂ and `values` v are (B, N, D), `keep` is a bool (B, N), `exclude` a sparse CSR (N, N).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from contranorm.kernels.blocked import blocked as blocked_contrast
from contranorm.kernels.edges import entry_rows
from contranorm.kernels.fused import fused as fused_contrast
from contranorm.kernels.linear import linear as linear_contrast

TOKEN_KERNELS = ("plain", "fused", "blocked", "sdpa", "linear")
# Number of rows from which the blocked form is the faster exact one, with excluded pairs ("graph") and without ("set"):
# measured on two CPU cores and written by `python -m benchmarks.layer --crossover --update`.
_CHOICES = Path(__file__).with_name("choices.json")
BLOCKED_FROM: dict[str, int] = json.loads(_CHOICES.read_text(encoding="utf-8"))["blocked_from"]


def token_contrast(
    x: Tensor,
    *,
    tau: float,
    symmetric: bool,
    keep: Tensor | None,
    exclude: Tensor | None,
    implementation: str,
    degree: int = 2,
) -> Tensor:
    """A·x, or (A + softmax over columns)·x, by the named implementation; (B, N, D) → (B, N, D)."""
    if implementation == "fused":
        return fused_step(x, own=0.0, scale=-1.0, tau=tau, keep=keep)
    dtype = product_dtype(x)
    with torch.autocast(x.device.type, enabled=False):  # from here on, `dtype` alone says what may be rounded
        unit, values = F.normalize(x, dim=-1), x  # x̂; a zero row stays zero
        if implementation == "plain":
            return plain(unit, values, tau=tau, symmetric=symmetric, keep=keep, exclude=exclude, dtype=dtype)
        if implementation == "sdpa":
            return sdpa(unit, values, tau=tau, keep=keep, dtype=dtype)

        def one_sample(unit: Tensor, values: Tensor, exclude: Tensor | None) -> Tensor:
            if implementation == "linear":
                approximate = linear_contrast(
                    unit, values, tau=tau, symmetric=symmetric, exclude=exclude, degree=degree
                )
                if approximate is not None:
                    return approximate
            return blocked_contrast(unit, values, tau=tau, symmetric=symmetric, exclude=exclude, dtype=dtype)

        parts = []
        for index in range(unit.shape[0]):  # one sample at a time: a tile is larger than most sequences
            chosen = None if keep is None else keep[index].nonzero().squeeze(1)
            parts.append(_among_chosen(one_sample, unit[index], values[index], chosen, exclude))
        return torch.stack(parts)


def fused_step(x: Tensor, *, own: float, scale: float, tau: float, keep: Tensor | None) -> Tensor:
    """own·x - scale·A x in one function; rows that `keep` leaves out stay as they are. (B, N, D) → (B, N, D)."""
    dtype = product_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return fused_contrast(x, own=own, scale=scale, tau=tau, keep=keep, dtype=dtype)


def product_dtype(x: Tensor) -> torch.dtype:
    """Type of the factors of the matrix products: autocast's where the machine multiplies it in hardware, else x's."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    low = torch.get_autocast_dtype(device)
    if device == "cpu" and not (low == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()):
        return x.dtype  # emulated bfloat16 products are several times slower than float32 ones
    return low


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """A b with factors rounded to `dtype`, in the dtype of a."""
    return a @ b if dtype == a.dtype else (a.to(dtype) @ b.to(dtype)).to(a.dtype)


def resolve(implementation: str, x: Tensor, *, symmetric: bool, exclude: Tensor | None) -> str:
    """The implementation that will run.

    Raises:
        ValueError: the one asked for cannot express the form.
    """
    if implementation == "auto":
        return choose(x, symmetric=symmetric, exclude=exclude)
    if implementation in ("fused", "sdpa") and (symmetric or exclude is not None):
        raise ValueError(f"implementation={implementation!r} knows neither symmetric=True nor exclude: use 'blocked'")
    return implementation


def choose(x: Tensor, *, symmetric: bool, exclude: Tensor | None) -> str:
    """The implementation that "auto" stands for, by shape and device; always an exact one.

    On GPUs, where nothing was measured, attention's flash kernels are taken wherever they can express the form.
    """
    if exclude is not None:
        return "blocked" if x.shape[1] >= BLOCKED_FROM["graph"] else "plain"
    if x.is_cuda and not symmetric:
        return "sdpa"
    if x.shape[1] >= BLOCKED_FROM["set"]:
        return "blocked"
    return "plain" if symmetric else "fused"


def plain(
    unit: Tensor,
    values: Tensor,
    *,
    tau: float,
    symmetric: bool,
    keep: Tensor | None,
    exclude: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The definition, with the N x N matrix in memory. The oracle for the others."""
    logits = product(unit, unit.mT, dtype) / tau  # (B, N, N)
    if exclude is None and not symmetric:
        if keep is not None:  # the rows that are not kept are not read: only columns need the mask
            logits = logits.masked_fill(~_allowed(keep)[:, None, :], -torch.inf)
        return product(logits.softmax(dim=-1), values, dtype)
    if keep is not None:
        logits = logits.masked_fill(~(keep.unsqueeze(-1) & keep.unsqueeze(-2)), -torch.inf)
    if exclude is not None:
        logits = logits.masked_fill(stored_entries(exclude), -torch.inf)
    weights = softmax_or_zero(logits, dim=-1)
    if symmetric:
        weights = weights + softmax_or_zero(logits, dim=-2)
    return product(weights, values, dtype)


def _allowed(keep: Tensor) -> Tensor:
    """`keep`, and everything in a sample that keeps nothing: its result is not read, it must only not be NaN."""
    return keep | ~keep.any(dim=-1, keepdim=True)


def sdpa(unit: Tensor, values: Tensor, *, tau: float, keep: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A·v as attention with q = k = x̂, v = values and scale 1/τ: flash kernels where torch has them."""
    allowed = None if keep is None else _allowed(keep)[:, None, None, :]
    q, v = unit.to(dtype).unsqueeze(1), values.to(dtype).unsqueeze(1)  # (B, 1, N, D): one head
    return F.scaled_dot_product_attention(q, q, v, attn_mask=allowed, scale=1 / tau).squeeze(1).to(values.dtype)


def feature_contrast(unit: Tensor, values: Tensor, *, tau: float, symmetric: bool, keep: Tensor | None) -> Tensor:
    """v·softmax_rows(x̂ᵀx̂ / τ), similarities over the kept rows only; (B, N, D)."""
    dtype = product_dtype(unit)
    if keep is not None:
        unit = unit * keep.unsqueeze(-1)
    with torch.autocast(unit.device.type, enabled=False):
        logits = unit.mT @ unit / tau  # (B, D, D); not bounded by 1/τ, so its rounding would not be either
        weights = logits.softmax(dim=-1)
        if symmetric:
            weights = weights + logits.softmax(dim=-2)
        return product(values, weights, dtype)


def softmax_or_zero(logits: Tensor, dim: int) -> Tensor:
    """Softmax in which a line of nothing but -inf is zero rather than NaN, in its gradient too."""
    empty = (logits == -torch.inf).all(dim=dim, keepdim=True)
    return logits.masked_fill(empty, 0.0).softmax(dim=dim).masked_fill(empty, 0.0)


def stored_entries(pattern: Tensor) -> Tensor:
    """Dense bool (N, N): True where the sparse CSR `pattern` stores an entry, explicit zeros included."""
    dense = torch.zeros(pattern.shape, dtype=torch.bool, device=pattern.device)
    dense[entry_rows(pattern), pattern.col_indices().long()] = True
    return dense


def _among_chosen(
    compute: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    unit: Tensor,
    values: Tensor,
    chosen: Tensor | None,
    exclude: Tensor | None,
) -> Tensor:
    """`compute` on the chosen rows of one sample (N, D) alone; the other rows of the result are zero."""
    if chosen is None or chosen.numel() == unit.shape[0]:
        return compute(unit, values, exclude)
    if chosen.numel() == 0:
        return torch.zeros_like(values)
    if exclude is not None:
        exclude = _restrict(exclude, chosen)
    return torch.zeros_like(values).index_copy(0, chosen, compute(unit[chosen], values[chosen], exclude))


def _restrict(pattern: Tensor, chosen: Tensor) -> Tensor:
    """The CSR pattern among the chosen rows alone."""
    place = torch.full((pattern.shape[0],), -1, device=chosen.device)
    place[chosen] = torch.arange(chosen.numel(), device=chosen.device)
    rows, columns = place[entry_rows(pattern)], place[pattern.col_indices().long()]
    inside = (rows >= 0) & (columns >= 0)
    indices = torch.stack([rows[inside], columns[inside]])
    ones = torch.ones(indices.shape[1], device=chosen.device)
    return torch.sparse_coo_tensor(
        indices, ones, (chosen.numel(),) * 2, is_coalesced=True, check_invariants=True
    ).to_sparse_csr()
