"""Three ways to run the cells of a sweep: child processes, submitit on this machine, submitit on a SLURM cluster.

A launcher starts cells and says whether a try is over; how it ended is read from the cell's folder (repro.sweep.cell).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from repro.errors import UserError
from repro.sweep.cell import Cell, CellRunner, Status, is_done, is_held, status

STOP_SECONDS = 60  # a stopped cell may save that long before it is killed
ARRAY_LIMIT = 1000  # SLURM's default MaxArraySize, less one
GONE = "GONE"  # not a word of SLURM's: the queue does not know the job any more
# States of `squeue` in which a job will not run any more.
OVER = frozenset(
    ["BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"]
    + [GONE]
)


@dataclass
class Try:
    """One try of one cell.

    Attributes:
        cell: what runs.
        ticket: found again in cell.json when it is this try that wrote it.
        handle: what the launcher needs: a thread, a submitit job, a SLURM job's number.
    """

    cell: Cell
    ticket: str
    handle: Any


class Launcher(Protocol):
    """Starts cells, at most `capacity` at a time."""

    capacity: int
    poll_seconds: float

    def start(self, cells: list[Cell]) -> list[Try]:
        """Start some cells."""
        ...

    def over(self, tries: list[Try]) -> list[Try]:
        """Those of `tries` that have ended in whatever way."""
        ...

    def settled(self, attempt: Try) -> Status:
        """How an ended try left its cell."""
        ...

    def stop(self, tries: list[Try]) -> None:
        """Make the cells save and leave."""
        ...


def _runner(cell: Cell, threads: int) -> CellRunner:
    # submitit's local executor hides the GPUs from a job that asked for none: a cell sees what the sweep sees.
    environment = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES")}
    return CellRunner(cell, threads=threads, ticket=uuid.uuid4().hex, environment=environment, cwd=os.getcwd())


def cell_threads(jobs: int) -> int:
    """Each cell's share of the cores that this process may use."""
    return max(1, len(os.sched_getaffinity(0)) // jobs)


class ChildLauncher:
    """`--cluster none`: child processes of the sweep, without submitit."""

    poll_seconds = 0.1

    def __init__(self, jobs: int) -> None:
        self.capacity = jobs

    def start(self, cells: list[Cell]) -> list[Try]:
        """Start some cells, each watched by a thread."""
        tries = []
        for cell in cells:
            runner = _runner(cell, cell_threads(self.capacity))
            thread = threading.Thread(target=_call, args=(runner,), daemon=True)
            thread.start()
            tries.append(Try(cell, runner.ticket, (thread, runner)))
        return tries

    def over(self, tries: list[Try]) -> list[Try]:
        """Those whose thread has ended."""
        return [t for t in tries if not t.handle[0].is_alive()]

    def settled(self, attempt: Try) -> Status:
        """What the cell's folder says."""
        return status(attempt.cell)

    def stop(self, tries: list[Try]) -> None:
        """SIGTERM, then SIGKILL to those that take too long."""
        for attempt in tries:
            attempt.handle[1].stop(signal.SIGTERM)
        _wait_then(lambda: all(not t.handle[0].is_alive() for t in tries))
        for attempt in tries:
            attempt.handle[1].stop(signal.SIGKILL)


def _call(runner: CellRunner) -> None:
    try:
        runner()
    except (OSError, UserError) as error:
        print(f"warning: {runner.cell.folder}: {error}", file=sys.stderr)


class LocalLauncher:
    """`--cluster local`: submitit's executor for this machine."""

    poll_seconds = 0.2

    def __init__(self, jobs: int, folder: Path) -> None:
        self.capacity = jobs
        self._executor = _submitit().LocalExecutor(folder=folder)
        self._executor.update_parameters(timeout_min=60 * 24 * 365)

    def start(self, cells: list[Cell]) -> list[Try]:
        """Start some cells; a Ctrl-C at the terminal must reach the sweep alone, which then stops them in order."""
        tries = []
        with _deaf_to_interrupts():
            for cell in cells:
                runner = _runner(cell, cell_threads(self.capacity))
                tries.append(Try(cell, runner.ticket, self._executor.submit(runner)))
        return tries

    def over(self, tries: list[Try]) -> list[Try]:
        """Those whose controller process has ended."""
        return [t for t in tries if t.handle.done()]

    def settled(self, attempt: Try) -> Status:
        """What the cell's folder says."""
        return status(attempt.cell)

    def stop(self, tries: list[Try]) -> None:
        """SIGTERM to the controllers (submitit's own `cancel` would kill a cell while it saves)."""
        for attempt in tries:
            if not attempt.handle.done():
                os.kill(int(attempt.handle.job_id), signal.SIGTERM)
        if not _wait_then(lambda: all(t.handle.done() and not is_held(t.cell.folder) for t in tries)):
            for attempt in tries:
                attempt.handle.cancel()


class SlurmLauncher:
    """`--cluster slurm`: job arrays through submitit; liveness from `squeue`, so that no accounting is needed.

    Args:
        jobs: how many cells of an array run at a time.
        folder: where submitit keeps its files.
        parameters: submitit's parameters (partition, account, time, gpus_per_node, additional_parameters, ...).
    """

    capacity = ARRAY_LIMIT

    def __init__(self, jobs: int, folder: Path, parameters: dict[str, Any], poll_seconds: float) -> None:
        self.poll_seconds = poll_seconds
        self._ledger = ledger_path(folder.parent)
        self._missing: dict[str, int] = {}
        try:
            # Below ten minutes submitit counts every preemption as a time-out: do not let it give up.
            self._executor = _submitit().SlurmExecutor(folder=folder, max_num_timeout=1000)
            self._executor.update_parameters(array_parallelism=jobs, **parameters)
        except RuntimeError as error:
            raise UserError(f"--cluster slurm: {error}") from error
        except (ValueError, TypeError) as error:
            raise UserError(f"--cluster slurm: {error}") from error

    def start(self, cells: list[Cell]) -> list[Try]:
        """Submit the cells as one job array."""
        threads = int(self._executor.parameters.get("cpus_per_task", 1))
        runners = [_runner(cell, threads) for cell in cells]
        try:
            with self._executor.batch():
                jobs = [self._executor.submit(runner) for runner in runners]
        except Exception as error:  # submitit wraps sbatch's own message in one of several types
            raise UserError(f"--cluster slurm: sbatch refused the jobs: {_last_line(error)}") from error
        tries = [Try(r.cell, r.ticket, job.job_id) for r, job in zip(runners, jobs, strict=True)]
        for attempt in tries:
            self._note({"line": attempt.cell.line, "ticket": attempt.ticket, "job": attempt.handle})
        return tries

    def queued(self, cells: list[Cell]) -> list[Try]:
        """Tries of an earlier sweep over this folder that are still in the queue."""
        states = queue_states()
        if not states:
            return []
        jobs = read_ledger(self._ledger)
        return [
            Try(cell, job["ticket"], job["job"])
            for cell in cells
            if (job := jobs.get(cell.line)) and "over" not in job and states.get(job["job"], GONE) not in OVER
        ]

    def over(self, tries: list[Try]) -> list[Try]:
        """Those that the queue no longer holds, looked at twice: a requeued job may be absent for a moment."""
        states = queue_states()
        if states is None:  # the controller does not answer: only a record can tell that a try is over
            return [attempt for attempt in tries if is_done(attempt.cell.folder)]
        ended = []
        for attempt in tries:
            state = states.get(attempt.handle, GONE)
            if state not in OVER:
                self._missing.pop(attempt.ticket, None)
                continue
            self._missing[attempt.ticket] = self._missing.get(attempt.ticket, 0) + 1
            if self._missing[attempt.ticket] >= 2:
                ended.append(attempt)
                # SLURM forgets a job after minutes: what became of it is kept for --status.
                self._note({"line": attempt.cell.line, "ticket": attempt.ticket, "job": attempt.handle, "over": state})
        return ended

    def settled(self, attempt: Try) -> Status:
        """What the cell's folder says, and what SLURM says of the job."""
        return queue_status(attempt.cell, read_ledger(self._ledger).get(attempt.cell.line), {})

    def _note(self, entry: dict[str, str]) -> None:
        with open(self._ledger, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def stop(self, tries: list[Try]) -> None:
        """Leave the jobs in the queue: a cluster's work outlives the terminal; say how to go on and how to cancel."""
        numbers = sorted({t.handle.split("_")[0] for t in tries})
        print(
            f"{len(tries)} cells stay in the queue: the same sweep finds them again; `scancel {' '.join(numbers)}` "
            "cancels them",
            file=sys.stderr,
        )


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
    """Line of a cell → its last job: `job`, `ticket`, and `over` (the job's last state) once it has ended."""
    jobs: dict[str, dict[str, str]] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return jobs
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            jobs[entry["line"]] = entry
        except (ValueError, TypeError, KeyError):
            continue  # the end of a line that was being written when the sweep died
    return jobs


def queue_status(cell: Cell, job: dict[str, str] | None, states: dict[str, str]) -> Status:
    """What a cell's folder and the queue say together.

    Args:
        cell: the cell.
        job: its last job, from `read_ledger`; None when it never went to a queue.
        states: job → state, from `queue_states`.
    """
    found = status(cell)
    if job is None or found.state in ("done", "running"):
        return found
    if found.details and found.details.get("ticket") != job["ticket"]:
        return found  # the last try was not this job's
    state = job.get("over") or states.get(job["job"], GONE)
    if state not in OVER:
        if state in ("RUNNING", "COMPLETING"):
            return Status("running", f"job {job['job']}", found.details)
        return Status("waiting", f"job {job['job']} is {state.lower()}", found.details)
    if state == "CANCELLED":
        return Status("cancelled", f"job {job['job']} was cancelled", found.details)
    if found.state == "waiting":
        files = cell.folder.parent / ".submitit" / f"{job['job']}_0_log.err"
        told = _last_words(files)
        return Status("failed", f"job {job['job']} died before the cell began" + (f": {told}" if told else ""))
    if state not in ("COMPLETED", "FAILED", GONE):
        return Status(found.state, f"{found.told}; SLURM says {state}", found.details)
    return found


def _last_words(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise UserError('submitit is missing: pip install "contranorm[cluster]", or use --cluster none') from error
    return submitit


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started inside ignore SIGINT, as children inherit that."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _wait_then(condition: Any) -> bool:
    """True as soon as `condition()` holds, False when it does not within STOP_SECONDS."""
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
