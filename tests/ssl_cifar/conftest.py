"""Tiny data sets, and flags of runs of seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from SSL_cifar.methods.base import Batch, Method
from tests.image_sets import datasets_cache, make_folders, make_parquet, parquet  # noqa: F401

RESNET = "--stem s2 --width 4 --proj_hidden_dim 16 --proj_output_dim 12"
VIT = "--backbone vit_micro --patch_size 16 --augment mae"
DECODER = "--decoder_dim 16 --decoder_depth 1 --decoder_num_heads 2 --mask_ratio 0.5"
# What each method needs in a run of seconds, besides `quick`.
METHOD_FLAGS = {
    "simsiam": RESNET,
    "simsiam_multi": f"{RESNET} --plain_epochs 1",
    "byol": f"{RESNET} --opt larc --pred_hidden_dim 16",
    "rdm_simsiam": f"{RESNET} --pred_location target --sigma -1",
    "rdm_byol": f"{RESNET} --pred_type log_1",
    "simclr": RESNET,
    "simclr_attn": RESNET,
    "moco": f"{RESNET} --queue_size 20",
    "arcl": f"{RESNET} --base moco --num_views 3 --queue_size 20",
    "mae": f"{VIT} {DECODER}",
    "cluster_mim": f"{VIT} {DECODER} --center_path CENTRES",
    "ar": f"{VIT} --center_path CENTRES",
    "dar": f"{VIT} --center_path CENTRES --offsets 2",
    "vlm": f"{VIT} --center_path CENTRES --mask_ratio_min 0.25 --mask_ratio_max 0.75",
}


@pytest.fixture(scope="session")
def flags_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """flags_of("simclr") → the flags of a method in a run of seconds; 5 random centres where it needs tokens."""
    from SSL_cifar import tokens
    from SSL_cifar.main import parse

    path = tmp_path_factory.mktemp("centres") / "centres.safetensors"
    common = f"--method mae {METHOD_FLAGS['mae']} --output_dir x".split()
    mean, std = tokens.statistics(parse(common))
    values = torch.randn(5, 3 * 16**2, generator=torch.Generator().manual_seed(0))
    header = tokens.Header("pixel", 5, 16, mean, std, False)
    tokens.save_tokenizer(path, tokens.Tokenizer(tokens.Patches(header), values))
    return lambda name: f"--method {name} {METHOD_FLAGS[name]}".replace("CENTRES", str(path)).split()


@pytest.fixture(scope="session")
def quick(parquet: Path) -> list[str]:  # noqa: F811
    """Flags of a run of seconds: 24 images, 3 steps an epoch; needs --method and --output_dir."""
    return (
        f"--data_path {parquet} --data_set CIFAR10 --cache --cpu --epochs 2 --batch_size 8 --warmup_epochs 1 "
        "--unscaled_lr --lr 0.05 --no_probe"
    ).split()


class Encoder(nn.Sequential):
    """Stands in for a backbone: (B, 3, 4, 4) to (B, 12)."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(48, 12), nn.ReLU())


@pytest.fixture
def build() -> Callable[..., Method]:
    """build("simclr_attn", beta=0.0) → the method with small heads on a linear encoder, in float64; seed 0."""
    from SSL_cifar import methods

    def make(name: str, *, images: int = 40, **flags: object) -> Method:
        kind = methods.load(name)
        fields = kind.Settings.__dataclass_fields__
        small = {"proj_hidden_dim": 10, "proj_output_dim": 6, "pred_hidden_dim": 5}
        if "moco" in (name, flags.get("base")):
            small["queue_size"] = 16
        small = {key: value for key, value in small.items() if key in fields}
        settings = kind.Settings(
            **{"output_dir": "unused", "method": name, "batch_size": 8, "crop_size": 4, **small, **flags}
        )
        torch.manual_seed(0)
        return kind(settings, Encoder(), images).double()

    return make


@pytest.fixture
def some_batch() -> Callable[..., tuple[list[Tensor], Batch]]:
    """some_batch(views=2) → 8 images' views (8, 3, 4, 4) in float64, and their batch."""

    def make(views: int = 2, size: int = 8, seed: int = 0) -> tuple[list[Tensor], Batch]:
        draw = torch.Generator().manual_seed(seed)
        images = torch.randn(size, 3, 4, 4, generator=draw, dtype=torch.float64)
        noise = [torch.randn(size, 3, 4, 4, generator=draw, dtype=torch.float64) for _ in range(views)]
        corners = torch.rand(size, views, 2, generator=draw) / 2
        boxes = torch.cat([corners, torch.rand(size, views, 2, generator=draw) / 2], -1)
        index = torch.randperm(40, generator=draw)[:size]
        batch = Batch(index, boxes, torch.zeros(size, views, dtype=torch.bool), seed, 0, size)
        return [images + one / 2 for one in noise], batch

    return make
