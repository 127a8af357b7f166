"""Batches whose content is a function of (seed, epoch, step) alone.

Every random draw has a seed of its own, derived from where it is used. No state passes from one batch to the next:
the number of workers, of processes and of interruptions does not change what is trained on, and a resumed run needs no
generator state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from timm.data import auto_augment, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Sampler
from torchvision import transforms as T

from repro.errors import UserError
from repro.images.loader import SampleRef
from repro.seeding import derive_seed
from ViT_imagenet.config import Config

REPEATS = 3  # of repeated augmentation, as in DeiT
SMALL_IMAGE = 64  # up to this side a random crop of the padded image replaces the random resized crop


class TrainBatches(Sampler[list[SampleRef]]):
    """The micro-batches of one process for one epoch, from `start_step` on.

    A step's effective batch of G images is cut into G / batch_size shares such that position p and its mirror image
    G - 1 - p lie in the same share, at mirrored places: Mixup, which pairs an image with its mirror, then makes the
    same pairs for any number of processes and accumulated micro-batches.
    """

    def __init__(self, length: int, config: Config, rank: int, world: int) -> None:
        self.config = config
        self.rank = rank
        self.world = world
        micro = config.batch_size * world
        self.effective = config.effective_batch or micro * config.accumulate
        if self.effective % micro:
            raise UserError(
                f"--effective_batch {self.effective} is not a multiple of --batch_size {config.batch_size} x {world} "
                "processes: change one of them"
            )
        self.accumulate = self.effective // micro
        self.epoch = 0
        self.start_step = 0
        self._repeated = RepeatAugSampler(
            range(length), num_replicas=1, rank=0, num_repeats=REPEATS if config.repeated_aug else 1,
            selected_round=256 if config.repeated_aug else 0,
        )  # fmt: skip
        self.steps = len(self._repeated) // self.effective
        if self.steps == 0:
            raise UserError(f"{length} training images do not fill one effective batch of {self.effective}")

    def share(self, part: int) -> list[int]:
        """Positions within the effective batch of share number `part`, ascending."""
        b, g = self.config.batch_size, self.effective
        if b % 2:
            return list(range(part * b, (part + 1) * b))
        half = range(part * b // 2, (part + 1) * b // 2)
        return [*half, *(g - 1 - p for p in reversed(half))]

    def __len__(self) -> int:
        return (self.steps - self.start_step) * self.accumulate

    def __iter__(self) -> Iterator[list[SampleRef]]:
        self._repeated.set_epoch(derive_seed(self.config.seed, self.epoch, 0))
        order = list(self._repeated)[: self.steps * self.effective]
        seeds = np.random.SeedSequence((self.config.seed, self.epoch, 1)).generate_state(len(order))
        for step in range(self.start_step, self.steps):
            for micro in range(self.accumulate):
                positions = [step * self.effective + p for p in self.share(micro * self.world + self.rank)]
                yield [SampleRef(order[p], int(seeds[p])) for p in positions]


def train_transform(config: Config, size: int) -> T.Compose:
    """The training transform of timm, PIL image to normalized (3, size, size).

    Raises:
        UserError: timm has no such `--aa`.
    """
    three = config.three_augment  # DeiT III's (Touvron et al., ECCV 2022)
    policy = "3a" if three else config.aa
    try:
        transform: T.Compose = create_transform(
            input_size=size,
            is_training=True,
            color_jitter=config.color_jitter or None,  # None leaves the transform out
            auto_augment=None if policy == "none" else policy,
            interpolation="bicubic" if three else config.train_interpolation,
            re_prob=0.0 if three else config.reprob,
            re_mode=config.remode,
            re_count=config.recount,
        )
    except (AssertionError, ValueError) as error:
        raise UserError(f"--aa {config.aa}: timm has no such policy ({error}); `none` for none") from error
    for part in transform.transforms:
        _keep_a_bit(part)
    if config.src:
        whole = T.Resize(size, T.InterpolationMode.BICUBIC)
        transform.transforms[0] = T.Compose([whole, T.RandomCrop(size, padding=4, padding_mode="reflect")])
    elif size <= SMALL_IMAGE and not three:  # a random resized crop would leave little of so small an image
        transform.transforms[0] = T.Compose([T.Resize((size, size)), T.RandomCrop(size, padding=size // 8)])
    return transform


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    return ImageOps.posterize(image, max(bits, 1)) if bits < 8 else image


def _keep_a_bit(transform: Any) -> None:
    """Give every "posterize" of a RandAugment, AutoAugment or AugMix at least one bit.

    At the largest magnitude timm asks Pillow for 0 bits, which today's Pillow refuses with an exception.
    """
    found = [*getattr(transform, "ops", []), *(op for policy in getattr(transform, "policy", []) for op in policy)]
    for op in found:
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = _posterize


def eval_transform(config: Config, size: int) -> T.Compose:
    """Resize, centre crop, normalize."""
    return create_transform(input_size=size, interpolation="bicubic", crop_pct=config.eval_crop_ratio)
