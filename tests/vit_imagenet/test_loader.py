from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup

from repro.errors import UserError
from repro.images.data import load_data
from repro.images.loader import Augmented, BadImages, eval_batches, make_loader
from repro.seeding import seed_everything
from ViT_imagenet.config import Config
from ViT_imagenet.loader import TrainBatches, eval_transform, train_transform


def config(**kwargs: object) -> Config:
    return Config(**{"output_dir": "unused", "scale": 0.1, "batch_size": 4, "repeated_aug": False, **kwargs})


def batches(length: int = 40, rank: int = 0, world: int = 1, epoch: int = 0, start: int = 0, **kwargs: object):
    sampler = TrainBatches(length, config(**kwargs), rank, world)
    sampler.epoch, sampler.start_step = epoch, start
    return sampler


def images_of(folder: Path, workers: int, start: int = 0, **kwargs: object) -> torch.Tensor:
    settings = config(data_path=str(folder), data_set="CIFAR10", num_workers=workers, **kwargs)
    source = load_data(settings).train
    sampler = TrainBatches(len(source), settings, 0, 1)
    sampler.epoch, sampler.start_step = 1, start
    loader = make_loader(Augmented(source, train_transform(settings, 32), 32), sampler, settings, pin_memory=False)
    return torch.stack([batch.image for batch in loader])


def test_augmentation_does_not_depend_on_workers_or_on_where_an_epoch_is_entered(parquet: Path) -> None:
    alone = images_of(parquet, 0)
    assert torch.equal(alone, images_of(parquet, 2))
    assert torch.equal(alone[3:], images_of(parquet, 2, start=3))
    assert not torch.equal(alone, images_of(parquet, 0, seed=1))


def test_an_epoch_takes_each_image_once_and_epochs_differ() -> None:
    orders = [[t.index for batch in batches(epoch=epoch) for t in batch] for epoch in (0, 1)]
    assert sorted(orders[0]) == list(range(40)) == sorted(orders[1])
    assert orders[0] != orders[1]
    assert orders[0] != [t.index for batch in batches(seed=1) for t in batch]


def test_repeated_augmentation_shows_an_image_three_times_each_time_otherwise() -> None:
    tickets = [t for batch in batches(300, repeated_aug=True) for t in batch]
    counts = Counter(t.index for t in tickets)
    assert set(counts.values()) <= {1, 2, 3}
    assert Counter(counts.values())[3] == 256 // 3
    assert len({t.seed for t in tickets}) == len(tickets) == 256
    first = [t.index for t in tickets[:3]]
    assert len(set(first)) < 3  # the repeats stand together: in one effective batch


@pytest.mark.parametrize(("world", "accumulate", "size"), [(2, 1, 8), (4, 1, 4), (1, 4, 4), (2, 2, 4)])
def test_shares_make_up_the_same_step_and_the_same_mixup_pairs(world: int, accumulate: int, size: int) -> None:
    whole = list(batches(64, batch_size=16))
    parts = [list(batches(64, rank, world, batch_size=size, accumulate=accumulate)) for rank in range(world)]
    for step, expected in enumerate(whole):
        pairs = {frozenset((a, b)) for a, b in zip(expected, reversed(expected), strict=True)}
        micro = [part[step * accumulate + m] for part in parts for m in range(accumulate)]
        assert sorted(t for share in micro for t in share) == sorted(expected)
        assert pairs == {frozenset((a, b)) for share in micro for a, b in zip(share, reversed(share), strict=True)}


def test_mixing_the_shares_equals_mixing_the_whole() -> None:
    """The point of the mirrored shares, on timm's Mixup itself, both kinds of mixing."""
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8)
    sampler = batches(8, 0, 2, batch_size=4)
    for seed in range(6):
        mix = Mixup(0.8, 1.0, num_classes=8)
        np.random.seed(seed)
        whole, targets = mix(images.clone(), labels)
        for part in range(2):
            share = sampler.share(part)
            np.random.seed(seed)
            mixed, target = mix(images[share].clone(), labels[share])
            torch.testing.assert_close(mixed, whole[share])
            torch.testing.assert_close(target, targets[share])


def test_start_step_skips_without_changing_the_rest() -> None:
    assert list(batches(start=4, accumulate=2)) == list(batches(accumulate=2))[8:]
    assert len(batches(start=4, accumulate=2)) == 2


def test_too_few_images_are_told() -> None:
    with pytest.raises(UserError, match="3 training images"):
        batches(3)


def test_small_images_are_cropped_from_their_padded_selves() -> None:
    names = [type(t).__name__ for t in train_transform(config(aa="none", color_jitter=0.0, reprob=0.0), 32).transforms]
    assert names == ["Compose", "RandomHorizontalFlip", "MaybeToTensor", "Normalize"]
    large = [type(t).__name__ for t in train_transform(config(), 224).transforms]
    assert large[0] == "RandomResizedCropAndInterpolation"
    assert "RandAugment" in large and "RandomErasing" in large


def test_the_recipes_strongest_posterize_is_one_bit() -> None:
    """Pillow refuses the 0 bits that timm's RandAugment asks for when its magnitude is drawn as 10."""
    augment = train_transform(config(aa="rand-m10-mstd0-inc1"), 224).transforms[2]
    assert type(augment).__name__ == "RandAugment"
    (posterize,) = [op for op in augment.ops if op.name == "PosterizeIncreasing"]
    posterize.prob = 1.0
    grey = posterize(Image.new("RGB", (4, 4), (200, 100, 50)))
    assert grey.getpixel((0, 0)) == (128, 0, 0)


@pytest.mark.parametrize("aa", ["foo", "rand-m9-foo1", "rand-m9.5"])
def test_a_policy_that_timm_does_not_have_is_told(aa: str) -> None:
    with pytest.raises(UserError, match=f"--aa {aa}: timm has no such policy"):
        train_transform(config(aa=aa), 32)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images(make_parquet: Callable[..., Path], workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(data_path=str(make_parquet(bad=(2, 3))), data_set="CIFAR10", num_workers=workers)
    data = load_data(settings)
    sampler = TrainBatches(len(data.train), settings, 0, 1)
    train = make_loader(Augmented(data.train, train_transform(settings, 32), 32), sampler, settings, pin_memory=False)
    images = Augmented(data.test, eval_transform(settings, 32), 32)
    test = make_loader(images, eval_batches(11, 4, 0, 1), settings, pin_memory=False)
    skip = BadImages("skip")
    for batch in train:
        assert batch.image.shape == (4, 3, 32, 32)
        assert batch.usable.all()
        skip.add(batch.bad)
    assert sorted(skip.names) == sorted(skip.names, key=lambda n: n.split("row ")[1])
    assert [n.split(" (")[0] for n in sorted(skip.names)] == [f"train-00000-of-00001.parquet, row {i}" for i in (2, 3)]
    assert capsys.readouterr().err.count("bad image skipped") == 2
    assert sum(int(batch.usable.sum()) for batch in test) == 9
    with pytest.raises(UserError, match=r"train-00000-of-00001.parquet, row [23] .*--on-bad-image skip"):
        for batch in train:
            BadImages("fail").add(batch.bad)


def test_the_effective_batch_is_kept_by_accumulation() -> None:
    steps = [[t for batch in batches(64, batch_size=4, effective_batch=16, world=world) for t in batch]
             for world in (1, 2, 4)]  # fmt: skip
    assert [len(step) for step in steps] == [64, 32, 16]
    assert [batches(64, batch_size=4, effective_batch=16, world=world).accumulate for world in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(UserError, match="--effective_batch 16 is not a multiple of --batch_size 4 x 8 processes"):
        batches(64, batch_size=4, effective_batch=16, world=8)


@pytest.mark.parametrize("src", [False, True])
def test_three_augment_is_grey_solarized_or_blurred(src: bool) -> None:
    settings = config(three_augment=True, src=src, color_jitter=0.0)
    transform = train_transform(settings, 32)
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    kinds = set()
    for seed in range(30):
        seed_everything(seed)
        result = transform(image)
        assert result.shape == (3, 32, 32)
        pixels = result * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) + torch.tensor([0.485, 0.456, 0.406]).view(
            3, 1, 1
        )
        grey = torch.allclose(pixels[0], pixels[1], atol=1e-5)
        kinds.add("grey" if grey else "dark" if pixels.max() < 0.51 else "blurred")
    assert kinds == {"grey", "dark", "blurred"}
