"""Runs one cell in a child process: lock, child, log.txt, cell.json; the run itself writes its record."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import IO, Any

from repro.errors import UserError
from repro.files import try_lock, write_atomic
from repro.run.track import is_done
from repro.sweep.cell import Cell
from repro.sweep.devices import Lent
from repro.sweep.preload import ForkedProcess, Preloader
from repro.sweep.status import read_details

GRACE_SECONDS = 300  # longest wait of a stopped job for SLURM to take it away
_LEFTOVERS = ".cell.json.*.tmp"
# Threads that wait for others sleep: spinning, they would take the cores from the cells beside them.
PASSIVE_WAIT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}


class CellRunner:
    """Runs one cell: called as a SLURM job, or started and polled by a launcher on this machine.

    Args:
        cell: what to run.
        threads: its share of the cores.
        attempt_id: identifies this try, so that a sweep can tell its own from another sweep's.
        cwd: folder in which the line is meant to run.
    """

    def __init__(self, cell: Cell, *, threads: int, attempt_id: str, cwd: str) -> None:
        self.cell = cell
        self.threads = threads
        self.attempt_id = attempt_id
        self.cwd = cwd
        self._child: subprocess.Popen[bytes] | ForkedProcess | None = None
        self._lock: IO[str] | None = None
        self._details: dict[str, Any] = {}
        self._began = 0.0
        self._stopped = False

    def __call__(self) -> None:
        """Run the cell to its end, as submitit does in a SLURM job."""
        os.chdir(self.cwd)
        self.start()
        if isinstance(self._child, subprocess.Popen):
            for signum in (signal.SIGTERM, signal.SIGINT):
                signal.signal(signum, self._on_signal)
            self._child.wait()
        taken_away = os.environ.get("SUBMITIT_EXECUTOR") == "slurm"
        if self.poll() and self._details.get("state") == "interrupted" and self._stopped and taken_away:
            time.sleep(GRACE_SECONDS)  # SIGTERM announces a preemption: a job that ends first is not queued again

    def start(self, preloader: Preloader | None = None, gpus: Lent | None = None) -> None:
        """Start the child, by the preloader where it can, unless the cell is done or another process holds it.

        Without `gpus` the child sees the GPUs that this process does.

        Raises:
            UserError: record.json is damaged.
        """
        folder = self.cell.folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _acquire(folder / "sweep.lock")
        if self._lock is None:
            return
        try:
            _remove_leftovers(folder)
            if not is_done(folder):
                self._start_child(folder, self._lock, preloader, gpus or Lent())
        finally:
            if self._child is None:
                self._lock.close()

    def _start_child(self, folder: Path, lock: IO[str], preloader: Preloader | None, gpus: Lent) -> None:
        self._began = time.monotonic()
        self._describe(
            line=self.cell.line, state="running", attempt_id=self.attempt_id,
            tries=read_details(folder).get("tries", 0) + 1, host=socket.gethostname(), pid=os.getpid(),
            job=_slurm_job(), gpus=gpus.names, started=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(self.threads))
        environment = PASSIVE_WAIT | dict(os.environ) | threads
        own = {"CUDA_VISIBLE_DEVICES": gpus.names} if gpus.names else {}
        try:
            with open(folder / "log.txt", "ab") as log:
                log.write("# try {tries} at {started} on {host}\n".format(**self._details).encode())
                log.flush()
                # The child holds the locks too: should this process be killed, the cell and its GPUs stay taken while
                # it lives. (filelock's locks cannot be handed to a child, which is why they are not used here.)
                held = [lock.fileno(), *(file.fileno() for file in gpus.locks)]
                if preloader is not None:
                    self._child = preloader.start(self.cell.argv, environment, log, held, own)
                if self._child is None:
                    self._child = subprocess.Popen(
                        self.cell.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                        env=environment | own, pass_fds=held, start_new_session=True,
                    )  # fmt: skip
        finally:
            if self._child is None:
                self._describe(state="failed", exit=None, seconds=0.0)

    def _describe(self, **news: Any) -> None:
        """Update cell.json; a full disk only costs the description, never the cell."""
        self._details |= news
        try:
            write_atomic(self.cell.folder / "cell.json", (json.dumps(self._details, indent=1) + "\n").encode())
        except OSError as error:
            print(f"warning: {self.cell.folder / 'cell.json'} not written: {error.strerror}", file=sys.stderr)

    def poll(self) -> bool:
        """True once nothing runs; the first time, the end is noted and the lock released."""
        if self._child is None:
            return True
        code = self._child.poll()
        if code is None:
            return False
        seconds = round(time.monotonic() - self._began, 3)
        self._describe(state=self._outcome(code), exit=code, seconds=seconds)
        self._child = None
        if self._lock is not None:
            self._lock.close()
        return True

    def _outcome(self, code: int) -> str:
        try:
            if is_done(self.cell.folder):
                return "done"
        except UserError:
            return "failed"
        soft = (128 + signal.SIGTERM, 128 + signal.SIGUSR2, -signal.SIGTERM, -signal.SIGUSR2)
        return "interrupted" if self._stopped or code in soft else "failed"

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.stop(signal.SIGTERM)

    def stop(self, signum: int = signal.SIGTERM) -> None:
        """Ask the child to save and leave; `SIGKILL` makes it leave."""
        self._stopped = True
        if self._child is not None:
            self._child.send_signal(signum)

    def checkpoint(self) -> Any:
        """Called by submitit before the time is up or the node is taken: save, then be queued again."""
        from submitit.helpers import DelayedSubmission

        self.stop(signal.SIGTERM)
        if self._child is not None:
            # This is a signal handler that interrupted Popen.wait, which holds a lock: look without touching the Popen.
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(CellRunner(self.cell, threads=self.threads, attempt_id=self.attempt_id, cwd=self.cwd))


def _slurm_job() -> str:
    """This job's number as squeue prints it (123_4 in an array), '' outside SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def _acquire(path: Path) -> IO[str] | None:
    """The lock file, held; None when another process keeps it (a glance by `is_held` lasts microseconds)."""
    for _ in range(5):
        if (file := try_lock(path)) is not None:
            return file
        time.sleep(0.02)
    return None


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed while it described this cell has left, unless the cell is being run."""
    if any(folder.glob(_LEFTOVERS)) and (lock := _acquire(folder / "sweep.lock")) is not None:
        with lock:
            _remove_leftovers(folder)


def _remove_leftovers(folder: Path) -> None:
    """The same for the holder of the cell's lock: nobody else writes the description."""
    for path in folder.glob(_LEFTOVERS):
        path.unlink(missing_ok=True)
