"""Tiny image data sets, made on the spot: a conftest.py imports the fixtures that its tests use."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

SIDE = 32


def picture(label: int, number: int, side: int = SIDE, mode: str = "RGB") -> Image.Image:
    """Noise around a level that tells the class."""
    generator = np.random.default_rng([label, number])
    pixels = np.clip(generator.normal(60 + 60 * label, 40, (side, side, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the datasets library converts goes to a scratch folder."""
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("hf_cache")


@pytest.fixture(scope="session")
def make_parquet(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_parquet(train=24, test=11, classes=3, bad=()) → folder with train-*.parquet and test-*.parquet."""

    def make(train: int = 24, test: int = 11, classes: int = 3, bad: tuple[int, ...] = ()) -> Path:
        folder = tmp_path_factory.mktemp("parquet")
        features = datasets.Features(
            {"img": datasets.Image(), "label": datasets.ClassLabel(names=[f"c{i}" for i in range(classes)])}
        )
        for split, number in (("train", train), ("test", test)):
            labels = [i % classes for i in range(number)]
            images = [
                {"bytes": encoded(picture(y, i))[: 200 if i in bad else None], "path": None}
                for i, y in enumerate(labels)
            ]
            rows = datasets.Dataset.from_dict({"img": images, "label": labels}, features=features)
            rows.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
        return folder

    return make


@pytest.fixture(scope="session")
def parquet(make_parquet: Callable[..., Path]) -> Path:
    return make_parquet()


@pytest.fixture
def make_folders(tmp_path: Path) -> Callable[..., Path]:
    """make_folders(classes, per_class) → folder with train/<class>/*.jpeg and val/<class>/*.jpeg; one grey a class."""

    def make(classes: tuple[str, ...] = ("n01", "n02", "n03"), per_class: int = 3, side: int = SIDE) -> Path:
        for split in ("train", "val"):
            for label, name in enumerate(classes):
                folder = tmp_path / "images" / split / name
                folder.mkdir(parents=True)
                for i in range(per_class):
                    picture(label, i, side, "L" if i == 0 else "RGB").save(folder / f"{i}.jpeg")
        return tmp_path / "images"

    return make
