"""TCAS and the tokenizer against definitions by hand; the program that fits centres, on generated images."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from repro.errors import UserError
from SSL_cifar import tcas, tokens
from SSL_cifar.backbones import ResNet
from SSL_cifar.main import main


def header(**changes) -> tokens.Header:
    return tokens.Header("pixel", 7, 4, [0.5] * 3, [0.25] * 3, False)._replace(**changes)


def images(count: int = 3, size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


# -- TCAS: D1 --------------------------------------------------------------------------------------------------------


def test_tcas_of_tokens_that_are_the_class_one_constant_or_one_per_patch():
    classes = np.repeat(np.arange(10), 30)
    assert tcas.tcas(classes, classes) == 0
    assert tcas.tcas(np.zeros_like(classes), classes) == pytest.approx(1 - 1 / 10)
    assert tcas.tcas(np.arange(len(classes)), classes) == pytest.approx(0, abs=1e-30)


def test_tcas_by_hand():
    """Counts [[4, 1], [1, 4], [0, 0]]: one off-diagonal cosine of 8/17, twice in a matrix of four."""
    found = tcas.tcas(np.array([0] * 4 + [1] + [0] + [1] * 4), np.array([0] * 5 + [1] * 5))
    assert found == pytest.approx(2 * (8 / 17) ** 2 / 4) == pytest.approx(0.110727, abs=1e-6)


def test_classes_without_images_do_not_count():
    tokens_of, classes = np.array([0] * 4 + [1] + [0] + [1] * 4), np.array([1] * 5 + [4] * 5)
    assert tcas.tcas(tokens_of, classes) == tcas.tcas(tokens_of, classes // 4)


@pytest.mark.parametrize(
    ("k", "patches", "expected"),
    [(50, 3_200_000, 0.900), (50, 10_000, 0.816), (1000, 10_000, 0.225), (1000, 1_000, 0.007)],
)
def test_tcas_of_random_tokens(k, patches, expected):
    assert tcas.tcas_of_random_tokens(k, patches, 10) == pytest.approx(expected, abs=6e-4)
    if patches <= 10_000:
        drawn = np.random.default_rng(0).integers(k, size=patches)
        assert tcas.tcas(drawn, np.arange(patches) % 10) == pytest.approx(expected, abs=0.01)


def test_perplexity_counts_tokens_in_use():
    assert tcas.perplexity(np.array([3] * 5)) == pytest.approx(1)
    assert tcas.perplexity(np.array([0, 1, 2, 5] * 3)) == pytest.approx(4)


# -- the tokenizer: D2, D5 -------------------------------------------------------------------------------------------


def test_tokens_are_the_nearest_centres():
    x, centres = images(), torch.randn(7, 48, generator=torch.Generator().manual_seed(1))
    found = tokens.Tokenizer(tokens.Patches(header()), centres)(x)
    assert found.shape == (3, 4)
    for b in range(3):
        for t in range(4):
            top, left = 4 * (t // 2), 4 * (t % 2)
            patch = x[b, :, top : top + 4, left : left + 4].permute(1, 2, 0).flatten()  # colour runs fastest
            assert found[b, t] == (patch - centres).square().sum(dim=1).argmin()


def test_of_equal_centres_the_first_is_taken():
    points = torch.randn(20, 5)
    centres = torch.randn(3, 5)
    assert tokens.nearest(points, centres.repeat(4, 1)).max() < 3


def test_directions_are_compared_at_unit_length():
    """Centres fitted to patches at unit length: a brighter patch keeps its token."""
    x, centres = images(), torch.nn.functional.normalize(torch.randn(7, 48), dim=1)
    tokenizer = tokens.Tokenizer(tokens.Patches(header(token_normalize=True)), centres)
    assert torch.equal(tokenizer(x), tokenizer(5 * x))
    cosines = torch.nn.functional.cosine_similarity(tokens.Patches(header())(x).unsqueeze(2), centres, dim=3)
    assert torch.equal(tokenizer(x), cosines.argmax(dim=2))


def test_the_tokens_of_a_mirrored_image_are_not_its_mirrored_tokens():
    """Content is mirrored within a patch as well: tokens must be made after augmentation."""
    x = images(20)
    tokenizer = tokens.Tokenizer(
        tokens.Patches(header()), torch.randn(7, 48, generator=torch.Generator().manual_seed(1))
    )
    mirrored = tokenizer(x).reshape(-1, 2, 2).flip(2).flatten(1)
    assert (tokenizer(x.flip(3)) != mirrored).float().mean() > 0.3


def test_autocast_does_not_change_tokens():
    x, centres = images(50), torch.randn(50, 48, generator=torch.Generator().manual_seed(1))
    tokenizer = tokens.Tokenizer(tokens.Patches(header(size=50)), centres)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer(x), tokenizer(x.clone()))
        inside = tokenizer(x)
    assert torch.equal(inside, tokenizer(x))


def test_a_file_holds_centres_and_what_they_are_of(tmp_path):
    centres = torch.randn(7, 48)
    tokens.save_tokenizer(tmp_path / "centres.safetensors", tokens.Tokenizer(tokens.Patches(header()), centres))
    found = tokens.load_tokenizer(tmp_path / "centres.safetensors")
    assert torch.equal(found.centres, centres) and found.patches.header == header() and found.size == 7
    (tmp_path / "other").write_bytes(b"nothing")
    for name, message in (("absent", "no such file"), ("other", "not written by")):
        with pytest.raises(UserError, match=message):
            tokens.read_header(tmp_path / name)


# -- fitting ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of plain images, red and blue, with a little noise."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for half in ("train", "val"):
        for number, name in enumerate(("blue", "red")):
            (root / half / name).mkdir(parents=True)
            for i in range(6):
                pixels = generator.integers(0, 40, (8, 8, 3))
                pixels[:, :, 2 * (1 - number)] += 200
                Image.fromarray(pixels.astype(np.uint8)).save(root / half / name / f"{i}.png")
    return root


def flags(folder, output, *more):
    return [
        "--data_set", "FOLDER", "--data_path", str(folder), "--crop_size", "8", "--patch_size", "4",
        "--num_workers", "0", "--output_dir", str(output), *more,
    ]  # fmt: skip


def test_two_colours_become_two_tokens(folder, tmp_path, capsys):
    tokens.main(flags(folder, tmp_path / "run", "--k", "2"))
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert record["metrics"]["tcas"] == pytest.approx(0)
    assert record["metrics"]["tcas_shuffled"] > 0.2 and record["metrics"]["perplexity"] == pytest.approx(2)
    assert record["metrics"]["tcas_random"] == tcas.tcas_of_random_tokens(2, 48, 2)
    assert record["patches_per_class"] == 24
    printed = capsys.readouterr().out
    assert "| pixel k-means | 4     | 2 | 24" in printed
    tcas.main([str(tmp_path / "run")])
    assert capsys.readouterr().out in printed
    tokenizer = tokens.load_tokenizer(tmp_path / "run" / tokens.CENTRES)
    assert tokenizer.centres.shape == (2, 48) and tokenizer.patches.header.patch_size == 4
    tokens.main(flags(folder, tmp_path / "again", "--k", "2"))
    assert torch.equal(tokens.load_tokenizer(tmp_path / "again" / tokens.CENTRES).centres, tokenizer.centres)


def test_the_sample_takes_as_many_patches_of_each_image(folder, tmp_path):
    config = tokens.FitConfig(
        data_set="FOLDER", data_path=str(folder), crop_size=8, num_workers=0, output_dir="x", augment="mae"
    )
    source = tokens.Source(config, tokens.load_data(config).train)
    patches = tokens.build_patches(config)
    points = tokens.sample(source, patches, 24, seed=0)
    assert points.shape == (24, 48)
    everything = torch.cat([patches(x).flatten(0, 1) for x, _ in source.batches("")]).numpy()
    owners = [int(np.abs(everything - point).sum(axis=1).argmin()) // 4 for point in points]
    assert sorted(owners) == sorted(list(range(12)) * 2)
    few = tokens.sample(source, patches, 9, seed=0)  # one of each image, less three
    owners = {int(np.abs(everything - point).sum(axis=1).argmin()) // 4 for point in few}
    assert len(few) == len(owners) == 9 and owners != set(range(9))


def test_centres_of_directions_are_at_unit_length(folder, tmp_path):
    tokens.main(flags(folder, tmp_path / "run", "--k", "3", "--token_normalize"))
    centres = tokens.load_tokenizer(tmp_path / "run" / tokens.CENTRES).centres
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--k", "49"], "--k 49 is above the 48 patches"),
        (["--k", "9", "--max_patches", "8"], "--k 9 is above the 8 patches"),
        (["--k", "0"], "--k must be above 0"),
        (["--seed", "-1"], "--seed must not be negative, got -1"),
        (["--eval_crop_ratio", "1.5"], "--eval_crop_ratio must be above 0 and at most 1, got 1.5"),
        (["--patch_size", "3"], "--patch_size 3 must divide --crop_size 8"),
        (["--augment", "none_such"], "--augment none_such: choose one of"),
    ],
)
def test_bad_input_writes_nothing(folder, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        tokens.main(flags(folder, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_no_records_of_tokens(tmp_path):
    with pytest.raises(UserError, match="no record"):
        tcas.main([str(tmp_path)])


def test_random_tokens_approach_zero_as_there_are_more_of_them():
    values = [tcas.tcas_of_random_tokens(k, 100_000, 10) for k in (10, 100, 1000, 10_000)]
    assert values == sorted(values, reverse=True) and math.isclose(values[0], 0.9, rel_tol=0.01)


# -- tokens of features ----------------------------------------------------------------------------------------------


@pytest.fixture
def teacher(tmp_path):
    """The folder of a run of a small ResNet, as far as the tokenizer reads it: maps of 8, 4, 2 and 1 vectors a side."""
    network = ResNet("resnet18", "s2", 8)
    for norm in (module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.running_mean)
    weights = {f"backbone.{name}": tensor for name, tensor in network.state_dict().items()}
    save_file(weights | {"projector.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    settings = {"method": "simsiam", "backbone": "resnet18", "stem": "s2", "width": 8, "augment": "simclr_cifar"}
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(settings | {"data_set": "CIFAR10", "crop_size": 16}))
    return tmp_path, network.eval()


def feature_config(teacher, **more):
    common = {"data_set": "CIFAR10", "crop_size": 16, "patch_size": 4, "augment": "mae", "output_dir": "x", "k": 5}
    return tokens.FitConfig(**common | {"teacher": str(teacher)} | more)


def test_feature_tokens_are_of_the_map_with_one_vector_for_each_patch(teacher, tmp_path):
    folder, network = teacher
    patches = tokens.build_patches(feature_config(folder))
    assert patches.header.kind == "SimSiam features" and patches.header.teacher["stage"] == 2
    tokenizer = tokens.Tokenizer(patches, torch.randn(5, 16))
    tokenizer.train()  # as part of a method: its BatchNorm must keep to running statistics
    x = torch.rand(3, 3, 16, 16)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in tokens.statistics(feature_config(folder)))
    expected = network.maps(x, 2).flatten(2).mT  # simclr_cifar does not normalize
    found = patches((x - mean) / std)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    tokens.save_tokenizer(tmp_path / "file", tokenizer)
    again = tokens.load_tokenizer(tmp_path / "file")
    assert torch.equal(again(x), tokenizer(x)) and again.patches.header == patches.header


def test_every_teacher_has_a_name(teacher):
    folder, _ = teacher
    settings = yaml.safe_load((folder / "args.yaml").read_text())
    (folder / "args.yaml").write_text(yaml.safe_dump(settings | {"method": "arcl"}))
    assert feature_config(folder).kind == "ArCL features"


def test_teachers_that_do_not_fit(teacher):
    folder, _ = teacher
    with pytest.raises(UserError, match="feature maps of 8, 4, 2, 1 vectors a side, an image 16 patches"):
        tokens.build_patches(feature_config(folder, patch_size=1))
    with pytest.raises(UserError, match="no such file"):
        tokens.build_patches(feature_config(folder / "absent"))
    (folder / "model.safetensors").rename(folder / "elsewhere")
    with pytest.raises(UserError, match="no model.safetensors there: the run is not finished"):
        tokens.build_patches(feature_config(folder))
    (folder / "args.yaml").write_text("backbone: vit_micro")
    with pytest.raises(UserError, match="not the folder of a run"):
        tokens.build_patches(feature_config(folder))


def test_the_lines_of_the_readme_run_in_their_order(root, parquet, tmp_path):  # noqa: F811
    text = (root / "SSL_cifar/README.md").read_text().replace("out/ssl", str(tmp_path))
    lines = [
        line.split() for line in re.findall(r"^python -m (SSL_cifar.*(?:tokens|center_path).*)", text, re.MULTILINE)
    ]
    assert [words[0].split(".")[1] for words in lines] == ["tokens", "main", "tokens", "main"]
    small = f"--data_path {parquet} --max_train_samples 8 --num_workers 0".split()
    for module, *words in lines:
        if module == "SSL_cifar.tokens":
            tokens.main([*words, *small, "--k", "6"])
        else:
            config = words.index("--config") + 1
            words[config] = str(root / words[config])
            main([*words, *small, *"--batch_size 8 --epochs 1 --warmup_epochs 0 --cpu --no_probe".split()])
        assert (Path(words[words.index("--output_dir") + 1]) / "record.json").exists()
