"""What a cell of a sweep costs: a fresh interpreter against a fork of one with torch imported, and one or two threads.

    python -m benchmarks.startup --data_root ../shared/data --json out/startup.json

The cells are Table 3's vanilla ones on Cora (digits, where Cora is absent), run as the sweep runs them, in turns. CPU
seconds are the better measure on a machine that is busy with other work.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import goal, report
from repro.config import default_data_root, parse_config
from repro.errors import run_main
from repro.report.records import comparable
from repro.sweep.cell import make_cell
from repro.sweep.preload import Preloader
from repro.sweep.runner import PASSIVE_WAIT, CellRunner

# gnn.main, which takes one thread for a small graph, made to take those that it is given.
ANY_THREADS = "import sys, gnn.train, gnn.main; gnn.train.ONE_THREAD_BELOW = 0; gnn.main.main(sys.argv[1:])"
Rows = list[dict[str, Any]]


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


def flags(config: Config, *, depth: int, epochs: int, seed: int = 0) -> list[str]:
    """Flags of gnn.main for a vanilla cell."""
    cora = (Path(config.data_root) / "graphs" / "planetoid" / "Cora").is_dir()
    values = {"data": "cora" if cora else "digits", "data_root": config.data_root, "nlayer": depth, "epochs": epochs,
              "seed": seed, "norm_mode": "None", "device": "cpu"}  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a finished run."""
    found: dict[str, Any] = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    return found


def startup(config: Config, scratch: Path) -> tuple[Rows, Rows]:
    """Wall and CPU seconds of a shallow cell, from its start by the sweep to its end."""
    preloader = Preloader()
    line = " ".join(["python -m gnn.main", *flags(config, depth=2, epochs=config.epochs)])
    taken: dict[str, list[tuple[float, float]]] = {"fresh interpreter": [], "preloaded": []}
    records: dict[str, dict[str, Any]] = {}
    try:
        for turn in range(config.rounds + 1):
            for way in taken:
                cell = make_cell(line, scratch / f"{turn}-{way[0]}")
                assert cell is not None
                runner = CellRunner(cell, threads=1, attempt_id="", cwd=os.getcwd())
                before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
                runner.start(preloader if way == "preloaded" else None)
                while not runner.poll():
                    time.sleep(0.002)
                after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
                cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                records[way] = read_record(cell.folder)
                if turn:  # the first start of a server, which imports for all cells, is not a cell's cost
                    taken[way].append((wall, cpu))
    finally:
        preloader.close()
    rows = [
        {"cell": "depth 2, vanilla", "way": way, "wall s": statistics.median(wall for wall, _ in times),
         "CPU s": statistics.median(cpu for _, cpu in times), "training s": records[way]["seconds"]}
        for way, times in taken.items()
    ]  # fmt: skip
    equal = comparable(records["fresh interpreter"]) == comparable(records["preloaded"])
    return rows, [
        goal("cost of a cell, fresh / preloaded (wall)", rows[0]["wall s"] / rows[1]["wall s"], 2, at_least=True),
        goal("cost of a cell, fresh / preloaded (CPU)", rows[0]["CPU s"] / rows[1]["CPU s"], 2, at_least=True),
        goal("equal records", float(equal), 1, at_least=True),
    ]


@contextmanager
def neighbour(config: Config, scratch: Path) -> Iterator[None]:
    """Another cell, busy until the end of the block."""
    words = flags(config, depth=8, epochs=1_000_000)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "gnn.main", *words, "--output_dir", str(scratch)],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not (scratch / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()


def threads(config: Config, scratch: Path) -> tuple[Rows, Rows]:
    """Training seconds of a cell on two cores, alone and beside another cell, by its threads and how they wait."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

    def seconds(count: int, passive: bool, name: str) -> float:
        folder = scratch / name
        environment = {k: v for k, v in os.environ.items() if k not in PASSIVE_WAIT}
        environment |= {"OMP_NUM_THREADS": str(count)} | (PASSIVE_WAIT if passive else {})
        words = flags(config, depth=8, epochs=config.thread_epochs)
        subprocess.run(
            [sys.executable, "-c", ANY_THREADS, *words, "--output_dir", str(folder)],
            env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return float(read_record(folder)["seconds"])

    ways = {"1 thread": (1, True), "2 threads, waiting asleep": (2, True), "2 threads, spinning": (2, False)}
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for turn in range(3):
        for way, (count, passive) in ways.items():
            name = f"{turn}-{count}-{passive}"
            alone = seconds(count, passive, f"alone-{name}")
            with neighbour(config, scratch / f"neighbour-{name}"):
                taken[way].append((alone, seconds(count, passive, f"beside-{name}")))
    rows = [
        {"cell": "depth 8, vanilla", "way": way, "alone s": statistics.median(alone for alone, _ in times),
         "beside another s": statistics.median(beside for _, beside in times)}
        for way, times in taken.items()
    ]  # fmt: skip
    _, two, spinning = (row["beside another s"] for row in rows)
    return rows, [
        goal("beside another cell, 2 spinning threads / 2 that sleep", spinning / two, 1, at_least=True),
    ]


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(Config, argv, prog="python -m benchmarks.startup", description=__doc__ or "")
    with tempfile.TemporaryDirectory() as folder:
        measured = [part(config, Path(folder) / part.__name__) for part in (startup, threads)]
    rows, goals = ([row for part in parts for row in part] for parts in zip(*measured, strict=True))
    report("startup", rows, goals, config.json)


if __name__ == "__main__":
    run_main(main)
