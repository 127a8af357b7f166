"""Dropout with cheap random bits, for training on a CPU: there, drawing is what most of dropout's time goes into.

PyTorch draws one Bernoulli number per element. Here 64 random bits serve four elements: each is dropped where its 16
bits, read as an integer, lie below 65536 · p. So the rate is p to within 1/131072, and kept elements are scaled
by the inverse of their exact share, which leaves the mean as it is.

The attention function is transformers' "sdpa" but for training with dropout on a CPU, which has no fused kernel for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "sdpa_cheap_dropout"
LEVELS = 1 << 16


def dropout_factor(x: Tensor, p: float) -> Tensor:
    """What dropout multiplies `x` by: 0 for dropped elements, the inverse of the kept share for the others.

    The rate p is one at which 65536 · p rounds to less than 65536; the draws are of PyTorch's global CPU generator.
    """
    dropped, elements = round(p * LEVELS), x.numel()
    words = torch.empty((elements + 3) // 4, dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
    bits = words.view(torch.int16)[:elements].view(x.shape)
    factor = torch.empty(x.shape, dtype=x.dtype)
    # 0 and 1 straight in x's type: a boolean mask would have to be converted, forward and backward
    torch.ge(bits, dropped - LEVELS // 2, out=factor)
    return factor.mul_(LEVELS / (LEVELS - dropped))


def cheap_dropout(x: Tensor, p: float) -> Tensor:
    """Dropout of a tensor on a CPU while training."""
    dropped = round(p * LEVELS)
    if dropped in (0, LEVELS):
        return x if dropped == 0 else x * 0
    return x * dropout_factor(x, p)


class CheapDropout(nn.Dropout):
    """`nn.Dropout` with other draws on a CPU, and the very same elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; the shape stays."""
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        return cheap_dropout(x, self.p)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with cheap dropout of its weights, as a backend of transformers; it returns the weights it has formed.

    Queries, keys and values are (B, H, N, D/H), the result (B, N, H, D/H). The mask is bool (B, 1, N, N), true where a
    token attends.
    """
    ours = dropout > 0 and query.device.type == "cpu" and scaling is not None
    ours &= attention_mask is None or attention_mask.dtype == torch.bool
    if not ours or kwargs.get("is_causal") or getattr(module, "is_causal", True):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scores = (query * scaling) @ key.transpose(-1, -2)  # (B, H, N, N)
    if attention_mask is not None:
        far = torch.zeros_like(attention_mask, dtype=scores.dtype)
        scores = scores + far.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)
    weights = cheap_dropout(scores.softmax(-1), dropout)  # (B, H, N, N)
    if attention_mask is not None and not (attends := attention_mask.any(-1, keepdim=True)).all():
        weights = weights * attends  # a token that attends nowhere gets nothing, as in sdpa
    return (weights @ value).transpose(1, 2).contiguous(), weights


def use_cheap_dropout(model: PreTrainedModel) -> None:
    """Exchange the model's dropout and, where its attention is sdpa, the attention's; evaluation stays as it is."""
    dropouts = [(name, module) for name, module in model.named_modules() if type(module) is nn.Dropout]
    for name, module in dropouts:
        model.set_submodule(name, CheapDropout(module.p).train(module.training))
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
