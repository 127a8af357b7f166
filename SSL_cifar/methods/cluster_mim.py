"""ClusterMIM: a masked autoencoder that classifies the cluster of each hidden patch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from SSL_cifar.methods.mae import MAE
from SSL_cifar.tokens import TokenSettings, load_tokenizer, read_header


class ClusterMIM(MAE):
    r"""`MAE` with K classes in place of pixels: the k-means cluster of each hidden patch (`SSL_cifar.tokens`).

    .. math:: L = \frac 1{|M|} \sum_{i \in M} \mathrm{CE}_\varepsilon(o_i, t_i)

    with o_i the K logits of patch i, t_i the nearest centre of the same augmented, unmasked image, and ε the label
    smoothing. From "On the Role of Discrete Tokenization in Visual Representation Learning", Du, Wang, Wang, ICLR 2024.
    """

    @dataclass(kw_only=True)
    class Settings(TokenSettings, MAE.Settings):
        """ClusterMIM."""

        TITLE: ClassVar[str] = "ClusterMIM"
        ORDER: ClassVar[float] = 31

        label_smoothing: float = 0.0
        """ε of the cross-entropy."""

        def check(self) -> None:
            """Refuse what makes no sense."""
            super().check()
            if self.norm_pix_loss:
                raise ValueError("--norm_pix_loss is a loss on pixels: leave it out, ClusterMIM predicts tokens")
            if not 0 <= self.label_smoothing < 1:
                raise ValueError(f"--label_smoothing must be at least 0 and below 1, got {self.label_smoothing}")

        def knob(self) -> tuple[str, float]:
            """The tokens and their number."""
            header = read_header(self.center_path)
            return f"{header.kind} K={header.size}", header.size

    def __init__(self, settings: Settings, backbone: VisionTransformer, images: int) -> None:
        tokenizer = load_tokenizer(settings.center_path)
        self.classes = tokenizer.size
        super().__init__(settings, backbone, images)
        self.tokenizer = tokenizer

    def outputs(self) -> int:
        """Width of the prediction for one patch: its logits."""
        return self.classes

    def patch_loss(self, predicted: Tensor, images: Tensor) -> Tensor:
        """Cross-entropy of each patch, (B, T), in nats; logits (B, T, K)."""
        tokens = self.tokenizer(images)
        smoothing = self.settings.label_smoothing
        return F.cross_entropy(predicted.mT, tokens, reduction="none", label_smoothing=smoothing)
