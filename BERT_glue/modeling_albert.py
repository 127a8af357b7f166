"""ALBERT with ContraNorm at named sites: layer and attention are restated, everything else is transformers' own.

No parameter is added (but for `learnable`): state-dict keys are vanilla ALBERT's, and any ALBERT checkpoint loads.
ALBERT shares one layer's weights over its depth, so a site that is on is on at every depth.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AlbertForMaskedLM, AlbertForSequenceClassification, AlbertForTokenClassification, AlbertModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.albert.modeling_albert import AlbertAttention, AlbertLayer, eager_attention_forward
from transformers.pytorch_utils import apply_chunking_to_forward

from BERT_glue.configuration import ContraNormAlbertConfig
from BERT_glue.modeling import WithContraNormBody, WithTokenMask, register
from BERT_glue.sites import Sites


class ContraNormAlbertAttention(AlbertAttention):
    """ALBERT's attention up to the context; the layer does the rest, because the sites lie behind it."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Context (B, N, D) and, where the backend forms them, the attention weights (B, H, N, N)."""
        batch, tokens = hidden_states.shape[:2]
        heads = (batch, tokens, self.num_attention_heads, self.attention_head_size)
        query, key, value = (
            project(hidden_states).view(heads).transpose(1, 2)  # (B, H, N, D/H)
            for project in (self.query, self.key, self.value)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout.p if self.training else 0.0
        context, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return context.reshape(batch, tokens, -1).contiguous(), weights


class ContraNormAlbertLayer(AlbertLayer):
    """ALBERT's post-LN block with its eight sites."""

    def __init__(self, config: ContraNormAlbertConfig) -> None:
        super().__init__(config)
        self.attention = ContraNormAlbertAttention(config)
        self.sites = Sites(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """One block.

        Args:
            hidden_states: (B, N, D).
            attention_mask: in the form of the attention backend.
            token_mask: bool (B, N), the tokens that ContraNorm sees; None for all.
            **kwargs: for the attention backend.

        Returns:
            (B, N, D).
        """
        attention = self.attention

        x = self.sites("layer_input", hidden_states, token_mask)  # (B, N, D)
        context, _ = attention(x, attention_mask, **kwargs)
        context = self.sites("attention_context", context, token_mask)
        y = attention.output_dropout(attention.dense(context))
        y = self.sites("attention_output", y, token_mask)
        y = self.sites("attention_sum", x + y, token_mask)
        x = self.sites("attention_norm", attention.LayerNorm(y), token_mask)

        y = apply_chunking_to_forward(self.ff_chunk, self.chunk_size_feed_forward, self.seq_len_dim, x)
        y = self.sites("ffn_output", y, token_mask)
        y = self.sites("ffn_sum", y + x, token_mask)
        return self.sites("ffn_norm", self.full_layer_layer_norm(y), token_mask)


class ContraNormAlbertModel(WithTokenMask, AlbertModel):
    """AlbertModel whose layers carry ContraNorm."""

    config_class = ContraNormAlbertConfig

    def __init__(self, config: ContraNormAlbertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        for group in self.encoder.albert_layer_groups:
            group.albert_layers = nn.ModuleList(ContraNormAlbertLayer(config) for _ in group.albert_layers)
        self.post_init()


class ContraNormAlbertForSequenceClassification(WithContraNormBody, AlbertForSequenceClassification):
    """ContraNorm-ALBERT with a classification or regression head on the pooled first token."""

    config_class, body_class = ContraNormAlbertConfig, ContraNormAlbertModel


class ContraNormAlbertForMaskedLM(WithContraNormBody, AlbertForMaskedLM):
    """ContraNorm-ALBERT with the masked-language-model head."""

    config_class, body_class = ContraNormAlbertConfig, ContraNormAlbertModel


class ContraNormAlbertForTokenClassification(WithContraNormBody, AlbertForTokenClassification):
    """ContraNorm-ALBERT with a classification head on every token."""

    config_class, body_class = ContraNormAlbertConfig, ContraNormAlbertModel


register(
    ContraNormAlbertModel,
    ContraNormAlbertForSequenceClassification,
    ContraNormAlbertForMaskedLM,
    ContraNormAlbertForTokenClassification,
)
