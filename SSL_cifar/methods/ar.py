"""Autoregressive prediction of image tokens in raster order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from SSL_cifar.methods.base import Batch, Method, Out
from SSL_cifar.patches import at_least_float32, mean_states, small_head
from SSL_cifar.tokens import TokenSettings, load_tokenizer


class AR(Method):
    r"""Each state of a causal transformer predicts the token of the next patch.

    .. math:: L = -\frac 1{T-1} \sum_{s=1}^{T-1} \log P(y_{s+1} | c_s)

    with y the tokens of the T patches and c_s the state after patches 1 to s.
    """

    @dataclass(kw_only=True)
    class Settings(TokenSettings):
        """Autoregressive prediction."""

        TITLE: ClassVar[str] = "AR"
        ORDER: ClassVar[float] = 40

        def vit_options(self) -> dict[str, Any]:
            """No class token, which would see nothing of the image; features are the mean state."""
            return {"class_token": False, "global_pool": "avg", "fc_norm": False}

    views = 1
    offsets = 1

    def __init__(self, settings: Settings, backbone: VisionTransformer, images: int) -> None:
        super().__init__(settings, backbone, images)
        self.tokenizer = load_tokenizer(settings.center_path)
        heads = [small_head(backbone.embed_dim, self.tokenizer.size) for _ in range(self.offsets)]
        self.heads = nn.ModuleList(heads)  # one for each offset

    def states(self, images: Tensor) -> Tensor:
        """State after each patch, (B, T, D): it has seen no later one."""
        states: Tensor = self.backbone.forward_features(images, is_causal=True)
        return states

    def features(self, images: Tensor) -> Tensor:
        """Mean state, (B, D)."""
        return self.states(images).mean(dim=1)

    def layers(self, images: Tensor) -> Tensor:
        """Mean state of each layer, (B, L, D): the last ones are made for prediction."""
        return mean_states(self.backbone, images, is_causal=True)

    def forward(self, views: list[Tensor], batch: Batch) -> Out:
        """`row_loss` (B,) of one view of each image, (B, 3, S, S): the mean over offsets and positions."""
        states, tokens = self.states(views[0]), self.tokenizer(views[0])
        losses = [self.nll(states, tokens, offset).mean(dim=1) for offset in range(1, self.offsets + 1)]
        weights = batch.mine(self.offset_weights(batch)).to(states.device)
        return {"row_loss": (torch.stack(losses, dim=1) * weights).sum(dim=1)}

    def offset_weights(self, batch: Batch) -> Tensor:
        """Weight of each offset in each image of the step, (total, K)."""
        return torch.full((batch.total, self.offsets), 1 / self.offsets)

    def nll(self, states: Tensor, tokens: Tensor, offset: int = 1) -> Tensor:
        """Negative log-likelihood, in nats, of the token `offset` patches ahead: (B, T - offset)."""
        logits = at_least_float32(self.heads[offset - 1](states[:, :-offset]))
        return F.cross_entropy(logits.mT, tokens[:, offset:], reduction="none")

    def loss(self, out: Out, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the images of all processes."""
        return out["row_loss"].mean(), {}

    def likelihood(self, images: Tensor) -> Tensor:
        """Negative log-likelihood, in nats, of each token after the first given what precedes it: (B, T - 1)."""
        return self.nll(self.states(images), self.tokenizer(images))
