"""The three experiments as a user runs them, each against its slow way: a Table 3 cell, a GLUE epoch, a DeiT epoch.

    python -m benchmarks.end_to_end --data_root ../shared/data --json out/e2e.json

Cells are ordinary runs of the three mains in a temporary folder, a few epochs or steps of them; an epoch's time is the
difference of a longer and a shorter run, so that loading does not count. Work whose data is not there is left out, and
said so.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common import goal, report
from repro.config import default_data_root, parse_config
from repro.errors import UserError, run_main

PARTS = ("cell", "seeds", "glue", "deit")
Rows = list[dict[str, Any]]


@dataclass
class Config:
    """Settings of the benchmark."""

    only: str = ",".join(PARTS)
    """parts, separated by commas"""
    json: str | None = None
    """file for the result"""
    data_root: str = field(default_factory=default_data_root)
    """folder with graphs/, glue/ and images/"""
    depth: int = 16
    """layers of the Table 3 cell"""
    epochs: int = 200
    """epochs of each run of the seeds measurement"""
    steps: int = 20
    """optimizer steps of the GLUE measurement, besides one to warm up"""
    images: int = 2000
    """training images of the DeiT measurement"""


def run_quietly(main: Any, arguments: list[str], folder: Path) -> list[dict[str, Any]]:
    """Run a main; the lines of its metrics.jsonl, and its record last."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        main([*arguments, "--output_dir", str(folder)])
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    return [*(json.loads(line) for line in lines), record]


def table3_cell(config: Config, scratch: Path) -> tuple[Rows, Rows]:
    """Seconds of an epoch of a Cora cell: the reference's order of work, and ours, exact and linear."""
    from gnn.main import main

    common = ["--config", "gnn/configs/cora.yaml", "--data_root", config.data_root, "--nlayer", str(config.depth)]
    common += ["--norm_mode", "CN", "--norm_scale", "1.0", "--use_layer_norm", "--checkpoint_every", "1000"]
    ways = {
        "plain, validation pass every epoch": ["--implementation", "plain", "--eval_every", "1"],
        "exact": ["--implementation", "auto"],
        "linear, degree 1": ["--implementation", "linear", "--degree", "1"],
        "linear, degree 2": ["--implementation", "linear"],
        "linear, degree 3": ["--implementation", "linear", "--degree", "3"],
    }
    seconds = {}
    for way, flags in ways.items():
        few, many = (2, 10) if "plain" in flags else (5, 45)
        short, long = (
            run_quietly(main, [*common, *flags, "--epochs", str(n)], scratch / f"{way}-{n}")[-1]["seconds"]
            for n in (few, many)
        )
        seconds[way] = (long - short) / (many - few)
    slow = seconds["plain, validation pass every epoch"]
    rows = [
        {"work": f"Cora, depth {config.depth}, one epoch", "way": way, "seconds": s, "times faster": slow / s}
        for way, s in seconds.items()
    ]
    best = max(rows, key=lambda row: float(row["times faster"]))
    return rows, [
        goal(f"Table 3 cell: times faster than plain ({best['way']})", best["times faster"], 5, at_least=True)
    ]


SEEDS = ("0", "1", "2")


def seeds_together(config: Config, scratch: Path) -> tuple[Rows, Rows]:
    """Whole commands, Cora at depth 2 on one thread: a process for each of three seeds against one for all."""
    common = ["--data", "cora", "--data_root", config.data_root, "--nlayer", "2", "--epochs", str(config.epochs)]
    norms = {"no norm": [], "ContraNorm": ["--norm_mode", "CN", "--norm_scale", "1.0", "--use_layer_norm"]}
    rows: Rows = []
    for norm, flags in norms.items():
        ways = {"a process per seed": [["--seed", s] for s in SEEDS], "one process": [["--seeds", ",".join(SEEDS)]]}
        taken = {}
        for way, calls in ways.items():
            folders = [scratch / f"{norm}-{way}-{n}" for n in range(len(calls))]
            taken[way] = run_processes(
                [[*common, *flags, *c, "--output_dir", str(f)] for c, f in zip(calls, folders, strict=True)]
            )
        slow = taken["a process per seed"][0]
        rows += [
            {"work": f"Cora, depth 2, {norm}, {len(SEEDS)} seeds x {config.epochs} epochs", "way": way,
             "seconds": wall, "CPU seconds": cpu, "times faster": slow / wall}
            for way, (wall, cpu) in taken.items()
        ]  # fmt: skip
    return rows, []


def run_processes(commands: list[list[str]]) -> tuple[float, float]:
    """Wall and CPU seconds of gnn.main's processes, one after another, on one thread each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    began, used = time.perf_counter(), cpu()
    for arguments in commands:
        line = [sys.executable, "-m", "gnn.main", *arguments]
        subprocess.run(line, env=environment, check=True, capture_output=True)
    return time.perf_counter() - began, cpu() - used


def glue_epoch(config: Config, scratch: Path) -> tuple[Rows, Rows]:
    """RTE examples per second with MiniLM and ContraNorm: the plain loop, and each improvement on top of the last."""
    from benchmarks.glue_epoch import measure

    rows = measure(config.data_root, config.steps, scratch)
    best = max(rows, key=lambda row: float(row["times faster"]))
    name = f"GLUE epoch: examples per second, times the slow way ({best['way']})"
    return rows, [goal(name, best["times faster"], 2.5, at_least=True)]


def deit_epoch(config: Config, scratch: Path) -> tuple[Rows, Rows]:
    """Images per second of the CIFAR-10 configuration, vanilla and with ContraNorm."""
    from ViT_imagenet.main import main

    common = ["--config", "ViT_imagenet/configs/cifar10_cpu.yaml", "--epochs", "1", "--max_test_samples", "100"]
    common += ["--data-path", str(Path(config.data_root) / "images" / "cifar10"), "--seed", "0"]
    common += ["--max-train-samples", str(config.images)]
    ways = {"vanilla": ["--norm", "layer"], "ContraNorm": ["--scale", "0.1"]}
    rate = {w: run_quietly(main, [*common, *f], scratch / w)[0]["images_per_second"] for w, f in ways.items()}
    rows = [
        {"work": "CIFAR-10, cifar10_cpu.yaml", "way": way, "images a second": r, "times faster": r / rate["vanilla"]}
        for way, r in rate.items()
    ]
    return rows, []


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(Config, argv, prog="benchmarks.end_to_end", description=__doc__ or "")
    names = config.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise UserError(f"--only: unknown part {unknown[0]!r}; there are {', '.join(PARTS)}")
    cora = "graphs/planetoid/Cora/raw"
    needs = {"cell": cora, "seeds": cora, "glue": "glue/rte", "deit": "images/cifar10"}
    parts = {"cell": table3_cell, "seeds": seeds_together, "glue": glue_epoch, "deit": deit_epoch}
    rows: Rows = []
    goals: Rows = []
    for name in tqdm(names, desc="parts"):
        if not (Path(config.data_root) / needs[name]).exists():
            tqdm.write(f"{name} left out: no {needs[name]} below --data_root {config.data_root}")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            more_rows, more_goals = parts[name](config, Path(scratch))
        rows += more_rows
        goals += more_goals
    if not rows:
        raise UserError(f"--data_root {config.data_root}: none of the data is there; nothing was measured")
    report("end_to_end", rows, goals, config.json)


if __name__ == "__main__":
    run_main(main)
