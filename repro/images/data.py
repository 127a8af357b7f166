"""The image data sets: where they are, what their classes are, and their images by number."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torchvision.datasets as tv
from PIL import Image
from torch.utils.data import Dataset, Subset

from repro.errors import UserError
from repro.holdout import split_off
from repro.images.config import ImageFields

# Folder of each data set below --data_root; the first that exists is taken.
PLACES = {
    "IMNET": ("images/imagenet", "imagenet"),
    "IMNET100": ("images/imagenet100", "imagenet100", "images/imagenet", "imagenet"),
    "CIFAR10": ("images/cifar10", "cifar10"),
    "CIFAR100": ("images/cifar100", "cifar100"),
    "TINY": ("images/tiny_imagenet", "images/tiny_imagenet_100", "tiny-imagenet-200"),
    "FOLDER": (),
}
EVALUATION_SPLITS = ("val", "validation", "test")
HELD_OUT = "held-out"  # the evaluation split of --hold_out
# ImageNet-100 as in "Contrastive Multiview Coding" (Tian, Krishnan, Isola): imagenet100.txt of HobbitLong/CMC.
# ContraNorm's authors use the same classes in PKU-ML/Message-Passing-Contrastive-Learning.
IMAGENET100 = Path(__file__).with_name("imagenet100_classes.txt")
IMAGENET100_SHA256 = "5ee5db69d488bb799a286d8e181801c3d02798776c1ce9203e5450f64e086e07"
WORDNET_ID = re.compile(r"n\d{8}")
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class BadImageError(Exception):
    """An image that cannot be decoded; the message names it."""


# Images by number, decoded when asked for: (RGB image, class number), or a BadImageError.
Images = Dataset[tuple[Image.Image, int]]


def decode(data: Any, name: str | None = None) -> Image.Image:
    """The image in a file or buffer as RGB, whether it is stored as greyscale, palette or CMYK.

    Raises:
        BadImageError: it cannot be decoded.
    """
    try:
        with Image.open(data) as image:
            return image.convert("RGB")
    except _DECODE_ERRORS as error:
        raise BadImageError(f"{name or data} ({error})") from error


class Files(Images):
    """Images in files."""

    def __init__(self, samples: Sequence[tuple[str, int]], classes: list[str]) -> None:
        self.classes = classes
        self._paths = np.array([os.fsencode(path) for path, _ in samples])  # one block that workers share
        self._labels = np.array([label for _, label in samples])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return decode(os.fsdecode(self._paths[index])), int(self._labels[index])


class Parquet(Images):
    """Parquet files in the Hugging Face image schema: a column of encoded images and one of class labels."""

    def __init__(self, files: list[Path]) -> None:
        self._name = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
        try:
            table = datasets.load_dataset("parquet", data_files=[str(f) for f in files], split="train")
        except Exception as error:  # pyarrow and datasets raise many types for a damaged file
            reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"{files[0].parent}/{self._name}: not readable as parquet ({reason[0]}): fetch the original again"
            ) from error
        features = table.features
        images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        if len(images) != 1 or len(labels) != 1:
            raise UserError(
                f"{files[0]}: needs one Image and one ClassLabel column, has {dict(features)}: not an image data set"
            )
        self.classes: list[str] = list(features[labels[0]].names)
        if any(label is None or not 0 <= label < len(self.classes) for label in table[labels[0]]):
            raise UserError(f"{self._name}: rows without a label, or with one outside 0..{len(self.classes) - 1}")
        table = table.cast_column(images[0], datasets.Image(decode=False))
        self._rows = table.select_columns([*images, *labels]).rename_columns({images[0]: "image", labels[0]: "label"})

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        row = self._rows[index]
        return decode(io.BytesIO(row["image"]["bytes"] or b""), f"{self._name}, row {index}"), row["label"]


class Cached(Images):
    """Every image decoded once and kept, three bytes a pixel, which forked workers share; bad ones as their error."""

    def __init__(self, source: Images) -> None:
        self._samples: list[tuple[np.ndarray, int] | BadImageError] = []
        for index in range(len(source)):  # type: ignore[arg-type]
            try:
                image, label = source[index]
                self._samples.append((np.asarray(image), label))  # (H, W, 3)
            except BadImageError as error:
                self._samples.append(error)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        sample = self._samples[index]
        if isinstance(sample, BadImageError):
            raise sample
        return Image.fromarray(sample[0]), sample[1]


@dataclass
class ImageData:
    """The two halves of a data set; `classes` are in the order of their numbers."""

    train: Images
    test: Images
    classes: list[str]
    name: str
    test_split: str


def load_data(config: ImageFields, *, hold_out: float | None = None) -> ImageData:
    """The data set that the config names, or a UserError that says what is wrong with it.

    With `hold_out` that share of the training images is evaluated in place of the test images.
    """
    name = config.data_set
    folder = _folder(config, name)
    test_split, train, test = _read(config, name, folder)
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(
            f"{folder}: train has {len(train.classes)} classes, {test_split} {len(test.classes)}; see {odd[:3]}"
        )
    if name == "IMNET100" and len(train.classes) != 100:
        raise UserError(f"{folder} has {len(train.classes)} classes, IMNET100 has 100: give another --data-path")
    classes, train = train.classes, _limit(train, config.max_train_samples)
    if hold_out is not None:
        test_split = HELD_OUT
        train, test = (Subset(train, part) for part in split_off(len(train), hold_out))  # type: ignore[arg-type]
    test = _limit(test, config.max_test_samples)
    if config.cache:
        train, test = Cached(train), Cached(test)
    return ImageData(train, test, classes, name, test_split)


def _folder(config: ImageFields, name: str) -> Path:
    if config.data_path is not None:
        config.check_folders()
        return Path(config.data_path)
    places = [Path(config.data_root) / place for place in PLACES[name]]
    for place in places:
        if place.is_dir():
            return place
    if config.download and places:
        return places[0]
    tried = ", ".join(map(str, places)) or "nothing: this data set has no usual place"
    raise UserError(f"no data for --data_set {name} (looked at {tried}): give --data-path, or --data_root")


def _read(config: ImageFields, name: str, folder: Path) -> tuple[str, Any, Any]:
    """(name of the evaluation split, training images, evaluation images), whatever the layout of the folder."""
    parquet = {split: sorted(folder.glob(f"{split}-*.parquet")) for split in ("train", *EVALUATION_SPLITS)}
    if parquet["train"]:
        split = next((s for s in EVALUATION_SPLITS if parquet[s]), None)
        if split is None:
            raise UserError(f"{folder}: train-*.parquet is there, but neither validation-*.parquet nor test-*.parquet")
        if config.class_list not in (None, "all"):
            raise UserError(f"--class_list chooses class folders; {folder} holds parquet files")
        train = Parquet(parquet["train"])
        checked = name == "IMNET100" and config.class_list is None
        if checked and all(WORDNET_ID.fullmatch(label) for label in train.classes):  # other names say nothing
            _imagenet100(set(train.classes), folder)
        return split, train, Parquet(parquet[split])
    if name in ("CIFAR10", "CIFAR100") and not (folder / "train").is_dir():
        cifar = _torchvision_cifar(name, folder, config.download)
        return "test", cifar[0], cifar[1]
    split = next((s for s in EVALUATION_SPLITS if (folder / s).is_dir()), None)
    if not (folder / "train").is_dir() or split is None:
        raise UserError(
            f"{folder}: needs train/ and val/ folders, or train-*.parquet and validation-* or test-*.parquet"
        )
    chosen = _chosen_classes(config.class_list, name, folder / "train")
    images = _image_folder(folder / "train", chosen)
    annotations = folder / split / "val_annotations.txt"
    if annotations.exists():  # Tiny-ImageNet's own layout: val/images/*.JPEG with a table of labels
        return split, images, _annotated(annotations, images.classes)
    return split, images, _image_folder(folder / split, chosen)


def _chosen_classes(class_list: str | None, name: str, folder: Path) -> list[str] | None:
    """The class folders to use, sorted; None is every one of `folder`."""
    if class_list == "all" or (class_list is None and name != "IMNET100"):
        return None
    if class_list is not None:
        return _read_class_list(Path(class_list))
    return _imagenet100({path.name for path in folder.iterdir() if path.is_dir()}, folder)


def _imagenet100(there: set[str], where: Path) -> list[str]:
    """The shipped list, all of whose classes must be `there`."""
    if hashlib.sha256(IMAGENET100.read_bytes()).hexdigest() != IMAGENET100_SHA256:
        raise UserError(f"{IMAGENET100} is not the list that this repository ships: restore it, or give --class-list")
    chosen = _read_class_list(IMAGENET100)
    if missing := [name for name in chosen if name not in there]:
        raise UserError(
            f"{where} has {len(there)} classes and lacks {len(missing)} of ImageNet-100's (e.g. {missing[0]}): to use "
            "100 other classes as they are, give --class-list all"
        )
    return chosen


def _read_class_list(path: Path) -> list[str]:
    try:
        names = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class-list {path}: not readable ({error})") from error
    if not names or len(set(names)) != len(names):
        raise UserError(f"--class-list {path}: needs one class folder per line, each once")
    return sorted(names)


def _image_folder(folder: Path, chosen: list[str] | None) -> Files:
    """One sub-folder per class; with `chosen`, only those."""
    try:
        classes = chosen or tv.folder.find_classes(folder)[0]
        numbers = {name: number for number, name in enumerate(classes)}
        samples = tv.folder.make_dataset(folder, numbers, tv.folder.IMG_EXTENSIONS)
    except FileNotFoundError as error:  # torchvision names the classes that are empty or not there
        raise UserError(f"{folder}: {error}") from error
    return Files(samples, classes)


def _annotated(table: Path, classes: list[str]) -> Files:
    """Tiny-ImageNet's validation images: file name, class and box per line."""
    numbers = {name: number for number, name in enumerate(classes)}
    rows = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines() if line]
    samples = [(str(table.parent / "images" / row[0]), numbers[row[1]]) for row in rows if row[1] in numbers]
    if not samples:
        raise UserError(f"{table}: none of its classes is a folder below train/")
    return Files(samples, classes)


def _torchvision_cifar(name: str, folder: Path, download: bool) -> list[Images]:
    try:
        return [getattr(tv, name)(folder, train=train, download=download) for train in (True, False)]
    except RuntimeError as error:
        raise UserError(f"{folder}: no {name} there ({error}): give --data-path, or --download") from error


def _limit(source: Images, number: int | None) -> Images:
    """`number` images drawn with a fixed seed: the first ones of a folder would all be of one class."""
    length = len(source)  # type: ignore[arg-type]
    if number is None or number >= length:
        return source
    return Subset(source, torch.randperm(length, generator=torch.Generator().manual_seed(0))[:number].tolist())
