"""Two processes under torchrun, one of which is killed: the other ends, the error names the rank, the run resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

# Two processes that add up their ranks by gloo, step by step, through Run; judged by record.json.
PAIR = """
import os, pathlib, sys, time, torch
import torch.distributed as dist
from dataclasses import dataclass
from repro.config import CellLabel, RunConfig, parse_config
from repro.errors import run_main
from repro.run.run import Run

@dataclass(kw_only=True)
class Config(RunConfig):
    def label(self):
        return CellLabel(data="d", model="m", method="vanilla")

def main():
    config = parse_config(Config, prog="pair")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    assert dist.get_world_size() == 2
    with Run(config.output_dir, "pair", config, main=rank == 0) as run:
        if run.done:
            return
        start, state = run.restore() or (0, {"x": torch.zeros(1)})
        x = state["x"]
        pathlib.Path(config.output_dir).mkdir(exist_ok=True)  # rank 1 may be here before rank 0 has made it
        (pathlib.Path(config.output_dir) / f"pid-{rank}").write_text(str(os.getpid()))
        for step in range(start, 40):
            time.sleep(0.1)
            y = torch.tensor([step * (rank + 1.0)])
            dist.all_reduce(y)
            x = x + y
            run.checkpoint(step + 1, {"x": x})
        run.finish({"x": x[0], "start": start}, protocol="p", selection="last")
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort an interpreter that is leaving

run_main(main)
"""


def _pair(script: Path, output: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with open(log, "wb") as file:
        return subprocess.Popen(
            [*command, str(script), "--output_dir", str(output)], stdout=file, stderr=subprocess.STDOUT
        )


@pytest.mark.timeout(900)
def test_one_of_two_processes_dies(tmp_path: Path, figures: dict[str, Any]) -> None:
    script, output = tmp_path / "pair.py", tmp_path / "run"
    script.write_text(PAIR, encoding="utf-8")
    process = _pair(script, output, tmp_path / "log1")
    deadline = time.monotonic() + 250
    while not list(output.glob("checkpoints/step-*")) or not (output / "pid-1").exists():
        assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "log1").read_text()
        time.sleep(0.05)
    victims = [int((output / f"pid-{rank}").read_text()) for rank in (0, 1)]
    killed = time.monotonic()
    os.kill(victims[1], signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    seconds = time.monotonic() - killed
    assert not [pid for pid in victims if psutil.pid_exists(pid)], "a process was left behind"
    told = (tmp_path / "log1").read_text()
    assert "Signal 9 (SIGKILL) received by PID" in told
    assert not (output / "record.json").exists()
    process = _pair(script, output, tmp_path / "log2")
    process.wait(timeout=250)
    record = json.loads((output / "record.json").read_text())
    assert record["metrics"]["x"] == sum(3 * step for step in range(40)) and record["metrics"]["start"] > 0
    assert seconds < 60
    figures["one of two processes killed"] = {
        "kills": 1,
        "seconds until the other ended": round(seconds, 1),
        "resumed to the undisturbed result": 1,
    }
