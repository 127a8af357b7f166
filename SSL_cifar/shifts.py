"""Test images that are shifted by one fixed change each: what features that ignore an augmentation should survive."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import adjust_hue, gaussian_blur, rgb_to_grayscale

NOISE = 0.1  # standard deviation, of pixels in [0, 1]


def _noisy(x: Tensor) -> Tensor:
    """The same noise on every image, so that an image's does not depend on its batch."""
    noise = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(0))
    return (x + NOISE * noise.to(x)).clamp(0, 1)


# Each takes images (B, 3, S, S) in [0, 1].
SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rotated": lambda x: x.rot90(1, (2, 3)),
    "grey": lambda x: rgb_to_grayscale(x, 3),
    "blurred": lambda x: gaussian_blur(x, [5, 5], [1.0, 1.0]),
    "hue": lambda x: adjust_hue(x, 0.2),
    "noisy": _noisy,
}
