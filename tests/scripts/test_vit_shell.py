"""The shell of ViT_imagenet: what it would run, and that every line of it runs."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from repro.config import parse_config
from ViT_imagenet.config import Config
from ViT_imagenet.main import main

Hear = Callable[..., tuple[list[str], list[list[str]]]]  # the fixture's type


def parse(words: list[str], root: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(root)  # lines name configs relative to the repository
    flags = words[words.index("ViT_imagenet.main") + 1 :]
    return parse_config(Config, [*flags, "--output_dir=x"], prog="ViT_imagenet.main")


def test_run(hear: Hear, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, _ = hear(
        "ViT_imagenet/run.sh",
        "--scale",
        "0.1",
        "--depth",
        "24",
        CONFIG="imagenet100_tiny",
        PROCESSES="4",
    )
    (call,) = calls
    assert call.startswith("-m torch.distributed.run --standalone --nproc-per-node=4 -m ViT_imagenet.main")
    config = parse(call.split(), root, monkeypatch)
    assert (config.depth, config.scale, config.data_set) == (24, 0.1, "IMNET100")
    (plain,), _ = hear("ViT_imagenet/run.sh", "--norm", "vanilla")
    assert plain.startswith("-m ViT_imagenet.main --config ViT_imagenet/configs/cifar10_cpu.yaml --output_dir out/vit/")


def test_baselines(hear: Hear, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "ViT_imagenet/run_different_baselines.sh"
    calls, lines = hear(script, "--dry-run", SEEDS="0 1", SCALES="vanilla 0.1", FLAGS="--data-path /d", JOBS="3")
    assert calls == ["-m repro.sweep --results out/vit/imagenet100_tiny --jobs 3 --cluster local --dry-run"]
    configs = [parse(words, root, monkeypatch) for words in lines]
    assert {(c.depth, c.norm, c.scale, c.seed) for c in configs} == {
        (depth, norm, scale, seed)
        for depth in (12, 16, 24)
        for norm, scale in (("vanilla", None), ("contra", 0.1))
        for seed in (0, 1)
    }
    assert len(configs) == 12
    assert {c.data_path for c in configs} == {"/d"}
    (call,), _ = hear(script, RECORDS="done.jsonl")
    assert call.endswith("--cluster local --records [done.jsonl]")


RIVALS = "attn_scale feat_scale layer_scale gfsa neutreno resformer patch_diversity"


def test_variants(hear: Hear, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "ViT_imagenet/run_different_baselines.sh"
    variants = f"none {RIVALS} contranorm contranorm+gfsa"
    _, lines = hear(script, DEPTHS="12", SCALES="vanilla 0.1 0.2", SEEDS="0 1", VARIANTS=variants)
    methods = [parse(words, root, monkeypatch).label().method for words in lines]
    both = ["ContraNorm s=0.1", "ContraNorm s=0.2", "ContraNorm s=0.1 + GFSA", "ContraNorm s=0.2 + GFSA"]
    alone = ["AttnScale", "FeatScale", "LayerScale", "GFSA", "NeuTRENO", "ResFormer", "patch diversity"]
    assert methods[::2] == methods[1::2] == ["vanilla", *alone, *both]  # vanilla once, though SCALES has it too


def test_table2(hear: Hear, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "scripts/reproduce_table2.sh"
    calls, lines = hear(
        script,
        "--gpus_per_cell",
        "4",
        IMAGENET="/i",
        CLASS_LIST="/c",
        PROCESSES="4",
        CLUSTER="slurm",
        SCALES="vanilla 0.1",
        RECORDS="",
    )
    assert calls[:4] == ["-m repro.sweep --results results/table2/runs --jobs 2 --cluster slurm --gpus_per_cell 4"] * 4
    assert [call.split()[1:4] for call in calls[4:]] == [["repro.report.tables", "--preset", "table2"]]
    calls_with_records, _ = hear(script, CONFIGS="cifar10_cpu", RECORDS="done.jsonl")
    assert calls_with_records[0].endswith("--records [done.jsonl]")
    assert "--records [done.jsonl] --output results/table2/table2.md" in calls_with_records[1]
    configs = [parse(words, root, monkeypatch) for words in lines]
    assert len(configs) == 4 * 3 * 2
    assert all(words[:3] == ["torchrun", "--standalone", "--nproc-per-node=4"] for words in lines)
    assert {(c.model, c.data_set, c.class_list, c.data_path) for c in configs} == {
        (f"deit_{size}_patch16_224", data_set, listed, "/i")
        for size in ("tiny", "small")
        for data_set, listed in (("IMNET100", "/c"), ("IMNET", None))
    }


def test_table2_on_a_laptop(hear: Hear, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, lines = hear("scripts/reproduce_table2.sh", "--dry-run", PRESET="cpu", RECORDS="")
    configs = [parse(words, root, monkeypatch) for words in lines]
    assert {(c.data_set, c.depth, c.scale, c.seed) for c in configs} == {
        (data, depth, scale, seed)
        for data in ("CIFAR10", "TINY")
        for depth in (6, 12, 24)
        for scale in (None, 0.1, 0.5)
        for seed in (0, 1, 2)
    } and len(configs) == 54
    assert {c.epochs for c in configs} == {1} and all(c.probe for c in configs)
    with pytest.raises(subprocess.CalledProcessError, match="exit status 2"):
        hear("scripts/reproduce_table2.sh", PRESET="gpu")


def test_every_line_of_every_script_trains(
    hear: Hear, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step per line on eight images, each line's own flags otherwise; depth and image side cut to size."""
    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    buffer = io.BytesIO()
    Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)).save(buffer, format="JPEG")
    names = [f"n{i:03}" for i in range(100)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    for split in ("train", "validation"):
        rows = {"image": [{"bytes": buffer.getvalue(), "path": None}] * 8, "label": list(range(8))}
        path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    everything = {"DEPTHS": "1", "SCALES": "vanilla 0.1", "SEEDS": "0"}
    configs = "imagenet100_tiny imagenet1k_small cifar10_cpu cifar10_nano tiny_imagenet100_nano"
    _, lines = hear("scripts/reproduce_table2.sh", **everything, CONFIGS=configs)
    _, more = hear("ViT_imagenet/run_different_baselines.sh", **everything, CONFIG="tiny_imagenet100_cpu")
    lines += more
    _, more = hear("ViT_imagenet/run_different_baselines.sh", **everything, CONFIG="cifar10_cpu", VARIANTS=RIVALS)
    lines += more
    assert len(lines) == 12 + 7
    monkeypatch.chdir(root)
    for number, words in enumerate(lines):
        AcceleratorState._reset_state(reset_partial_state=True)  # of the line before: one precision per process
        main(
            [*words[3:], f"--data-path={tmp_path / 'data'}", "--epochs=1", "--batch_size=8", "--effective_batch=8",
             "--num_workers=0", "--cpu", "--input_size=32", "--max_train_samples=8",
             f"--output_dir={tmp_path / str(number)}"]
        )  # fmt: skip
        record = json.loads((tmp_path / str(number) / "record.json").read_text())
        assert record["metrics"]["test_images"] == 8
    AcceleratorState._reset_state(reset_partial_state=True)
