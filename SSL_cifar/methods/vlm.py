"""Masked prediction of tokens with as many hidden tokens in every image, or a number drawn for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightly.models.modules import MaskedVisionTransformerTIMM
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from SSL_cifar.methods.base import Batch, Method, Out
from SSL_cifar.patches import (
    at_least_float32,
    check_ratio,
    masked_mean,
    mean_states,
    random_masks,
    small_head,
    suffix_masks,
)
from SSL_cifar.tokens import TokenSettings, load_tokenizer


class VLM(Method):
    r"""A mask token stands in place of each hidden patch; the transformer predicts the hidden patches' tokens.

    .. math:: L = -\frac 1{|M|} \sum_{i \in M} \log P(y_i | y_{\bar M}), \qquad |M| = \max(1, \mathrm{round}(r T)),
        \quad r \sim U(r_{min}, r_{max}) \text{ for each image}

    r_min = r_max is the usual objective with a fixed number of hidden tokens. With |M| uniform on 1..T, T times the
    expected loss is the negative log-likelihood of the image, token by token, averaged over all orders. Our reading of
    "Look Ahead or Look Around? A Theoretical Comparison Between Autoregressive and Masked Pretraining", Zhang, Du,
    Huang, Wang, Wang, ICML 2024, whose code was not released.
    """

    @dataclass(kw_only=True)
    class Settings(TokenSettings):
        """Variable-length masked prediction."""

        TITLE: ClassVar[str] = "masked"
        ORDER: ClassVar[float] = 42

        mask_ratio_min: float = 0.1
        """r_min: smallest share of hidden tokens."""
        mask_ratio_max: float = 0.9
        """r_max: largest share. Equal to the smallest, every image hides the same number."""
        hide_suffix: bool = False
        """Hide the last tokens in place of a random set: what is seen is a prefix, as in generation."""

        def check(self) -> None:
            """Refuse what makes no sense."""
            super().check()
            if self.mask_ratio_min > self.mask_ratio_max:
                raise ValueError(
                    f"--mask_ratio_min {self.mask_ratio_min:g} must not be above --mask_ratio_max "
                    f"{self.mask_ratio_max:g}"
                )
            check_ratio("mask_ratio_min", self.mask_ratio_min, self.tokens)
            check_ratio("mask_ratio_max", self.mask_ratio_max, self.tokens)

        def knob(self) -> tuple[str, float]:
            """The range of shares."""
            low, high = self.mask_ratio_min, self.mask_ratio_max
            shares = f"r={low:g}" if low == high else f"r={low:g} to {high:g}"
            return shares + (" (suffix)" if self.hide_suffix else ""), high - low

        def vit_options(self) -> dict[str, Any]:
            """As for autoregressive prediction: features are the mean state."""
            return {"class_token": False, "global_pool": "avg", "fc_norm": False}

    views = 1

    def __init__(self, settings: Settings, backbone: VisionTransformer, images: int) -> None:
        super().__init__(settings, backbone, images)
        self.tokenizer = load_tokenizer(settings.center_path)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, backbone.embed_dim))
        self.head = small_head(backbone.embed_dim, self.tokenizer.size)
        # Of the wrapper only the method is kept, so that the backbone is registered once, as timm initialized it.
        self.encode = MaskedVisionTransformerTIMM(
            backbone, self.mask_token, weight_initialization="skip", pos_embed_initialization="skip"
        ).encode

    def layers(self, images: Tensor) -> Tensor:
        """Mean state of each layer, (B, L, D): the last ones are made for prediction."""
        return mean_states(self.backbone, images)

    def forward(self, views: list[Tensor], batch: Batch) -> Out:
        """`row_loss` (B,) of one view of each image, (B, 3, S, S)."""
        mask = batch.mine(self.draw(batch)).to(views[0].device)
        return {"row_loss": masked_mean(self.nll(views[0], self.tokenizer(views[0]), mask), mask)}

    def draw(self, batch: Batch) -> Tensor:
        """Masks of the whole step, (total, T)."""
        masks = suffix_masks if self.settings.hide_suffix else random_masks
        low, high = self.settings.mask_ratio_min, self.settings.mask_ratio_max
        return masks(batch.total, self.settings.tokens, low, high, batch.generator())

    def nll(self, images: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Negative log-likelihood, in nats, of every token given the patches where the mask is False: (B, T)."""
        logits = at_least_float32(self.head(self.encode(images, mask=mask)))
        return F.cross_entropy(logits.mT, tokens, reduction="none")

    def loss(self, out: Out, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the images of all processes."""
        return out["row_loss"].mean(), {}

    def likelihood(self, images: Tensor) -> Tensor:
        """Negative log-likelihood, in nats, of each token after the first given what precedes it: (B, T - 1)."""
        tokens = self.tokenizer(images)
        position = torch.arange(tokens.shape[1], device=images.device)
        masks = [(position >= prefix).expand(len(images), -1) for prefix in position[1:]]
        return torch.stack([self.nll(images, tokens, mask)[:, i] for i, mask in enumerate(masks, start=1)], dim=1)
