"""scripts/reproduce_ssl.sh: its plans, that each line of it trains, and that claims and tables find its runs."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from repro.config import parse_config
from repro.report import figures, tables
from SSL_cifar import plan, tokens
from SSL_cifar.claims import CLAIMS
from SSL_cifar.main import main, parse
from tests.image_sets import datasets_cache, make_parquet  # noqa: F401

Hear = Callable[..., tuple[list[str], list[list[str]]]]
SCRIPT = "scripts/reproduce_ssl.sh"
TRAIN, CLUSTER = ["python", "-m", "SSL_cifar.main"], ["python", "-m", "SSL_cifar.tokens"]


@pytest.fixture
def heard(hear: Hear, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """heard(PARTS=...) → the lines of the small preset; the centres that they name are there."""
    monkeypatch.chdir(root)  # lines name configs relative to the repository

    def run(*arguments: str, **variables: str) -> list[list[str]]:
        results = tmp_path / "ssl" / "runs"
        _, lines = hear(SCRIPT, *(arguments or ("--dry-run",)), RESULTS=str(results), RECORDS="", **variables)
        for words in (words for words in lines if words[:3] == CLUSTER):
            config = parse_config(tokens.FitConfig, words[3:], prog="tokens")
            folder = Path(config.output_dir)
            if not folder.exists() and config.teacher is None:
                folder.mkdir(parents=True)
                patches = tokens.build_patches(config)
                centres = torch.randn(config.k, 3 * config.patch_size**2)
                tokens.save_tokenizer(folder / tokens.CENTRES, tokens.Tokenizer(patches, centres))
        return lines

    return run


def without(words: list[str], *names: str) -> tuple[str, ...]:
    """The words of a line without some flags and their values."""
    return tuple(w for w, before in zip(words, ["", *words], strict=False) if w not in names and before not in names)


def test_the_small_preset_is_the_plan(heard):
    lines = heard()
    folders = [words[words.index("--output_dir") + 1] for words in lines]
    assert len(set(folders)) == len(lines)
    parts = Counter(Path(folder).parent.name for folder in folders)
    assert parts == {"rdm": 6 * 3 + 4, "attn": 9, "arcl": 6, "multi": 6, "tokens": 6, "mim": 7, "ar": 10}
    order = [Path(folder).parent.name for folder in folders]
    assert order.index("mim") > order.index("tokens") and order.index("ar") > order.index("tokens")
    teacher, features = (next(i for i, f in enumerate(folders) if n in f) for n in ("attn/simclr-seed0", "features50"))
    assert teacher < features
    assert {int(words[words.index("--seed") + 1]) for words in lines if "--seed" in words} == {0, 1, 2}


def test_parts_seeds_and_flags_choose_the_lines(heard):
    lines = heard(PARTS="rdm tokens", SEEDS="7", FLAGS="--data_path /x")
    assert {Path(w[w.index("--output_dir") + 1]).parent.name for w in lines} == {"rdm", "tokens"}
    trained = [words for words in lines if words[:3] == TRAIN]
    assert len(trained) == 8 and all("7" == w[w.index("--seed") + 1] and "/x" in w for w in trained)
    assert not any("features" in " ".join(words) for words in heard(PARTS="mim tokens"))  # no trained network


@pytest.mark.parametrize(("name", "value"), [("PRESET", "gpu"), ("PARTS", "rdm gnn")])
def test_an_unknown_preset_or_part_is_refused(root, name, value):
    import os
    import subprocess

    done = subprocess.run(
        ["bash", str(root / SCRIPT), "--dry-run"], env={**os.environ, name: value}, capture_output=True, text=True
    )
    assert done.returncode == 2 and name in done.stderr and len(done.stderr.splitlines()) == 1


def test_claims_and_tables_name_runs_of_the_plan(heard, hear, root):
    """Every arm of every claim, and every base of a table, is the label of some line."""
    settings = [parse([*words[3:]]) for words in heard() if words[:3] == TRAIN and "features50" not in " ".join(words)]
    labels = {(config.label().method, config.epochs) for config in settings}
    names = {name for name, _ in labels}
    for claim in CLAIMS:
        assert claim.arm in names, claim.arm
        assert claim.base is None or claim.base in names, claim.base
        assert claim.epochs is None or (claim.base, claim.epochs) in labels
    bases = re.findall(r'^    table \w+ "?([^"\n]*?)"?(?: [a-z_]+)*$', (root / SCRIPT).read_text(), re.MULTILINE)
    assert len(bases) == 6 and set(bases) <= names


@pytest.fixture(scope="module")
def images(make_parquet) -> Path:  # noqa: F811
    return make_parquet(train=16, test=8)


def test_every_line_trains_for_a_step(heard, images, tmp_path):
    """Lines that differ in their seed alone once; 16 images, batches of 8."""
    small = f"--data_set CIFAR10 --data_path {images} --max_train_samples 16 --num_workers 0"
    once: dict[tuple[str, ...], list[str]] = {}
    for words in heard():
        once.setdefault(without(words, "--seed", "--output_dir"), words)
    done = 0
    for words in once.values():
        output = words[words.index("--output_dir") + 1]
        if words[:3] == TRAIN:
            flags = f"{small} --batch_size 8 --epochs 2 --warmup_epochs 0 --unscaled_lr --lr 0.01"
            flags += " --width 4" if "vit" not in Path(words[4]).read_text() else ""
            flags += " --plain_epochs 1" if "--plain_epochs" in words else ""
            main([*words[3:], *flags.split()])
            assert (Path(output) / "model.safetensors").exists()
        else:
            for old in Path(output).glob("*"):
                old.unlink()
            tokens.main([*words[3:], *small.split(), "--k", "5"])
            assert (Path(output) / tokens.CENTRES).exists()
        done += (Path(output) / "record.json").exists()
    assert done == len(once) == 31


# -- the published sizes -----------------------------------------------------------------------------------------------


def paper(root: Path, hear: Hear, monkeypatch: pytest.MonkeyPatch, **variables: str) -> list[str]:
    """What PRESET=paper --dry-run prints."""
    monkeypatch.chdir(root)
    calls, lines = hear(SCRIPT, "--dry-run", PRESET="paper", RECORDS="", RESULTS="nowhere", **variables)
    assert [call.split()[1] for call in calls] == ["SSL_cifar.plan"]
    return list(plan.lines((shlex.join(words) for words in lines), tflops=20))


def test_each_published_accuracy_has_a_line_with_three_seeds_and_hours(hear, root, monkeypatch):
    *lines, last = paper(root, hear, monkeypatch, PARTS="multi attn")
    assert len(lines) == 24 and last.startswith("24 published accuracies; ")
    found = [re.search(r"  # seeds 0 1 2; published ([\d.]+); ([\d.]+) GPU hours each$", line) for line in lines]
    assert all(found)
    first = next(line for line in lines if "CIFAR10 " in line and "--method simsiam " in line and "resnet18" in line)
    assert "published 83.8;" in first
    total = sum(3 * float(match[2]) for match in found)
    assert float(re.search(r"; (\d+) GPU hours", last)[1]) == pytest.approx(total, abs=10)


def test_what_is_not_published_says_so(hear, root, monkeypatch):
    lines = paper(root, hear, monkeypatch, PARTS="rdm tokens mim", SEEDS="0", DATASETS="CIFAR10")
    assert lines[-1].startswith("0 published accuracies")
    told = Counter(line.split("  # ")[1].split("; ")[1] for line in lines[:-1])
    assert set(told) == {"none published", "no training"} and told["no training"] == 2
    assert any("hours not known before its tokens" in line for line in lines)


def test_the_estimate_grows_with_what_is_computed():
    def hours(*flags: str) -> float:
        return plan.gpu_hours(parse(["--output_dir=x", *flags]), 20.0)

    once = hours("--method", "simclr")
    assert hours("--method", "simclr", "--epochs", "400") == pytest.approx(2 * once)
    assert hours("--method", "arcl", "--num_views", "8") == pytest.approx(4 * once, rel=0.01)
    assert hours("--method", "simclr", "--max_train_samples", "5000") == pytest.approx(once / 10)
    assert hours("--method", "simclr", "--backbone", "resnet50") > 2 * once
    vit = ("--method", "mae", "--backbone", "vit_tiny")
    assert hours(*vit, "--mask_ratio", "0.9") < hours(*vit, "--mask_ratio", "0.5")


def test_the_report_reads_what_was_run(heard, hear, root, tmp_path):
    """The commands after the sweep parse, and are about the parts that have records."""
    runs = tmp_path / "ssl" / "runs"
    (runs / "multi" / "x").mkdir(parents=True)
    (runs / "multi" / "x" / "record.json").write_text("{}")
    (tmp_path / "ssl" / "ar").mkdir()
    (tmp_path / "ssl" / "ar" / "records.jsonl").write_text("")
    calls, _ = hear(SCRIPT, PARTS="multi ar", RESULTS=str(runs))
    reports = [call.split(maxsplit=2) for call in calls if "repro.sweep" not in call]
    assert Counter(words[1] for words in reports) == {
        "repro.report.tables": 7, "repro.report.figures": 5, "SSL_cifar.claims": 1,
    }  # fmt: skip
    for _, module, flags in reports:
        words = shlex.split(re.sub(r"--against (.*?) --metric", r"--against '\1' --metric", flags))
        if module != "SSL_cifar.claims":
            parse_config(
                {"repro.report.tables": tables, "repro.report.figures": figures}[module].Config, words, prog=module
            )
    claims = next(flags for _, module, flags in reports if module == "SSL_cifar.claims")
    assert f"[{runs}/multi,{tmp_path}/ssl/ar/records.jsonl]" in claims
