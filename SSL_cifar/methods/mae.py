"""Masked autoencoder (He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM
from lightly.models.utils import normalize_mean_var, patchify, set_at_index
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from SSL_cifar.methods.base import Batch, Method, Out
from SSL_cifar.patches import (
    PatchSettings,
    at_least_float32,
    check_ratio,
    masked_count,
    masked_mean,
    random_masks,
    small_head,
)


class MAE(Method):
    r"""Predicts the pixels of hidden patches; the encoder sees only the others.

    .. math:: L = \frac 1{|M|} \sum_{i \in M} \frac 1D \|\hat y_i - y_i\|^2

    with M the hidden patches and y_i the D pixel values of patch i of the augmented image.
    """

    @dataclass(kw_only=True)
    class Settings(PatchSettings):
        """Masked autoencoder."""

        TITLE: ClassVar[str] = "MAE"
        ORDER: ClassVar[float] = 30

        mask_ratio: float = 0.75
        """Share of patches that the encoder does not see. MAE's value."""
        decoder_dim: int = 256
        """Width of the decoder: 256 beside ViT-S, 512 beside larger ones."""
        decoder_depth: int = 8
        """Blocks of the decoder."""
        decoder_num_heads: int = 8
        """Heads of the decoder; they divide its width."""
        norm_pix_loss: bool = False
        """Predict the pixels of each patch normalized to mean 0 and variance 1."""

        def check(self) -> None:
            """Refuse what makes no sense."""
            super().check()
            check_ratio("mask_ratio", self.mask_ratio, self.tokens)
            for name in ("decoder_dim", "decoder_depth", "decoder_num_heads"):
                if getattr(self, name) < 1:
                    raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
            if self.decoder_dim % self.decoder_num_heads or self.decoder_dim % 4:
                raise ValueError(
                    f"--decoder_dim {self.decoder_dim} must be a multiple of 4 and of --decoder_num_heads "
                    f"{self.decoder_num_heads}"
                )

    views = 1

    def __init__(self, settings: Settings, backbone: VisionTransformer, images: int) -> None:
        super().__init__(settings, backbone, images)
        self.settings: MAE.Settings = settings
        # Of the wrapper only the method is kept, so that the backbone is registered once.
        self.encode = MaskedVisionTransformerTIMM(backbone).encode  # MAE's initialization, sine-cosine positions
        self.embed = nn.Linear(backbone.embed_dim, settings.decoder_dim)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=settings.tokens, embed_dim=settings.decoder_dim, depth=settings.decoder_depth,
            num_heads=settings.decoder_num_heads, num_prefix_tokens=backbone.num_prefix_tokens,
        )  # fmt: skip
        self.predict = small_head(settings.decoder_dim, self.outputs())

    def outputs(self) -> int:
        """Width of the prediction for one patch: its pixel values."""
        return 3 * self.settings.patch_size**2

    def forward(self, views: list[Tensor], batch: Batch) -> Out:
        """`row_loss` (B,) of one view of each image, (B, 3, S, S)."""
        images, ratio, tokens = views[0], self.settings.mask_ratio, self.settings.tokens
        drawn = random_masks(batch.total, tokens, ratio, ratio, batch.generator())
        mask = batch.mine(drawn).to(images.device)  # (B, T)
        never = mask.new_zeros(len(mask), self.backbone.num_prefix_tokens)  # the class token is always seen
        order = torch.cat([never, mask], dim=1).int().argsort(dim=1, stable=True)
        seen = order[:, : order.shape[1] - masked_count(ratio, tokens)]

        visible = self.embed(self.encode(images, idx_keep=seen))
        hidden = self.decoder.mask_token.to(visible.dtype).expand(*order.shape, -1)
        decoded = self.decoder(set_at_index(hidden, seen, visible))
        predicted = self.predict(decoded[:, never.shape[1] :])  # (B, T, outputs)
        return {"row_loss": masked_mean(self.patch_loss(at_least_float32(predicted), images), mask)}

    def patch_loss(self, predicted: Tensor, images: Tensor) -> Tensor:
        """Loss of each patch, (B, T): mean squared error of its pixels, (B, T, P·P·3)."""
        pixels = patchify(images, self.settings.patch_size)
        if self.settings.norm_pix_loss:
            pixels = normalize_mean_var(pixels)
        return (predicted - pixels).square().mean(dim=2)

    def loss(self, out: Out, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the images of all processes."""
        return out["row_loss"].mean(), {}
