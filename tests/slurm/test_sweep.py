"""`repro.sweep --cluster slurm` on a real SLURM: cells killed, cancelled, interrupted, preempted, out of time."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from repro.sweep.cell import Cell, read_cells
from repro.sweep.status import read_details

CELL = Path(__file__).with_name("cell.py")
Until = Callable[[Callable[[], object], float, str], None]


class Sweeps:
    """Starts sweeps over one results folder."""

    def __init__(self, cluster: Any, python: str, folder: Path, cwd: Path) -> None:
        self.cluster = cluster
        self.python = python
        self.results = folder / "results"
        self.go = folder / "go"
        self.cwd = cwd
        self.started: list[subprocess.Popen[str]] = []

    def lines(self, plain: int, waiting: int = 0, *, steps: int = 4) -> list[str]:
        """Commands: some that run through, and some that wait in the middle until `self.go` exists."""
        return [
            f"python {shlex.quote(str(CELL))} --seed {seed} --steps {steps}"
            + (f" --until {shlex.quote(str(self.go))}" if seed >= plain else "")
            for seed in range(plain + waiting)
        ]

    def cells(self, lines: list[str]) -> list[Cell]:
        return read_cells(lines, self.results)[0]

    def start(self, lines: list[str], *flags: str, where: str = "slurm") -> subprocess.Popen[str]:
        wanted = ["--cluster", where, "--poll_seconds", "0.3", "--time", "10", "--mem_gb", "0.25", *flags]
        sweep = subprocess.Popen(
            [self.python, "-m", "repro.sweep", "--results", str(self.results), *wanted],
            cwd=self.cwd, env=self.cluster.environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.started.append(sweep)
        assert sweep.stdin is not None
        sweep.stdin.write("".join(f"{line}\n" for line in lines))
        sweep.stdin.close()
        sweep.stdin = None  # so that communicate() leaves it alone
        return sweep

    def run(self, lines: list[str], *flags: str, where: str = "slurm") -> tuple[int, str]:
        sweep = self.start(lines, *flags, where=where)
        out, _ = sweep.communicate(timeout=240)
        return sweep.returncode, out

    def job(self, cell: Cell) -> str:
        """The cell's job, once it runs."""
        return str(read_details(cell.folder).get("job") or "")

    def records(self, lines: list[str]) -> dict[str, Any]:
        return {c.line: json.loads((c.folder / "record.json").read_text()) for c in self.cells(lines)}


@pytest.fixture
def sweeps(cluster: Any, python: str, tmp_path: Path, root: Path) -> Any:
    found = Sweeps(cluster, python, tmp_path, root)
    yield found
    for sweep in found.started:
        if sweep.poll() is None:
            sweep.kill()
        sweep.communicate()
    cluster.ask("scancel", "--user", str(os.getuid()))


def in_the_middle(cell: Cell, *, steps: int = 4) -> bool:
    """True when a waiting cell has reached the step in which it waits."""
    state = cell.folder / "state.json"
    return state.exists() and json.loads(state.read_text())[0] == steps // 2


def kill_all(pid: int) -> None:
    """SIGKILL a process and all below it, as the kernel does when memory runs out."""
    runner = psutil.Process(pid)
    for process in [runner, *runner.children(recursive=True)]:
        process.kill()


def test_killed_and_requeued_cells_end_with_the_records_of_a_local_sweep(
    sweeps: Sweeps, cluster: Any, until: Until, tmp_path: Path
) -> None:
    lines = sweeps.lines(4, waiting=2)
    cells = sweeps.cells(lines)
    killed, moved = cells[4], cells[5]
    sweep = sweeps.start(lines, "--jobs", "3")
    until(lambda: in_the_middle(killed) and in_the_middle(moved), 60, "two cells in the middle")
    first_job = sweeps.job(moved)
    kill_all(int(read_details(killed.folder)["pid"]))  # nobody is left to write a word
    cluster.ask("scancel", "--signal=USR2", first_job)  # what SLURM sends before the time is up
    until(lambda: "stopped at step 2" in (moved.folder / "log.txt").read_text(), 30, "the cell's leave")
    until(lambda: cluster.jobs()[first_job] == "PENDING", 30, "the cell in the queue again")
    _, shown = sweeps.run(lines, "--status")
    sweeps.go.touch()
    out, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 1, out
    assert f"failed: {killed.line}" in out and "exited without a status" in out and "last line: from step 0" in out
    assert out.count("failed: ") == 1
    assert sweeps.job(moved) == first_job  # the same job, queued again
    assert len((moved.folder / "starts.txt").read_text().splitlines()) == 2
    assert "4 done, 0 running, 1 waiting, 0 interrupted, 0 cancelled, 1 failed" in shown

    code, shown = sweeps.run(lines, "--status")
    assert code == 0 and "5 done, 0 running, 0 waiting, 0 interrupted, 0 cancelled, 1 failed" in shown
    assert "last line of" in shown and "from step 0" in shown

    code, out = sweeps.run(lines)
    assert code == 0, out
    assert "from step 2" in (killed.folder / "log.txt").read_text()
    records = sweeps.records(lines)
    sweeps.results = tmp_path / "local"
    code, out = sweeps.run(lines, where="local")
    assert code == 0, out
    assert sweeps.records(lines) == records


def test_cancelled_cells_are_told_apart(sweeps: Sweeps, cluster: Any, until: Until) -> None:
    lines = sweeps.lines(0, waiting=3)
    cells = sweeps.cells(lines)
    sweep = sweeps.start(lines, "--jobs", "1")
    until(lambda: in_the_middle(cells[0]), 60, "the first cell in the middle")
    _, shown = sweeps.run(lines, "--status")
    assert "1 running, 2 waiting" in shown
    cluster.ask("scancel", sweeps.job(cells[0]).split("_")[0])
    out, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 1
    assert out.count("was cancelled") == 3, out
    assert "last line: stopped at step 2" in out
    _, shown = sweeps.run(lines, "--status")
    assert "0 waiting, 0 interrupted, 3 cancelled, 0 failed" in shown
    assert "last line of" in shown and "stopped at step 2" in shown
    sweeps.go.touch()
    assert sweeps.run(lines)[0] == 0


def test_preempted_cell_saves_and_comes_back(sweeps: Sweeps, cluster: Any, until: Until) -> None:
    lines = sweeps.lines(0, waiting=1)
    (cell,) = sweeps.cells(lines)
    sweep = sweeps.start(lines)
    until(lambda: in_the_middle(cell), 60, "the cell in the middle")
    cluster.ask("sbatch", "--partition=urgent", "--cpus-per-task=4", "--mem=1G", "--output=/dev/null", "--wrap=sleep 2")
    until(lambda: "stopped at step 2" in (cell.folder / "log.txt").read_text(), 40, "the cell's leave")
    sweeps.go.touch()
    out, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 0, out
    assert (cell.folder / "log.txt").read_text().count("from step 2") == 1


def test_a_cell_out_of_time_goes_on_in_the_queue(sweeps: Sweeps, until: Until) -> None:
    lines = sweeps.lines(0, waiting=1)
    (cell,) = sweeps.cells(lines)
    sweep = sweeps.start(lines, "--time", "1", "--signal_delay", "55")
    until(lambda: in_the_middle(cell), 60, "the cell in the middle")
    until(lambda: "stopped at step 2" in (cell.folder / "log.txt").read_text(), 90, "the signal")
    sweeps.go.touch()
    out, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 0, out


def test_a_sweep_that_died_finds_its_jobs_again(sweeps: Sweeps, cluster: Any, until: Until) -> None:
    lines = sweeps.lines(1, waiting=2)
    cells = sweeps.cells(lines)
    before = set(cluster.jobs())
    sweep = sweeps.start(lines, "--jobs", "1")
    until(lambda: in_the_middle(cells[1]), 60, "a cell in the middle")
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    again = sweeps.start(lines, "--jobs", "1")
    sweeps.go.touch()
    out, _ = again.communicate(timeout=120)
    assert again.returncode == 0, out
    assert len(set(cluster.jobs()) - before) == 3
    assert all(len((c.folder / "starts.txt").read_text().splitlines()) == 1 for c in cells)


def test_parameters_reach_the_queue(sweeps: Sweeps, cluster: Any, until: Until, tmp_path: Path) -> None:
    lines = sweeps.lines(0, waiting=1)
    (cell,) = sweeps.cells(lines)
    config = tmp_path / "sweep.yaml"
    config.write_text("partition: urgent\ncpus: 2\nextra: {nice: 7, comment: from the file}\n")
    sweep = sweeps.start(lines, "--config", str(config), "--jobs", "5", "--account", "physics")
    until(lambda: in_the_middle(cell), 60, "the cell in the middle")
    told = cluster.ask("scontrol", "show", "job", sweeps.job(cell))
    for part in ("Partition=urgent", "Account=physics", "CPUs/Task=2", "TimeLimit=00:10:00", "MinMemoryNode=256M",
                 "Nice=7", "Comment=from the file", "Requeue=1"):  # fmt: skip
        assert part in told
    sweeps.go.touch()
    assert sweep.wait(timeout=60) == 0


def test_a_refused_sweep_says_why(sweeps: Sweeps) -> None:
    code, out = sweeps.run(sweeps.lines(1), "--partition", "nowhere")
    assert code == 2
    assert "Traceback" not in out
    assert "nvalid partition" in out.splitlines()[-1]


def test_a_training_run_is_moved(sweeps: Sweeps, cluster: Any, until: Until, tmp_path: Path) -> None:
    """A real experiment, interrupted and queued again, ends with the same numbers as in one go."""
    lines = ["python -m gnn.main --data digits --hid 8 --nlayer 2 --epochs 150 --checkpoint_every 1 --device cpu"]
    (cell,) = sweeps.cells(lines)
    sweep = sweeps.start(lines)
    until(lambda: list(cell.folder.glob("checkpoints/step-*")), 90, "a checkpoint")
    cluster.ask("scancel", "--signal=USR2", sweeps.job(cell))
    out, _ = sweep.communicate(timeout=200)
    assert sweep.returncode == 0, out
    assert "resuming from step" in (cell.folder / "log.txt").read_text()
    moved = sweeps.records(lines)[cell.line]
    sweeps.results = tmp_path / "local"
    assert sweeps.run(lines, where="local")[0] == 0
    assert sweeps.records(lines)[cell.line]["metrics"] == moved["metrics"]
