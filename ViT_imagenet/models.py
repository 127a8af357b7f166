"""DeiT with ContraNorm at every norm, for timm: `timm.create_model("deit_tiny_patch16_224_contranorm", scale=0.1)`.

A DeiT block stays what it is, x + Attention(norm(x)), then x + MLP(norm(x)); the norms are ContraNorm, which
sub-classes LayerNorm, so a state dict has the keys of the plain DeiT and its pretrained weights load.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, Literal

import pandas as pd
import timm
import torch
from timm.models import (
    VisionTransformer,
    build_model_with_cfg,
    deit,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from torch import nn

from contranorm import CollapseProbe, ContraNorm, attention_similarity, singular_spectrum
from contranorm.options import ContraNormOptions

SUFFIX = "_contranorm"
LAYER_NORM_EPS = 1e-6  # DeiT's; torch's default is 1e-5
# The norms of a DeiT that see all tokens of an image, (B, N, D); any other one sees pooled or per-head tensors. timm's
# features_only puts `model.`, `body.` or `graph_module.` before the names.
TOKEN_NORMS = re.compile(r"(?:model\.|body\.|graph_module\.)?(?:norm|norm_pre|blocks\.\d+\.norm[12])")
register_notrace_module(ContraNorm)  # timm's torch.fx feature extraction takes it as a whole
_SWITCHES = {f.name for f in fields(ContraNormOptions)} - {"scale", "pre_norm"}  # timm has a pre_norm of its own
_SMALL = {  # the models that timm does not have: sides of an image and of a patch, features
    "deit_micro_patch8_32": (32, 8, 128), "deit_micro_patch8_64": (64, 8, 128),
    "deit_nano_patch8_32": (32, 8, 64), "deit_nano_patch16_64": (64, 16, 64),
}  # fmt: skip
default_cfgs = generate_default_cfgs(
    {name: deit._cfg(input_size=(3, side, side), crop_pct=1.0) for name, (side, _, _) in _SMALL.items()}
)


def contra_norm_sites(model: nn.Module) -> list[str]:
    """Names of the modules that are ContraNorm, in order of depth."""
    return [name for name, module in model.named_modules() if isinstance(module, ContraNorm)]


def _refuse_other_sites(model: nn.Module) -> None:
    """A token-mixing norm on pooled vectors would mix the images of a batch, on heads the heads of one image."""
    for name in contra_norm_sites(model):
        if not TOKEN_NORMS.fullmatch(name):
            raise ValueError(
                f"ContraNorm would stand at {name!r}, where its input is not (B, N, D): pooled vectors "
                "(global_pool='avg' and the like) would mix the images of a batch, per-head tensors (qk_norm) the "
                "heads. Use global_pool='token' and qk_norm=False, or a plain LayerNorm"
            )


def _plain_final_norm(model: VisionTransformer) -> None:
    """Put LayerNorm in the place of the network's last ContraNorm, with the weights that it has."""
    contra = model.norm
    model.norm = timm.layers.LayerNorm(contra.normalized_shape, eps=contra.eps).to(contra.weight)
    model.norm.load_state_dict({name: contra.state_dict()[name] for name in ("weight", "bias")})


def _with_contra_norm(
    plain: Callable[..., VisionTransformer],
    pretrained: bool,
    *,
    scale: float,
    contra_pre_norm: bool = False,
    last_norm: Literal["contra", "vanilla"] = "contra",
    **kwargs: Any,
) -> VisionTransformer:
    """`plain` with ContraNorm in place of every LayerNorm.

    Args:
        plain: a DeiT's function.
        pretrained: load timm's weights of the plain model: ContraNorm adds none, unless `learnable`.
        scale: ContraNorm's step.
        contra_pre_norm: ContraNorm's pre_norm; timm's own `pre_norm` adds a norm before the blocks.
        last_norm: "vanilla" keeps the final norm plain.
        **kwargs: ContraNorm's other switches; the rest goes to timm (depth=, num_classes=, img_size=, ...).
    """
    if kwargs.pop("norm_layer", None) is not None:
        raise ValueError(
            f"{plain.__name__}{SUFFIX} chooses its norm itself: give scale=, or norm_layer= to the plain model"
        )
    if kwargs.get("global_pool", "token") != "token":
        raise ValueError(
            f"global_pool={kwargs['global_pool']!r}: {plain.__name__}{SUFFIX} reads the class token; a pooled (B, D) "
            "tensor would make ContraNorm mix the images of a batch"
        )
    if last_norm not in ("contra", "vanilla"):
        raise ValueError(f"last_norm must be 'contra' or 'vanilla', got {last_norm!r}")
    switches = {name: kwargs.pop(name) for name in _SWITCHES & kwargs.keys()}
    norm = partial(ContraNorm, scale=scale, pre_norm=contra_pre_norm, eps=LAYER_NORM_EPS, **switches)
    model = plain(pretrained, norm_layer=norm, **kwargs)
    _refuse_other_sites(model)
    vit = getattr(model, "model", model)  # with features_only, timm wraps it
    if last_norm == "vanilla" and isinstance(getattr(vit, "norm", None), ContraNorm):
        _plain_final_norm(vit)
    return model


def _small(name: str, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    side, patch, width = _SMALL[name]
    features = {
        "out_indices": kwargs.pop("out_indices", 3),
        "feature_cls": "getter",
    }  # for features_only, as timm's ViTs
    size = {"img_size": side, "patch_size": patch, "embed_dim": width, "depth": 12, "num_heads": width // 32}
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer, name, pretrained, feature_cfg=features, **{**size, **kwargs}
    )
    return model


@register_model
def deit_micro_patch8_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A DeiT for CPUs: 128 features, images of 32 x 32 pixels."""
    return _small("deit_micro_patch8_32", pretrained, **kwargs)


@register_model
def deit_micro_patch8_64(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A DeiT for CPUs: 128 features, images of 64 x 64 pixels."""
    return _small("deit_micro_patch8_64", pretrained, **kwargs)


@register_model
def deit_nano_patch8_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A DeiT for many runs on CPUs: 64 features, images of 32 x 32 pixels in 16 patches."""
    return _small("deit_nano_patch8_32", pretrained, **kwargs)


@register_model
def deit_nano_patch16_64(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A DeiT for many runs on CPUs: 64 features, images of 64 x 64 pixels in 16 patches."""
    return _small("deit_nano_patch16_64", pretrained, **kwargs)


@register_model
def deit_micro_patch8_32_contranorm(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """`deit_micro_patch8_32` with ContraNorm; `scale` is required, see `_with_contra_norm` for the rest."""
    return _with_contra_norm(deit_micro_patch8_32, pretrained, **kwargs)


@register_model
def deit_micro_patch8_64_contranorm(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """`deit_micro_patch8_64` with ContraNorm."""
    return _with_contra_norm(deit_micro_patch8_64, pretrained, **kwargs)


@register_model
def deit_nano_patch8_32_contranorm(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """`deit_nano_patch8_32` with ContraNorm."""
    return _with_contra_norm(deit_nano_patch8_32, pretrained, **kwargs)


@register_model
def deit_nano_patch16_64_contranorm(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """`deit_nano_patch16_64` with ContraNorm."""
    return _with_contra_norm(deit_nano_patch16_64, pretrained, **kwargs)


@register_model
def deit_tiny_patch16_224_contranorm(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-tiny with ContraNorm, of the paper's Table 2."""
    return _with_contra_norm(deit.deit_tiny_patch16_224, pretrained, **kwargs)


@register_model
def deit_small_patch16_224_contranorm(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-small with ContraNorm, of the paper's Table 2."""
    return _with_contra_norm(deit.deit_small_patch16_224, pretrained, **kwargs)


@register_model
def deit_tiny_distilled_patch16_224_contranorm(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-tiny with a distillation token and ContraNorm."""
    return _with_contra_norm(deit.deit_tiny_distilled_patch16_224, pretrained, **kwargs)


@register_model
def deit_small_distilled_patch16_224_contranorm(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-small with a distillation token and ContraNorm."""
    return _with_contra_norm(deit.deit_small_distilled_patch16_224, pretrained, **kwargs)


def image_side(model: nn.Module) -> int:
    """Side of the images that a model takes."""
    return int(model.patch_embed.img_size[0])  # type: ignore[union-attr, index]


@torch.no_grad()
def collapse_by_block(model: VisionTransformer, images: torch.Tensor) -> tuple[pd.DataFrame, list[float]]:
    """Collapse metrics after each block, before the final norm: its token mixing is not part of a block.

    Args:
        model: a plain or ContraNorm DeiT, on the device of `images`.
        images: (B, 3, H, W), normalized.

    Returns:
        One row per block: layer (from 1), mean_cosine, effective_rank, variance, attention_similarity; and the singular
        values of the last block's tokens, as shares of their sum, in descending order, mean over the images.
    """
    names = [f"blocks.{i}" for i in range(len(model.blocks))]
    maps = [f"{name}.attn.attn_drop" for name in names]  # its input and output are the weights, (B, heads, N, N)
    fused = [block.attn.fused_attn for block in model.blocks]
    was_training = model.training
    model.eval()
    try:
        for block in model.blocks:
            block.attn.fused_attn = False  # the fused kernel never forms the weights
        with CollapseProbe(model, names) as features, CollapseProbe(
            model, dict(zip(names, maps, strict=True)), metrics={"attention_similarity": attention_similarity}
        ) as attention, CollapseProbe(model, names[-1:], metrics={"spectrum": singular_spectrum}) as last:  # fmt: skip
            model(images)
    finally:
        for block, value in zip(model.blocks, fused, strict=True):
            block.attn.fused_attn = value
        model.train(was_training)
    frame = features.frame().drop(columns=["call", "module"])
    similarity = attention.frame()["attention_similarity"]
    frame = frame.assign(layer=range(1, len(names) + 1), attention_similarity=similarity)
    return frame, last.frame()["spectrum"][0].mean(dim=0).tolist()
