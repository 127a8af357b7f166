"""What a cell's folder says about it. Its record alone decides whether it is done; cell.json describes the last try."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from repro.errors import UserError
from repro.run.track import is_done
from repro.sweep.cell import Cell

State = Literal["done", "running", "waiting", "interrupted", "cancelled", "failed"]
_LOG_TAIL_BYTES = 65536  # searched for the last line


@dataclass
class Status:
    """A cell's state, why in a few words where that is needed, and cell.json of the last try."""

    state: State
    message: str = ""
    details: dict[str, Any] = field(default_factory=dict)


def status(cell: Cell) -> Status:
    """What is known about a cell from its folder alone (a queue may know more)."""
    details = read_details(cell.folder)
    try:
        if is_done(cell.folder):
            return Status("done", f"on GPU {details['gpus']}" if details.get("gpus") else "", details)
    except UserError as error:
        return Status("failed", str(error), details)
    if is_held(cell.folder):
        gpus = f", GPU {details['gpus']}" if details.get("gpus") else ""
        return Status("running", f"on {details.get('host', '?')}{gpus}", details)
    return of_last_try(details)


def of_last_try(details: dict[str, Any]) -> Status:
    """How the last try of a cell without a record ended, by its cell.json."""
    state = details.get("state")
    if state is None:
        return Status("waiting")
    if state == "running":
        return Status("failed", "exited without a status (killed, or out of memory)", details)
    if state == "interrupted":
        return Status("interrupted", "stopped; re-running the sweep resumes it from its last checkpoint", details)
    return Status("failed", exit_message(details.get("exit")), details)


def exit_message(code: Any) -> str:
    """An exit code in words."""
    if not isinstance(code, int):
        return "could not be started"
    if code == 0:
        return "exit code 0, but no record.json"
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"killed by {name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    return f"exit code {code}"


def last_line(log: Path) -> str:
    """The last line of a log that is not blank ('' when there is none)."""
    try:
        with open(log, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _LOG_TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = (line.strip() for line in reversed(re.split(r"[\r\n]+", text)) if not line.startswith("# try "))
    return next(filter(None, lines), "")


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
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
