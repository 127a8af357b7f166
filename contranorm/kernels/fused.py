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

from contranorm.kernels.autograd import differentiable_twice
from contranorm.kernels.masks import kept_columns, with_padding, without_padding
from contranorm.kernels.plain import NORM_EPS, plain_contrast, product_dtype, unit_rows

# Elements of (n, N, N + D) that n sequences taken together may have on a CPU, for each thread.
CHUNK = 1 << 18
HARMLESS = 1e12  # norms whose products are far from overflow: 0 times what such rows hold is 0


class _Step(torch.autograd.Function):
    """own·x - scale·A x over the rows that `keep` (B, N) names, None for all; the others stay as they are."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, own: float, scale: float, tau: float, keep: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        b, n, d = x.shape
        x = x.contiguous()
        y = torch.empty_like(x)
        weights = x.new_empty((b, n, n), dtype=dtype)  # A
        inverse = x.new_empty((b, n, 1))  # 1 / ‖x‖
        size = max(1, b if x.is_cuda else CHUNK * torch.get_num_threads() // max(1, n * (n + d)))
        padding = _paddings(keep, b, size)
        for rows, y_, a, inverse_, pad in _together(size, padding, x, y, weights, inverse):
            others = pad and pad.select(rows)
            x_ = pad.silence(rows, others) if pad else rows
            if pad:
                pad.x_is_safe = x_ is rows
            norm = torch.linalg.vector_norm(x_, dim=-1, keepdim=True)
            torch.reciprocal(norm.masked_fill_(norm < NORM_EPS, torch.inf), out=inverse_)
            unit = (x_ * inverse_).to(dtype)
            if pad:
                torch.baddbmm(pad.bias(dtype), unit, unit.mT, alpha=1 / tau, out=a)
            else:
                torch.baddbmm(a, unit, unit.mT, beta=0, alpha=1 / tau, out=a)  # beta = 0: a is not read
            torch.softmax(a, dim=-1, out=a)
            if pad:
                a.mul_(pad.keep.unsqueeze(-1))  # the gradient through A then needs no mask any more
            _product(own, x_, -scale, a, x_, out=y_)
            if pad:
                pad.restore(y_, others)
        ctx.save_for_backward(x, weights, inverse)
        ctx.settings = (own, scale, tau, size, padding)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        x, weights, inverse = ctx.saved_tensors
        own, scale, tau, size, padding = ctx.settings
        grad = grad.contiguous()
        grad_x = torch.empty_like(x)
        for rows, upstream, out, a, inverse_, pad in _together(size, padding, x, grad, grad_x, weights, inverse):
            others = pad and pad.select(upstream)
            g = pad.silence(upstream, others) if pad else upstream
            x_ = rows if pad is None or pad.x_is_safe else without_padding(rows, pad.keep)
            unit = (x_ * inverse_).to(a.dtype)
            _product(own, g, -scale, a.mT, g, out=out)
            slope = torch.bmm(g.to(a.dtype), x_.to(a.dtype).mT)  # G, (n, N, N)
            slope = torch._softmax_backward_data(slope, a, -1, a.dtype)  # dS
            grad_unit = torch.bmm(slope + slope.mT, unit).to(x.dtype)  # a factor of -s / τ is still missing
            along = (grad_unit * unit).sum(dim=-1, keepdim=True)
            grad_unit.addcmul_(unit.to(x.dtype), along, value=-1)  # x̂ stays on the sphere
            out.addcmul_(grad_unit, inverse_, value=-scale / tau)
            if pad:
                pad.restore(out, others)
        return grad_x, None, None, None, None, None


class _Padding:
    """The rows that do not count in a few sequences taken together.

    Attributes:
        keep: (n, N), False for these rows.
        rows: their numbers, (R,); None on a GPU, where looking for them would have to wait.
        x_is_safe: the features of these rows, times 0, are 0.
    """

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep
        self.rows = None if keep.is_cuda else (~keep).flatten().nonzero().squeeze(1)
        self.x_is_safe = False

    def select(self, x: Tensor) -> Tensor:
        """These rows of x (n, N, D), (R, D); on a GPU all of x."""
        return x if self.rows is None else x.flatten(0, 1).index_select(0, self.rows)

    def silence(self, x: Tensor, others: Tensor) -> Tensor:
        """X, with zeros in these rows, `others`, where a weight of 0 would not take them out: 0·NaN is NaN."""
        if self.rows is not None and bool(torch.linalg.vector_norm(others) < HARMLESS):
            return x
        return without_padding(x, self.keep)

    def restore(self, y: Tensor, others: Tensor) -> None:
        """Write `others` to these rows of y."""
        if self.rows is None:
            y.copy_(torch.where(self.keep.unsqueeze(-1), y, others))
        else:
            y.flatten(0, 1).index_copy_(0, self.rows, others)

    def bias(self, dtype: torch.dtype) -> Tensor:
        """What is added to logits: 0 where a column counts, -inf where not, (n, 1, N)."""
        zeros = torch.zeros(self.keep.shape, dtype=dtype, device=self.keep.device)
        return zeros.masked_fill_(~kept_columns(self.keep), -torch.inf).unsqueeze(1)


def _paddings(keep: Tensor | None, b: int, size: int) -> list[_Padding | None]:
    """The padding of each part of `size` sequences; None for one without (on a GPU, only where there is no mask)."""
    if keep is None:
        return [None] * -(-b // size)
    return [None if not part.is_cuda and bool(part.all()) else _Padding(part) for part in torch.split(keep, size)]


def _together(size: int, padding: list[_Padding | None], *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """The tensors `size` sequences at a time, on a GPU all at once, and the padding of each part."""
    return zip(*(torch.split(tensor, size) for tensor in tensors), padding, strict=True)


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
        moved = own * rows - scale * plain_contrast(unit_rows(rows), rows, **form)
        return moved if keep is None else with_padding(moved, x, keep)

    with torch.autocast(x.device.type, enabled=False):
        return differentiable_twice(_Step.apply(x, own, scale, tau, keep, dtype), definition, x)
