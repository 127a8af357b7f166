"""What BERT and ALBERT with ContraNorm share: sites in a vanilla model's layers, the token mask's way there, heads."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from BERT_glue.attention import NEEDS_FIRST_VALUES, PassState, VariantAttention
from BERT_glue.sites import Sites, real_tokens_of, token_mask_of
from contranorm import ContraStep


class ContraNormBody:
    """A model without head whose layers carry ContraNorm; stands before the vanilla class."""

    replacements: dict[type[nn.Module], type[nn.Module]]
    """Vanilla class → the class in its place, which has the same parameters; one with `has_sites` gets its sites."""

    def __init__(self, config: PretrainedConfig, add_pooling_layer: bool = True) -> None:
        _check(type(self), config)
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        # a layer changes its class: weights, and flags such as gradient checkpointing, stay as they are
        for module in list(self.modules()):
            module.__class__ = self.replacements.get(type(module), type(module))
            if getattr(module, "has_sites", False):
                module.sites = Sites(self.config)
            if isinstance(module, VariantAttention):
                module.add_parameters()
        self.supports_gradient_checkpointing &= config.variant not in NEEDS_FIRST_VALUES
        self._no_split_modules = {kind.__name__ for kind in self.replacements.values()} | set(self._no_split_modules)
        self.post_init()

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
        if self.config.variant is not None:
            kwargs["state"] = PassState(real_tokens_of(attention_mask))
        return super().forward(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (ContraStep, VariantAttention)):  # parameters that no vanilla checkpoint has
            module.reset_parameters()


def with_head(vanilla: type[PreTrainedModel], body: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The vanilla model with head as a class whose body is `body`, known to the Auto classes."""

    def init(self: PreTrainedModel, config: PretrainedConfig) -> None:
        _check(type(self), config)
        checkpointing = getattr(config, "gradient_checkpointing", False)
        vanilla.__init__(self, config)
        old = self.base_model
        with torch.random.fork_rng(devices=[]):  # a seed gives the vanilla model's weights
            new = body(config, add_pooling_layer=old.pooler is not None)
        new.load_state_dict(old.state_dict(), strict=False)  # a learnable step and a variant's parameter are new
        self.supports_gradient_checkpointing = new.supports_gradient_checkpointing
        setattr(self, self.base_model_prefix, new)
        if checkpointing:  # the first body has taken it off the configuration
            config.gradient_checkpointing = True
        self.post_init()

    doc = f"{vanilla.__name__} on {body.__name__}."
    namespace = {"__init__": init, "__module__": body.__module__, "__doc__": doc, "config_class": body.config_class}
    return register(type(f"ContraNorm{vanilla.__name__}", (vanilla,), namespace))


def _check(model: type[PreTrainedModel], config: PretrainedConfig) -> None:
    if not isinstance(config, model.config_class):
        raise TypeError(
            f"{model.__name__} needs a {model.config_class.__name__}, got {type(config).__name__}: "
            "BERT_glue.with_contranorm(config, sites=['attention_sum'], scale=0.01) makes one of it"
        )


def register(model: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Make transformers' Auto class of the same task find the model."""
    _, has_head, task = model.__name__.partition("For")
    auto = getattr(transformers, f"AutoModelFor{task}" if has_head else "AutoModel")
    auto.register(model.config_class, model)
    return model
