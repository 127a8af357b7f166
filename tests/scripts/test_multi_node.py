"""The job of several nodes, with SLURM's commands played by stand-ins on one node."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

STAND_INS = {"srun": 'exec "$@"', "scontrol": 'echo localhost; echo "asked: $*" >&2'}


def test_a_node_joins_its_rendezvous_and_runs_the_module(tmp_path: Path, root: Path) -> None:
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(root)}
    environment = {**os.environ, **slurm, "PORT": str(port), "PYTHON": sys.executable, "PROCESSES": "2"}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(root / "scripts/multi_node.sbatch"), "repro.report.readme", "--print_config"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("check: false") == 2  # both processes ran the module with its flags
    assert "requeue" not in done.stderr
    assert "asked: show hostnames node[1-2]" in done.stderr
