"""Watch a sweep from another terminal: `python -m repro.sweep.watch RESULTS` shows its cells and the time left.

Everything is read from the run folders, so it works on any machine that sees them, while the sweep runs anywhere;
where there is a SLURM queue, it is asked as well.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import yaml

from repro.config import parse_config
from repro.errors import UserError, run_main
from repro.sweep.cell import Cell
from repro.sweep.launch import ledger_path, queue_states, queue_status, read_ledger
from repro.sweep.status import Status, last_line
from repro.sweep.sweep import LOST, known_cells

ORDER = ("running", "failed", "cancelled", "interrupted", "waiting", "done")
LENGTH_FIELDS = ("epochs", "num_train_epochs")  # the config fields that say how long a run is
_CLEAR = "\x1b[H\x1b[2J"


@dataclass
class Config:
    """What to watch."""

    results: str
    """The results folder of a sweep."""
    every: float = 2.0
    """Seconds between two looks."""
    once: bool = False
    """Print the table once and leave; so does an output that is no terminal."""

    def __post_init__(self) -> None:
        if self.every <= 0:
            raise ValueError(f"--every must be positive, got {self.every}")


def progress(folder: Path) -> float | None:
    """How far a run is, 0 to 1, from the last epoch in metrics.jsonl; None when its length is not known."""
    try:
        config = yaml.safe_load((folder / "args.yaml").read_text(encoding="utf-8"))
        total = next(float(config[name]) for name in LENGTH_FIELDS if config.get(name))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError, TypeError, StopIteration, AttributeError, yaml.YAMLError):
        return None
    for line in reversed(lines[-3:]):  # the last line may be half-written
        try:
            return min(1.0, float(json.loads(line)["epoch"]) / total)
        except (ValueError, KeyError, TypeError):
            continue
    return 0.0


def running_seconds(found: Status) -> float:
    """How long the present try has been running."""
    try:
        return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(found.details["started"])).total_seconds())
    except (KeyError, TypeError, ValueError):
        return 0.0


def seconds_left(states: list[tuple[Cell, Status]]) -> float | None:
    """Time to the end: the cells that are left at the median time of those that are done, side by side."""
    done = [float(s.details["seconds"]) for _, s in states if s.state == "done" and "seconds" in s.details]
    running = [s for _, s in states if s.state == "running"]
    waiting = sum(s.state == "waiting" for _, s in states)
    if not done or not (running or waiting):
        return None
    each = statistics.median(done)
    work = waiting * each + sum(max(0.0, each - running_seconds(s)) for s in running)
    return work / max(1, len(running))


def format_duration(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def look(cells: list[Cell], folder: Path) -> list[tuple[Cell, Status]]:
    """What the folders say, and the queue where cells were ever queued."""
    jobs = read_ledger(ledger_path(folder))
    queue = (queue_states() or {}) if jobs else {}
    return [(cell, queue_status(cell, jobs.get(cell.line), queue)) for cell in cells]


def render(states: list[tuple[Cell, Status]], width: int, height: int) -> str:
    """The table: running and failed cells first, as many as fit."""
    counts: Counter[str] = Counter(found.state for _, found in states)
    cells = len(states)
    left = seconds_left(states)
    head = f"{cells} cells: " + ", ".join(f"{counts[name]} {name}" for name in ORDER)
    if left is not None:
        head += f"; about {format_duration(left)} left"
    bar_width = max(10, min(60, width - 10))
    filled = round(bar_width * counts["done"] / max(1, cells))
    rows = [head, "[" + "#" * filled + "." * (bar_width - filled) + f"] {counts['done'] / max(1, cells):.0%}"]
    states = sorted(states, key=lambda item: ORDER.index(item[1].state))
    shown = states[: max(1, height - 4)]
    rows += [_row(cell, found)[:width] for cell, found in shown]
    if len(shown) < len(states):
        rows.append(f"... and {len(states) - len(shown)} more")
    return "\n".join(rows) + "\n"


def _row(cell: Cell, found: Status) -> str:
    done = progress(cell.folder) if found.state == "running" else None
    how_far = f"{done:4.0%}" if done is not None else "    "
    seconds = running_seconds(found) if found.state == "running" else found.details.get("seconds")
    took = format_duration(float(seconds)) if seconds is not None else ""
    why = f"  {found.message}: {last_line(cell.folder)}" if found.state in LOST else ""
    return f"{found.state:<11} {how_far} {took:>8}  {cell.folder.name}{why}"


def main(argv: list[str] | None = None) -> None:
    """Entry point; the folder may be given without its flag."""
    words = sys.argv[1:] if argv is None else argv
    if words and not words[0].startswith("-"):
        words = ["--results", *words]
    config = parse_config(Config, words, prog="python -m repro.sweep.watch", description=__doc__ or "")
    folder = Path(config.results)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    while True:
        cells = known_cells(folder)
        size = shutil.get_terminal_size((160, len(cells) + 4))
        live = sys.stdout.isatty() and not config.once
        text = render(look(cells, folder), size.columns, size.lines if live else len(cells) + 4)
        print((_CLEAR if live else "") + text, end="", flush=True)
        if not live or all((cell.folder / "record.json").exists() for cell in cells):
            return
        time.sleep(config.every)


if __name__ == "__main__":
    try:
        run_main(main)
    except BrokenPipeError:  # `| head` has seen enough
        os._exit(0)
