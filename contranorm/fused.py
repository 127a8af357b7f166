"""The exact contrast term for batches of short sequences, normalization of the rows included, as one function.

As in `contranorm.blocked`, A v = (K v) / (K 1) with K = exp(x̂ x̂ᵀ / τ), and the gradient by x̂ needs only dS + dSᵀ.
K is kept for the backward, which is written out: K and dS + dSᵀ are symmetric, so that no transposed product is
taken (five products of size N x N x D where autograd of the definition takes six), and the passes over (B, N, N) and
(B, N, D) between them are counted (benchmarks/layer.py compares).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NORM_EPS = 1e-12  # as in torch.nn.functional.normalize


class _Contrast(torch.autograd.Function):
    """softmax(x̂ x̂ᵀ / τ) x over the rows that `keep` (B, N), 0 or 1 in the dtype of x, names; None for all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tau: float, keep: Tensor | None, dtype: torch.dtype) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(NORM_EPS)  # (B, N, 1)
        unit = (x / norm).to(dtype)
        values = (x if keep is None else x * keep.unsqueeze(-1)).to(dtype)
        empty = unit.new_empty(())  # beta = 0: not read
        kernel = torch.baddbmm(empty, unit, unit.mT, beta=0, alpha=1 / tau).exp_()  # (B, N, N)
        if keep is None:
            total = kernel.sum(dim=-1, keepdim=True, dtype=x.dtype)  # (B, N, 1)
        else:
            total = torch.bmm(kernel, keep.unsqueeze(-1).to(dtype)).to(x.dtype)
            total.masked_fill_(total == 0, 1.0)  # a sample with nothing to keep
        out = torch.bmm(kernel, values).to(x.dtype).div_(total)
        ctx.save_for_backward(norm, unit, values, kernel, total, out)
        ctx.tau, ctx.keep = tau, keep
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        norm, unit, values, kernel, total, out = ctx.saved_tensors
        g = grad / total
        mean = (g * out).sum(dim=-1, keepdim=True)  # Σ_j A_ij g_i·v_j
        g, mean = g.to(kernel.dtype), mean.to(kernel.dtype)
        slope = torch.bmm(g, values.mT)  # (B, N, N)
        if ctx.keep is None:
            slope.sub_(mean)
        else:
            slope.addcmul_(mean, ctx.keep.unsqueeze(1).to(kernel.dtype), value=-1)
        both = (slope + slope.mT).mul_(kernel)  # τ (dS + dSᵀ)
        grad_x = torch.bmm(kernel, g).to(grad.dtype)  # through the values
        if ctx.keep is not None:
            grad_x.mul_(ctx.keep.unsqueeze(-1))
        grad_unit = torch.bmm(both, unit).to(grad.dtype)
        along = (grad_unit * unit).sum(dim=-1, keepdim=True)  # x̂ stays on the sphere
        grad_unit.addcmul_(unit.to(grad.dtype), along, value=-1)
        return grad_x.addcdiv_(grad_unit, norm, value=1 / ctx.tau), None, None, None


def fused(x: Tensor, *, tau: float, keep: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A·x.

    Args:
        x: (B, N, D), not normalized.
        tau: temperature, not below 1 / `contranorm.blocked.MAX_LOGIT`.
        keep: bool (B, N), True for the rows that count; what the other rows give means nothing.
        dtype: type of the factors of the matrix products.

    Returns:
        (B, N, D).
    """
    result: Tensor = _Contrast.apply(x, tau, None if keep is None else keep.to(x.dtype), dtype)
    return result
