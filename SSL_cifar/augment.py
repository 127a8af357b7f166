"""Views of images, batch by batch: one `grid_sample` crops and mirrors, one matrix a view changes its colours.

torchvision's v2 transforms draw once for a whole batch. Here every view has draws of its own, all from one generator
of the step, so that a view is a function of (seed, epoch, step, place in the batch) for any number of processes.

Against torchvision image by image: crops are not rounded to whole pixels, hue turns about the grey axis (YIQ) in place
of a detour through HSV, and colours are clamped to [0, 1] once, at the end. Images that are larger than their views are
cropped one by one, with torchvision's antialiasing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

STATISTICS = {  # mean and standard deviation of the training images
    "CIFAR10": ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
    "CIFAR100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
GREY = (0.299, 0.587, 0.114)  # weights of red, green and blue in a grey value, ITU-R 601
ATTEMPTS = 10  # at a crop of the drawn area and shape, before the whole image is taken (torchvision's number)
SOLARIZED_FROM = 128 / 255
BLUR_SIGMA = (0.1, 2.0)  # pixels; SimCLR, MoCo v2
_TO_YIQ = torch.tensor([GREY, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)], dtype=torch.float64)
# Places of a view's uniform draws.
_CROP, _FLIP, _COLOUR, _ORDER = slice(0, 40), 40, slice(41, 45), slice(45, 49)
_JITTERED, _GREYED, _BLURRED, _SIGMA, _SOLARIZED, DRAWS = 49, 50, 51, 52, 53, 54


@dataclass(frozen=True)
class Preset:
    """One recipe; `blur` and `solarize` hold a probability for each view, in turn."""

    scale: tuple[float, float] | None = (0.08, 1.0)  # area of the crop; None: the whole image
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
    jittered: float = 0.8
    grey: float = 0.2
    blur: tuple[float, ...] = (0.0,)
    solarize: tuple[float, ...] = (0.0,)
    normalize: bool = True  # with the data set's mean and standard deviation


PRESETS = {
    # solo-learn's scripts for SimSiam and BYOL, as in the authors' two forks of it
    "solo_cifar": Preset(),
    "solo_cifar_byol": Preset(jitter=(0.4, 0.4, 0.2, 0.1), solarize=(0.0, 0.2)),
    "solo_imagenet": Preset(blur=(0.5,)),
    "solo_imagenet_byol": Preset(jitter=(0.4, 0.4, 0.2, 0.1), blur=(1.0, 0.1), solarize=(0.0, 0.2)),
    # GRAPH-ATTENTION/models/ssl.py of Message-Passing-Contrastive-Learning: strength 0.5 for CIFAR, 1 for ImageNet
    "simclr_cifar": Preset(normalize=False),
    "simclr_imagenet": Preset(jitter=(0.8, 0.8, 0.8, 0.2), blur=(0.5,), normalize=False),
    # imagenet/main_simsiam.py of Rank-Differential-Mechanism, from MoCo v2
    "moco_v2": Preset(scale=(0.2, 1.0), blur=(0.5,)),
    # main_pretrain.py of ClusterMIM, from MAE
    "mae": Preset(scale=(0.2, 1.0), jittered=0.0, grey=0.0),
    "none": Preset(scale=None, flip=0.0, jittered=0.0, grey=0.0),
}


class Augment:
    """Makes `views` views of `size` x `size` pixels of each image."""

    def __init__(self, preset: str, size: int, data_set: str, views: int) -> None:
        self.preset = PRESETS[preset]
        self.size = size
        self.views = views
        mean, std = STATISTICS.get(data_set, (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        self.mean, self.std = (mean, std) if self.preset.normalize else ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def draw(self, seed: int, rows: int) -> Tensor:
        """The uniform draws of a step's images, (rows, V, DRAWS), on the CPU."""
        return torch.rand(rows, self.views, DRAWS, generator=torch.Generator().manual_seed(seed))

    def __call__(self, images: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of images.

        Args:
            images: (B, 3, H, W), uint8.
            draws: (B, V, DRAWS), on the images' device.

        Returns:
            Views (B, V, 3, S, S), normalized; boxes (B, V, 4) as fractions of the image: top, left, height, width;
            whether a view is mirrored, (B, V).
        """
        boxes = crop_boxes(draws[..., _CROP], images.shape[2] / images.shape[3], self.preset.scale)
        flips = draws[..., _FLIP] < self.preset.flip
        views = crop(images, boxes, flips, self.size)  # (V, B, 3, S, S)
        rows = draws.transpose(0, 1).flatten(0, 1)  # (V·B, DRAWS)
        turn = torch.arange(self.views, device=images.device).repeat_interleave(len(images))
        x = self._colour(views.flatten(0, 1), rows)
        x = self._solarize(self._blur(x, rows, turn), rows, turn)
        return self.normalize(x).view(views.shape).transpose(0, 1), boxes, flips

    def clean(self, images: Tensor, ratio: float, change: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """Images (B, 3, H, W), uint8, as evaluation sees them: the centre of the size / `ratio` pixels large image.

        `change` is made to the pixels, in [0, 1], before they are normalized.
        """
        height, width = images.shape[2:]
        side = min(height, width) * ratio
        box = torch.tensor([(1 - side / height) / 2, (1 - side / width) / 2, side / height, side / width])
        boxes = box.to(images.device).expand(len(images), 1, 4)
        whole = crop(images, boxes, boxes.new_zeros(len(images), 1, dtype=torch.bool), self.size)[0]
        return self.normalize(change(whole))

    def normalize(self, x: Tensor) -> Tensor:
        """Subtract the mean, divide by the standard deviation; x (B, 3, S, S) in [0, 1]."""
        mean, std = (x.new_tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        return (x - mean).div_(std)

    def _colour(self, x: Tensor, rows: Tensor) -> Tensor:
        """Jitter in drawn order and greyscale, as one matrix and one offset for each image; clamped to [0, 1]."""
        preset = self.preset
        if preset.jittered == preset.grey == 0:
            return x
        matrix, offset = colour_matrix(x, rows, preset.jitter, rows[:, _JITTERED] < preset.jittered)
        grey = x.new_tensor(GREY).expand(3, 3)
        greyed = (rows[:, _GREYED] < preset.grey).view(-1, 1, 1)
        matrix = torch.where(greyed, grey @ matrix, matrix)
        offset = torch.where(greyed, grey @ offset, offset)
        return torch.baddbmm(offset, matrix, x.flatten(2)).view(x.shape).clamp_(0, 1)

    def _blur(self, x: Tensor, rows: Tensor, turn: Tensor) -> Tensor:
        """Gaussian blur of the views that have drawn it."""
        if not any(self.preset.blur):
            return x
        chosen = rows[:, _BLURRED] < torch.tensor(self.preset.blur, device=x.device)[turn % len(self.preset.blur)]
        if not chosen.any():
            return x
        sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * rows[chosen, _SIGMA]
        reach = min(math.ceil(3 * BLUR_SIGMA[1]), self.size - 1)
        places = torch.arange(-reach, reach + 1, device=x.device)
        kernel = (-0.5 * (places / sigma[:, None]).square()).softmax(dim=1)  # (C, 2·reach + 1)
        kernel = kernel.repeat_interleave(3, 0)[:, None]  # each channel of each image for itself
        images = F.pad(x[chosen], (reach,) * 4, mode="reflect").flatten(0, 1)[None]  # (1, C·3, ., .)
        images = F.conv2d(images, kernel[:, :, None, :], groups=len(kernel))
        images = F.conv2d(images, kernel[:, :, :, None], groups=len(kernel))
        return x.masked_scatter(chosen.view(-1, 1, 1, 1), images)

    def _solarize(self, x: Tensor, rows: Tensor, turn: Tensor) -> Tensor:
        """Bright values inverted, in the views that have drawn it."""
        if not any(self.preset.solarize):
            return x
        share = torch.tensor(self.preset.solarize, device=x.device)[turn % len(self.preset.solarize)]
        chosen = (rows[:, _SOLARIZED] < share).view(-1, 1, 1, 1)
        return torch.where(chosen & (x >= SOLARIZED_FROM), 1 - x, x)


def crop_boxes(draws: Tensor, shape: float, scale: tuple[float, float] | None) -> Tensor:
    """Random resized crops as torchvision draws them: area uniform in `scale`, log of the aspect ratio uniform.

    Args:
        draws: (..., 4 · ATTEMPTS) uniform.
        shape: height / width of the image.
        scale: smallest and largest share of the image's area; None takes the whole image.

    Returns:
        (..., 4) top, left, height, width as fractions of the image: of the first attempt that fits into it. Where none
        does, the largest crop in the middle whose aspect ratio is allowed.
    """
    widest = math.log(4 / 3)
    if scale is None:
        return draws.new_tensor([0.0, 0.0, 1.0, 1.0]).expand(*draws.shape[:-1], 4)
    draws = draws.unflatten(-1, (ATTEMPTS, 4))
    area = scale[0] + (scale[1] - scale[0]) * draws[..., 0]
    aspect = ((2 * draws[..., 1] - 1) * widest).exp() * shape  # width / height, in fractions of the image
    height, width = (area / aspect).sqrt(), (area * aspect).sqrt()
    fits = (height <= 1) & (width <= 1)
    boxes = torch.stack([(1 - height) * draws[..., 2], (1 - width) * draws[..., 3], height, width], -1)
    first = fits.int().argmax(dim=-1)[..., None, None].expand(*fits.shape[:-1], 1, 4)
    ratio = min(max(1 / shape, 3 / 4), 4 / 3) * shape  # of the middle crop, in fractions
    middle = (min(1.0, 1 / ratio), min(1.0, ratio))
    whole = draws.new_tensor([(1 - middle[0]) / 2, (1 - middle[1]) / 2, *middle])
    return torch.where(fits.any(dim=-1, keepdim=True), boxes.gather(-2, first).squeeze(-2), whole)


def crop(images: Tensor, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    """Cut `boxes` (B, V, 4) out of images (B, 3, H, W), uint8, mirror and resize: (V, B, 3, size, size) in [0, 1]."""
    if max(images.shape[2:]) > size:
        return _crop_antialiased(images, boxes, flips, size)
    top, left, tall, wide = boxes.transpose(0, 1)[..., None].unbind(-2)  # (V, B, 1)
    places = (torch.arange(size, device=images.device) + 0.5) / size
    across = torch.where(flips.T[..., None], 1 - places, places)
    x = 2 * (left + wide * across) - 1  # (V, B, size), -1 and 1 at the image's edges
    y = 2 * (top + tall * places) - 1
    pixels = images.to(x.dtype).div_(255)
    views = x.new_empty(*x.shape[:2], 3, size, size)
    for view, across, down in zip(views, x, y, strict=True):
        grid = torch.stack(torch.broadcast_tensors(across[:, None, :], down[:, :, None]), -1)  # (B, size, size, 2)
        sampled = F.grid_sample(pixels, grid, mode="bicubic", padding_mode="border", align_corners=False)
        torch.clamp(sampled, 0, 1, out=view)
    return views


def _crop_antialiased(images: Tensor, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    """As `crop`, for images that are larger than their views: whole pixels, torchvision's antialiased bicubic."""
    scale = torch.tensor([*images.shape[2:]] * 2)
    pixels = (boxes.transpose(0, 1).cpu() * scale).round().int()
    views = [
        resized_crop(
            image, top, left, max(tall, 1), max(wide, 1), [size, size], InterpolationMode.BICUBIC, antialias=True
        )
        for rows in pixels.tolist()
        for image, (top, left, tall, wide) in zip(images, rows, strict=True)
    ]
    stacked = torch.stack(views).unflatten(0, pixels.shape[:2]).to(boxes.dtype).div_(255)
    return torch.where(flips.T[..., None, None, None], stacked.flip(-1), stacked)


def colour_matrix(
    x: Tensor, rows: Tensor, strength: tuple[float, float, float, float], jittered: Tensor
) -> tuple[Tensor, Tensor]:
    """Colour jitter as matrices (N, 3, 3) and offsets (N, 3, 1) for images x (N, 3, S, S) in [0, 1].

    Brightness, contrast, saturation and hue, in drawn order, by factors that are uniform in 1 ± strength (hue: a turn
    by ± strength of a full circle); the identity where not `jittered`. Contrast keeps the mean grey value that the
    image has by then.
    """
    n = len(x)
    factors = 1 + (2 * rows[:, _COLOUR] - 1) * x.new_tensor(strength)  # (N, 4)
    brightness, contrast, saturation = factors[:, :3].clamp(min=0).unbind(1)
    eye, grey = torch.eye(3, device=x.device), x.new_tensor(GREY)
    turn = -2 * math.pi * (factors[:, 3] - 1)  # in YIQ red, yellow and green follow one another clockwise
    rotation = torch.zeros(n, 3, 3, device=x.device)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = turn.cos()
    rotation[:, 1, 2], rotation[:, 2, 1] = -turn.sin(), turn.sin()
    to_yiq = _TO_YIQ.to(x)
    steps = torch.stack(
        [
            brightness.view(-1, 1, 1) * eye,
            contrast.view(-1, 1, 1) * eye,
            saturation.view(-1, 1, 1) * eye + (1 - saturation.view(-1, 1, 1)) * grey.expand(3, 3),
            _TO_YIQ.inverse().to(x) @ rotation @ to_yiq,
        ]
    )  # (4, N, 3, 3)
    mean = x.mean(dim=(2, 3))[..., None]  # (N, 3, 1)
    matrix, offset = eye.expand(n, 3, 3), x.new_zeros(n, 3, 1)
    every = torch.arange(n, device=x.device)
    for kind in rows[:, _ORDER].argsort(dim=1).unbind(1):  # (N,): the step that each image takes now
        now = grey @ (matrix @ mean + offset)  # (N, 1): mean grey value
        step = steps[kind, every]
        kept = torch.where(kind == 1, (1 - contrast) * now[:, 0], 0.0).view(-1, 1, 1)
        matrix, offset = step @ matrix, step @ offset + kept
    jittered = jittered.view(-1, 1, 1)
    return torch.where(jittered, matrix, eye), torch.where(jittered, offset, 0.0)
