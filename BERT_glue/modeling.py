"""What BERT and ALBERT with ContraNorm share: the token mask's way to the layers, and the models with a head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from BERT_glue.sites import ContraNormSite, token_mask_of


class WithTokenMask:
    """A model without head whose layers take the tokens that ContraNorm sees; stands before the vanilla class."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the vanilla model; the tokenizer's mask goes to every layer besides the backend's."""
        kwargs["token_mask"] = token_mask_of(self.config, attention_mask)
        return super().forward(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ContraNormSite):  # a learnable step, which no vanilla checkpoint has
            module.reset_parameters()


class WithContraNormBody:
    """A vanilla model with head whose body is exchanged for `body_class`; stands before the vanilla class."""

    body_class: type[PreTrainedModel]

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        pools = self.base_model.pooler is not None
        setattr(self, self.base_model_prefix, self.body_class(config, add_pooling_layer=pools))
        self.post_init()


def register(
    body: type[PreTrainedModel],
    classifier: type[PreTrainedModel],
    masked_lm: type[PreTrainedModel],
    token_classifier: type[PreTrainedModel],
) -> None:
    """Make transformers' Auto classes find an architecture's configuration and models."""
    config = body.config_class
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, body)
    AutoModelForSequenceClassification.register(config, classifier)
    AutoModelForMaskedLM.register(config, masked_lm)
    AutoModelForTokenClassification.register(config, token_classifier)
