"""Run a list of commands, each a cell of a table: `... | python -m repro.sweep --results DIR --jobs 2`.

One command a line on standard input; cells whose record.json is there are skipped, the rest run `--jobs` at a time, on
this machine or as SLURM job arrays. A failing cell does not stop the others. The same command again goes on.
"""

from __future__ import annotations

import collections
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args

from tqdm import tqdm

from repro.config import parse_config
from repro.errors import Interrupted, UserError, run_main
from repro.sweep.cell import Cell, State, Status, is_held, last_line, read_cells, status, sweep_up
from repro.sweep.launch import (
    ChildLauncher,
    Launcher,
    LocalLauncher,
    SlurmLauncher,
    Try,
    ledger_path,
    queue_states,
    queue_status,
    read_ledger,
)

PLAN = "sweep.txt"
LOST = ("interrupted", "cancelled", "failed")  # states that are explained by the log's last line


@dataclass
class Config:
    """Settings of a sweep; also the keys of a `--config sweep.yaml`."""

    results: str
    """Folder of the sweep: one run folder per cell, made from the cell's line; two sweeps may share it."""
    jobs: int = 2
    """Cells that run at a time; on this machine each gets an equal share of the cores as threads."""
    cluster: Literal["local", "slurm", "none"] = "local"
    """local: this machine through submitit; slurm: job arrays; none: plain child processes, submitit not needed."""
    dry_run: bool = False
    """Print the plan (state and command of every cell) and run nothing."""
    status: bool = False
    """Print what is done, running, waiting and failed, from the records and the queue, and run nothing."""
    partition: str | None = None
    """SLURM partition; the cluster's default when left out."""
    account: str | None = None
    """SLURM account to charge; the user's default when left out."""
    time: int = 240
    """SLURM time limit of a cell in minutes; a cell that needs longer saves, and is queued again."""
    gpus: int = 0
    """GPUs of a cell on SLURM."""
    cpus: int = 1
    """Cores of a cell on SLURM, which become its threads."""
    mem_gb: float | None = None
    """Memory of a cell on SLURM in GB; the cluster's default when left out."""
    signal_delay: int = 90
    """Seconds before the SLURM time limit at which a cell is told to save."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More sbatch options, as a mapping: `--extra '{"qos": "high", "constraint": "a100"}'`."""
    poll_seconds: float = 5.0
    """Seconds between two looks at the SLURM queue."""

    def __post_init__(self) -> None:
        if not self.results:
            raise ValueError("--results is empty: name a folder")
        for name in ("jobs", "time", "cpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.gpus < 0 or self.signal_delay < 0 or self.poll_seconds <= 0:
            raise ValueError("--gpus and --signal_delay must not be negative, --poll_seconds must be positive")


def make_launcher(config: Config) -> Launcher:
    """The launcher that `--cluster` asks for."""
    folder = Path(config.results) / ".submitit"
    if config.cluster == "none":
        return ChildLauncher(config.jobs)
    if config.cluster == "local":
        return LocalLauncher(config.jobs, folder)
    parameters: dict[str, Any] = {
        "job_name": Path(config.results).name[:40],
        "partition": config.partition,
        "account": config.account,
        "time": config.time,
        "gpus_per_node": config.gpus or None,
        "cpus_per_task": config.cpus,
        "mem": f"{int(config.mem_gb * 1024)}M" if config.mem_gb else None,
        "signal_delay_s": config.signal_delay,
        "additional_parameters": {"requeue": True, **config.extra},
    }
    given = {name: value for name, value in parameters.items() if value is not None}
    return SlurmLauncher(config.jobs, folder, given, config.poll_seconds)


class Sweep:
    """Runs cells to their end and keeps the score.

    Attributes:
        failed: cells that ended without a record, with why.
        own: cells that this sweep finished itself, by line, with their seconds.
    """

    def __init__(self, cells: list[Cell], launcher: Launcher) -> None:
        self.launcher = launcher
        self.failed: list[tuple[Cell, Status]] = []
        self.own: dict[str, float] = {}
        self._waiting = collections.deque(cells)
        self._flying: list[Try] = []
        self._stop: int | None = None

    def run(self, total: int, done: int) -> None:
        """Run everything; one bar with the time left.

        Raises:
            KeyboardInterrupt: Ctrl-C; the cells in flight have been stopped.
            Interrupted: SIGTERM, likewise.
        """
        before = signal.signal(signal.SIGTERM, self._on_sigterm)
        try:
            with tqdm(total=total, initial=done, unit="cell", desc="sweep", dynamic_ncols=True) as bar:
                if isinstance(self.launcher, SlurmLauncher):
                    self._attach(self.launcher)
                while self._waiting or self._flying:
                    self._start_some()
                    time.sleep(self.launcher.poll_seconds)
                    over = self.launcher.over(self._flying)
                    for attempt in over:
                        self._flying.remove(attempt)
                        bar.update(self._settle(attempt))
                    # Drawn on news alone: a log file would otherwise get a line at every poll.
                    bar.set_postfix(running=len(self._flying), failed=len(self.failed), refresh=bool(over))
        except KeyboardInterrupt:
            print("\nstopping the cells in flight; Ctrl-C again leaves at once", file=sys.stderr)
            self.launcher.stop(self._flying)
            if self._stop is not None:
                raise Interrupted(self._stop) from None
            raise
        finally:
            signal.signal(signal.SIGTERM, before)

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        self._stop = signum
        raise KeyboardInterrupt

    def _attach(self, launcher: SlurmLauncher) -> None:
        """Take over the jobs that an earlier sweep left in the queue."""
        self._flying = launcher.queued(list(self._waiting))
        lines = {attempt.cell.line for attempt in self._flying}
        self._waiting = collections.deque(cell for cell in self._waiting if cell.line not in lines)

    def _start_some(self) -> None:
        """Fill the free places; a cell that another sweep is running goes to the back of the line."""
        chosen: list[Cell] = []
        for _ in range(len(self._waiting)):
            if len(self._flying) + len(chosen) >= self.launcher.capacity:
                break
            cell = self._waiting.popleft()
            if is_held(cell.folder):
                self._waiting.append(cell)
            else:
                chosen.append(cell)
        if chosen:
            self._flying += self.launcher.start(chosen)

    def _settle(self, attempt: Try) -> int:
        """Look at a cell whose try is over; returns 1 when the cell is settled, 0 when it goes on elsewhere."""
        found = self.launcher.settled(attempt)
        mine = found.details.get("ticket") == attempt.ticket
        if found.state == "running":  # another sweep was faster, or the child has outlived its parent
            self._waiting.append(attempt.cell)
            return 0
        if found.state != "done":
            if found.state == "waiting":
                found = Status("failed", "died before it began (see .submitit/ in the results folder)")
            self.failed.append((attempt.cell, found))
        elif mine:
            self.own[attempt.cell.line] = float(found.details.get("seconds", 0.0))
        return 1


def show(cells: list[Cell], results: Path) -> None:
    """Print every cell's state, the states of the queue included, and the failed cells' last words."""
    jobs = read_ledger(ledger_path(results))
    queue = (queue_states() or {}) if jobs else {}
    counts: collections.Counter[str] = collections.Counter()
    for cell in cells:
        found = queue_status(cell, jobs.get(cell.line), queue)
        counts[found.state] += 1
        print(f"{found.state:<11} {cell.line}" + (f"  {found.told}" if found.told else ""))
        if found.state in LOST and (words := last_line(cell.folder)):
            print(f"{'':<11} last line of {cell.folder / 'log.txt'}: {words}")
    print(", ".join(f"{counts[state]} {state}" for state in get_args(State)))


def _remember(folder: Path, cells: list[Cell]) -> None:
    """Keep the lines in DIR/sweep.txt, for `--status` and repro.sweep.watch; another sweep may add its own."""
    path = folder / PLAN
    known = set(path.read_text(encoding="utf-8").splitlines()) if path.exists() else set()
    new = [cell.line for cell in cells if cell.line not in known]
    if new:
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in new))


def known_cells(folder: Path) -> list[Cell]:
    """The cells of all sweeps over a results folder so far."""
    path = folder / PLAN
    if not path.exists():
        raise UserError(f"{folder} holds no {PLAN}: no sweep was started over it")
    return read_cells(path.read_text(encoding="utf-8").splitlines(), folder)[0]


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 1 when a cell failed."""
    config = parse_config(Config, argv, prog="python -m repro.sweep", description=__doc__ or "")
    results = Path(config.results)
    lines = [] if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().splitlines()
    cells, repeated = read_cells(lines, results)
    if config.status:
        show(cells or known_cells(results), results)
        return 0
    if not cells:
        raise UserError("no cells: pipe one command a line into this program (see gnn/run_different_baselines.sh)")
    if repeated:
        print(f"note: {repeated} repeated lines left out", file=sys.stderr)
    states = {cell.line: status(cell) for cell in cells}
    todo = [cell for cell in cells if states[cell.line].state != "done"]
    print(f"{len(cells)} cells, {len(cells) - len(todo)} done, {len(todo)} to run", file=sys.stderr)
    if config.dry_run:
        for cell in cells:
            print(f"{states[cell.line].state:<11} {cell.folder}  {cell.line}")
        return 0
    try:
        results.mkdir(parents=True, exist_ok=True)
        _remember(results, cells)
        for cell in cells:
            sweep_up(cell.folder)
    except OSError as error:
        raise UserError(f"--results {results}: cannot be written ({error.strerror})") from error
    if not todo:
        return 0
    began = time.monotonic()
    sweep = Sweep(todo, make_launcher(config))
    sweep.run(len(cells), len(cells) - len(todo))
    return _report(sweep, time.monotonic() - began, config.jobs)


def _report(sweep: Sweep, seconds: float, jobs: int) -> int:
    if sweep.own:
        work = sum(sweep.own.values())
        print(
            f"{len(sweep.own)} cells, {jobs} side by side, took {seconds:.1f} s; their times add up to {work:.1f} s "
            f"(speed-up {work / seconds:.2f})",
            file=sys.stderr,
        )
    for cell, found in sweep.failed:
        print(f"{found.state}: {cell.line}\n  {found.told}; {cell.folder / 'log.txt'}", file=sys.stderr)
        if words := last_line(cell.folder):
            print(f"  last line: {words}", file=sys.stderr)
    return 1 if sweep.failed else 0


if __name__ == "__main__":
    run_main(main)
