"""The batches of an epoch: which images, in which order, and their views, as a function of (seed, epoch, step) alone.

Small images are kept in memory and augmented batch by batch (`--cache`); others are decoded and augmented by workers.
Both draw the same views.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Sampler
from torchvision.transforms.v2.functional import pil_to_tensor

from repro.errors import UserError
from repro.images.data import BadImageError, Images
from repro.images.loader import Augmented, BadImages, make_loader
from repro.seeding import derive_seed
from SSL_cifar.augment import Augment
from SSL_cifar.config import Config
from SSL_cifar.methods.base import Batch

ORDER, VIEWS, STEP = 0, 1, 2  # what a derived seed is for


class ViewRef(NamedTuple):
    """One image to make views of: its number, and its row in the draws of a step (seed None: in evaluation)."""

    index: int
    seed: int | None
    row: int


class Pixels:
    """Images of one size in memory, decoded once; bad ones are left out.

    Attributes:
        images: (n, 3, H, W), uint8.
        labels: (n,).
        numbers: (n,), the images' numbers in the data set.
        places: for each number in the data set the image's row above; a bad one's is that of the next good image.

    Raises:
        UserError: the images are of several sizes, or none can be decoded.
    """

    def __init__(self, source: Images, bad_images: BadImages) -> None:
        images, labels, numbers = [], [], []
        for number in range(total := len(source)):  # type: ignore[arg-type]
            try:
                image, label = source[number]
            except BadImageError as error:
                bad_images.add([str(error)])
                continue
            images.append(pil_to_tensor(image))
            labels.append(label)
            numbers.append(number)
            if images[-1].shape != images[0].shape:
                raise UserError("--cache keeps images of one size, and these are of several: give --no_cache")
        if not images:
            raise UserError(f"none of {total} images can be decoded")
        self.images, self.labels, self.numbers = torch.stack(images), torch.tensor(labels), torch.tensor(numbers)
        self.places = torch.searchsorted(self.numbers, torch.arange(total)) % len(numbers)

    def __len__(self) -> int:
        return len(self.labels)


class _Views(Augmented):
    """Decodes an image and makes its views, in the worker process."""

    def __init__(self, source: Images, augment: Augment, rows: int) -> None:
        super().__init__(source, pil_to_tensor, augment.size)
        self.augment = augment
        self.rows = rows
        self._drawn: tuple[int, Tensor] | None = None  # the last step's draws: a worker makes them once

    def prepare(self, image: Image.Image, ref: ViewRef) -> tuple[Tensor, ...]:  # type: ignore[override]
        if self._drawn is None or self._drawn[0] != ref.seed:
            self._drawn = ref.seed, self.augment.draw(ref.seed, self.rows)
        draws = self._drawn[1][ref.row : ref.row + 1]
        return tuple(part[0] for part in self.augment(self.transform(image)[None], draws))


class _Refs(Sampler[list[ViewRef]]):
    """This process's images of each step of an epoch, for the loader; `batches` says which epoch."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[ViewRef]]:
        b = self.batches
        order = b.order(b.current_epoch).tolist()
        for step in range(b.start_step, b.steps):
            seed = derive_seed(b.config.seed, b.current_epoch, VIEWS, step)
            rows = range(b.first, b.first + b.share)
            yield [ViewRef(order[step * b.config.batch_size + row], seed, row) for row in rows]


class Batches:
    """Training batches of one process: rank r of w takes rows r·B/w .. of every step's B images.

    Args:
        source: training images.
        config: settings of the run.
        augment: makes the views.
        bad_images: gets to know what cannot be decoded.
        rank: number of this process.
        world: how many there are.
        device: where views are wanted; images in memory are augmented there.

    Raises:
        UserError: a batch that the processes cannot share, or that the images do not fill.
    """

    def __init__(
        self, source: Images, config: Config, augment: Augment, bad_images: BadImages, *, rank: int, world: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.config, self.augment, self.bad_images, self.device = config, augment, bad_images, device
        self.images = len(source)  # type: ignore[arg-type]
        self.steps = self.images // config.batch_size
        if config.batch_size % world:
            raise UserError(f"--batch_size {config.batch_size} is not a multiple of the {world} processes")
        if self.steps == 0:
            raise UserError(f"{self.images} training images do not fill one batch of {config.batch_size}")
        self.share = config.batch_size // world
        if self.share < 2:
            raise UserError(f"--batch_size {config.batch_size} leaves each of {world} processes one image: at least 2")
        self.first = rank * self.share
        self.current_epoch = self.start_step = 0
        self.pixels = self._loader = None
        if config.cache:
            self.pixels = Pixels(source, bad_images)
        else:
            self._loader = make_loader(
                _Views(source, augment, config.batch_size), _Refs(self), config, pin_memory=device.type == "cuda"
            )

    def order(self, epoch: int) -> Tensor:
        """The images in the order of an epoch."""
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, epoch, ORDER))
        return torch.randperm(self.images, generator=generator)

    def epoch(self, epoch: int, start_step: int) -> Iterator[tuple[list[Tensor], Batch]]:
        """(views, V tensors (B, 3, S, S); what is known of them) for each step from `start_step` on."""
        self.current_epoch, self.start_step = epoch, start_step
        for step, (index, views, boxes, flips) in enumerate(self._samples(), start_step):
            seed = derive_seed(self.config.seed, epoch, STEP, step)
            index, views, boxes, flips = (t.to(self.device, non_blocking=True) for t in (index, views, boxes, flips))
            yield list(views.unbind(1)), Batch(index, boxes, flips, seed, self.first, self.config.batch_size)

    def _samples(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        if self._loader is not None:
            for sample in self._loader:
                self.bad_images.add(sample.bad)
                yield sample.number, *sample.image
            return
        assert self.pixels is not None
        order = self.order(self.current_epoch)
        for step in range(self.start_step, self.steps):
            draws = self.augment.draw(
                derive_seed(self.config.seed, self.current_epoch, VIEWS, step), self.config.batch_size
            )[self.first : self.first + self.share]
            rows = self.pixels.places[order[step * self.config.batch_size + self.first :][: self.share]]
            images = self.pixels.images[rows].to(self.device)
            yield self.pixels.numbers[rows], *self.augment(images, draws.to(self.device))
