"""BERT with ContraNorm at named sites: the layer is restated, everything else is transformers' own.

No parameter is added (but for `learnable`, AttnScale and GFSA): state-dict keys are vanilla BERT's, and any BERT
checkpoint loads.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention
from transformers.pytorch_utils import apply_chunking_to_forward

from BERT_glue.attention import VariantAttention
from BERT_glue.configuration import ContraNormBertConfig
from BERT_glue.modeling import ContraNormBody, register, with_head


class ContraNormBertSelfAttention(VariantAttention, BertSelfAttention):
    """BERT's attention, or one of its variants."""

    dropout_name = "dropout"


class ContraNormBertLayer(BertLayer):
    """BERT's post-LN block with its eight sites."""

    has_sites = True

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        past_key_values: None = None,
        token_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """One block: hidden states (B, N, D) → (B, N, D).

        `attention_mask` is in the form of the attention backend; `token_mask`, bool (B, N), are the tokens that
        ContraNorm sees. The encoder_* arguments and the cache belong to decoders, which the configuration refuses.
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


class ContraNormBertModel(ContraNormBody, BertModel):
    """BertModel whose layers carry ContraNorm."""

    config_class = ContraNormBertConfig
    replacements = {BertLayer: ContraNormBertLayer, BertSelfAttention: ContraNormBertSelfAttention}


register(ContraNormBertModel)
ContraNormBertForSequenceClassification = with_head(BertForSequenceClassification, ContraNormBertModel)
ContraNormBertForMaskedLM = with_head(BertForMaskedLM, ContraNormBertModel)
ContraNormBertForTokenClassification = with_head(BertForTokenClassification, ContraNormBertModel)
ContraNormBertForQuestionAnswering = with_head(BertForQuestionAnswering, ContraNormBertModel)
ContraNormBertForMultipleChoice = with_head(BertForMultipleChoice, ContraNormBertModel)
ContraNormBertForPreTraining = with_head(BertForPreTraining, ContraNormBertModel)
ContraNormBertForNextSentencePrediction = with_head(BertForNextSentencePrediction, ContraNormBertModel)
