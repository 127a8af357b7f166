"""`scripts/multi_node.sbatch` on a real SLURM: near its time limit, or preempted, a job saves and is queued again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Until = Callable[[Callable[[], object], float, str], None]


@pytest.fixture
def submit(cluster: Any, python: str, tmp_path: Path, root: Path, until: Until) -> Callable[..., str]:
    """Submits a job that waits in the middle for the file `go`; returns its number once it is there."""

    def start(port: int, restarts: int = 20) -> str:
        variables = {"PYTHON": python, "PYTHONPATH": Path(__file__).parent, "PORT": port, "RESTARTS": restarts}
        job = cluster.ask(
            "sbatch", "--parsable", "--mem=500", f"--chdir={root}", f"--output={tmp_path / 'log'}",
            f"--export=ALL,{','.join(f'{name}={value}' for name, value in variables.items())}",
            str(root / "scripts/multi_node.sbatch"), "cell", "--seed=1", f"--until={tmp_path / 'go'}",
            f"--output_dir={tmp_path / 'run'}",
        )  # fmt: skip
        state = tmp_path / "run" / "state.json"
        until(lambda: state.exists() and json.loads(state.read_text())[0] == 2, 60, "the step in which the run waits")
        return str(job)

    return start


@pytest.mark.parametrize("event", ["time limit", "preemption"])
def test_a_stopped_job_saves_and_is_queued_again(
    event: str, cluster: Any, submit: Callable[..., str], tmp_path: Path, until: Until
) -> None:
    job = submit(29617 if event == "preemption" else 29618)
    if event == "preemption":
        cluster.ask(
            "sbatch", "--partition=urgent", "--cpus-per-task=4", "--mem=500", "--wrap=true", "--output=/dev/null"
        )
    else:
        cluster.ask("scancel", "--batch", "--signal=USR2", job)  # what SLURM sends two minutes before the end
    until(lambda: len((tmp_path / "run" / "starts.txt").read_text().split()) == 2, 120, "the second start")
    (tmp_path / "go").touch()
    until(lambda: cluster.jobs()[job] == "COMPLETED", 60, "the end of the job")
    assert json.loads((tmp_path / "run" / "record.json").read_text())["steps"] == 4
    assert "stopped at step 2" in (tmp_path / "log").read_text()


def test_a_job_is_not_queued_for_ever(cluster: Any, submit: Callable[..., str], tmp_path: Path, until: Until) -> None:
    job = submit(29619, restarts=0)
    cluster.ask("scancel", "--batch", "--signal=USR2", job)
    until(lambda: cluster.jobs()[job] == "FAILED", 60, "the end of the job")
    assert "stopped at step 2" in (tmp_path / "log").read_text()
