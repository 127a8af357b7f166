"""Configurations of BERT and ALBERT with ContraNorm or a rival: the vanilla fields, sites, switches, the variant."""

from dataclasses import field, fields, make_dataclass
from typing import Any, get_args, get_type_hints

from huggingface_hub.dataclasses import strict
from transformers import AlbertConfig, AutoConfig, BertConfig, PretrainedConfig

from BERT_glue.sites import check_settings
from contranorm.options import ContraNormOptions
from contranorm.variants import VariantOptions


def _json_type(hint: Any) -> Any:
    """The type as it is read from config.json, where 1.0 may be written as 1."""
    return hint | int if float in (hint, *get_args(hint)) else hint


_OPTIONS = (ContraNormOptions, VariantOptions)
_HINTS = {name: hint for options in _OPTIONS for name, hint in get_type_hints(options).items()}
ContraNormFields = make_dataclass(
    "ContraNormFields",
    [
        *(
            (f.name, _json_type(_HINTS[f.name]), field(default=f.default, metadata=f.metadata))
            for options in _OPTIONS
            for f in fields(options)
        ),
        ("sites", list[str], field(default_factory=list)),
        ("include_padding", bool, field(default=False)),
    ],
    bases=_OPTIONS,
    kw_only=True,
    namespace={"validate_contranorm": check_settings},  # called by the strict dataclass
)


class SaysItsSites:
    """Refuses a vanilla config.json that is read without a word about sites; stands before the vanilla class."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> PretrainedConfig:
        """As the vanilla class; ContraNorm's settings among `kwargs` are checked like those of a config.json."""
        own = {f.name: kwargs.pop(f.name) for f in fields(ContraNormFields) if f.name in kwargs}
        vanilla = config_dict.get("model_type", cls.model_type) != cls.model_type
        if vanilla and "sites" not in own:
            raise ValueError(
                f"a configuration of {config_dict['model_type']!r} has no ContraNorm: say where it goes, as in "
                f"from_pretrained(..., sites=['attention_sum'], scale=0.01), or sites=[] for none"
            )
        return super().from_dict(config_dict | own, **kwargs)


@strict
class ContraNormBertConfig(SaysItsSites, BertConfig, ContraNormFields):
    """BertConfig with ContraNorm: `ContraNormOptions`' switches under the same names, of which `scale` is needed.

    Args:
        sites: names of the sites that are on, see `BERT_glue.sites.SITES`; none is vanilla BERT.
        include_padding: let padding tokens take part in ContraNorm's A, as the released code does; logits then depend
            on how far a batch is padded.
        variant: a rival of ContraNorm inside attention, beside it or alone: attn_scale, gfsa, neutreno or resformer,
            with its arguments, see `VariantOptions`.
    """

    model_type = "contranorm_bert"
    identity: bool = True  # the form in which the paper's BERT runs


@strict
class ContraNormAlbertConfig(SaysItsSites, AlbertConfig, ContraNormFields):
    """AlbertConfig with ContraNorm; the fields are those of ContraNormBertConfig."""

    model_type = "contranorm_albert"
    identity: bool = False


CONFIGS: dict[str, type[PretrainedConfig]] = {"bert": ContraNormBertConfig, "albert": ContraNormAlbertConfig}
for _config in CONFIGS.values():
    AutoConfig.register(_config.model_type, _config)


def with_contranorm(config: PretrainedConfig, **settings: Any) -> PretrainedConfig:
    """The ContraNorm configuration of a BERT or ALBERT, with or without ContraNorm so far.

    `settings` are sites, scale, include_padding, ContraNorm's switches, or any other field to change; a ValueError
    where they do not go together.
    """
    architecture = config.model_type.removeprefix("contranorm_")
    if architecture not in CONFIGS:
        raise ValueError(f"ContraNorm is built into {' and '.join(CONFIGS)}, not into model type {config.model_type!r}")
    values = config.to_dict() | settings
    values.pop("model_type")
    return CONFIGS[architecture](**values)


def without_contranorm(config: PretrainedConfig) -> PretrainedConfig:
    """Transformers' own configuration, with the same values."""
    architecture = config.model_type.removeprefix("contranorm_")
    own = {"model_type", *(f.name for f in fields(ContraNormFields))}
    values = {name: value for name, value in config.to_dict().items() if name not in own}
    return {"bert": BertConfig, "albert": AlbertConfig}[architecture](**values)
