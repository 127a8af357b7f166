"""Loaders of images by number: decoding and transforming in worker processes, and what becomes of bad images."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from repro.errors import UserError
from repro.images.config import ImageFields
from repro.images.data import BadImageError, Images
from repro.seeding import seed_everything

_MAX_REPLACEMENTS = 100


class SampleRef(NamedTuple):
    """One sample to fetch: the image's number, and the seed of its augmentation (None in evaluation)."""

    index: int  # type: ignore[assignment]  # a tuple's own method of this name is not needed
    seed: int | None


class Sample(NamedTuple):
    """One image ready for the model; a batch has the same fields, collated."""

    image: Any  # (3, H, W), or what `Augmented.prepare` makes of it
    label: int
    bad: str  # names of the images that could not be decoded, one per line; usually ""
    usable: bool  # False: nothing to count (evaluation of a bad image)
    number: int  # the image's: not the one asked for where that was bad


class Augmented(Dataset[Sample]):
    """Decodes and transforms image `ref.index`, in the worker process; `transform` gives (3, size, size)."""

    def __init__(self, source: Images, transform: Callable[[Image.Image], Tensor], size: int) -> None:
        self.source = source
        self.transform = transform
        self.blank = torch.zeros(3, size, size)  # in evaluation, in the place of an image that cannot be decoded

    def prepare(self, image: Image.Image, ref: SampleRef) -> Any:
        """What the model gets to see of an image."""
        if ref.seed is not None:
            seed_everything(ref.seed)  # timm's and torchvision's transforms draw from all three generators
        return self.transform(image)

    def __getitem__(self, ref: SampleRef) -> Sample:
        index, bad = ref.index, []
        for _ in range(_MAX_REPLACEMENTS):
            try:
                image, label = self.source[index]
            except BadImageError as error:
                bad.append(str(error))
                if ref.seed is None:
                    return Sample(self.blank, 0, bad[0], False, index)
                index = (index + 1) % len(self.source)  # type: ignore[arg-type]
                continue
            return Sample(self.prepare(image, ref), label, "\n".join(bad), True, index)
        raise UserError(f"{_MAX_REPLACEMENTS} images in a row cannot be decoded, the last one {bad[-1]}")


def eval_batches(length: int, batch_size: int, rank: int, world: int) -> list[list[SampleRef]]:
    """Every image once: process `rank` of `world` takes each world-th."""
    mine = [SampleRef(index, None) for index in range(rank, length, world)]
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]


def make_loader(
    dataset: Augmented, batches: Iterable[list[SampleRef]], config: ImageFields, *, pin_memory: bool
) -> DataLoader[Sample]:
    """A loader of collated `Sample`s, decoded and augmented in `config.num_workers` processes."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=config.num_workers,
        pin_memory=pin_memory,
        persistent_workers=config.num_workers > 0,
    )


class BadImages:
    """The images that could not be decoded so far: the first one ends the run, or all are named once and counted."""

    def __init__(self, policy: str, names: Iterable[str] = ()) -> None:
        self.policy = policy
        self.names = dict.fromkeys(names)

    def add(self, samples: list[str]) -> None:
        """Take note of a batch's bad images, `Sample.bad` of each of its samples.

        Raises:
            UserError: the policy is to fail.
        """
        for name in filter(None, "\n".join(samples).split("\n")):
            if self.policy == "fail":
                raise UserError(f"image cannot be decoded: {name}; repair it, or give --on-bad-image skip")
            if name not in self.names:
                self.names[name] = None
                print(f"warning: bad image skipped: {name}", file=sys.stderr, flush=True)
