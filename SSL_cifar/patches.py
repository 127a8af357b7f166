"""What methods that work on an image's patches share: their number, and which of them are hidden."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from SSL_cifar.config import Config


@dataclass(kw_only=True)
class PatchSettings(Config):
    """Methods that work on patches."""

    NEEDS_VIT: ClassVar[bool] = True

    @property
    def tokens(self) -> int:
        """T, the number of an image's patches."""
        return (self.crop_size // self.patch_size) ** 2


def small_head(width: int, outputs: int) -> nn.Linear:
    """A last layer that starts near 0, so that the first loss is that of a uniform guess."""
    layer = nn.Linear(width, outputs)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def mean_states(vit: VisionTransformer, images: Tensor, **options: Any) -> Tensor:
    """Mean over the patches after each block and the final norm, (B, L, D), of images (B, 3, S, S)."""
    found = vit.forward_intermediates(images, norm=True, output_fmt="NLC", intermediates_only=True, **options)
    return torch.stack([states.mean(dim=1) for states in found], dim=1)


def at_least_float32(x: Tensor) -> Tensor:
    """Autocast's results in float32, for a loss; others as they are."""
    return x if x.dtype == torch.float64 else x.float()


def check_ratio(flag: str, ratio: float, tokens: int) -> None:
    """Refuse a share of masked tokens that hides all of them, or none.

    Raises:
        ValueError: the message names the flag, and what it may be.
    """
    if not 0 < ratio < 1 or not 0 < masked_count(ratio, tokens) < tokens:
        raise ValueError(
            f"--{flag} {ratio:g} hides {'none' if ratio < 0.5 else 'all'} of {tokens} tokens: give a share between "
            f"{1 / tokens:.3g} and {1 - 1 / tokens:.3g}"
        )


def masked_count(ratio: float, tokens: int) -> int:
    """How many of the tokens are hidden: the nearest whole number."""
    return round(ratio * tokens)


def random_masks(rows: int, tokens: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Masks (rows, tokens), True for hidden: each row a random set, its share drawn from U(low, high), at least one.

    With low = high all rows hide the same number.
    """
    return _smallest(torch.rand(rows, tokens, generator=generator), _counts(rows, tokens, low, high, generator))


def suffix_masks(rows: int, tokens: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """As `random_masks`, but what is hidden are the last tokens: a prefix is seen."""
    torch.rand(rows, tokens, generator=generator)  # the shares are those of random_masks
    order = torch.arange(tokens, 0, -1.0).expand(rows, tokens)
    return _smallest(order, _counts(rows, tokens, low, high, generator))


def _counts(rows: int, tokens: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    ratios = low + (high - low) * torch.rand(rows, dtype=torch.float64, generator=generator)
    return (ratios * tokens).round().long().clamp(1, tokens)


def _smallest(values: Tensor, counts: Tensor) -> Tensor:
    """True at the `counts` smallest values of each row."""
    return values.argsort(dim=1).argsort(dim=1) < counts.unsqueeze(1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (B, T) over the hidden tokens of each row: (B,)."""
    return (values * mask).sum(dim=1) / mask.sum(dim=1)
