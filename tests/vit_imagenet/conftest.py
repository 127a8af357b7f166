"""A quick run, and the image data sets."""

from __future__ import annotations

import pytest

from tests.image_sets import datasets_cache, make_folders, make_parquet, parquet  # noqa: F401


@pytest.fixture(scope="session")
def quick() -> list[str]:
    """Flags of a run of seconds; needs --data_path and --output_dir."""
    return (
        "--model deit_micro_patch8_32 --depth 2 --data_set CIFAR10 --scale 0.1 --epochs 2 --batch_size 4 "
        "--num_workers 0 --cpu --warmup_epochs 1 --unscaled_lr --lr 1e-3 --drop_path 0.1 --model_ema_decay 0.9 "
        "--no_repeated_aug"
    ).split()
