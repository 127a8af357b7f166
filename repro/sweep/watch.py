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
from tqdm import tqdm

from repro.config import parse_config
from repro.errors import UserError, run_main
from repro.sweep.cell import Cell
from repro.sweep.launch import look
from repro.sweep.status import Status, last_line
from repro.sweep.sweep import LOST, known_cells

ORDER = ("running", "failed", "cancelled", "interrupted", "waiting", "done")
LENGTH_FIELDS = ("epochs", "num_train_epochs")  # the config fields that say how long a run is
BAR_WIDTH = 40
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


def render(states: list[tuple[Cell, Status]], width: int, height: int) -> str:
    """The table: running and failed cells first, as many as fit."""
    counts: Counter[str] = Counter(found.state for _, found in states)
    left = seconds_left(states)
    head = f"{len(states)} cells: " + ", ".join(f"{counts[name]} {name}" for name in ORDER)
    done = counts["done"] / len(states)
    bar = "#" * round(done * BAR_WIDTH)
    rows = [
        head + (f"; about {tqdm.format_interval(left)} left" if left is not None else ""),
        f"[{bar:.<{BAR_WIDTH}}] {done:.0%}",
    ]
    shown = sorted(states, key=lambda item: ORDER.index(item[1].state))[: max(1, height - 4)]
    rows += [_row(cell, found)[:width] for cell, found in shown]
    if len(shown) < len(states):
        rows.append(f"... and {len(states) - len(shown)} more")
    return "\n".join(rows) + "\n"


def _row(cell: Cell, found: Status) -> str:
    done = progress(cell.folder) if found.state == "running" else None
    share = f"{done:.0%}" if done is not None else ""
    seconds = running_seconds(found) if found.state == "running" else found.details.get("seconds")
    time_taken = tqdm.format_interval(float(seconds)) if seconds is not None else ""
    why = f"  {found.message}: {last_line(cell.folder / 'log.txt')}" if found.state in LOST else ""
    return f"{found.state:<11} {share:>4} {time_taken:>8}  {cell.folder.name}{why}"


def main(argv: list[str] | None = None) -> None:
    """Entry point; the folder may be given without its flag."""
    words = sys.argv[1:] if argv is None else argv
    if words and not words[0].startswith("-"):
        words = ["--results", *words]
    config = parse_config(Config, words, prog="python -m repro.sweep.watch", description=__doc__ or "")
    folder = Path(config.results)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    try:
        _watch(folder, config)
    except BrokenPipeError:  # `| head` has seen enough; what is left in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _watch(folder: Path, config: Config) -> None:
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
    run_main(main)
