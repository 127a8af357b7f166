"""What a cell of a sweep costs: a fresh interpreter against a fork of one with torch imported, and one or two threads.

    python -m benchmarks.startup --data_root ../shared/data --json out/startup.json

The cells are Table 3's vanilla ones on Cora (digits, where Cora is absent), run as the sweep runs them, in turns. CPU
seconds are the better measure on a machine that is busy with other work.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common import Rows, goal, report
from repro.config import default_data_root, parse_config
from repro.errors import run_main
from repro.report.records import comparable
from repro.sweep.cell import make_cell
from repro.sweep.preload import Preloader
from repro.sweep.runner import PASSIVE_WAIT, CellRunner

# gnn.main, which takes one thread for a small graph, made to take those that it is given.
ANY_THREADS = "import sys, gnn.train, gnn.main; gnn.train.ONE_THREAD_BELOW = 0; gnn.main.main(sys.argv[1:])"
WAYS = {"1 thread": (1, True), "2 threads, waiting asleep": (2, True), "2 threads, spinning": (2, False)}


@dataclass
class Config:
    """Settings of the benchmark."""

    json: str | None = None
    """file for the result"""
    data_root: str = field(default_factory=default_data_root)
    """folder with graphs/"""
    rounds: int = 5
    """cells started in each way"""
    epochs: int = 200
    """epochs of a cell of the start-up measurement"""
    thread_epochs: int = 100
    """epochs of a cell of the measurement of threads"""


def flags(config: Config, depth: int, epochs: int) -> list[str]:
    """Flags of gnn.main for a vanilla cell."""
    cora = (Path(config.data_root) / "graphs" / "planetoid" / "Cora").is_dir()
    data = f"--data {'cora' if cora else 'digits'} --data_root {shlex.quote(config.data_root)} --device cpu"
    return shlex.split(f"{data} --norm_mode None --nlayer {depth} --epochs {epochs}")


def read_record(folder: Path) -> Any:
    """The record of a finished run."""
    return json.loads((folder / "record.json").read_text(encoding="utf-8"))


def startup(config: Config, scratch: Path) -> tuple[Rows, Rows]:
    """Wall and CPU seconds of a shallow cell, from its start by the sweep to its end."""
    line = shlex.join(["python", "-m", "gnn.main", *flags(config, 2, config.epochs)])
    taken: Rows = []
    records = {}
    with closing(Preloader()) as preloader:
        # The first start of a server, which imports for all cells, is not a cell's cost: round 0 is left out below.
        for turn, way in itertools.product(range(config.rounds + 1), ("fresh interpreter", "preloaded")):
            cell = make_cell(line, scratch / f"{turn}-{way[0]}")
            assert cell is not None
            runner = CellRunner(cell, threads=1, attempt_id="", cwd=os.getcwd())
            before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            runner.start(preloader if way == "preloaded" else None)
            while not runner.poll():
                time.sleep(0.002)
            after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
            records[way] = read_record(cell.folder)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            taken.append({"cell": "depth 2, vanilla", "way": way, "wall s": wall, "CPU s": cpu,
                          "training s": records[way]["seconds"]})  # fmt: skip
    table = pd.DataFrame(taken[2:]).groupby(["cell", "way"], sort=False).median()
    ratio = table.iloc[0] / table.iloc[1]
    equal = comparable(records["fresh interpreter"]) == comparable(records["preloaded"])
    return table.reset_index().to_dict("records"), [
        goal("cost of a cell, fresh / preloaded (wall)", float(ratio["wall s"]), 2, at_least=True),
        goal("cost of a cell, fresh / preloaded (CPU)", float(ratio["CPU s"]), 2, at_least=True),
        goal("equal records", float(equal), 1, at_least=True),
    ]


def start(words: list[str], folder: Path, count: int, passive: bool = True) -> subprocess.Popen[bytes]:
    """A cell on so many threads, which sleep or spin while they wait for each other."""
    environment = {name: value for name, value in os.environ.items() if name not in PASSIVE_WAIT}
    return subprocess.Popen(
        [sys.executable, "-c", ANY_THREADS, *words, "--output_dir", str(folder)],
        env=environment | {"OMP_NUM_THREADS": str(count)} | (PASSIVE_WAIT if passive else {}),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def threads(config: Config, scratch: Path) -> tuple[Rows, Rows]:
    """Training seconds of a cell on two cores, alone and beside another cell, by its threads and how they wait."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    taken: Rows = []
    for turn, way, column in itertools.product(range(3), WAYS, ("alone s", "beside another s")):
        folder = scratch / f"{turn} {way} {column}"
        neighbour = start(flags(config, 8, 10**6), folder / "other", 1) if column != "alone s" else None
        try:
            while neighbour and not (folder / "other" / "metrics.jsonl").exists() and neighbour.poll() is None:
                time.sleep(0.1)
            start(flags(config, 8, config.thread_epochs), folder, *WAYS[way]).wait()
        finally:
            if neighbour:
                neighbour.kill()
                neighbour.wait()
        taken.append({"cell": "depth 8, vanilla", "way": way, column: read_record(folder)["seconds"]})
    table = pd.DataFrame(taken).groupby(["cell", "way"], sort=False).median()
    _, two, spinning = table["beside another s"].tolist()
    goals = [goal("beside another cell, 2 spinning threads / 2 that sleep", spinning / two, 1, at_least=True)]
    return table.reset_index().to_dict("records"), goals


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(Config, argv, prog="python -m benchmarks.startup", description=__doc__ or "")
    with tempfile.TemporaryDirectory() as folder:
        measured = [part(config, Path(folder) / part.__name__) for part in (startup, threads)]
    rows, goals = ([row for part in parts for row in part] for parts in zip(*measured, strict=True))
    report("startup", rows, goals, config.json)


if __name__ == "__main__":
    run_main(main)
