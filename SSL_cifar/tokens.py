"""Tokens of image patches by k-means: fit the centres, and say how well the tokens go with classes (TCAS).

`python -m SSL_cifar.tokens --data_set CIFAR10 --k 50 --output_dir out/tokens50` writes centres.safetensors, which the
methods that predict tokens read with --center_path.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightly.models.utils import deactivate_requires_grad, patchify
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from repro.config import CellLabel, load_yaml, parse_config
from repro.errors import UserError, run_main
from repro.files import write_atomic
from repro.images.config import DataSet, ImageFields
from repro.images.data import Images, load_data
from repro.images.loader import Augmented, BadImages, eval_batches, make_loader
from repro.run.run import Run
from repro.seeding import derive_seed
from repro.weights import read_weights
from SSL_cifar import tcas
from SSL_cifar.augment import PRESETS, Augment
from SSL_cifar.backbones import RESNETS, ResNet
from SSL_cifar.methods import load as load_method
from SSL_cifar.patches import PatchSettings

PRELOAD = ("SSL_cifar.tokens",)  # what a process that starts many runs imports once for all of them
CENTRES = "centres.safetensors"
IMAGES_PER_BATCH = 256
VECTORS_PER_STEP = 16_384  # of mini-batch k-means


class Header(NamedTuple):
    """What the centres in a file are of."""

    kind: str  # what is clustered: "pixel", or "SimCLR features"
    size: int  # K
    patch_size: int
    mean: list[float]
    std: list[float]
    token_normalize: bool
    teacher: dict[str, Any] | None = None  # of features: the `ResNet`'s arguments, its stage, mean and std


# -- the tokenizer ---------------------------------------------------------------------------------------------------


class Patches(nn.Module):
    """What is clustered of an image, for each patch in raster order: its pixels, or a network's features.

    Pixels are normalized as the images are. Features are the map of the teacher's stage that has one vector for each
    patch; the teacher is frozen, and its images are normalized as in its own training.
    """

    def __init__(self, header: Header) -> None:
        super().__init__()
        self.header = header
        self.teacher: ResNet | None = None
        if header.teacher is not None:
            self.teacher = ResNet(*(header.teacher[name] for name in ("backbone", "stem", "width")))
            deactivate_requires_grad(self.teacher)
            self.teacher.eval()

    def train(self, mode: bool = True) -> Patches:
        """A tokenizer is not trained: BatchNorm keeps to its running statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Vectors (B, T, d) of normalized images (B, 3, S, S); d is P·P·3, or the channels of the map."""
        header = self.header
        if self.teacher is None or header.teacher is None:
            found = patchify(images, header.patch_size)
        else:
            mean, std, theirs, spread = (
                images.new_tensor(value).view(3, 1, 1)
                for value in (header.mean, header.std, header.teacher["mean"], header.teacher["std"])
            )
            found = self.teacher.maps((images * std + mean - theirs) / spread, header.teacher["stage"])
            found = found.flatten(2).mT  # (B, T, C)
        return F.normalize(found, dim=2) if header.token_normalize else found


class Tokenizer(nn.Module):
    """Images (B, 3, S, S), normalized, to the number of the nearest centre of each patch, (B, T); frozen."""

    def __init__(self, patches: Patches, centres: Tensor) -> None:
        super().__init__()
        self.patches = patches
        self.register_buffer("centres", centres)

    @property
    def size(self) -> int:
        """K, the number of tokens."""
        return len(self.centres)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Token of each patch, (B, T)."""
        with torch.autocast(images.device.type, enabled=False):
            return nearest(self.patches(images.to(self.centres.dtype)), self.centres)


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """Number of the centre (K, d) at the smallest distance from each point (..., d); the first of equals."""
    return (centres.square().sum(dim=1) - 2 * points @ centres.T).argmin(dim=-1)


def statistics(config: FitConfig | PatchSettings) -> tuple[list[float], list[float]]:
    """Mean and standard deviation, by colour, that normalize the images of a data set."""
    augment = Augment(config.augment, config.crop_size, config.data_set, views=1)
    return list(augment.mean), list(augment.std)


def save_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer and what its centres are of."""
    tensors = {name: tensor.contiguous() for name, tensor in tokenizer.state_dict().items()}
    write_atomic(path, save(tensors, {"header": json.dumps(tokenizer.patches.header._asdict())}))


def read_header(path: str | Path) -> Header:
    """What the centres in a file are of; reads nothing else.

    Raises:
        UserError: no such file, or none that `python -m SSL_cifar.tokens` wrote.
    """
    try:
        with safe_open(path, "pt") as file:
            return Header(**json.loads(file.metadata()["header"]))
    except FileNotFoundError as error:
        raise UserError(f"--center_path {path}: no such file: make it by `python -m SSL_cifar.tokens`") from error
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"--center_path {path}: not written by `python -m SSL_cifar.tokens` ({error})") from error


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file; see `read_header` for errors."""
    patches, tensors = Patches(read_header(path)), load_file(path)
    tokenizer = Tokenizer(patches, tensors["centres"])
    tokenizer.load_state_dict(tensors)
    return tokenizer


@dataclass(kw_only=True)
class TokenSettings(PatchSettings):
    """Where a method's tokens come from."""

    center_path: str | None = None
    """centres.safetensors of a finished run of `python -m SSL_cifar.tokens`."""
    token_normalize: bool = False
    """Compare directions: patches and centres at unit length; as when the centres were fitted."""

    def check(self) -> None:
        """Refuse centres that are missing, or of other patches."""
        super().check()
        if self.center_path is None:
            raise ValueError("--center_path is missing: make the file by `python -m SSL_cifar.tokens`")
        header = read_header(self.center_path)
        mean, std = statistics(self)
        if header.patch_size != self.patch_size:
            raise ValueError(
                f"--center_path {self.center_path} is of patches of {header.patch_size} pixels, not of --patch_size "
                f"{self.patch_size}: fit centres of that"
            )
        if (header.mean, header.std) != (mean, std):
            raise ValueError(
                f"--center_path {self.center_path} is of images normalized by mean {header.mean} and std {header.std}, "
                f"--augment {self.augment} of {self.data_set} has {mean} and {std}: fit centres with these two flags"
            )
        if header.token_normalize != self.token_normalize:
            raise ValueError(
                f"--center_path {self.center_path} was fitted with{'' if header.token_normalize else 'out'} "
                f"--token_normalize: do the same here"
            )


# -- fitting ---------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class FitConfig(ImageFields):
    """What to cluster, and into how many tokens."""

    data_set: DataSet = "CIFAR10"
    """As in SSL_cifar.main."""
    k: int = 50
    """Tokens. 50 in ClusterMIM's code for pixels, 100 for features."""
    patch_size: int = 4
    """Side of a patch in pixels; it divides --crop_size."""
    crop_size: int = 32
    """Side of the images in pixels, after a resize and a centre crop."""
    eval_crop_ratio: float = 1.0
    """The resize is to crop_size / this: 0.875 for ImageNet."""
    augment: str = "mae"
    """Preset of the training that will use the tokens: its mean and std normalize the pixels."""
    token_normalize: bool = False
    """Cluster directions: patches and centres at unit length."""
    teacher: str | None = None
    """Cluster features in place of pixels: folder of a finished run of SSL_cifar.main with a ResNet. The centres' file
    will hold its weights."""
    passes: int = 100
    """Most passes of mini-batch k-means; it ends sooner after 10 mini-batches in a row that do not improve the inertia,
    the mean squared distance to the nearest centre."""
    max_patches: int = 1_000_000
    """Most patches that the centres are fitted to, drawn evenly from all images; TCAS counts all."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        self.check_image_fields()
        for name in ("k", "patch_size", "crop_size", "passes", "max_patches"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} must be above 0, got {getattr(self, name)}")
        if not 0 < self.eval_crop_ratio <= 1:
            raise ValueError(f"--eval_crop_ratio must be above 0 and at most 1, got {self.eval_crop_ratio}")
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, got {self.seed}")
        if self.crop_size % self.patch_size:
            raise ValueError(f"--patch_size {self.patch_size} must divide --crop_size {self.crop_size}")
        if self.augment not in PRESETS:
            raise ValueError(f"--augment {self.augment}: choose one of {', '.join(PRESETS)}")

    @property
    def kind(self) -> str:
        """What is clustered."""
        if self.teacher is None:
            return "pixel"
        method = load_method(_settings_of(self.teacher)["method"])
        return f"{method.Settings.TITLE or method.__name__} features"  # ArCL's title is among its knobs

    def label(self) -> CellLabel:
        """Data set, patches, and what is clustered."""
        name = f"{self.kind} k-means" + (" of directions" if self.token_normalize else "")
        return CellLabel(data=self.data_set, model=f"{self.patch_size}x{self.patch_size} patches", method=name)


def build_patches(config: FitConfig) -> Patches:
    """What will be clustered, with the teacher's weights.

    Raises:
        UserError: the teacher cannot be read, is not finished, is no ResNet, or has no vector for each patch.
    """
    header = Header(config.kind, config.k, config.patch_size, *statistics(config), config.token_normalize)
    if config.teacher is None:
        return Patches(header)
    trained = _settings_of(config.teacher)
    theirs = Augment(trained["augment"], config.crop_size, trained["data_set"], views=1)
    shape = {name: trained[name] for name in ("backbone", "stem", "width")}
    network, image = ResNet(*shape.values()).eval(), torch.zeros(1, 3, config.crop_size, config.crop_size)
    sides = [network.maps(image, stage).shape[-1] for stage in range(1, 5)]
    if (grid := config.crop_size // config.patch_size) not in sides:
        raise UserError(
            f"--teacher {config.teacher} has feature maps of {', '.join(map(str, sides))} vectors a side, an image "
            f"{grid} patches: change --patch_size"
        )
    teacher = shape | {"stage": sides.index(grid) + 1, "mean": list(theirs.mean), "std": list(theirs.std)}
    patches = Patches(header._replace(teacher=teacher))
    weights = read_weights(config.teacher)
    backbone = {name.removeprefix("backbone."): t for name, t in weights.items() if name.startswith("backbone.")}
    patches.load_state_dict({f"teacher.{name}": tensor for name, tensor in backbone.items()})
    return patches


def _settings_of(folder: str) -> dict[str, Any]:
    """The settings of a finished run of SSL_cifar.main with a ResNet."""
    settings = load_yaml(Path(folder) / "args.yaml")
    if not isinstance(settings, dict) or settings.get("backbone") not in RESNETS:
        raise UserError(f"--teacher {folder}: not the folder of a run of SSL_cifar.main with a ResNet")
    if not (Path(folder) / "model.safetensors").exists():  # a checkpoint would be read in its place
        raise UserError(f"--teacher {folder}: no model.safetensors there: the run is not finished")
    return settings


class Source:
    """The training images, normalized and without augmentation, in batches (images, class numbers)."""

    def __init__(self, config: FitConfig, images: Images) -> None:
        self.config = config
        self.images = images
        self.bad = BadImages(config.on_bad_image)
        self.augment = Augment(config.augment, config.crop_size, config.data_set, views=1)

    def clean(self, image: Image.Image) -> Tensor:
        """An image as evaluation sees it, (3, S, S)."""
        return self.augment.clean(pil_to_tensor(image)[None], self.config.eval_crop_ratio)[0]

    def batches(self, what: str) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once, in order; bad ones left out."""
        data = Augmented(self.images, self.clean, self.config.crop_size)
        loader = make_loader(
            data, eval_batches(len(data.source), IMAGES_PER_BATCH, 0, 1), self.config, pin_memory=False
        )
        for batch in tqdm(loader, what, unit="batch"):
            self.bad.add(batch.bad)
            yield batch.image[batch.usable], batch.label[batch.usable]


def sample(source: Source, patches: Patches, limit: int, seed: int) -> np.ndarray[Any, Any]:
    """At most `limit` vectors (N, d): as many random ones of each image, less some at random where these are more."""
    share = math.ceil(limit / len(source.images))
    generator = torch.Generator().manual_seed(derive_seed(seed, 0))
    drawn = []
    for images, _ in source.batches("sample"):
        found = patches(images)  # (B, T, d)
        order = torch.rand(found.shape[:2], generator=generator).argsort(dim=1)[:, :share]
        drawn.append(found.gather(1, order.unsqueeze(2).expand(-1, -1, found.shape[2])).flatten(0, 1))
    points = torch.cat(drawn)
    if len(points) > limit:  # the last ones may be a whole class: folders are read class by class
        generator = torch.Generator().manual_seed(derive_seed(seed, 1))
        points = points[torch.randperm(len(points), generator=generator)[:limit]]
    return points.numpy()


def fit(points: np.ndarray[Any, Any], k: int, passes: int, seed: int) -> Tensor:
    """K centres (K, d) of points (N, d) by mini-batch k-means."""
    means = MiniBatchKMeans(k, batch_size=VECTORS_PER_STEP, max_iter=passes, n_init=1, random_state=seed).fit(points)
    return torch.from_numpy(means.cluster_centers_).float()


def main(argv: Sequence[str] | None = None) -> None:
    """Fit, tokenize the training images, compare, and write centres and record."""
    config = parse_config(FitConfig, argv, prog="python -m SSL_cifar.tokens", description=str(__doc__))
    run = Run(config.output_dir, "SSL_cifar.tokens", config, report_to=config.report_to)
    if run.done:
        with run:
            return
    patches = build_patches(config)
    source = Source(config, load_data(config).train)
    available = min(len(source.images) * (config.crop_size // config.patch_size) ** 2, config.max_patches)
    if config.k > available:
        raise UserError(f"--k {config.k} is above the {available} patches to cluster: lower it, or give more images")
    with run:
        points = sample(source, patches, config.max_patches, config.seed)
        started = time.monotonic()
        centres = fit(points, config.k, config.passes, config.seed)
        tokenizer = Tokenizer(patches, F.normalize(centres, dim=1) if config.token_normalize else centres)
        fit_seconds = time.monotonic() - started
        found = [(tokenizer(images), labels) for images, labels in source.batches("tokens")]
        tokens = torch.cat([part for part, _ in found])  # (N, T)
        classes = torch.cat([labels for _, labels in found]).repeat_interleave(tokens.shape[1])
        metrics = tcas.compare(tokens.flatten().numpy(), classes.numpy(), config.k, config.seed)
        per_class = len(classes) // len(classes.unique())
        save_tokenizer(run.folder / CENTRES, tokenizer)
        run.finish(
            metrics, protocol=f"{config.data_set} train split, all patches", selection="the fitted centres",
            patches_per_class=per_class, fit_seconds=fit_seconds, bad_images=list(source.bad.names),
        )  # fmt: skip
        row = {"tokens": config.label().method, "patch_size": config.patch_size, "k": config.k}
        row |= {"patches_per_class": per_class, **metrics}
        print(tcas.table([row]), end="")
        print(f"{run.folder / CENTRES}")


if __name__ == "__main__":
    run_main(main)
