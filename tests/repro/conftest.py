"""A stand-in for an experiment that starts in no time, and records without training."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from repro.report.records import CELL_FIELDS
from repro.sweep import sweep

# Keeps a run folder as a real experiment does; `--do` tells what happens on the way. It counts its starts and its
# finished runs in files beside itself. No torch: a process takes hundredths of a second.
EXPERIMENT = r"""
import json, os, signal, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
here = os.path.dirname(os.path.abspath(__file__))
folder, name, do = flags["--output_dir"], flags["--name"], flags.get("--do", "")
os.makedirs(folder, exist_ok=True)
def note(file, text):
    with open(os.path.join(here, file), "a") as f:
        f.write(text + "\n")
note("starts", name)
note("pids", str(os.getpid()))
if do == "fail":
    print("Traceback ...\nboom: the last line of " + name, flush=True)
    sys.exit(3)
if do == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if do == "nothing":
    sys.exit(0)
if do == "stop":
    signal.signal(signal.SIGTERM, lambda *a: (note("saved", name), sys.exit(143)))
time.sleep(float(flags.get("--sleep", 0)))
record = {
    "schema": 1, "experiment": "fake", "protocol": "p", "selection": "last epoch", "metrics": {"accuracy": 0.5},
    "seed": 0, "config": {"name": name, "threads": os.environ.get("OMP_NUM_THREADS")}, "argv": sys.argv[1:],
}
with open(folder + "/.record.tmp", "w") as f:
    json.dump(record, f)
os.replace(folder + "/.record.tmp", folder + "/record.json")
note("finished", name)
"""


class Experiment:
    """The stand-in, its lines, and what it has noted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.script = folder / "experiment.py"
        self.script.write_text(EXPERIMENT)

    def line(self, name: str, **flags: object) -> str:
        words = "".join(f" --{flag} {value}" for flag, value in flags.items())
        return f"python -S {self.script} --name {name}{words}"

    def noted(self, what: str) -> list[str]:
        path = self.folder / what
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return Experiment(tmp_path)


@pytest.fixture
def run_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a sweep over lines in this process; returns its exit code."""

    def run(lines: list[str], *flags: str, cluster: str = "local") -> int:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return sweep.main(["--results", str(tmp_path / "results"), "--cluster", cluster, *flags])

    return run


@pytest.fixture
def write_records(tmp_path: Path):
    """Write records of one cell: one per metric value, seeds from 0, as repro.run.run would; returns their folder.

    Keywords that a cell has (data, model, method, order, depth, scale) go there, the others into the config.
    """

    def write(values, *, metric="test_accuracy", folder="runs", protocol="p", seeds=None, extra=None, **fields):
        cell = {name: fields.get(name) for name in CELL_FIELDS}
        config = {name: value for name, value in fields.items() if name not in cell}
        if extra and extra.get("experiment") == "gnn":  # a plain run, which published cells are of
            config = {"dropedge": 0.0, "residual": 0, "missing_rate": 0.0} | config
        for index, value in enumerate(values):
            seed = index if seeds is None else seeds[index]
            name = "-".join([*(str(v) for v in fields.values()), protocol, str(seed)])
            path = tmp_path / folder / name / "record.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            metrics = value if isinstance(value, dict) else {metric: value}
            record = {
                "schema": 2, "experiment": "fake", "cell": cell, "execution_fields": ["output_dir", "device"],
                "protocol": protocol, "selection": "last epoch", "metrics": metrics,
                "seed": seed, "config": {**config, "seed": seed, "output_dir": str(path.parent)},
                "seconds": 1.0, "peak_rss_mb": 1.0, "command": "python", "environment": {"commit": None},
                **(extra or {}),
            }  # fmt: skip
            path.write_text(json.dumps(record, indent=1))
        return str(tmp_path / folder)

    return write
