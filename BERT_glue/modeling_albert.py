"""ALBERT with ContraNorm at named sites: layer and attention are restated, everything else is transformers' own.

No parameter is added (but for `learnable`, AttnScale and GFSA): state-dict keys are vanilla ALBERT's, and any ALBERT
checkpoint loads.
ALBERT shares one layer's weights over its depth, so a site that is on is on at every depth.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import (
    AlbertForMaskedLM,
    AlbertForMultipleChoice,
    AlbertForPreTraining,
    AlbertForQuestionAnswering,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
    AlbertModel,
)
from transformers.models.albert.modeling_albert import AlbertAttention, AlbertLayer
from transformers.pytorch_utils import apply_chunking_to_forward

from BERT_glue.attention import VariantAttention
from BERT_glue.configuration import ContraNormAlbertConfig
from BERT_glue.modeling import ContraNormBody, register, with_head


class ContraNormAlbertAttention(VariantAttention, AlbertAttention):
    """ALBERT's attention or a variant, up to the context; the layer does the rest, as the sites lie behind it."""

    dropout_name = "attention_dropout"


class ContraNormAlbertLayer(AlbertLayer):
    """ALBERT's post-LN block with its eight sites."""

    has_sites = True

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """One block: hidden states (B, N, D) → (B, N, D).

        `attention_mask` is in the form of the attention backend; `token_mask`, bool (B, N), are the tokens that
        ContraNorm sees.
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


class ContraNormAlbertModel(ContraNormBody, AlbertModel):
    """AlbertModel whose layers carry ContraNorm."""

    config_class = ContraNormAlbertConfig
    replacements = {AlbertLayer: ContraNormAlbertLayer, AlbertAttention: ContraNormAlbertAttention}


register(ContraNormAlbertModel)
ContraNormAlbertForSequenceClassification = with_head(AlbertForSequenceClassification, ContraNormAlbertModel)
ContraNormAlbertForMaskedLM = with_head(AlbertForMaskedLM, ContraNormAlbertModel)
ContraNormAlbertForTokenClassification = with_head(AlbertForTokenClassification, ContraNormAlbertModel)
ContraNormAlbertForQuestionAnswering = with_head(AlbertForQuestionAnswering, ContraNormAlbertModel)
ContraNormAlbertForMultipleChoice = with_head(AlbertForMultipleChoice, ContraNormAlbertModel)
ContraNormAlbertForPreTraining = with_head(AlbertForPreTraining, ContraNormAlbertModel)
