"""BERT with ContraNorm at named sites: the layer is restated, everything else is transformers' own.

No parameter is added (but for `learnable`): state-dict keys are vanilla BERT's, and any BERT checkpoint loads.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification, BertModel
from transformers.models.bert.modeling_bert import BertLayer
from transformers.pytorch_utils import apply_chunking_to_forward

from BERT_glue.configuration import ContraNormBertConfig
from BERT_glue.modeling import WithContraNormBody, WithTokenMask, register
from BERT_glue.sites import Sites


class ContraNormBertLayer(BertLayer):
    """BERT's post-LN block with its eight sites."""

    def __init__(self, config: ContraNormBertConfig, layer_idx: int | None = None) -> None:
        super().__init__(config, layer_idx)
        self.sites = Sites(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: object | None = None,
        token_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """One block; the encoder_* arguments and the cache belong to decoders, which the configuration refuses.

        Args:
            hidden_states: (B, N, D).
            attention_mask: in the form of the attention backend.
            encoder_hidden_states: None.
            encoder_attention_mask: None.
            past_key_values: None.
            token_mask: bool (B, N), the tokens that ContraNorm sees; None for all.
            **kwargs: for the attention backend.

        Returns:
            (B, N, D).
        """
        attention, output = self.attention.output, self.output

        x = self.sites("layer_input", hidden_states, token_mask)  # (B, N, D)
        context, _ = self.attention.self(x, attention_mask=attention_mask, **kwargs)
        context = self.sites("attention_context", context, token_mask)
        y = attention.dropout(attention.dense(context))
        y = self.sites("attention_output", y, token_mask)
        y = self.sites("attention_sum", y + x, token_mask)
        x = self.sites("attention_norm", attention.LayerNorm(y), token_mask)

        y = apply_chunking_to_forward(self._feed_forward, self.chunk_size_feed_forward, self.seq_len_dim, x)
        y = self.sites("ffn_output", y, token_mask)
        y = self.sites("ffn_sum", y + x, token_mask)
        return self.sites("ffn_norm", output.LayerNorm(y), token_mask)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.output.dropout(self.output.dense(self.intermediate(x)))


class ContraNormBertModel(WithTokenMask, BertModel):
    """BertModel whose layers carry ContraNorm."""

    config_class = ContraNormBertConfig
    _no_split_modules = ["BertEmbeddings", "ContraNormBertLayer"]

    def __init__(self, config: ContraNormBertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        layers = [ContraNormBertLayer(config, layer_idx=i) for i in range(config.num_hidden_layers)]
        self.encoder.layer = nn.ModuleList(layers)
        self.post_init()


class ContraNormBertForSequenceClassification(WithContraNormBody, BertForSequenceClassification):
    """ContraNorm-BERT with a classification or regression head on the pooled first token."""

    config_class, body_class = ContraNormBertConfig, ContraNormBertModel


class ContraNormBertForMaskedLM(WithContraNormBody, BertForMaskedLM):
    """ContraNorm-BERT with the masked-language-model head."""

    config_class, body_class = ContraNormBertConfig, ContraNormBertModel


class ContraNormBertForTokenClassification(WithContraNormBody, BertForTokenClassification):
    """ContraNorm-BERT with a classification head on every token."""

    config_class, body_class = ContraNormBertConfig, ContraNormBertModel


register(
    ContraNormBertModel,
    ContraNormBertForSequenceClassification,
    ContraNormBertForMaskedLM,
    ContraNormBertForTokenClassification,
)
