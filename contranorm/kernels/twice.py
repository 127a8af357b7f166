"""c₁ A v + c₂ A (A v) with one A = softmax(q kᵀ/√d), for batches of short sequences on a CPU.

Two calls of scaled_dot_product_attention form A twice, and twice again in the backward: 14 products of size N x N x d
for a training step. Here it is formed once in each direction, a few heads at a time, so that it stays in the
second-level cache and is not stored: 10 products. With y = A v, z = A y, g the gradient by the sum, g_z = c₂ g and
g_y = c₁ g + Aᵀ g_z,

    ∂v = Aᵀ g_y,    ∂A = g_y vᵀ + g_z yᵀ,    ∂(q kᵀ/√d) = A ∘ (∂A - rowsum(A ∘ ∂A)),    ∂c₁ = g·y,    ∂c₂ = g·z.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from contranorm.kernels.autograd import differentiable_twice, is_traced, is_transformed

CHUNK = 1 << 18  # elements of the matrices A taken together, for each thread


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend_twice` takes these: of one dtype, on a CPU, and where torch neither records nor transforms."""
    return q.dtype == k.dtype == v.dtype and q.device.type == "cpu" and not is_traced(q) and not is_transformed()


def attend_twice(q: Tensor, k: Tensor, v: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """c₁ A v + c₂ A (A v), (B, H, N, d).

    Args:
        q: queries, (B, H, N, d), on a CPU.
        k: keys, (B, H, N, d).
        v: values, (B, H, N, d).
        c1: weights of the first product, (H,), in the dtype of v.
        c2: weights of the second.
    """
    heads = [x.reshape(-1, *x.shape[-2:]) for x in (q, k, v)]
    weights = [c.repeat(len(q))[:, None, None] for c in (c1, c2)]  # (B·H, 1, 1)
    with torch.autocast("cpu", enabled=False):
        out: Tensor = _Twice.apply(*heads, *weights)
    return differentiable_twice(out.view_as(v), _definition, q, k, v, c1, c2)


def _definition(q: Tensor, k: Tensor, v: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    a = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)
    y = a @ v
    return c1[:, None, None] * y + c2[:, None, None] * (a @ y)


def _parts(q: Tensor) -> tuple[list[slice], int]:
    """The heads in groups, and the size of the largest."""
    size = max(1, min(len(q), CHUNK * torch.get_num_threads() // q.shape[1] ** 2))
    return [slice(start, start + size) for start in range(0, len(q), size)], size


def _weights(q: Tensor, k: Tensor, out: Tensor) -> Tensor:
    """A of some heads, (n, N, N), in the first rows of `out`."""
    a = out[: len(q)]
    torch.baddbmm(a, q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5, out=a)  # beta = 0: a is not read
    return torch.softmax(a, dim=-1, out=a)


class _Twice(torch.autograd.Function):
    """On heads (B·H, N, d)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
        y, z, out = (torch.empty_like(v) for _ in range(3))
        parts, size = _parts(q)
        room = q.new_empty(size, q.shape[1], q.shape[1])
        for i in parts:
            a = _weights(q[i], k[i], room)
            torch.bmm(a, v[i], out=y[i])
            torch.bmm(a, y[i], out=z[i])
            torch.mul(y[i], c1[i], out=out[i]).addcmul_(z[i], c2[i])
        ctx.save_for_backward(q, k, v, c1, c2, y, z)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, c1, c2, y, z = ctx.saved_tensors
        grad_q, grad_k, grad_v, grad_1, grad_2 = (torch.empty_like(x) for x in (q, k, v, c1, c2))
        parts, size = _parts(q)
        room = q.new_empty(size, q.shape[1], q.shape[1])
        scale = q.shape[-1] ** -0.5
        for i in parts:
            a, g = _weights(q[i], k[i], room), grad[i]
            grad_1[i] = (g * y[i]).sum((1, 2), keepdim=True)
            grad_2[i] = (g * z[i]).sum((1, 2), keepdim=True)
            g_z = g * c2[i]
            g_y = torch.baddbmm(g * c1[i], a.mT, g_z)
            torch.bmm(a.mT, g_y, out=grad_v[i])
            slope = torch.bmm(g_y, v[i].mT).baddbmm_(g_z, y[i].mT)  # ∂A
            slope = torch._softmax_backward_data(slope, a, -1, a.dtype)
            torch.baddbmm(grad_q[i], slope, k[i], beta=0, alpha=scale, out=grad_q[i])
            torch.baddbmm(grad_k[i], slope.mT, q[i], beta=0, alpha=scale, out=grad_k[i])
        return grad_q, grad_k, grad_v, grad_1, grad_2
