"""Remedies against oversmoothing that act inside attention, as functions of one layer's queries, keys and values.

Shapes: q, k, v (B, H, N, d), the per-head queries, keys and values of B sequences; A = softmax(q kᵀ/√d), y = A v. A
mask is bool (B, N), True for real tokens: padding enters neither a real token's output nor a mean.

| function | output per head | trained, and its start | equals y at |
| --- | --- | --- | --- |
| `attn_scale` | (1+λ) y - λ mean(v) | λ (H,), 0 | λ = 0 |
| `feat_scale` | (1+t₂) o + (t₁-t₂) mean(o) of the layer's output o | t₁, t₂ (D,), 0 | t₁ = t₂ = 0 |
| `gfsa` | w₀ v + (w₁-(K-2) w_K) y + (K-1) w_K A y | w_K (H,), 0 | w₀ = w_K = 0, w₁ = 1 |
| `neutreno` | y + λ (v₀ - v) | nothing | λ = 0 |
| `resformer` | A (β v₀ + (1-β) v) | nothing | β = 0 |

None of them needs A itself, only products A·values: scaled_dot_product_attention computes those, and no N x N matrix
is stored (on a CPU, a kernel of our own forms A once for both of GFSA's). Another backend goes in as `attend`.

All means are over all tokens of a sequence: in a decoder they would read the future.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from contranorm.kernels import twice

Operator = Callable[[Tensor], Tensor]
"""Values (B, H, N, d) → A · values."""
Attend = Callable[[Tensor, Tensor, Tensor | None], Operator]
"""Queries, keys and mask → the operator of their attention matrix."""


class FusedAttention:
    """A = softmax(q kᵀ/√d) as an operator on values, by scaled_dot_product_attention.

    Args:
        q: queries, (B, H, N, d).
        k: keys, (B, H, N, d).
        mask: bool (B, N), True for real tokens; no token attends to the others.
    """

    def __init__(self, q: Tensor, k: Tensor, mask: Tensor | None = None) -> None:
        self.q, self.k = q, k
        self.mask = None if mask is None else mask[:, None, None, :]

    def __call__(self, values: Tensor) -> Tensor:
        """A · values, (B, H, N, d)."""
        return F.scaled_dot_product_attention(self.q, self.k, values, attn_mask=self.mask)


def token_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the real tokens: x (B, N, D) or (B, H, N, d) → (B, 1, D) or (B, H, 1, d)."""
    if mask is None:
        return x.mean(dim=-2, keepdim=True)
    keep = mask.view(mask.shape[0], *(1,) * (x.dim() - 3), mask.shape[1], 1)
    count = keep.sum(dim=-2, keepdim=True).clamp(min=1)
    total = x.masked_fill(~keep, 0).sum(dim=-2, keepdim=True, dtype=None if x.dtype == torch.float64 else torch.float32)
    return (total / count).to(x.dtype)  # a float16 sum of some hundred tokens can overflow


def attn_scale(
    q: Tensor, k: Tensor, v: Tensor, lamb: Tensor, mask: Tensor | None = None, *, attend: Attend = FusedAttention
) -> Tensor:
    """AttnScale: the part of attention that is no average, made stronger.

    A' = 1/n + (1+λ_h)(A - 1/n), so A' v = (1+λ) y - λ mean(v); rows of A' sum to 1, and λ = -1 leaves the mean alone.

    Source: Wang et al., "Anti-Oversmoothing in Deep Vision Transformers via the Fourier Domain Analysis", ICLR 2022;
    VITA-Group/ViT-Anti-Oversmoothing attnscale.py, which stores A'. The mean over real tokens where there is padding is
    ours. Dropout of `attend` acts on A, in the release on A'.

    Args:
        q: queries, (B, H, N, d).
        k: keys, (B, H, N, d).
        v: values, (B, H, N, d).
        lamb: λ, (H,).
        mask: bool (B, N), True for real tokens.
        attend: what computes A.
    """
    y = attend(q, k, mask)(v)
    weight = lamb.to(y.dtype)[:, None, None]
    return torch.addcmul(-weight * token_mean(v, mask), 1 + weight, y)


def feat_scale(o: Tensor, t1: Tensor, t2: Tensor, mask: Tensor | None = None, *, doubled: bool = False) -> Tensor:
    """FeatScale: mean and rest of the attention layer's output, each weighted per feature.

    o + t₁⊙m + t₂⊙(o - m), with m the mean of o over tokens, class token included.

    Source: Wang et al., ICLR 2022, see `attn_scale`; VITA-Group/ViT-Anti-Oversmoothing featscale.py, which adds both
    terms twice. That is this function at 2t: the same functions, learned with twice the step.

    Args:
        o: (B, N, D), the output of the attention layer.
        t1: weight of the mean, (D,).
        t2: weight of the rest, (D,).
        mask: bool (B, N), True for real tokens.
        doubled: add both terms twice, as the release does.
    """
    times = 2 if doubled else 1
    t1, t2 = times * t1.to(o.dtype), times * t2.to(o.dtype)
    return torch.addcmul((t1 - t2) * token_mean(o, mask), 1 + t2, o)


def gfsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_k: Tensor,
    mask: Tensor | None = None,
    *,
    order: int = 4,
    w0: float = 0.0,
    w1: float = 1.0,
    attend: Attend = FusedAttention,
) -> Tensor:
    """Graph-filter self-attention: a polynomial of A, whose highest power is estimated from A and A².

    A' = w₀ I + w₁ A + w_K (A + (K-1)(A² - A)), so A' v = w₀ v + (w₁ - (K-2) w_K) y + (K-1) w_K A y: a second product
    with A in place of A·A. Rows of A' sum to w₀ + w₁ + w_K. A uniform A stays uniform: w₀ = 0 cannot undo a collapse.

    Source: Choi et al., "Graph Convolutions Enrich the Self-Attention in Transformers!", NeurIPS 2024, arXiv
    2312.04234; jeongwhanchoi/GFSA Image/gfsa.py (w₀ = 0, w₁ = 1, K = 4) and NLP/ (w₀ and K fixed per task, K searched
    in 2..10).

    Args:
        q: queries, (B, H, N, d).
        k: keys, (B, H, N, d).
        v: values, (B, H, N, d).
        w_k: w_K, (H,).
        mask: bool (B, N), True for real tokens.
        order: K, at least 2.
        w0: weight of the identity.
        w1: weight of A.
        attend: what computes A; its operator is applied twice, and dropout must have drawn one A for both.

    Raises:
        ValueError: order below 2.
    """
    if order < 2:
        raise ValueError(f"order must be at least 2, got {order}")
    a, w = attend(q, k, mask), w_k.to(v.dtype)
    c1, c2 = w1 - (order - 2) * w, (order - 1) * w  # (H,)
    # While w_K is 0, vanilla's own kernel: then it is vanilla bit for bit.
    if isinstance(a, FusedAttention) and mask is None and twice.serves(q, k, v) and bool(w_k.any()):
        out = twice.attend_twice(q, k, v, c1, c2)
    else:
        y = a(v)
        out = torch.addcmul(c1[:, None, None] * y, c2[:, None, None], a(y))
    return torch.add(out, v, alpha=w0) if w0 else out


def neutreno(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    v0: Tensor,
    lamb: float,
    mask: Tensor | None = None,
    *,
    attend: Attend = FusedAttention,
) -> Tensor:
    """NeuTRENO: the first layer's values hold on to every later layer's output, y + λ (v₀ - v).

    Source: Nguyen, Nguyen, Baraniuk, "Mitigating Over-smoothing in Transformers via Regularized Nonlocal Functionals",
    NeurIPS 2023; tamnguyen9520/NeuTRENO_NeurIPS2024 DeiT/neutreno.py: λ = 0.6, v₀ not detached, first layer plain.

    Args:
        q: queries, (B, H, N, d).
        k: keys, (B, H, N, d).
        v: values, (B, H, N, d).
        v0: the first layer's values, (B, H, N, d).
        lamb: λ.
        mask: bool (B, N), True for real tokens.
        attend: what computes A.
    """
    y = attend(q, k, mask)(v)
    return torch.add(y, (v0 - v).to(y.dtype), alpha=lamb)


def resformer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    v0: Tensor,
    share: float = 0.5,
    mask: Tensor | None = None,
    *,
    attend: Attend = FusedAttention,
) -> Tensor:
    """ResFormer: attention over a mixture of the first layer's values and the own ones, A (β v₀ + (1-β) v).

    Source: Zhou et al., "Value Residual Learning", arXiv 2410.17897; Zcchill/Value-Residual-Learning: β = 0.5, first
    layer plain. With A = I it is `neutreno` at λ = β.

    Args:
        q: queries, (B, H, N, d).
        k: keys, (B, H, N, d).
        v: values, (B, H, N, d).
        v0: the first layer's values, (B, H, N, d).
        share: β.
        mask: bool (B, N), True for real tokens.
        attend: what computes A.
    """
    return attend(q, k, mask)(torch.lerp(v, v0, share))
