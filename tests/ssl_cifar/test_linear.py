"""Classifiers on finished runs: each protocol, resuming, the rates, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from repro.errors import UserError
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
        ("--model RESNET --batch_size 25", "24 training images do not fill one batch of 25"),
    ],
)
def test_refused_before_anything_is_written(flags: str, said: str, runs: dict[str, Path], tmp_path: Path) -> None:
    flags = flags.replace("NOWHERE", str(tmp_path / "none")).replace("RESNET", str(runs["simsiam_multi"]))
    with pytest.raises(UserError, match=said):
        main([*flags.split(), "--num_workers=0", "--cpu", f"--output_dir={tmp_path / 'a'}"])
    assert not (tmp_path / "a").exists()
