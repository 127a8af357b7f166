"""The shell of SSL_cifar: what it would run, and that every line of it runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from SSL_cifar.config import Config
from SSL_cifar.main import main, parse
from tests.scripts.conftest import Hear

RUN, MANY = "SSL_cifar/run_baselines.sh", "SSL_cifar/run_different_baselines.sh"
ROOM = Path(__file__).parents[2] / "SSL_cifar"
# What cuts a documented run down to one step on eight images; ViTs keep their patches' number per side.
SMALL = "--max_train_samples 8 --max_test_samples 8 --batch_size 8 --epochs 1 --warmup_epochs 0 --num_workers 0 --cpu"


def flags_after(words: list[str], program: str = "SSL_cifar.main") -> list[str]:
    return words[words.index(program) + 1 :]


def settings(words: list[str], root: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(root)  # lines name configs relative to the repository
    given = flags_after(words)
    return parse(given if "--output_dir" in given else [*given, "--output_dir=x"])


def test_the_authors_example(hear: Hear, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = "rdm_simsiam cifar10 400 -- --pred_type poly --pred_location target --sigma -1".split()
    (call,), _ = hear(RUN, *example)
    config = settings(call.split(), root, monkeypatch)
    assert (config.method, config.data_set, config.epochs, config.seed) == ("rdm_simsiam", "CIFAR10", 400, 0)
    assert (config.pred_type, config.pred_location, config.sigma) == ("poly", "target", -1.0)
    assert (config.backbone, config.stem, config.width, config.lr) == ("resnet18", "cifar_pad2", 64, 0.5)
    assert config.output_dir.startswith("out/ssl/simsiam_cifar-rdm_simsiam")


def test_one_run(hear: Hear, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (call,), _ = hear(RUN, "byol", "cifar100", "7", "3", PROCESSES="2", OUTPUT_DIR="o")
    assert call.startswith("-m torch.distributed.run --standalone --nproc-per-node=2 -m SSL_cifar.main")
    config = settings(call.split(), root, monkeypatch)
    assert (config.method, config.data_set, config.epochs, config.seed) == ("byol", "CIFAR100", 7, 3)
    assert (config.opt, config.augment, config.output_dir) == ("larc", "solo_cifar_byol", "o")
    (call,), _ = hear(RUN, "simclr_attn", "imagenet100", "--", "--beta", "4")
    config = settings(call.split(), root, monkeypatch)
    assert (config.crop_size, config.data_set, config.beta) == (224, "IMNET100", 4.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("simsiam", "METHOD and DATA are missing"),
        ("simsiam mars", "DATA mars is none of"),
        ("simsiam cifar10 1 0 --sigma 1", "flags come after --"),
        ("mae cifar10", "no SSL_cifar/configs/mae_cifar.yaml"),
    ],
)
def test_bad_arguments(arguments: str, said: str, root: Path, python: str) -> None:
    done = subprocess.run(
        ["bash", str(root / RUN), *arguments.split()], capture_output=True, text=True,
        env={"PYTHON": python, "PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_many_runs(hear: Hear, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, lines = hear(MANY, "--dry-run", METHODS="rdm_simsiam", SEEDS="0 1", JOBS="3", CONFIG="siamese_cpu")
    assert calls == ["-m repro.sweep --results out/ssl/siamese_cpu --jobs 3 --cluster local --dry-run"]
    configs = [settings(words, root, monkeypatch) for words in lines]
    knobs = {(c.pred_type, c.pred_location, c.sigma) for c in configs}
    assert knobs == {("poly", "online", 1.0), ("log_1", "online", 1.0)} | {
        ("poly", "target", sigma) for sigma in (-1.0, -0.7, -0.5, -0.3)
    }
    assert len(configs) == 12 and not any(c.negative_control for c in configs)
    _, lines = hear(
        MANY, METHODS="simsiam simsiam_multi simclr_attn arcl", LAMBDAS="0 0.5", BETAS="1 4", VIEWS="2 4", SEEDS="0",
        CONFIG="simsiam_cifar", DATASETS="CIFAR10 CIFAR100", BACKBONES="resnet18 resnet50", FLAGS="--cpu",
    )  # fmt: skip
    configs = [settings(words, root, monkeypatch) for words in lines]
    assert len(configs) == 4 * 7 and all(c.cpu for c in configs)
    assert {c.lam for c in configs if c.method == "simsiam_multi"} == {0, 0.5}
    _, lines = hear(MANY, METHODS="simclr", PROCESSES="4", SEEDS="0")
    assert lines[0][:4] == ["torchrun", "--standalone", "--nproc-per-node=4", "-m"]


def test_contranorm_has_the_other_signs(hear: Hear, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, lines = hear(
        MANY, METHODS="rdm_byol", SEEDS="0", CONFIG="siamese_cpu", PRED_TYPES="contranorm", SIGMAS="-1 0 0.5 1"
    )
    configs = [settings(words, root, monkeypatch) for words in lines]
    assert {(c.pred_type, c.pred_location, c.sigma) for c in configs} == {
        ("contranorm", side, sigma)
        for side, sigma in (("online", -1), ("online", 0), ("target", 0), ("target", 0.5), ("target", 1))
    }


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PRED_TYPES", "poly pollly", "PRED_TYPES knows poly, log, log_1, log_2 and contranorm, not pollly"),
        ("PRED_LOCATIONS", "left", "PRED_LOCATIONS knows online and target, not left"),
    ],
)
def test_unknown_knobs(name: str, value: str, said: str, root: Path, python: str) -> None:
    done = subprocess.run(
        ["bash", str(root / MANY), "--dry-run"], capture_output=True, text=True,
        env={"PYTHON": python, "PATH": os.environ["PATH"], name: value},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, f"error: {said}\n")


def documented_lines() -> list[str]:
    """Every SSL_cifar.main line of the README, the config files and the shell scripts."""
    found = []
    for path in [ROOM / "README.md", *ROOM.glob("configs/*.yaml"), *ROOM.glob("*.py")]:
        text = re.sub(r"(\\\n|\n# )\s*", " ", path.read_text())  # a line that goes on in the next
        found += re.findall(r"SSL_cifar\.main( +-[^\n`\"#|(]*)", text)
    return sorted({line.strip() for line in found if not re.search(r"[$\[{…]|\.\.\.|centres|NAME", line)})


def test_config_files_are_datasheets() -> None:
    for path in ROOM.glob("configs/*.yaml"):
        for word in ("hardware", "time", "expect", "command"):
            assert f"# {word}" in path.read_text().lower(), path.name


def test_every_documented_line_trains_one_step(
    hear: Hear, root: Path, tmp_path: Path, make_parquet: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line's own flags, on eight small images: full-size networks get a width of 4."""
    monkeypatch.chdir(root)
    parquet = make_parquet(train=8, test=8)
    lines = [shlex.split(line) for line in documented_lines()]
    lines += [flags_after(call.split()) for (call,) in (hear(RUN, *line.split())[0] for line in shell_lines())]
    assert len(lines) > 12
    for number, words in enumerate(lines):
        config = parse(words)
        folder = tmp_path / str(number)
        small = [*SMALL.split(), f"--data_path={parquet}", "--data_set=CIFAR10", f"--output_dir={folder}"]
        if config.backbone.startswith("resnet"):
            small += ["--width=4", "--crop_size=32", "--proj_output_dim=16", "--proj_hidden_dim=16"]
        else:
            small += ["--backbone=vit_micro", f"--crop_size={2 * config.patch_size}"]
        if config.method == "moco":
            small.append("--queue_size=8")
        AcceleratorState._reset_state(reset_partial_state=True)  # of the line before: one precision per process
        plain = [word for word in words if not word.startswith("--class_list")]
        main([*plain, *small, *(["--plain_epochs=1", "--epochs=2"] if config.method == "simsiam_multi" else [])])
        assert json.loads((folder / "record.json").read_text())["metrics"]["test_images"] == 8
    AcceleratorState._reset_state(reset_partial_state=True)


def shell_lines() -> list[str]:
    """The arguments of every run_baselines.sh line in the README and the scripts."""
    text = "\n".join(path.read_text() for path in [ROOM / "README.md", *ROOM.glob("*.sh")])
    line = r"^[ #]*bash SSL_cifar/run_baselines\.sh ([a-z_]+ [a-z0-9]+(?: \d+)*(?: -- [^\n#]*)?)"
    return sorted({found.strip() for found in re.findall(line, text, re.MULTILINE)})
