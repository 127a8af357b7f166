"""Views: drawn image by image, for any split of the batch; crops and colours against torchvision and PIL."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms.v2 import functional as F

from SSL_cifar.augment import DRAWS, PRESETS, Augment, Preset, colour_matrix, crop, crop_boxes
from SSL_cifar.shifts import SHIFTS


def pictures(number: int, side: int = 32, seed: int = 0) -> Tensor:
    """Smooth random images (number, 3, side, side), uint8, away from black and white."""
    noise = torch.rand(number, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(noise, (side, side), mode="bicubic").clamp(0, 1)
    return (60 + 130 * smooth).to(torch.uint8)


def augment(monkeypatch: pytest.MonkeyPatch, preset: Preset, size: int = 32, views: int = 1) -> Augment:
    monkeypatch.setitem(PRESETS, "made up", preset)
    return Augment("made up", size, "FOLDER", views)


PLAIN = {"scale": None, "flip": 0.0, "jittered": 0.0, "grey": 0.0, "normalize": False}


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_views_do_not_depend_on_the_split_of_the_batch(preset: str) -> None:
    images = pictures(6)
    made = Augment(preset, 32, "CIFAR10", 2)
    draws = made.draw(7, 6)
    assert draws.shape == (6, 2, DRAWS) and not torch.equal(draws, made.draw(8, 6))
    whole = made(images, draws)
    for part in (slice(0, 3), slice(3, 6), slice(2, 3)):
        for one, other in zip(made(images[part], draws[part]), whole, strict=True):
            torch.testing.assert_close(one, other[part], rtol=0, atol=1e-5)
    views, boxes, flips = whole
    assert views.shape == (6, 2, 3, 32, 32) and boxes.shape == (6, 2, 4) and flips.shape == (6, 2)
    if preset != "none":
        assert (views[:, 0] - views[:, 1]).abs().amax(dim=(1, 2, 3)).min() > 0.05  # drawn for each view


def test_every_image_has_draws_of_its_own() -> None:
    """torchvision's v2 transforms would mirror all images of a batch, or none."""
    _, boxes, flips = Augment("solo_cifar", 32, "CIFAR10", 2)(pictures(64), torch.rand(64, 2, DRAWS))
    assert 20 < flips.sum() < 108 and len(boxes.flatten(0, 1).unique(dim=0)) == 128


def test_an_untouched_image_is_itself() -> None:
    images = pictures(3)
    made = Augment("none", 32, "CIFAR10", 1)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (made.mean, made.std))
    expected = (images / 255 - mean) / std
    torch.testing.assert_close(made(images, made.draw(0, 3))[0][:, 0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(made.clean(images, 1.0), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(32, 32), (20, 40), (50, 30)])
def test_boxes_are_distributed_as_torchvisions(shape: tuple[int, int]) -> None:
    height, width = shape
    boxes = crop_boxes(torch.rand(4000, 40, generator=torch.Generator().manual_seed(0)), height / width, (0.08, 1.0))
    top, left, tall, wide = boxes.unbind(-1)
    assert min(top.min(), left.min()) >= 0 and max((top + tall).max(), (left + wide).max()) <= 1 + 1e-6
    torch.manual_seed(0)
    image = torch.zeros(1, height * 8, width * 8)  # rounding to pixels matters less
    theirs = [T.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    theirs = torch.tensor(theirs) / torch.tensor([height * 8, width * 8] * 2)
    for ours, other in ((tall * wide, theirs[:, 2] * theirs[:, 3]), (tall / wide, theirs[:, 2] / theirs[:, 3]),
                        (top, theirs[:, 0]), (left, theirs[:, 1])):  # fmt: skip
        mean, std = float(other.mean()), float(other.std())
        assert float(ours.mean()) == pytest.approx(mean, abs=0.02 * max(1, mean))
        assert float(ours.std()) == pytest.approx(std, rel=0.06)


def test_a_crop_is_pils(monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(8)
    boxes = crop_boxes(torch.rand(8, 1, 40, generator=torch.Generator().manual_seed(3)), 1.0, (0.08, 1.0))
    flips = torch.tensor([[True], [False]] * 4)
    views = crop(images, boxes, flips, 32)[0]
    for image, box, flip, view in zip(images, boxes[:, 0] * 32, flips[:, 0], views, strict=True):
        top, left, tall, wide = box.tolist()
        cut = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
            (32, 32), Image.Resampling.BICUBIC, box=(left, top, left + wide, top + tall)
        )
        expected = torch.from_numpy(np.array(cut)).permute(2, 0, 1) / 255
        torch.testing.assert_close(view, expected.flip(-1) if flip else expected, rtol=0, atol=0.025)


def test_larger_images_are_antialiased_as_by_torchvision() -> None:
    images = pictures(2, 64)
    boxes = torch.tensor([[[0.25, 0.125, 0.5, 0.75]], [[0.0, 0.0, 1.0, 1.0]]])
    views = crop(images, boxes, torch.tensor([[False], [True]]), 24)[0]
    first = F.resized_crop(images[0], 16, 8, 32, 48, [24, 24], T.InterpolationMode.BICUBIC, antialias=True)
    second = F.resize(images[1], [24, 24], T.InterpolationMode.BICUBIC, antialias=True).flip(-1)
    assert torch.equal(views, torch.stack([first, second]) / 255)
    assert Augment("none", 24, "FOLDER", 1).clean(pictures(2, 40), 0.875).shape == (2, 3, 24, 24)


def test_evaluation_crops_the_centre() -> None:
    image = torch.zeros(1, 3, 40, 64, dtype=torch.uint8)
    image[..., 5:35, 17:47] = 200
    made = Augment("simclr_cifar", 30, "FOLDER", 1)
    assert made.clean(image, 0.75).min() == pytest.approx(200 / 255, abs=0.01)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_colours_are_torchvisions_in_drawn_order(order: tuple[int, ...]) -> None:
    """Where nothing is clamped; hue is turned about another axis, see below."""
    x = pictures(5).float() / 255
    rows = torch.rand(5, DRAWS, generator=torch.Generator().manual_seed(1))
    rows[:, 45:49] = torch.tensor([order.index(kind) for kind in range(4)]) / 4.0
    matrix, offset = colour_matrix(x, rows, (0.2, 0.2, 0.2, 0.0), torch.ones(5, dtype=torch.bool))
    ours = torch.baddbmm(offset, matrix, x.flatten(2)).view(x.shape)
    factors = 1 + (2 * rows[:, 41:44] - 1) * 0.2
    steps = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation]
    for number, expected in enumerate(x):
        for kind in order:
            if kind < 3:
                expected = steps[kind](expected, float(factors[number, kind]))
        torch.testing.assert_close(ours[number], expected, rtol=0, atol=2e-3)


def test_hue_keeps_grey_and_brightness_and_turns_colours() -> None:
    x = pictures(4).float() / 255
    rows = torch.full((4, DRAWS), 0.5)
    rows[:, 44] = torch.tensor([0.0, 0.25, 0.75, 1.0])
    matrix, offset = colour_matrix(x, rows, (0.0, 0.0, 0.0, 0.5), torch.ones(4, dtype=torch.bool))
    assert not offset.any()
    torch.testing.assert_close(matrix @ torch.ones(3), torch.ones(4, 3), rtol=0, atol=1e-3)
    luma = torch.tensor([0.299, 0.587, 0.114])
    torch.testing.assert_close(luma @ matrix, luma.expand(4, 3), rtol=0, atol=1e-4)
    turned = torch.baddbmm(offset, matrix, x.flatten(2)).view(x.shape)
    quarter = F.adjust_hue(x[1], -0.25)
    against = torch.baddbmm(offset[2:3], matrix[2:3], x[1:2].flatten(2)).view(x[1].shape)
    assert (turned[1] - quarter).abs().mean() < (against - quarter).abs().mean() / 2
    torch.testing.assert_close(matrix[0], matrix[3], rtol=0, atol=1e-5)  # both are half a turn


def test_contrast_and_saturation_leave_alone_what_is_not_jittered() -> None:
    x = pictures(2).float() / 255
    matrix, offset = colour_matrix(x, torch.rand(2, DRAWS), (0.4, 0.4, 0.4, 0.1), torch.tensor([True, False]))
    assert torch.equal(matrix[1], torch.eye(3)) and not offset[1].any()
    assert not torch.equal(matrix[0], torch.eye(3))


def test_grey_blur_and_solarization(monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(4)
    x = images.float() / 255
    grey = augment(monkeypatch, Preset(**{**PLAIN, "grey": 1.0}))(images, torch.rand(4, 1, DRAWS))[0][:, 0]
    torch.testing.assert_close(grey, F.rgb_to_grayscale(x, 3), rtol=0, atol=2e-3)
    made = augment(monkeypatch, Preset(**{**PLAIN, "blur": (1.0, 0.0), "solarize": (0.0, 1.0)}), views=2)
    draws = torch.rand(4, 2, DRAWS)
    draws[:, :, 52] = 0.5
    views = made(images, draws)[0]
    sigma = 0.1 + 1.9 * 0.5
    torch.testing.assert_close(views[:, 0], F.gaussian_blur(x, [13, 13], [sigma, sigma]), rtol=0, atol=1e-4)
    torch.testing.assert_close(views[:, 1], F.solarize(x, 128 / 255), rtol=0, atol=1e-5)


def test_presets_draw_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    made = augment(monkeypatch, Preset(**{**PLAIN, "solarize": (0.2,)}))
    views = made(pictures(400), made.draw(0, 400))[0][:, 0]
    changed = (views - pictures(400) / 255).abs().amax(dim=(1, 2, 3)) > 0.01
    assert 0.2 == pytest.approx(float(changed.float().mean()), abs=3 * math.sqrt(0.16 / 400))


def test_statistics_agree_with_torchvision_image_by_image(data_root: Path) -> None:
    """Real CIFAR-10 images; what differs is documented in augment.py."""
    from repro.images.data import load_data
    from SSL_cifar.batches import Pixels
    from SSL_cifar.main import parse

    config = parse(f"--method simsiam --output_dir x --max_train_samples 600 --data_root {data_root}".split())
    from repro.images.loader import BadImages

    source = load_data(config).train
    images = Pixels(source, BadImages("fail")).images
    made = Augment("simclr_cifar", 32, "CIFAR10", 1)
    ours = made(images, made.draw(0, len(images)))[0][:, 0]
    torch.manual_seed(0)
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
    crop_it = T.RandomResizedCrop(32, (0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    theirs_of = T.Compose([crop_it, T.RandomHorizontalFlip(), jitter, T.RandomGrayscale(0.2), T.ToTensor()])
    theirs = torch.stack([theirs_of(source[i][0]) for i in range(len(images))])
    torch.testing.assert_close(ours.mean((0, 2, 3)), theirs.mean((0, 2, 3)), rtol=0, atol=0.03)
    torch.testing.assert_close(ours.std((0, 2, 3)), theirs.std((0, 2, 3)), rtol=0, atol=0.02)
    within = [x.var(dim=(2, 3)).mean() for x in (ours, theirs)]
    assert within[0] == pytest.approx(float(within[1]), rel=0.12)


def test_shifts_are_fixed_changes() -> None:
    x = pictures(3).float() / 255
    for name, change in SHIFTS.items():
        shifted = change(x)
        assert shifted.shape == x.shape and shifted.min() >= 0 and shifted.max() <= 1
        torch.testing.assert_close(change(x[1:2])[0], shifted[1], rtol=0, atol=1e-6, msg=name)
        assert (shifted - x).abs().mean() > 0.002, name
    assert torch.equal(SHIFTS["rotated"](x)[..., 0, 0], x[..., 0, -1])
    made = Augment("solo_cifar", 32, "CIFAR10", 1)
    for change in SHIFTS.values():
        assert made.clean(pictures(3), 1.0, change).shape == x.shape
