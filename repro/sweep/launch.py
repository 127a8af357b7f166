"""Two ways to run the cells of a sweep: child processes on this machine, or submitit on a SLURM cluster.

A launcher starts cells and says whether an attempt has finished; how it ended is read from the cell's folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repro.errors import UserError
from repro.run.track import is_done
from repro.sweep.cell import Cell, processes
from repro.sweep.devices import Devices
from repro.sweep.preload import Preloader
from repro.sweep.runner import CellRunner
from repro.sweep.status import Status, last_line, status

STOP_SECONDS = 60  # a stopped cell may save that long before it is killed
ARRAY_LIMIT = 1000  # SLURM's default MaxArraySize, less one
GONE = "GONE"  # not one of SLURM's words: the queue no longer knows the job
FINISHED = {  # states of `squeue` in which a job will not run any more
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
    GONE,
}  # fmt: skip


@dataclass
class Attempt:
    """One try of one cell."""

    cell: Cell
    attempt_id: str  # also in cell.json, when it is this attempt that wrote it
    handle: Any  # the cell's runner, or the number of its SLURM job


def _runner(cell: Cell, threads: int) -> CellRunner:
    return CellRunner(cell, threads=threads, attempt_id=uuid.uuid4().hex, cwd=os.getcwd())


class LocalLauncher:
    """`--cluster local`: child processes of the sweep; lines that allow it start with their modules imported."""

    poll_seconds = 0.05

    def __init__(self, jobs: int, devices: Devices, gpus_per_cell: int | None = None) -> None:
        self.capacity = jobs
        self._devices = devices
        self._gpus_per_cell = gpus_per_cell
        self._threads = max(1, len(os.sched_getaffinity(0)) // jobs)  # a cell's share of the cores
        self._preloader = Preloader()

    def start(self, cells: list[Cell]) -> list[Attempt]:
        """Start the cells for which there are GPUs, in their order."""
        attempts = []
        for cell in cells:
            if (gpus := self._devices.lend(self._gpus_of(cell))) is None:
                break  # none of the later ones may overtake it: it could wait for ever
            runner = _runner(cell, self._threads)
            try:
                runner.start(self._preloader, gpus)
            except (OSError, UserError) as error:
                print(f"warning: {cell.folder}: {error}", file=sys.stderr)
            finally:
                gpus.close()
            attempts.append(Attempt(cell, runner.attempt_id, runner))
        return attempts

    def _gpus_of(self, cell: Cell) -> int:
        return self._gpus_per_cell or processes(cell) or len(self._devices)

    def check(self, cells: list[Cell]) -> None:
        """Refuse cells that would wait for ever.

        Raises:
            UserError: a cell needs more GPUs than there are.
        """
        known = len(self._devices)
        for cell in cells if known else ():
            if (needed := self._gpus_of(cell)) > known:
                raise UserError(f"{cell.line!r} needs {needed} GPUs, but --gpus names {known}")

    def finished(self, attempts: list[Attempt]) -> list[Attempt]:
        """Those whose process has ended."""
        return [attempt for attempt in attempts if attempt.handle.poll()]

    def final_status(self, attempt: Attempt) -> Status:
        """What the cell's folder says."""
        return status(attempt.cell)

    def stop(self, attempts: list[Attempt]) -> None:
        """SIGTERM, then SIGKILL to those that take too long."""
        for signum in (signal.SIGTERM, signal.SIGKILL):
            for attempt in attempts:
                attempt.handle.stop(signum)
            deadline = time.monotonic() + STOP_SECONDS
            while time.monotonic() < deadline:
                if len(self.finished(attempts)) == len(attempts):
                    return
                time.sleep(self.poll_seconds)

    def close(self) -> None:
        """Stop the processes that have the modules imported."""
        self._preloader.close()


class SlurmLauncher:
    """`--cluster slurm`: job arrays through submitit; liveness from `squeue`, so that no accounting is needed.

    Args:
        jobs: how many cells of an array run at a time.
        folder: where submitit keeps its files.
        parameters: submitit's own (partition, account, time, gpus_per_node, additional_parameters, ...).
        poll_seconds: between two looks at the queue.
    """

    capacity = ARRAY_LIMIT

    def __init__(self, jobs: int, folder: Path, parameters: dict[str, Any], poll_seconds: float) -> None:
        self.poll_seconds = poll_seconds
        self._ledger = ledger_path(folder.parent)
        self._missing: dict[str, int] = {}
        try:
            import submitit

            # Below ten minutes submitit counts every preemption as a time-out: do not let it give up.
            self._executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=1000)
            self._executor.update_parameters(array_parallelism=jobs, **parameters)
        except ImportError as error:
            raise UserError('submitit is missing: pip install "contranorm[cluster]", or use --cluster local') from error
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"--cluster slurm: {error}") from error

    def start(self, cells: list[Cell]) -> list[Attempt]:
        """Submit the cells as one job array."""
        threads = int(self._executor.parameters.get("cpus_per_task", 1))
        runners = [_runner(cell, threads) for cell in cells]
        try:
            with self._executor.batch():
                jobs = [self._executor.submit(runner) for runner in runners]
        except Exception as error:  # submitit wraps sbatch's own message in one of several types
            raise UserError(
                f"--cluster slurm: sbatch refused the jobs: {str(error).strip().splitlines()[-1]}"
            ) from error
        attempts = [Attempt(r.cell, r.attempt_id, job.job_id) for r, job in zip(runners, jobs, strict=True)]
        for attempt in attempts:
            self._note(attempt)
        return attempts

    def queued(self, cells: list[Cell]) -> list[Attempt]:
        """Tries of an earlier sweep over this folder that are still in the queue."""
        states = queue_states()
        if not states:
            return []
        jobs = read_ledger(self._ledger)
        return [
            Attempt(cell, job["attempt_id"], job["job"])
            for cell in cells
            if (job := jobs.get(cell.line)) and "finished" not in job and states.get(job["job"], GONE) not in FINISHED
        ]

    def finished(self, attempts: list[Attempt]) -> list[Attempt]:
        """Those that the queue no longer holds, looked at twice: a requeued job may be absent for a moment."""
        states = queue_states()
        if states is None:  # the controller does not answer: only a record can tell that a try is over
            return [attempt for attempt in attempts if is_done(attempt.cell.folder)]
        ended = []
        for attempt in attempts:
            state = states.get(attempt.handle, GONE)
            if state not in FINISHED:
                self._missing.pop(attempt.attempt_id, None)
                continue
            self._missing[attempt.attempt_id] = self._missing.get(attempt.attempt_id, 0) + 1
            if self._missing[attempt.attempt_id] >= 2:
                ended.append(attempt)
                # SLURM forgets a job after minutes: what became of it is kept for --status.
                self._note(attempt, finished=state)
        return ended

    def final_status(self, attempt: Attempt) -> Status:
        """What the cell's folder says, and what SLURM says of the job."""
        return queue_status(attempt.cell, read_ledger(self._ledger).get(attempt.cell.line), {}, self._ledger.parent)

    def _note(self, attempt: Attempt, **news: str) -> None:
        entry = {"line": attempt.cell.line, "attempt_id": attempt.attempt_id, "job": attempt.handle} | news
        with open(self._ledger, "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(entry) + "\n")  # the line before it may be torn

    def close(self) -> None:
        """Nothing is held."""

    def stop(self, attempts: list[Attempt]) -> None:
        """Leave the jobs in the queue: a cluster's work outlives the terminal; say how to resume and how to cancel."""
        numbers = sorted({t.handle.split("_")[0] for t in attempts})
        print(
            f"{len(attempts)} cells stay in the queue: re-running the sweep finds them again; "
            f"`scancel {' '.join(numbers)}` cancels them",
            file=sys.stderr,
        )


Launcher = LocalLauncher | SlurmLauncher


def queue_states() -> dict[str, str] | None:
    """Job number (123_4 in an array) → state of this user's jobs; None when `squeue` cannot be asked."""
    command = ["squeue", "--noheader", "--array", "--states=all", "--user", str(os.getuid()), "--format=%i|%T"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(line.strip().split("|", 1) for line in answer.stdout.splitlines() if "|" in line)


def ledger_path(results: Path) -> Path:
    """Where a results folder keeps its jobs: one JSON line when a job is submitted, one when it is over."""
    return results / ".submitit" / "jobs.jsonl"


def read_ledger(path: Path) -> dict[str, dict[str, str]]:
    """Line of a cell → its last job: `job`, `attempt_id`, and `finished` (the job's last state) once it has ended."""
    jobs: dict[str, dict[str, str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            jobs[entry["line"]] = {name: entry[name] for name in ("job", "attempt_id")} | entry
        except (ValueError, TypeError, KeyError):
            continue  # blank, or being written when the sweep died
    return jobs


def look(cells: list[Cell], results: Path) -> list[tuple[Cell, Status]]:
    """What the folders say of the cells, and the queue where cells were ever queued."""
    ledger = ledger_path(results)
    jobs = read_ledger(ledger)
    queue = (queue_states() or {}) if jobs else {}
    return [(cell, queue_status(cell, jobs.get(cell.line), queue, ledger.parent)) for cell in cells]


def queue_status(cell: Cell, job: dict[str, str] | None, states: dict[str, str], logs: Path) -> Status:
    """What a cell's folder, its last `job` in the ledger, the queue's `states` and submitit's `logs` say together."""
    found = status(cell)
    if job is None or found.state in ("done", "running"):
        return found
    if found.details and found.details.get("attempt_id") != job["attempt_id"]:
        return found  # the last try was not this job's
    state = job.get("finished") or states.get(job["job"], GONE)
    if state not in FINISHED:
        if state in ("RUNNING", "COMPLETING"):
            return Status("running", f"job {job['job']}", found.details)
        return Status("waiting", f"job {job['job']} is {state.lower()}", found.details)
    if state == "CANCELLED":
        return Status("cancelled", f"job {job['job']} was cancelled", found.details)
    if found.state == "waiting":
        reason = last_line(logs / f"{job['job']}_0_log.err") or "no message"
        return Status("failed", f"job {job['job']} ended before the cell started: {reason}")
    if state not in ("COMPLETED", "FAILED", GONE):
        return Status(found.state, f"{found.message}; SLURM says {state}", found.details)
    return found
