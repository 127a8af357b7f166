"""A cell of a sweep: one command line, one run folder, and what the files in that folder say about it.

    line  →  argv + folder  →  CellRunner: lock, child process, log.txt, cell.json  →  the run's own record.json

Whether a cell is done is decided by its record alone; cell.json tells how the last try went. Nothing here imports
torch, so that a sweep of a thousand cells starts in no time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal

from repro.errors import UserError

State = Literal["done", "running", "waiting", "interrupted", "cancelled", "failed"]
SLUG_LENGTH = 120  # with the 9 characters of the hash far below the 255 that file systems allow
GRACE_SECONDS = 300  # longest wait of a stopped job for SLURM to take it away
_PYTHON = re.compile(r"(.*/)?python(3(\.\d+)?)?$")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_LOGGED = 65536  # bytes of a log's end that are looked at for its last line


@dataclass(frozen=True)
class Cell:
    """One command of a sweep.

    Attributes:
        line: the command, normalised; the identity of the cell.
        argv: what is executed (never through a shell), with the run folder in it.
        folder: the run folder.
    """

    line: str
    argv: tuple[str, ...]
    folder: Path


@dataclass
class Status:
    """What a cell's folder says.

    Attributes:
        state: done, running, waiting, interrupted, cancelled (in a queue) or failed.
        told: why, in a few words, for the states that need it.
        details: cell.json of the last try.
    """

    state: State
    told: str = ""
    details: dict[str, Any] = field(default_factory=dict)


# -- from lines to cells ---------------------------------------------------------------------------------------------


def normalise(line: str) -> list[str]:
    """The words of a command line; comments go, and any Python interpreter at its head becomes `python`."""
    words = shlex.split(line, comments=True)
    if words and _PYTHON.match(words[0]):
        words[0] = "python"
    return words


def slug(words: list[str]) -> str:
    """A readable folder name: the program, then the values, with their flag's name where the value is a bare number."""
    parts: list[str] = []
    name = ""
    for word in words:
        if word in ("python", "torchrun", "accelerate", "launch", "-m", "-u", "--standalone"):
            continue
        if word.startswith("--") and "=" in word:
            name, _, word = word[2:].partition("=")
        elif word.startswith("--"):
            if name:
                parts.append(name)  # a switch
            name = word[2:]
            continue
        is_path = "/" in word
        if not name:
            parts.append(Path(word).stem if is_path else word)
        elif name == "config":
            parts.append(Path(word).stem)
        elif not is_path:
            parts.append(f"{name}{word}" if re.fullmatch(r"[-+.,\deE]+", word) else word)
        name = ""
    if name:
        parts.append(name)
    text = re.sub(r"[^A-Za-z0-9._=+-]+", "_", "-".join(parts)).strip("-_.")
    return text[:SLUG_LENGTH].rstrip("-_.") or "cell"


def _output_dir(words: list[str]) -> str | None:
    """The run folder that the line itself names; the last one wins, as for every flag."""
    found = None
    for index, word in enumerate(words):
        flag, _, value = word.partition("=")
        if flag in ("--output_dir", "--output-dir"):
            found = value if "=" in word else (words[index + 1] if index + 1 < len(words) else "")
    return found


def _program(word: str, where: str) -> str:
    """Where the head of a line is found: this interpreter, a script beside it, or a program on PATH."""
    if word == "python":
        return sys.executable
    beside = Path(sys.executable).parent / word
    found = str(beside) if "/" not in word and os.access(beside, os.X_OK) else shutil.which(word)
    if found is None:
        raise UserError(f"{where}: {word!r} is no program on this machine (lines do not go through a shell)")
    return found


def make_cell(line: str, results: Path, where: str = "line") -> Cell | None:
    """The cell of one line, or None for a blank line or a comment.

    Raises:
        UserError: unbalanced quotes, a line that needs a shell, an unknown program, `--output_dir` without a value.
    """
    try:
        words = normalise(line)
    except ValueError as error:
        raise UserError(f"{where}: {error} in {line.strip()!r}") from error
    if not words:
        return None
    if _ASSIGNMENT.match(words[0]):
        raise UserError(f"{where}: {words[0]!r} sets a variable, but lines do not go through a shell: export it before")
    text = shlex.join(words)
    named = _output_dir(words)
    if named == "":
        raise UserError(f"{where}: --output_dir without a folder in {text!r}")
    argv = [_program(words[0], where), *words[1:]]
    if named is not None:
        return Cell(text, tuple(argv), Path(named))
    folder = results / f"{slug(words)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return Cell(text, (*argv, "--output_dir", str(folder)), folder)


def read_cells(lines: Iterable[str], results: Path) -> tuple[list[Cell], int]:
    """All cells of a list of lines, and how many lines were repeated (and left out).

    Raises:
        UserError: a line that cannot be used, or two different lines that name one run folder.
    """
    cells: dict[str, Cell] = {}
    folders: dict[str, str] = {}
    repeated = 0
    for number, line in enumerate(lines, start=1):
        cell = make_cell(line, results, f"line {number}")
        if cell is None:
            continue
        if cell.line in cells:
            repeated += 1
            continue
        folder = os.path.abspath(cell.folder)
        if folder in folders:
            raise UserError(f"line {number}: its --output_dir {cell.folder} is also that of {folders[folder]!r}")
        folders[folder] = cell.line
        cells[cell.line] = cell
    return list(cells.values()), repeated


# -- what a folder says ----------------------------------------------------------------------------------------------


def is_summary(record: Any) -> bool:
    """True for what `repro.run.group` writes above the runs of several seeds: it is no run of its own."""
    return isinstance(record, dict) and "runs" in record and "config" not in record


def is_done(folder: Path) -> bool:
    """True when record.json is there and whole, and so are the records that it sums up, if it does.

    Raises:
        UserError: record.json is damaged.
    """
    path = folder / "record.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged record ({error}): delete it to run the cell again") from error
    if not isinstance(record, dict) or "metrics" not in record:
        raise UserError(f"{path}: not a run's record: delete it to run the cell again")
    runs = record["runs"] if is_summary(record) else []
    return all((folder / str(run) / "record.json").exists() for run in (runs if isinstance(runs, list) else []))


def last_line(folder: Path) -> str:
    """The last line of the cell's log that says something ('' when there is none)."""
    try:
        with open(folder / "log.txt", "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _LOGGED))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    told = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip() and not line.startswith("# try ")]
    return told[-1] if told else ""


def read_details(folder: Path) -> dict[str, Any]:
    """cell.json, or {} when it is missing or damaged (it only describes; it decides nothing)."""
    try:
        details = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return details if isinstance(details, dict) else {}


def is_held(folder: Path) -> bool:
    """True while some process runs this cell."""
    try:
        with open(folder / "sweep.lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def status(cell: Cell) -> Status:
    """What is known about a cell from its folder alone (a queue may know more)."""
    details = read_details(cell.folder)
    try:
        if is_done(cell.folder):
            return Status("done", details=details)
    except UserError as error:
        return Status("failed", str(error), details)
    if is_held(cell.folder):
        return Status("running", f"on {details.get('host', '?')}", details)
    state = details.get("state")
    if state is None:
        return Status("waiting", details=details)
    if state == "running":
        return Status("failed", "died without a word (killed, or out of memory)", details)
    if state == "interrupted":
        return Status("interrupted", "stopped; the same sweep goes on from its last checkpoint", details)
    return Status("failed", told_exit(details.get("exit")), details)


def told_exit(code: Any) -> str:
    """An exit code in words."""
    if not isinstance(code, int):
        return "could not be started"
    if code == 0:
        return "exit code 0, but no record.json"
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"killed by {name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    return f"exit code {code}"


# -- running one -----------------------------------------------------------------------------------------------------


_LEFTOVERS = ".cell.json.*.tmp"


class CellRunner:
    """Runs one cell in a child process; what submitit pickles and calls, and asks to `checkpoint` before a requeue.

    Args:
        cell: what to run.
        threads: its share of the cores; 0 leaves the thread variables as they are.
        ticket: names this try, so that the sweep can tell its own try from another sweep's.
        environment: variables to set (a value) or to remove (None) in the child.
        cwd: folder in which the line is meant to run.
    """

    def __init__(self, cell: Cell, *, threads: int, ticket: str, environment: dict[str, str | None], cwd: str) -> None:
        self.cell = cell
        self.threads = threads
        self.ticket = ticket
        self.environment = environment
        self.cwd = cwd
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def __call__(self) -> str:
        """Run the cell; returns its final state, or "elsewhere" when another process holds it."""
        os.chdir(self.cwd)
        folder = self.cell.folder
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquire(folder / "sweep.lock")
        if lock is None:
            return "elsewhere"
        with lock:
            _remove_leftovers(folder)
            if is_done(folder):
                return "done"
            return self._run(folder, lock)

    def _run(self, folder: Path, lock: IO[str]) -> str:
        began = time.monotonic()
        details: dict[str, Any] = {
            "line": self.cell.line,
            "state": "running",
            "ticket": self.ticket,
            "tries": read_details(folder).get("tries", 0) + 1,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": _slurm_job(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        _write_json(folder / "cell.json", details)
        code: int | None = None
        try:
            with open(folder / "log.txt", "ab") as log:
                log.write(f"# try {details['tries']} at {details['started']} on {details['host']}\n".encode())
                log.flush()
                # The child holds the lock too: should this process be killed, the cell stays taken while it lives.
                self._child = subprocess.Popen(
                    self.cell.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    env=self._child_environment(), pass_fds=[lock.fileno()], start_new_session=True,
                )  # fmt: skip
                self._forward_signals()
                code = self._child.wait()
        finally:
            state = _outcome(folder, code, self._stopped)
            _write_json(
                folder / "cell.json",
                details | {"state": state, "exit": code, "seconds": round(time.monotonic() - began, 3)},
            )
        if state == "interrupted" and self._stopped:
            _wait_to_be_taken()
        return state

    def _child_environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        for name, value in self.environment.items():
            environment.pop(name, None)
            if value is not None:
                environment[name] = value
        if self.threads:
            for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
                environment[name] = str(self.threads)
        return environment

    def _forward_signals(self) -> None:
        """SIGTERM and SIGINT go to the child, which saves and leaves; in a thread (`--cluster none`) this is void."""
        try:
            for signum in (signal.SIGTERM, signal.SIGINT):
                signal.signal(signum, self._on_signal)
        except ValueError:
            pass

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.stop(signal.SIGTERM)

    def stop(self, signum: int = signal.SIGTERM) -> None:
        """Ask the child to save and leave; `SIGKILL` makes it leave."""
        self._stopped = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signum)

    def checkpoint(self) -> Any:
        """Called by submitit before the time is up or the node is taken: save, then be queued again."""
        from submitit.helpers import DelayedSubmission

        self.stop(signal.SIGTERM)
        if self._child is not None:
            # This is a signal handler that interrupted Popen.wait, which holds a lock: look without touching the Popen.
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(
            CellRunner(
                self.cell,
                threads=self.threads,
                ticket=self.ticket,
                environment=self.environment,
                cwd=self.cwd,
            )
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_child": None}


def _slurm_job() -> str:
    """This job's number as squeue prints it (123_4 in an array), '' outside SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def _wait_to_be_taken() -> None:
    """Under SLURM, SIGTERM announces a cancellation or a preemption: a job that ends first is not queued again."""
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        time.sleep(GRACE_SECONDS)


def _outcome(folder: Path, code: int | None, stopped: bool) -> str:
    try:
        if is_done(folder):
            return "done"
    except UserError:
        return "failed"
    soft = (128 + signal.SIGTERM, 128 + signal.SIGUSR2, -signal.SIGTERM, -signal.SIGUSR2)
    return "interrupted" if stopped or code in soft else "failed"


def _acquire(path: Path) -> IO[str] | None:
    """The lock file, held; None when another process keeps it (a glance by `is_held` lasts microseconds)."""
    file = open(path, "a")
    for _ in range(5):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            time.sleep(0.02)
    file.close()
    return None


def sweep_up(folder: Path) -> None:
    """Remove what a process that was killed while it described this cell has left, unless the cell is being run."""
    if any(folder.glob(_LEFTOVERS)) and (lock := _acquire(folder / "sweep.lock")) is not None:
        with lock:
            _remove_leftovers(folder)


def _remove_leftovers(folder: Path) -> None:
    """The same for the holder of the cell's lock: nobody else writes the description."""
    for path in folder.glob(_LEFTOVERS):
        path.unlink(missing_ok=True)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Write by renaming; a full disk only costs the description, never the cell."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        print(f"warning: {path} not written: {error.strerror}", file=sys.stderr)
