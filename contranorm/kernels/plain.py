"""The definition of the contrast term, the N x N matrix in memory, and its close kin: as attention, and over features.

Shapes: `unit` x̂ and `values` v are (B, N, D); `keep` and `exclude` as in `contranorm.kernels.masks`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from contranorm.kernels.autograd import differentiable_twice, is_traced
from contranorm.kernels.masks import kept_columns, softmax_or_zero, stored_entries

NORM_EPS = 1e-12  # as in torch.nn.functional.normalize


def plain_contrast(
    unit: Tensor,
    values: Tensor,
    *,
    tau: float | Tensor,
    symmetric: bool,
    keep: Tensor | None,
    exclude: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """A·v, or (A + softmax over columns)·v. The oracle for the other kernels."""
    dense = exclude if exclude is None or exclude.layout == torch.strided else stored_entries(exclude)
    logits = product(unit, unit.mT, dtype) / tau  # (B, N, N)
    return product(softmax_weights(logits, symmetric, keep, dense), values, dtype)


def softmax_weights(logits: Tensor, symmetric: bool, keep: Tensor | None, exclude: Tensor | None) -> Tensor:
    """A, or A + softmax over columns; `exclude` is a dense bool. torch.jit.script can compile it."""
    if exclude is None and not symmetric:
        if keep is not None:  # the rows that are not kept are not read: only columns need the mask
            logits = logits.masked_fill(~kept_columns(keep).unsqueeze(-2), -torch.inf)
        return logits.softmax(dim=-1)
    if keep is not None:
        logits = logits.masked_fill(~(keep.unsqueeze(-1) & keep.unsqueeze(-2)), -torch.inf)
    if exclude is not None:
        logits = logits.masked_fill(exclude, -torch.inf)
    weights = softmax_or_zero(logits, dim=-1)
    return weights + softmax_or_zero(logits, dim=-2) if symmetric else weights


def sdpa_contrast(unit: Tensor, values: Tensor, *, tau: float, keep: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A·v as attention with q = k = x̂, v = values and scale 1/τ: flash kernels where torch has them."""
    allowed = None if keep is None else kept_columns(keep)[:, None, None, :]
    q, v = unit.to(dtype).unsqueeze(1), values.to(dtype).unsqueeze(1)  # (B, 1, N, D): one head
    contrast = F.scaled_dot_product_attention(q, q, v, attn_mask=allowed, scale=1 / tau).squeeze(1).to(values.dtype)
    if is_traced(unit):
        return contrast

    def definition(unit: Tensor, values: Tensor) -> Tensor:
        return plain_contrast(unit, values, tau=tau, symmetric=False, keep=keep, exclude=None, dtype=unit.dtype)

    return differentiable_twice(contrast, definition, unit, values)


def feature_contrast(unit: Tensor, values: Tensor, *, tau: float | Tensor, symmetric: bool) -> Tensor:
    """v·softmax_rows(x̂ᵀx̂ / τ); (B, N, D). Rows of zeros do not count."""
    dtype = product_dtype(unit)
    with no_autocast(unit):
        logits = unit.mT @ unit / tau  # (B, D, D); not bounded by 1/τ, so its rounding would not be either
        return product(values, softmax_weights(logits, symmetric, None, None), dtype)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """A b with factors rounded to `dtype`, in the dtype of a."""
    return a @ b if dtype == a.dtype else (a.to(dtype) @ b.to(dtype)).to(a.dtype)


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, `product_dtype` as it was outside says alone what may be rounded."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def product_dtype(x: Tensor) -> torch.dtype:
    """Type of the factors of the matrix products: autocast's where the machine multiplies it in hardware, else x's."""
    device = x.device.type
    if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(device):
        return x.dtype
    low = torch.get_autocast_dtype(device)
    if device == "cpu" and not (low == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()):
        return x.dtype  # emulated bfloat16 products are several times slower than float32 ones
    return low


def unit_rows(x: Tensor, eps: float = NORM_EPS) -> Tensor:
    """x̂, as by torch.nn.functional.normalize, but for the gradient of a zero row: 0, since it has no direction."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    unit: Tensor = x / norm.masked_fill(norm < eps, float("inf"))
    return unit
