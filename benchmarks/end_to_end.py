"""The three experiments as a user runs them, each against its slow way: a Table 3 cell, a GLUE epoch, a DeiT epoch.

    python -m benchmarks.end_to_end --data_root data --json out/e2e.json

Cells are ordinary runs of the three mains in a temporary folder, a few epochs or steps of them; an epoch's time is the
difference of a longer and a shorter run, so that loading does not count; what starting a cell costs is measured by
itself. Work whose data is not there is left out, with a message.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common import Rows, goal, names_in, report
from repro.config import default_data_root, parse_config
from repro.errors import UserError, run_main

PARTS = ("cell", "startup", "glue", "deit")
SEEDS = 5


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
    """epochs of each run of the start-up measurement"""
    steps: int = 20
    """optimizer steps of the GLUE measurement, besides one to warm up"""
    images: int = 2000
    """training images of the DeiT measurement"""


def run_quietly(main: Any, arguments: list[str], folder: Path) -> Rows:
    """Run a main; the lines of its metrics.jsonl, and its record last."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        main([*arguments, "--output_dir", str(folder)])
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [*(json.loads(line) for line in lines), *records(folder)]


def records(folder: Path) -> Rows:
    """The records of all runs below a folder, by seed."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.rglob("record.json")]
    return sorted(found, key=lambda record: int(record["seed"]))


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


def startup(config: Config, scratch: Path) -> tuple[Rows, Rows]:
    """Whole cells, Cora at depth 2 on one thread: a fresh interpreter for each of five seeds against one sweep.

    Raises:
        RuntimeError: the two ways did not end in the same metrics.
    """
    common = ["-m", "gnn.main", "--data", "cora", "--data_root", config.data_root, "--nlayer", "2"]
    common += ["--epochs", str(config.epochs)]
    norms = {"no norm": [], "ContraNorm": ["--norm_mode", "CN", "--norm_scale", "1.0", "--use_layer_norm"]}
    rows: Rows = []
    for norm, flags in norms.items():
        fresh, sweep = scratch / f"{norm} fresh", scratch / f"{norm} sweep"
        cells = [[*common, *flags, "--seed", str(seed)] for seed in range(SEEDS)]
        seconds = {
            "a fresh interpreter per cell": run_processes(
                [[*cell, "--output_dir", str(fresh / cell[-1])] for cell in cells]
            ),
            "one sweep": run_processes(
                [["-m", "repro.sweep", "--results", str(sweep), "--jobs", "1", "--cluster", "local"]],
                lines="".join(shlex.join(["python", *cell]) + "\n" for cell in cells),
            ),
        }
        if [r["metrics"] for r in records(fresh)] != [r["metrics"] for r in records(sweep)]:
            raise RuntimeError(f"{norm}: cells of a sweep end in other metrics than the same commands run alone")
        slow = seconds["a fresh interpreter per cell"]
        work = f"Cora, depth 2, {norm}, {SEEDS} cells x {config.epochs} epochs"
        rows += [{"work": work, "way": way, "seconds": s, "times faster": slow / s} for way, s in seconds.items()]
    name = f"a cell of a sweep ({rows[1]['work']}): times faster than a fresh interpreter"
    return rows, [goal(name, rows[1]["times faster"], 2, at_least=True)]


def run_processes(commands: list[list[str]], lines: str = "") -> float:
    """Wall seconds of Python processes, one after another, on one thread each; `lines` is their standard input."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    for arguments in commands:
        subprocess.run(
            [sys.executable, *arguments], env=environment, input=lines, text=True, check=True, capture_output=True
        )
    return time.perf_counter() - start


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
    ways = {"vanilla": ["--norm", "vanilla"], "ContraNorm": ["--scale", "0.1"]}
    rate = {w: run_quietly(main, [*common, *f], scratch / w)[0]["images_per_second"] for w, f in ways.items()}
    rows = [
        {"work": "CIFAR-10, cifar10_cpu.yaml", "way": way, "images a second": r, "times faster": r / rate["vanilla"]}
        for way, r in rate.items()
    ]
    return rows, []


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(Config, argv, prog="benchmarks.end_to_end", description=__doc__ or "")
    names = names_in(config.only, PARTS)
    cora = "graphs/planetoid/Cora/raw"
    parts = {"cell": (cora, table3_cell), "startup": (cora, startup), "glue": ("glue/rte", glue_epoch)}
    parts["deit"] = ("images/cifar10", deit_epoch)
    rows: Rows = []
    goals: Rows = []
    for name in tqdm(names, desc="parts"):
        data, measure = parts[name]
        if not (Path(config.data_root) / data).exists():
            tqdm.write(f"{name} left out: no {data} below --data_root {config.data_root}")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            more_rows, more_goals = measure(config, Path(scratch))
        rows += more_rows
        goals += more_goals
    if not rows:
        raise UserError(f"--data_root {config.data_root}: none of the data is there; nothing was measured")
    report("end_to_end", rows, goals, config.json)


if __name__ == "__main__":
    run_main(main)
