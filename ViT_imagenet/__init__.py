"""DeiT trained from scratch with ContraNorm. Importing `ViT_imagenet.models` registers its models with timm."""
