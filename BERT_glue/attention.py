"""Rivals of ContraNorm that act inside BERT's and ALBERT's attention: AttnScale, GFSA, NeuTRENO, ResFormer.

Equations, papers and what the released code does: `contranorm.attention`. Here, beyond it:

- Padding never counts: no real token attends to it, and AttnScale's mean is over real tokens (its release has none).
- GFSA, Choi et al., NeurIPS 2024: K = 4 and w₀ = 0 unless given; the release has one K and w₀ per task (CoLA: BERT 4
  and -0.01, ALBERT 10 and 0.05). Dropout of A is drawn once for both products, as there.
- NeuTRENO and ResFormer: the first layer is plain; in ALBERT, whose depths share their weights, the first depth.

What is added starts at 0, without a random number drawn, and has no weight decay, as all vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import eager_attention_forward

from BERT_glue.dropout import ATTENTION
from contranorm import attention as forms

NEEDS_FIRST_VALUES = ("neutreno", "resformer")
PARAMETERS = {"attn_scale": "lamb", "gfsa": "w_k"}  # variant → its parameter, (H,)


@dataclass
class PassState:
    """What the layers of one forward pass share."""

    real_tokens: Tensor | None  # bool (B, N), None where all are
    first_values: Tensor | None = None  # the first layer's, (B, H, N, D/H)


class Weights:
    """A of one layer, by transformers' attention backend, as an operator on values (B, H, N, D/H).

    A backend that forms A, dropout included, leaves it here, and the next product is with the same A.
    """

    formed: Tensor | None = None

    def __init__(
        self, module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None, dropout: float, others: dict[str, Any]
    ) -> None:
        implementation = module.config._attn_implementation
        self.backend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        self.module, self.q, self.k, self.mask, self.dropout, self.others = module, q, k, mask, dropout, others

    def form(self, real_tokens: Tensor | None) -> None:
        """Form A and drop from it, where the backend's kernel would draw dropout anew for each product."""
        scores = self.q @ self.k.transpose(-2, -1) * self.module.scaling  # (B, H, N, N)
        if real_tokens is not None:
            scores = scores.masked_fill(~real_tokens[:, None, None, :], torch.finfo(scores.dtype).min)
        self.formed = F.dropout(scores.softmax(dim=-1), self.dropout)

    def __call__(self, values: Tensor) -> Tensor:
        """A · values, (B, H, N, D/H)."""
        if self.formed is not None:
            return self.formed @ values
        context, self.formed = self.backend(
            self.module, self.q, self.k, values, self.mask, dropout=self.dropout, scaling=self.module.scaling,
            **self.others,
        )  # fmt: skip
        return context.transpose(1, 2)


class VariantAttention(nn.Module):
    """Attention up to the context, before the output projection; stands before the vanilla class."""

    config: PretrainedConfig
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_head_size: int
    dropout_name: str
    """The vanilla class's name for the dropout of A."""

    def add_parameters(self) -> None:
        """The variant's parameter, if it has one."""
        if name := PARAMETERS.get(self.config.variant):
            setattr(self, name, nn.Parameter(torch.empty(self.config.num_attention_heads)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The variant is vanilla, or near it, at the start."""
        if name := PARAMETERS.get(self.config.variant):
            nn.init.zeros_(getattr(self, name))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        state: PassState | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Context (B, N, D) and, where the backend forms them, the attention weights (B, H, N, N)."""
        batch, tokens = hidden_states.shape[:2]
        heads = (batch, tokens, -1, self.attention_head_size)
        q, k, v = (
            project(hidden_states).view(heads).transpose(1, 2)  # (B, H, N, D/H)
            for project in (self.query, self.key, self.value)
        )
        dropout = getattr(self, self.dropout_name).p if self.training else 0.0
        weights = Weights(self, q, k, attention_mask, dropout, kwargs)
        context = weights(v) if state is None else self.mix(q, k, v, weights, state)
        return context.transpose(1, 2).reshape(batch, tokens, -1).contiguous(), weights.formed

    def mix(self, q: Tensor, k: Tensor, v: Tensor, weights: Weights, state: PassState) -> Tensor:
        """What the variant puts out per head, (B, H, N, D/H)."""
        c, mask, v0 = self.config, state.real_tokens, state.first_values
        attend = lambda *_: weights  # noqa: E731
        if c.variant == "attn_scale":
            return forms.attn_scale(q, k, v, self.lamb, mask, attend=attend)
        if c.variant == "gfsa":
            if weights.dropout and c._attn_implementation not in ("eager", ATTENTION):
                weights.form(mask)
            return forms.gfsa(q, k, v, self.w_k, mask, order=c.gfsa_order, w0=c.gfsa_w0, attend=attend)
        if v0 is None:
            state.first_values = v
            return weights(v)
        if c.variant == "neutreno":
            return forms.neutreno(q, k, v, v0, c.neutreno_lambda, mask, attend=attend)
        return forms.resformer(q, k, v, v0, c.resformer_share, mask, attend=attend)


def describe_variant(config: PretrainedConfig) -> str:
    """The variant and its arguments in words; "" without one."""
    if not getattr(config, "variant", None):
        return ""
    arguments = ", ".join(f"{name}={value}" for name, value in config.variant_arguments().items())
    return f"{config.variant_name()} in every layer" + (f" ({arguments})" if arguments else "")
