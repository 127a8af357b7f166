"""Where ContraNorm can stand in a transformer layer: names, the released code's digits, and the module for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from contranorm import ContraStep

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SITES = {
    "layer_input": "the block's input; the residual branch takes the normalized value too",
    "attention_context": "the attention context, before the output projection",
    "attention_output": "after the attention's output projection and dropout",
    "attention_sum": "attention output + residual, before the attention LayerNorm",
    "attention_norm": "after the attention LayerNorm",
    "ffn_output": "after the feed-forward's last dense (and BERT's dropout)",
    "ffn_sum": "feed-forward output + residual, before the output LayerNorm",
    "ffn_norm": "after the output LayerNorm",
}
VARIANTS = ("attn_scale", "gfsa", "neutreno", "resformer")
FEED_FORWARD_SITES = ("ffn_output", "ffn_sum", "ffn_norm")

# The same digit of `--pos` means different places in the two architectures.
DIGITS = {
    "bert": {
        1: "layer_input",
        2: "attention_context",
        3: "attention_output",
        4: "attention_norm",
        5: "ffn_output",
        6: "ffn_norm",
        7: "attention_sum",
        8: "ffn_sum",
    },
    "albert": dict(enumerate(SITES, start=1)),  # in the order in which a block meets them
}


def check_settings(config: PretrainedConfig) -> None:
    """Refuse ContraNorm settings that mean nothing or contradict each other, with a ValueError that names the field."""
    unknown = [site for site in config.sites if site not in SITES]
    if unknown:
        raise ValueError(f"unknown site {unknown[0]!r}; the sites are {', '.join(SITES)}")
    if len(set(config.sites)) != len(config.sites):
        raise ValueError(f"sites names a site twice: {', '.join(config.sites)}")
    if config.sites and config.scale is None:
        raise ValueError("sites without scale: ContraNorm's step size has no default, give scale=0.01 or the like")
    config.check_switches()
    config.check_variant()
    if config.variant not in (None, *VARIANTS):
        raise ValueError(f"unknown variant {config.variant!r}; the variants are {', '.join(VARIANTS)}")
    if config.variant in ("neutreno", "resformer") and getattr(config, "gradient_checkpointing", False):
        raise ValueError(f"{config.variant} takes the first layer's values along: set gradient_checkpointing=False")
    in_chunks = [site for site in config.sites if site in FEED_FORWARD_SITES]
    if config.chunk_size_feed_forward > 0 and in_chunks:
        raise ValueError(
            f"site {in_chunks[0]} contrasts all tokens of a sequence, a chunked feed-forward sees only some of them: "
            f"set chunk_size_feed_forward=0 (it is {config.chunk_size_feed_forward})"
        )
    if getattr(config, "is_decoder", False):
        raise ValueError("ContraNorm mixes all tokens of a sequence, later ones too: it cannot stand in a decoder")


class Sites(nn.ModuleDict):
    """The sites of one layer that are on, by name; calling it at a site that is off returns x itself."""

    def __init__(self, config: PretrainedConfig) -> None:
        steps = {site: ContraStep(config.scale, dim=config.hidden_size, **config.switches()) for site in config.sites}
        super().__init__(steps)

    def forward(self, site: str, x: Tensor, token_mask: Tensor | None) -> Tensor:
        """The features after the named site; (B, N, D)."""
        if site not in SITES:
            raise KeyError(site)
        return self[site](x, token_mask) if site in self else x


def token_mask_of(config: PretrainedConfig, attention_mask: Tensor | None) -> Tensor | None:
    """The tokens that take part in ContraNorm: bool (B, N), or None for all of them.

    Taken from the tokenizer's mask (B, N), before the attention backend turns it into what its kernel wants. A mask
    with other axes is a ValueError where a site is on: which tokens are padding cannot be read off it.
    """
    if config.include_padding or not config.sites:
        return None
    return real_tokens_of(attention_mask, "; pass the tokenizer's mask, or set include_padding=True")


def real_tokens_of(attention_mask: Tensor | None, advice: str = "; pass the tokenizer's mask") -> Tensor | None:
    """The tokens that are no padding: bool (B, N), or None for all; a ValueError where the mask has other axes."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(
            f"leaving padding out needs the (B, N) attention mask, got {tuple(attention_mask.shape)}{advice}"
        )
    return attention_mask.bool()


def active_sites(model: nn.Module) -> dict[str, list[str]]:
    """Layer name → the sites that really are on in it, read off the built model; layers without any are left out."""
    found = {name: list(module) for name, module in model.named_modules() if isinstance(module, Sites)}
    return {name.removesuffix(".sites"): sites for name, sites in found.items() if sites}
