"""The settings that say which images a run reads, and how; no torch, so that a wrong flag is reported at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from repro.config import RunConfig
from repro.errors import UserError

DataSet = Literal["IMNET", "IMNET100", "CIFAR10", "CIFAR", "CIFAR100", "TINY", "FOLDER"]


@dataclass(kw_only=True)
class ImageFields(RunConfig):
    """Data set, and how its images are read."""

    EXECUTION_FIELDS: ClassVar[tuple[str, ...]] = (
        *RunConfig.EXECUTION_FIELDS, "data_path", "download", "num_workers", "cache",
    )  # fmt: skip

    data_path: str | None = None
    """Folder of the data set: train/ and val/ image folders, or train-*.parquet and test-* or validation-*.parquet. By
    default the data set's folder below --data_root."""
    data_set: DataSet = "IMNET"
    """IMNET100 is the 100 classes of imagenet100_classes.txt, in a folder with these or all of ImageNet. CIFAR is
    CIFAR100, as in DeiT."""
    class_list: str | None = None
    """File with one class folder (WordNet id) per line: only these are used, in sorted order; `all` uses every folder
    there. Unset: imagenet100_classes.txt for IMNET100, else all."""
    download: bool = False
    """Let torchvision download CIFAR into --data-path when it is not there."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """An image that cannot be decoded: stop, or name it, count it, and continue (training takes the next image
    instead, evaluation leaves it out)."""
    max_train_samples: int | None = None
    """Train on this many images, drawn once, the same for every seed."""
    max_test_samples: int | None = None
    """Evaluate on this many images, drawn once. The record's protocol says so."""
    cache: bool = False
    """Decode every image once and keep the pixels: for data sets of small images of one size that fit in memory."""
    num_workers: int = 10
    """Processes that decode and augment, per training process; 0 does it in the training process."""

    def check_image_fields(self) -> None:
        """Refuse what makes no sense, and give CIFAR-100 its one name."""
        if self.data_set == "CIFAR":
            self.data_set = "CIFAR100"
        if self.num_workers < 0:
            raise ValueError(f"--num_workers must not be negative, got {self.num_workers}")
        for name in ("max_train_samples", "max_test_samples"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be above 0, got {getattr(self, name)}")
        if self.class_list and self.data_set not in ("IMNET", "IMNET100", "FOLDER"):
            raise ValueError(f"--class_list chooses class folders; --data_set {self.data_set} has none")

    def check_folders(self) -> None:
        """Refuse a data_path that is not there, before anything is loaded; `RunConfig` does so for data_root."""
        if self.data_path is not None and not Path(self.data_path).is_dir() and not self.download:
            raise UserError(f"--data_path {self.data_path}: no such folder")
