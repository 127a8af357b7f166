"""Classifiers on finished runs: each protocol, resuming, the rates, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from repro.errors import UserError
from repro.report.tables import main as tables
from repro.run.run import Run
from SSL_cifar.linear import PROTOCOLS, Classifier, LinearConfig, load_method, main, rate
from SSL_cifar.main import main as pretrain

FlagsOf = Callable[[str], list[str]]
QUICK = "--epochs 2 --batch_size 8 --num_workers 0 --cpu".split()


@pytest.fixture(scope="module")
def runs(quick: list[str], flags_of: FlagsOf, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of a ResNet with a bank, and one of a ViT."""
    folder = tmp_path_factory.mktemp("finished")
    for name in ("simsiam_multi", "mae"):
        pretrain([*quick, *flags_of(name), f"--output_dir={folder / name}"])
    return {name: folder / name for name in ("simsiam_multi", "mae")}


def record(folder: Path) -> dict:
    return json.loads((folder / "record.json").read_text())


@pytest.mark.parametrize(
    ("name", "protocol"),
    [("simsiam_multi", "offline"), ("simsiam_multi", "simclr"), ("mae", "mae_lin"), ("mae", "mae_ft")],
)
def test_each_protocol_ends_with_a_record(name: str, protocol: str, runs: dict[str, Path], tmp_path: Path) -> None:
    main([f"--model={runs[name]}", f"--protocol={protocol}", *QUICK, f"--output_dir={tmp_path / 'a'}"])
    done = record(tmp_path / "a")
    metric = "finetune_accuracy" if protocol == "mae_ft" else "linear_accuracy"
    assert done["metrics"]["test_images"] == 11
    assert done["metrics"][metric] * 11 == pytest.approx(round(done["metrics"][metric] * 11))
    assert done["cell"]["method"] == record(runs[name])["cell"]["method"]
    assert done["pretrained"]["method"] == name and done["protocol"].endswith(protocol)
    trained = load_file(tmp_path / "a" / "classifier.safetensors")
    if protocol != "mae_ft":
        assert all(key.startswith("head.") for key in trained)
    else:
        start = load_file(runs[name] / "model.safetensors")
        changed = [k for k, v in start.items() if not torch.equal(trained[f"method.{k}"], v)]
        assert changed and all(k.startswith("backbone.") for k in changed)


def test_the_method_stays_frozen_and_in_eval_mode(runs: dict[str, Path]) -> None:
    config = LinearConfig(output_dir="x", model=str(runs["simsiam_multi"]), cpu=True)
    method = load_method(config)
    classifier = Classifier(config, method, 3).train()
    assert not method.training and not method.backbone.bn1.training and classifier.head.training
    assert not any(p.requires_grad for p in method.parameters())
    written = load_file(runs["simsiam_multi"] / "model.safetensors")
    assert not any(name.startswith("bank.") for name in written)
    assert all(torch.equal(method.state_dict()[name], value) for name, value in written.items())


@pytest.mark.parametrize("protocol", ["offline", "mae_ft"])
def test_an_interrupted_training_ends_as_an_undisturbed_one(
    protocol: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = runs["mae" if protocol == "mae_ft" else "simsiam_multi"]
    flags = [f"--model={model}", f"--protocol={protocol}", *QUICK]
    main([*flags, f"--output_dir={tmp_path / 'whole'}"])

    def die(self: Run, step: int, state: object, real: Callable[..., None] = Run.checkpoint) -> None:
        real(self, step, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "checkpoint", die)
        with pytest.raises(KeyboardInterrupt):
            main([*flags, f"--output_dir={tmp_path / 'stopped'}"])
    main([*flags, f"--output_dir={tmp_path / 'stopped'}"])
    one, two = (load_file(tmp_path / name / "classifier.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert record(tmp_path / "whole")["metrics"] == record(tmp_path / "stopped")["metrics"]


def test_the_rates() -> None:
    offline = PROTOCOLS["offline"]
    assert [rate(offline, done) for done in (0, 0.59, 0.6, 0.8)] == pytest.approx([30, 30, 3, 0.3])
    assert rate(PROTOCOLS["simclr"], 0.25) == pytest.approx(0.075)
    lin = PROTOCOLS["mae_lin"]
    assert rate(lin, 0) == 0 and rate(lin, 10 / 90) == pytest.approx(0.2) and rate(lin, 1) == pytest.approx(0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--model NOWHERE", "no model.safetensors there: name the folder of a finished run"),
        ("--model RESNET --protocol mae_ft", "mae_ft is for ViTs, .* has a resnet18"),
        ("--model RESNET --lr 0", "--lr must be above 0"),
        ("--model RESNET --seed -1", "--seed must not be negative, got -1"),
        ("--model RESNET --pretrain_epochs 400", "--pretrain_epochs 400: .* has 2: leave it out"),
        ("--model RESNET --batch_size 25", "24 training images do not fill one batch of 25"),
    ],
)
def test_refused_before_anything_is_written(flags: str, said: str, runs: dict[str, Path], tmp_path: Path) -> None:
    flags = flags.replace("NOWHERE", str(tmp_path / "none")).replace("RESNET", str(runs["simsiam_multi"]))
    with pytest.raises(UserError, match=said):
        main([*flags.split(), "--num_workers=0", "--cpu", f"--output_dir={tmp_path / 'a'}"])
    assert not (tmp_path / "a").exists()


def one_step(config: LinearConfig, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """How the head's weight and bias move by a gradient of `scale`."""
    torch.manual_seed(0)
    classifier = Classifier(config, load_method(config), 3)
    layer, optimizer = classifier.head[-1], classifier.optimizer()
    torch.nn.init.ones_(layer.bias)
    before = layer.weight.detach().clone()
    layer.weight.grad, layer.bias.grad = torch.full_like(layer.weight, scale), torch.full_like(layer.bias, scale)
    optimizer.step()
    return layer.weight - before, layer.bias - 1


def test_lars_adapts_the_weight_and_not_the_bias(runs: dict[str, Path]) -> None:
    config = LinearConfig(output_dir="x", model=str(runs["mae"]), protocol="mae_lin", cpu=True)
    one, ten = one_step(config, 1), one_step(config, 10)
    torch.testing.assert_close(one[0], ten[0])
    torch.testing.assert_close(10 * one[1], ten[1])


def test_what_does_not_decay_in_fine_tuning(runs: dict[str, Path]) -> None:
    config = LinearConfig(output_dir="x", model=str(runs["mae"]), protocol="mae_ft", cpu=True)
    classifier = Classifier(config, load_method(config), 3)
    decays = {id(p): group["weight_decay"] for group in classifier.optimizer().param_groups for p in group["params"]}
    backbone, layer = classifier.method.backbone, classifier.head[-1]
    assert backbone.pos_embed.requires_grad  # mae's are trained here
    assert [decays[id(p)] for p in (backbone.cls_token, backbone.pos_embed, layer.bias)] == [0, 0, 0]
    assert decays[id(layer.weight)] == decays[id(backbone.patch_embed.proj.weight)] == 0.05


def test_different_pre_trainings_are_not_averaged(
    quick: list[str], flags_of: FlagsOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that differ in their seed alone are; a classifier takes its pre-training's seed."""
    for name, more in {"a": "--seed=3", "b": "--seed=4", "long": "--epochs=3", "fast": "--lr=0.1"}.items():
        pretrain([*quick, *flags_of("simsiam"), more, f"--output_dir={tmp_path / name}"])
        main([f"--model={tmp_path / name}", *QUICK, f"--output_dir={tmp_path / 'linear' / name}"])
    done = {name: record(tmp_path / "linear" / name) for name in ("a", "b", "long", "fast")}
    assert [r["seed"] for r in done.values()] == [r["pretrained"]["seed"] for r in done.values()] == [3, 4, 0, 0]
    assert done["a"]["config"]["pretrain_epochs"] == 2 and "lr=0.05" in done["a"]["config"]["pretrain_settings"].split()
    shown = "--rows method --columns data --metric linear_accuracy".split()
    places = {name: str(tmp_path / "linear" / name) for name in done}
    tables([places["a"], places["b"], *shown])
    assert "(2)" in capsys.readouterr().out
    with pytest.raises(UserError, match="mixes pretrain_epochs: 2, 3"):
        tables([places["a"], places["long"], *shown])
    with pytest.raises(UserError, match="mixes pretrain_settings"):
        tables([places["a"], places["fast"], *shown])
    main([f"--model={tmp_path / 'a'}", "--seed=7", *QUICK, f"--output_dir={tmp_path / 'own'}"])
    assert (record(tmp_path / "own")["seed"], record(tmp_path / "own")["pretrained"]["seed"]) == (7, 3)


def test_data_that_were_moved(
    runs: dict[str, Path], parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's own folders are gone: new ones are taken before the old ones are refused."""
    shutil.copytree(runs["simsiam_multi"], tmp_path / "run")
    args = tmp_path / "run" / "args.yaml"
    lines = [line for line in args.read_text().splitlines() if not line.startswith(("data_root", "data_path"))]
    args.write_text("\n".join([*lines, f"data_root: {tmp_path / 'old'}", f"data_path: {tmp_path / 'old' / 'c10'}"]))
    (tmp_path / "new").mkdir()
    model = {"output_dir": "x", "model": str(tmp_path / "run")}
    assert LinearConfig(**model, data_path=str(parquet)).trained.data_path == str(parquet)
    found = LinearConfig(**model, data_root=str(tmp_path / "new")).trained
    assert (found.data_root, found.data_path) == (str(tmp_path / "new"), None)
    monkeypatch.setenv("CONTRANORM_DATA", str(tmp_path / "new"))
    assert LinearConfig(**model).trained.data_root == str(tmp_path / "new")
