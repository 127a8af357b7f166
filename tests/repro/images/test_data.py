from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from repro.config import CellLabel
from repro.errors import UserError
from repro.images.config import ImageFields
from repro.images.data import IMAGENET100, BadImageError, Cached, load_data

Folders = Callable[..., Path]


@dataclass(kw_only=True)
class Config(ImageFields):
    def label(self) -> CellLabel:
        return CellLabel(data=self.data_set, model="m", method="vanilla")


def config(folder: Path, data_set: str = "CIFAR10", **kwargs: object) -> Config:
    return Config(output_dir="unused", data_path=str(folder), data_set=data_set, **kwargs)


def test_parquet(parquet: Path) -> None:
    data = load_data(config(parquet))
    assert data.classes == ["c0", "c1", "c2"]
    assert (len(data.train), len(data.test), data.test_split) == (24, 11, "test")
    assert [data.train[i][1] for i in range(4)] == [0, 1, 2, 0]
    assert np.asarray(data.train[2][0]).mean() > np.asarray(data.train[0][0]).mean() + 50


def test_folders_and_grey_images(make_folders: Folders) -> None:
    data = load_data(config(make_folders(), "FOLDER"))
    assert data.classes == ["n01", "n02", "n03"]
    assert (len(data.train), data.test_split) == (9, "val")
    assert {data.train[i][0].mode for i in range(9)} == {"RGB"}
    grey = np.asarray(data.train[0][0])
    assert np.array_equal(grey[..., 0], grey[..., 2])


def test_class_list_chooses_and_numbers_the_classes(make_folders: Folders, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("n03\nn01\n")
    data = load_data(config(make_folders(), "FOLDER", class_list=str(listed)))
    assert data.classes == ["n01", "n03"]
    assert [data.train[i][1] for i in range(len(data.train))] == [0, 0, 0, 1, 1, 1]
    listed.write_text("n03\nn77\n")
    with pytest.raises(UserError, match="n77"):
        load_data(config(tmp_path / "images", "FOLDER", class_list=str(listed)))
    listed.write_text("n03\nn03\n")
    with pytest.raises(UserError, match="each once"):
        load_data(config(tmp_path / "images", "FOLDER", class_list=str(listed)))


def test_imagenet_100_means_100_classes(make_folders: Folders) -> None:
    folder = make_folders()
    with pytest.raises(UserError, match="3 classes and lacks 100 of ImageNet-100's .*--class-list all"):
        load_data(config(folder, "IMNET100"))
    with pytest.raises(UserError, match="3 classes, IMNET100 has 100"):
        load_data(config(folder, "IMNET100", class_list="all"))


def test_imagenet_100_is_the_shipped_list_unless_told_otherwise(make_folders: Folders, tmp_path: Path) -> None:
    listed = IMAGENET100.read_text().split()
    assert len(set(listed)) == 100
    folder = make_folders((*listed, "n00000001"), per_class=1, side=8)
    assert load_data(config(folder, "IMNET100")).classes == sorted(listed)
    for split in ("train", "val"):
        shutil.rmtree(folder / split / listed[7])  # 100 classes are left, one of them another
    with pytest.raises(UserError, match=f"100 classes and lacks 1 of .*{listed[7]}.*--class-list all"):
        load_data(config(folder, "IMNET100"))
    assert "n00000001" in load_data(config(folder, "IMNET100", class_list="all")).classes


def test_a_changed_class_list_is_refused(
    make_folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_text(IMAGENET100.read_text().replace("n01558993", "n01558994"))
    monkeypatch.setattr("repro.images.data.IMAGENET100", copy)
    with pytest.raises(UserError, match="not the list that this repository ships"):
        load_data(config(make_folders(), "IMNET100"))


def test_imagenet_100_in_parquet_is_checked_by_its_wordnet_ids(data_root: Path) -> None:
    tiny = data_root / "images" / "tiny_imagenet_100"
    with pytest.raises(UserError, match="100 classes and lacks .*--class-list all"):
        load_data(config(tiny, "IMNET100"))
    assert len(load_data(config(tiny, "IMNET100", class_list="all")).classes) == 100


def test_empty_class_folder_is_named(make_folders: Folders) -> None:
    folder = make_folders()
    (folder / "train" / "n02b").mkdir()
    with pytest.raises(UserError, match="n02b"):
        load_data(config(folder, "FOLDER"))


def test_classes_of_train_and_val_must_agree(make_folders: Folders) -> None:
    folder = make_folders()
    (folder / "val" / "n02").rename(folder / "val" / "n09")
    with pytest.raises(UserError, match="n02.*n09"):
        load_data(config(folder, "FOLDER"))


def test_tiny_imagenets_own_layout(make_folders: Folders) -> None:
    folder = make_folders()
    flat = folder / "val" / "images"
    flat.mkdir()
    rows = []
    for name in ("n01", "n02", "n03"):
        for image in (folder / "val" / name).iterdir():
            rows.append(f"{name}_{image.name}\t{name}\t0\t0\t31\t31")
            image.rename(flat / f"{name}_{image.name}")
        (folder / "val" / name).rmdir()
    (folder / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    data = load_data(config(folder, "TINY"))
    assert len(data.test) == 9
    assert sorted(data.test[i][1] for i in range(9)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("data_set", "said"),
    [("FOLDER", "train/ and val/"), ("CIFAR10", "--download"), ("IMNET", "train/ and val/")],
)
def test_nothing_there(tmp_path: Path, data_set: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_data(config(tmp_path, data_set))
    with pytest.raises(UserError, match="no such folder"):
        load_data(config(tmp_path / "missing", data_set))


def test_data_root_is_searched(parquet: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "cifar10").symlink_to(parquet)
    data = load_data(Config(output_dir="unused", data_root=str(tmp_path), data_set="CIFAR10"))
    assert len(data.train) == 24
    with pytest.raises(UserError, match="give --data-path"):
        load_data(Config(output_dir="unused", data_root=str(tmp_path), data_set="CIFAR100"))


def test_limit_draws_the_same_mixed_images_for_every_seed(make_folders: Folders) -> None:
    folder = make_folders(per_class=10)
    halves = [load_data(config(folder, "FOLDER", max_train_samples=12, seed=seed)) for seed in (0, 1)]
    labels = [[half.train[i][1] for i in range(12)] for half in halves]
    assert labels[0] == labels[1]
    assert len(set(labels[0])) == 3


def test_cache_keeps_pixels_and_complaints(make_parquet: Callable[..., Path]) -> None:
    folder = make_parquet(bad=(5,))
    source = load_data(config(folder)).train
    cached = Cached(source)
    good = [i for i in range(len(source)) if i != 5]
    assert all(np.array_equal(cached[i][0], source[i][0]) for i in good)
    assert [cached[i][1] for i in good] == [source[i][1] for i in good]
    for images in (source, cached):
        with pytest.raises(BadImageError, match=r"train-00000-of-00001\.parquet, row 5"):
            images[5]


def test_cache_takes_images_of_several_sizes(make_folders: Folders) -> None:
    folder = make_folders()
    with Image.open(folder / "train" / "n02" / "1.jpeg") as image:
        image.resize((16, 16)).save(folder / "train" / "n02" / "1.jpeg")
    train = load_data(config(folder, "FOLDER", cache=True)).train
    assert {train[i][0].size for i in range(len(train))} == {(16, 16), (32, 32)}


def test_parquet_without_images_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows = datasets.Dataset.from_dict({"a": [1, 2]})
        rows.to_parquet(str(tmp_path / f"{split}-00000-of-00001.parquet"))
    with pytest.raises(UserError, match="one Image and one ClassLabel"):
        load_data(config(tmp_path))


def test_real_parquet_sets(data_root: Path) -> None:
    data = load_data(config(data_root / "images" / "imagenette_224", "FOLDER", num_workers=0))
    assert (len(data.train), len(data.test), len(data.classes)) == (1000, 500, 10)
    assert {data.train[i][0].mode for i in range(100)} == {"RGB"}
    assert data.train[0][0].size == (224, 224)
