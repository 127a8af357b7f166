"""The exact step y = own·x - s·A x for batches of short sequences, normalization of the rows included, as one function.

A = softmax(x̂ x̂ᵀ / τ) is kept for the backward, which is written out. With g the gradient by y, G = g xᵀ and
dS = A ∘ (G - rowsum(A ∘ G)), the gradient of the logits x̂ x̂ᵀ / τ,

    ∂x = own·g - s·Aᵀ g  through the values,        ∂x̂ = -s (dS + dSᵀ) x̂ / τ  through the cosines.

The sum dS + dSᵀ makes these five products of size N x N x D where autograd takes six; the sums with own·x and own·g are
part of products. On a CPU a few sequences are taken at a time, so that the passes between the products find their
operands in the second-level cache (`python -m benchmarks.layer --chunks` measures other sizes).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from contranorm.kernels.autograd import differentiable_twice
from contranorm.kernels.masks import kept_columns, with_padding, without_padding
from contranorm.kernels.plain import plain_contrast, product_dtype

NORM_EPS = 1e-12  # as in torch.nn.functional.normalize
# Elements of (n, N, N + D) that n sequences taken together may have on a CPU, for each thread.
CHUNK = 1 << 18


class _Step(torch.autograd.Function):
    """own·x - scale·A x over the rows that `keep` (B, N) names, None for all; the others stay as they are."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, own: float, scale: float, tau: float, keep: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        b, n, _ = x.shape
        x = x.contiguous()
        y = torch.empty_like(x)
        weights = x.new_empty((b, n, n), dtype=dtype)  # A
        inverse = x.new_empty((b, n, 1))  # 1 / ‖x‖
        for rows, y_, a, inverse_, kept in _together(x, y, weights, inverse, keep=keep):
            x_ = rows if kept is None else without_padding(rows, kept)
            norm = torch.linalg.vector_norm(x_, dim=-1, keepdim=True)
            torch.reciprocal(norm.clamp_min_(NORM_EPS), out=inverse_)
            unit = (x_ * inverse_).to(dtype)
            torch.baddbmm(a, unit, unit.mT, beta=0, alpha=1 / tau, out=a)  # beta = 0: a is not read
            if kept is not None:
                a.masked_fill_(~kept_columns(kept).unsqueeze(1), -torch.inf)
            torch.softmax(a, dim=-1, out=a)
            if kept is not None:
                a.mul_(kept.unsqueeze(-1))  # the gradient through A then needs no mask any more
            _product(own, x_, -scale, a, x_, out=y_)
            if kept is not None:
                y_.copy_(with_padding(y_, rows, kept))
        ctx.save_for_backward(x, weights, inverse)
        ctx.settings = (own, scale, tau, keep)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        x, weights, inverse = ctx.saved_tensors
        own, scale, tau, keep = ctx.settings
        grad = grad.contiguous()
        grad_x = torch.empty_like(x)
        for x_, upstream, out, a, inverse_, kept in _together(x, grad, grad_x, weights, inverse, keep=keep):
            g = upstream
            if kept is not None:
                x_, g = without_padding(x_, kept), without_padding(g, kept)
            unit = (x_ * inverse_).to(a.dtype)
            _product(own, g, -scale, a.mT, g, out=out)
            slope = torch.bmm(g.to(a.dtype), x_.to(a.dtype).mT)  # G, (n, N, N)
            slope = torch._softmax_backward_data(slope, a, -1, a.dtype)  # dS
            grad_unit = torch.bmm(slope + slope.mT, unit).to(x.dtype)  # a factor of -s / τ is still missing
            along = (grad_unit * unit).sum(dim=-1, keepdim=True)
            grad_unit.addcmul_(unit.to(x.dtype), along, value=-1)  # x̂ stays on the sphere
            out.addcmul_(grad_unit, inverse_, value=-scale / tau)
            if kept is not None:
                out.copy_(with_padding(out, upstream, kept))
        return grad_x, None, None, None, None, None


def _together(x: Tensor, *others: Tensor, keep: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """All of them, a few sequences at a time; a part of `keep` that keeps everything is None.

    On a GPU, all sequences at once, and `keep` is not looked at: that would have to wait.
    """
    b, n, d = x.shape
    size = max(1, b if x.is_cuda else CHUNK * torch.get_num_threads() // max(1, n * (n + d)))
    parts = [torch.split(tensor, size) for tensor in (x, *others)]
    kept: list[Tensor | None] = [None] * len(parts[0])
    if keep is not None:
        kept = [None if not part.is_cuda and bool(part.all()) else part for part in torch.split(keep, size)]
    return zip(*parts, kept, strict=True)


def _product(beta: float, base: Tensor, alpha: float, a: Tensor, b: Tensor, out: Tensor) -> None:
    """Out = beta·base + alpha·a b, with factors in the dtype of a and the sum in that of base."""
    if a.dtype == base.dtype:
        torch.baddbmm(base, a, b, beta=beta, alpha=alpha, out=out)
    else:
        torch.add(beta * base, torch.bmm(a, b.to(a.dtype)), alpha=alpha, out=out)


def fused_step(x: Tensor, *, own: float, scale: float, tau: float, keep: Tensor | None) -> Tensor:
    """own·x - scale·A x for x (B, N, D), not normalized; own = 0 and scale = -1 give the contrast term A x alone.

    `keep`, bool (B, N), is True for the rows that count; None for all. The others stay as they are.
    """
    dtype = product_dtype(x)

    def definition(x: Tensor) -> Tensor:
        rows = x if keep is None else without_padding(x, keep)
        form: dict[str, Any] = dict(tau=tau, symmetric=False, keep=keep, exclude=None, dtype=x.dtype)
        moved = own * rows - scale * plain_contrast(F.normalize(rows, dim=-1), rows, **form)
        return moved if keep is None else with_padding(moved, x, keep)

    with torch.autocast(x.device.type, enabled=False):
        return differentiable_twice(_Step.apply(x, own, scale, tau, keep, dtype), definition, x)
