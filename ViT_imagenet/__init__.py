"""DeiT trained from scratch with ContraNorm. Importing this package registers its models with timm."""

from ViT_imagenet import models

__all__ = ["models"]
