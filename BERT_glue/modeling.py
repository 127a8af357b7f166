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

from BERT_glue.sites import token_mask_of
from contranorm import ContraStep


class WithTokenMask:
    """A model without head whose layers take the tokens that ContraNorm sees; stands before the vanilla class."""

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, *others: Any, **kwargs: Any
    ) -> Any:
        """As the vanilla model; the tokenizer's mask goes to every layer besides the backend's."""
        kwargs["token_mask"] = token_mask_of(self.config, attention_mask)
        return super().forward(input_ids, attention_mask, *others, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ContraStep):  # a learnable step, which no vanilla checkpoint has
            module.reset_parameters()


class WithContraNormBody:
    """A vanilla model with head whose body is exchanged for `body_class`; stands before the vanilla class."""

    body_class: type[PreTrainedModel]

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        pools = self.base_model.pooler is not None
        setattr(self, self.base_model_prefix, self.body_class(config, add_pooling_layer=pools))
        self.post_init()


AUTO_CLASSES = (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForMaskedLM,
    AutoModelForTokenClassification,
)


def register(*models: type[PreTrainedModel]) -> None:
    """Make transformers' Auto classes find an architecture: its models in the order of AUTO_CLASSES."""
    config = models[0].config_class
    AutoConfig.register(config.model_type, config)
    for auto, model in zip(AUTO_CLASSES, models, strict=True):
        auto.register(config, model)
