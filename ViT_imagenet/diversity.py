"""Patch diversification as a regularizer: losses that keep the last block's patches apart.

    L = weight · (L_cos + L_con)
    L_cos = mean over i ≠ j of |cos(h_i, h_j)|
    L_con = -mean over i of log[e^{p_i·h_i} / (e^{p_i·h_i} + e^{p_i·mean_{j≠i} h_j})]

h are the last block's patches, p the first block's, detached. Source: Gong et al., "Vision Transformers with Patch
Diversification", arXiv 2104.12753, whose third loss, a class for every patch under patch-wise CutMix, is left out here.
The released code (ChengyueGongR/PatchVisionTransformer) has no cosine loss, contrasts with a local 7 x 7 neighbourhood,
and calls its results "currently not reproducable".
"""

from __future__ import annotations

from typing import Any

from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F


def cosine_loss(h: Tensor) -> Tensor:
    """L_cos of patches h (B, P, D): 1 where all are parallel, 0 where all are orthogonal."""
    unit = F.normalize(h, dim=-1)
    patches = h.shape[1]
    return ((unit @ unit.mT).abs().sum() - unit.square().sum()) / (len(h) * patches * (patches - 1))


def contrastive_loss(p: Tensor, h: Tensor) -> Tensor:
    """L_con of the first block's patches p and the last one's h, (B, P, D): ln 2 where all h are equal, 0 far apart."""
    others = (h.sum(dim=1, keepdim=True) - h) / (h.shape[1] - 1)
    return F.softplus((p * (others - h)).sum(dim=-1)).mean()


def patch_diversity(p: Tensor, h: Tensor) -> Tensor:
    """L_cos + L_con of patches of the first block p and the last one h, (B, P, D), in float32 or wider."""
    p, h = (x if x.dtype.itemsize > 4 else x.float() for x in (p.detach(), h))
    return cosine_loss(h) + contrastive_loss(p, h)


def add_patch_diversity(model: VisionTransformer, weight: float = 1.0) -> None:
    """After each forward pass in training, `model.auxiliary_loss` is the weighted loss of its patches."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda block, inputs, output: seen.update({name: output[:, model.num_prefix_tokens :]})

    def lose(module: nn.Module, inputs: Any, output: Any) -> None:
        first, last = seen.pop("first"), seen.pop("last")  # not kept beyond the pass
        module.auxiliary_loss = weight * patch_diversity(first, last) if module.training else 0.0

    model.blocks[0].register_forward_hook(keep("first"))
    model.blocks[-1].register_forward_hook(keep("last"))
    model.register_forward_hook(lose)
