"""DeiT with ContraNorm at every norm, for timm: `timm.create_model("deit_tiny_patch16_224_contranorm", scale=0.1)`.

A DeiT block stays what it is, x + Attention(norm(x)), then x + MLP(norm(x)); the norms are ContraNorm, which
sub-classes LayerNorm, so a state dict has the keys of the plain DeiT and its pretrained weights load.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import timm
import torch
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled, checkpoint_filter_fn
from torch import nn

from contranorm import CollapseProbe, ContraNorm, attention_similarity
from contranorm.functional import Implementation

SUFFIX = "_contranorm"
LAYER_NORM_EPS = 1e-6  # DeiT's; torch's default is 1e-5
# The norms of a DeiT that see all tokens of an image, (B, N, D). Any other one sees pooled or per-head tensors.
TOKEN_NORMS = re.compile(r"norm|norm_pre|blocks\.\d+\.norm[12]")
_IMAGENET = {
    "pool_size": None,
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": timm.data.IMAGENET_DEFAULT_MEAN,
    "std": timm.data.IMAGENET_DEFAULT_STD,
    "first_conv": "patch_embed.proj",
    "num_classes": 1000,
}


@dataclass(frozen=True)
class Size:
    """Width and heads of one DeiT; a head has embed_dim / num_heads features."""

    embed_dim: int
    num_heads: int


SIZES = {
    "nano": Size(96, 3),  # nano and micro: for CPUs
    "micro": Size(128, 4),
    "tiny": Size(192, 3),
    "small": Size(384, 6),
    "base": Size(768, 12),
}
# (patch, image side) → the sizes that make sense there
GRIDS = {
    (16, 224): ("tiny", "small", "base"),
    (16, 384): ("tiny", "small", "base"),
    (4, 32): ("nano", "micro", "tiny"),
    (8, 32): ("nano", "micro", "tiny"),
    (4, 64): ("nano", "micro", "tiny"),
    (8, 64): ("nano", "micro", "tiny"),
}


def contra_norm_layer(
    scale: float,
    *,
    tau: float = 1.0,
    identity: bool = False,
    symmetric: bool = False,
    pre_norm: bool = False,
    learnable: bool = False,
    positive: bool = False,
    implementation: Implementation = "auto",
) -> Callable[..., ContraNorm]:
    """A `norm_layer` for any timm vision transformer, with DeiT's epsilon; arguments as in `ContraNorm`."""
    return partial(
        ContraNorm,
        scale=scale,
        tau=tau,
        identity=identity,
        symmetric=symmetric,
        pre_norm=pre_norm,
        learnable=learnable,
        positive=positive,
        implementation=implementation,
        eps=LAYER_NORM_EPS,
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
    plain = timm.layers.LayerNorm(contra.normalized_shape, eps=contra.eps).to(contra.weight)
    plain.load_state_dict({name: contra.state_dict()[name] for name in ("weight", "bias")})
    model.norm = plain


def _build(name: str, arch: dict[str, Any], *, distilled: bool, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformerDistilled if distilled else VisionTransformer,
        name,
        pretrained,
        pretrained_filter_fn=partial(checkpoint_filter_fn, adapt_layer_scale=True),
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **{**arch, **kwargs},
    )
    return model


def _plain_entry(name: str, arch: dict[str, Any], distilled: bool) -> Callable[..., VisionTransformer]:
    def entry(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        return _build(name, arch, distilled=distilled, pretrained=pretrained, **kwargs)

    entry.__doc__ = f"Plain DeiT {name}."
    entry.__name__ = entry.__qualname__ = name
    return entry


def _contranorm_entry(name: str, arch: dict[str, Any], distilled: bool) -> Callable[..., VisionTransformer]:
    def entry(
        pretrained: bool = False,
        *,
        scale: float,
        tau: float = 1.0,
        identity: bool = False,
        symmetric: bool = False,
        contra_pre_norm: bool = False,
        learnable: bool = False,
        positive: bool = False,
        implementation: Implementation = "auto",
        last_norm: Literal["contra", "layer"] = "contra",
        **kwargs: Any,
    ) -> VisionTransformer:
        if kwargs.pop("norm_layer", None) is not None:
            raise ValueError(f"{name} chooses its norm itself: give scale=..., or norm_layer= to the plain model")
        if kwargs.get("global_pool", "token") != "token":
            raise ValueError(
                f"global_pool={kwargs['global_pool']!r}: {name} reads the class token; a pooled (B, D) tensor would "
                "make ContraNorm mix the images of a batch"
            )
        if last_norm not in ("contra", "layer"):
            raise ValueError(f"last_norm must be 'contra' or 'layer', got {last_norm!r}")
        norm = contra_norm_layer(
            scale,
            tau=tau,
            identity=identity,
            symmetric=symmetric,
            pre_norm=contra_pre_norm,
            learnable=learnable,
            positive=positive,
            implementation=implementation,
        )
        model = _build(name, arch, distilled=distilled, pretrained=pretrained, norm_layer=norm, **kwargs)
        _refuse_other_sites(model)
        if last_norm == "layer" and isinstance(model.norm, ContraNorm):
            _plain_final_norm(model)
        return model

    entry.__doc__ = (
        f"{name.removesuffix(SUFFIX)} with ContraNorm in place of every LayerNorm.\n\n"
        "`scale` is required; `tau`, `identity`, `symmetric`, `contra_pre_norm` (ContraNorm's pre_norm; timm's own "
        "`pre_norm` adds a norm before the blocks), `learnable`, `positive` as in ContraNorm; `last_norm='layer'` "
        "keeps the final norm plain. The rest goes to timm (depth=, num_classes=, img_size=, drop_path_rate=, ...)."
    )
    entry.__name__ = entry.__qualname__ = name
    return entry


__all__ = ["SUFFIX", "collapse_by_block", "contra_norm_layer", "contra_norm_sites"]  # timm adds its models' names
default_cfgs: dict[str, Any] = {}


def _register_all() -> None:
    known = set(timm.list_models("deit_*"))
    for (patch, side), sizes in GRIDS.items():
        for size in sizes:
            for distilled in (False, True):
                name = f"deit_{size}{'_distilled' if distilled else ''}_patch{patch}_{side}"
                width = SIZES[size]
                arch: dict[str, Any] = {
                    "patch_size": patch,
                    "img_size": side,
                    "embed_dim": width.embed_dim,
                    "depth": 12,
                    "num_heads": width.num_heads,
                }
                if name in known:  # same weights as the plain model: they load, ContraNorm adds none
                    cfg = replace(timm.get_pretrained_cfg(name), tag=None).to_dict(remove_source=False)
                else:
                    cfg = {
                        **_IMAGENET,
                        "input_size": (3, side, side),
                        "crop_pct": 1.0 if side != 224 else 0.9,
                        "classifier": ("head", "head_dist") if distilled else "head",
                    }
                    default_cfgs.update(generate_default_cfgs({name: cfg}))
                    register_model(_in_this_module(_plain_entry(name, arch, distilled)))
                default_cfgs.update(generate_default_cfgs({name + SUFFIX: cfg}))
                register_model(_in_this_module(_contranorm_entry(name + SUFFIX, arch, distilled)))


def _in_this_module(entry: Callable[..., VisionTransformer]) -> Callable[..., VisionTransformer]:
    entry.__module__ = __name__
    globals()[entry.__name__] = entry
    return entry


_register_all()


@torch.no_grad()
def collapse_by_block(model: VisionTransformer, images: torch.Tensor) -> Any:
    """Collapse metrics after each block, before the final norm: its token mixing is not part of a block.

    Args:
        model: a plain or ContraNorm DeiT, on the device of `images`.
        images: (B, 3, H, W), normalized.

    Returns:
        DataFrame with one row per block: layer, module, mean_cosine, effective_rank, variance, attention_similarity.
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
        ) as attention:  # fmt: skip
            model(images)
    finally:
        for block, value in zip(model.blocks, fused, strict=True):
            block.attn.fused_attn = value
        model.train(was_training)
    frame = features.frame().drop(columns="call")
    return frame.assign(attention_similarity=attention.frame()["attention_similarity"])
