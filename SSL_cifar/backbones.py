"""Backbones: ResNets of any width from timm's blocks, and timm's ViTs."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck, make_blocks
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from SSL_cifar.config import Config

RESNETS = {"resnet18": (BasicBlock, (2, 2, 2, 2)), "resnet50": (Bottleneck, (3, 4, 6, 3))}
STEMS = {  # kernel, stride, padding, max-pooling
    "cifar": (3, 1, 1, False),
    "cifar_pad2": (3, 1, 2, False),
    "s2": (3, 2, 1, False),
    "imagenet": (7, 2, 3, True),
}
VITS = {  # width, blocks, heads
    "vit_micro": (192, 4, 3),
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
}


class ResNet(nn.Sequential):
    """ResNet (He et al., CVPR 2016) without classifier: images (B, 3, S, S) to (B, D).

    timm's own class has a stem of 64 channels whatever the width; this one's is `width`.
    """

    def __init__(self, name: str, stem: str, width: int) -> None:
        block, repeats = RESNETS[name]
        kernel, stride, padding, pooled = STEMS[stem]
        stages, info = make_blocks((block,) * 4, (width, width * 2, width * 4, width * 8), repeats, inplanes=width)
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(3, width, kernel, stride, padding, bias=False),
                bn1=nn.BatchNorm2d(width),
                act1=nn.ReLU(inplace=True),
                maxpool=nn.MaxPool2d(3, 2, 1) if pooled else nn.Identity(),
                **dict(stages),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
            )
        )
        self.num_features: int = info[-1]["num_chs"]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if hasattr(module, "zero_init_last"):
                module.zero_init_last()

    def maps(self, images: Tensor, stage: int) -> Tensor:
        """The feature maps after stage 1 to 4, (B, C, H, W)."""
        x = images
        for name, module in self.named_children():
            x = module(x)
            if name == f"layer{stage}":
                return x
        raise ValueError(f"a ResNet has stages 1 to 4, not {stage}")


def build(config: Config, **more: Any) -> nn.Module:
    """The backbone of the config, with new weights; it has `num_features`. `more` goes to timm's VisionTransformer."""
    if config.backbone in RESNETS:
        return ResNet(config.backbone, config.stem, config.width)
    width, depth, heads = VITS[config.backbone]
    options = {"global_pool": "token", **config.vit_options(), **more}
    return VisionTransformer(
        img_size=config.crop_size, patch_size=config.patch_size, num_classes=0, embed_dim=width, depth=depth,
        num_heads=heads, **options,
    )  # fmt: skip
