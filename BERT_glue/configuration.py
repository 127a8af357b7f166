"""Configurations of BERT and ALBERT with ContraNorm: the vanilla fields and six more."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AlbertConfig, BertConfig, PretrainedConfig

from BERT_glue.sites import check_settings


@strict
class ContraNormBertConfig(BertConfig):
    """BertConfig with ContraNorm.

    Args:
        sites: names of the sites that are on, see `BERT_glue.sites.SITES`; none is vanilla BERT.
        scale: the step s. Needed as soon as a site is on.
        tau: temperature.
        axis: "tokens", or "features" for the paper's D-ContraNorm.
        identity: (1+s)·x - s·A·x, the form in which the paper's BERT runs; False is Eq. 6, x - s·A·x.
        include_padding: let padding tokens take part in A, as the reference code does; logits then depend on how far a
            batch is padded.
    """

    model_type = "contranorm_bert"
    sites: list[str] = field(default_factory=list)
    scale: float | int | None = None
    tau: float | int = 1.0
    axis: str = "tokens"
    identity: bool = True
    include_padding: bool = False

    def validate_contranorm(self) -> None:
        """Called by the strict dataclass."""
        check_settings(self)


@strict
class ContraNormAlbertConfig(AlbertConfig):
    """AlbertConfig with ContraNorm; the fields are those of ContraNormBertConfig, `identity` starts as Eq. 6."""

    model_type = "contranorm_albert"
    sites: list[str] = field(default_factory=list)
    scale: float | int | None = None
    tau: float | int = 1.0
    axis: str = "tokens"
    identity: bool = False
    include_padding: bool = False

    def validate_contranorm(self) -> None:
        """Called by the strict dataclass."""
        check_settings(self)


CONFIGS: dict[str, type[PretrainedConfig]] = {"bert": ContraNormBertConfig, "albert": ContraNormAlbertConfig}


def with_contranorm(config: PretrainedConfig, **settings: Any) -> PretrainedConfig:
    """The ContraNorm configuration of a vanilla BERT or ALBERT (or of one that has ContraNorm already).

    Args:
        config: of the checkpoint.
        **settings: sites, scale, tau, axis, identity, include_padding, or any other field to change.

    Raises:
        ValueError: another architecture, or settings that do not go together.
    """
    architecture = config.model_type.removeprefix("contranorm_")
    if architecture not in CONFIGS:
        raise ValueError(f"ContraNorm is built into {' and '.join(CONFIGS)}, not into model type {config.model_type!r}")
    values = config.to_dict() | settings
    values.pop("model_type")
    return CONFIGS[architecture](**values)
