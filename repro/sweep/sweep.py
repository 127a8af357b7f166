"""Run a list of commands, each a cell of a table: `... | python -m repro.sweep --results DIR --jobs 2`.

One command a line on standard input; cells whose record.json is there are skipped, the rest run `--jobs` at a time, on
this machine or as SLURM job arrays. A failing cell does not stop the others. Re-running the command resumes.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args

from tqdm import tqdm

from repro.config import parse_config
from repro.errors import Interrupted, UserError, run_main
from repro.sweep.cell import Canonical, Cell, canonical, make_cell, read_cells
from repro.sweep.devices import Devices
from repro.sweep.launch import Attempt, Launcher, LocalLauncher, SlurmLauncher, look
from repro.sweep.runner import remove_leftovers
from repro.sweep.status import State, Status, is_held, last_line, of_last_try, status

PLAN = "sweep.txt"
LOST = ("interrupted", "cancelled", "failed")  # states that are explained by the log's last line


@dataclass(kw_only=True)
class SlurmOptions:
    """Settings of `--cluster slurm`."""

    partition: str | None = None
    """Partition; the cluster's default when left out."""
    account: str | None = None
    """Account to charge; the user's default when left out."""
    time: int = 240
    """Time limit of a cell in minutes; a cell that needs longer saves, and is queued again."""
    cpus: int = 1
    """Cores of a cell, which become its threads."""
    mem_gb: float | None = None
    """Memory of a cell in GB; the cluster's default when left out."""
    signal_delay: int = 90
    """Seconds before the time limit at which a cell is asked to save."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More sbatch options, as a mapping: `--extra '{"qos": "high", "constraint": "a100"}'`."""
    poll_seconds: float = 5.0
    """Seconds between two looks at the queue."""


@dataclass(kw_only=True)
class Config(SlurmOptions):
    """Settings of a sweep; also the keys of a `--config sweep.yaml`."""

    results: str
    """Folder of the sweep: one run folder per cell, made from the cell's line; two sweeps may share it."""
    jobs: int = 2
    """Cells that run at a time; on this machine each gets an equal share of the cores as threads."""
    cluster: Literal["local", "slurm"] = "local"
    """local: child processes on this machine; slurm: job arrays, through submitit."""
    records: list[str] | str = field(default_factory=list)
    """Folders or files of records: a cell whose command has a record there is done."""
    gpus: str = ""
    """GPUs of this machine, as CUDA_VISIBLE_DEVICES names them (`0,1,2,3`); default $GPUS. A cell gets its own."""
    gpus_per_cell: int | None = None
    """GPUs of a cell. Unset: here one for each process that torchrun or accelerate starts, on SLURM none."""
    share_gpus: bool = False
    """Cells may share GPUs, which they then get in turn."""
    dry_run: bool = False
    """Print the plan (state and command of every cell, and the hours that it takes) and run nothing."""
    hours_per_cell: float | None = None
    """For the plan: hours of a cell that no record of the same settings (but for the seed) tells."""
    status: bool = False
    """Print what is done, running, waiting and failed, from the records and the queue, and run nothing."""

    def __post_init__(self) -> None:
        if not self.results:
            raise ValueError("--results is empty: name a folder")
        for name in ("jobs", "time", "cpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("gpus_per_cell", "hours_per_cell"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"--{name} {value}: must be positive")
        if self.signal_delay < 0 or self.poll_seconds <= 0:
            raise ValueError("--signal_delay must not be negative, --poll_seconds must be positive")
        if self.cluster == "slurm" and (self.gpus or self.share_gpus):
            raise ValueError("--gpus and --share_gpus are about this machine; on SLURM a cell gets --gpus_per_cell N")
        if self.share_gpus and not self.gpu_names():
            raise ValueError("--share_gpus: which? name them in --gpus")

    def gpu_names(self) -> str:
        """The GPUs of this machine that cells may use, separated by commas."""
        return self.gpus or os.environ.get("GPUS", "")


def make_launcher(config: Config, cells: list[Cell]) -> Launcher:
    """The launcher that `--cluster` asks for.

    Raises:
        UserError: SLURM or submitit is missing, or a cell needs more GPUs than there are.
    """
    folder = Path(config.results) / ".submitit"
    if config.cluster == "local":
        local = LocalLauncher(config.jobs, Devices(config.gpu_names(), config.share_gpus), config.gpus_per_cell)
        local.check(cells)
        return local
    parameters: dict[str, Any] = {
        "job_name": Path(config.results).name[:40],
        "partition": config.partition,
        "account": config.account,
        "time": config.time,
        "gpus_per_node": config.gpus_per_cell,
        "cpus_per_task": config.cpus,
        "mem": f"{int(config.mem_gb * 1024)}M" if config.mem_gb else None,
        "signal_delay_s": config.signal_delay,
        "additional_parameters": {"requeue": True, **config.extra},
    }
    given = {name: value for name, value in parameters.items() if value is not None}
    return SlurmLauncher(config.jobs, folder, given, config.poll_seconds)


class Sweep:
    """Runs cells to their end and keeps count of them."""

    def __init__(self, cells: list[Cell], launcher: Launcher) -> None:
        self.launcher = launcher
        self.failed: list[tuple[Cell, Status]] = []  # ended without a record
        self.own: dict[str, float] = {}  # line → seconds of what this sweep itself has finished
        self._waiting = collections.deque(cells)
        self._running: list[Attempt] = []
        self._attached: set[str] = set()  # tries that an earlier sweep has started
        self._starting = False
        self._noted = False
        self._stop: int | None = None

    def run(self, total: int, done: int) -> None:
        """Run everything; one bar with the time left.

        Raises:
            KeyboardInterrupt: Ctrl-C; the running cells have been stopped.
            Interrupted: SIGTERM, likewise.
        """
        before = {signum: signal.signal(signum, self._on_signal) for signum in (signal.SIGTERM, signal.SIGINT)}
        try:
            with tqdm(total=total, initial=done, unit="cell", desc="sweep", dynamic_ncols=True) as bar:
                if isinstance(self.launcher, SlurmLauncher):
                    self._attach(self.launcher)
                while self._waiting or self._running:
                    self._start_some()
                    time.sleep(self.launcher.poll_seconds)
                    finished = self.launcher.finished(self._running)
                    for attempt in finished:
                        self._running.remove(attempt)
                        bar.update(self._finish(attempt))
                    # Drawn on news alone: a log file would otherwise get a line at every poll.
                    bar.set_postfix(running=len(self._running), failed=len(self.failed), refresh=bool(finished))
        except KeyboardInterrupt:
            print("\nstopping the running cells; Ctrl-C again leaves at once", file=sys.stderr)
            self.launcher.stop(self._running)
            if self._stop == signal.SIGTERM:
                raise Interrupted(self._stop) from None
            raise
        finally:
            self.launcher.close()
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._stop = self._stop or signum
        if not self._starting:  # a process that is being started could not be stopped yet
            raise KeyboardInterrupt

    def _attach(self, launcher: SlurmLauncher) -> None:
        """Take over the jobs that an earlier sweep left in the queue."""
        self._running = launcher.queued(list(self._waiting))
        self._attached = {attempt.attempt_id for attempt in self._running}
        lines = {attempt.cell.line for attempt in self._running}
        self._waiting = collections.deque(cell for cell in self._waiting if cell.line not in lines)

    def _start_some(self) -> None:
        """Fill the free places; a cell that another sweep is running goes to the back of the line."""
        own = [attempt for attempt in self._running if attempt.attempt_id not in self._attached]
        if own and isinstance(self.launcher, SlurmLauncher):
            return  # --jobs limits an array: two side by side would be twice as many
        chosen: list[Cell] = []
        for _ in range(len(self._waiting)):
            if len(self._running) + len(chosen) >= self.launcher.capacity:
                break
            cell = self._waiting.popleft()
            if is_held(cell.folder):
                self._waiting.append(cell)
            else:
                chosen.append(cell)
        if chosen:
            self._starting = True
            attempts = self.launcher.start(chosen)
            self._running += attempts
            self._starting = False
            started = {attempt.cell.line for attempt in attempts}
            self._waiting.extendleft(cell for cell in reversed(chosen) if cell.line not in started)
            if not self._running and not self._noted:
                self._noted = True
                print("note: other cells have the GPUs (--share_gpus shares them); waiting", file=sys.stderr)
            if self._stop is not None:
                raise KeyboardInterrupt

    def _finish(self, attempt: Attempt) -> int:
        """Note how an attempt has ended; returns 1, or 0 when its cell is running elsewhere."""
        found = self.launcher.final_status(attempt)
        own = found.details.get("attempt_id") == attempt.attempt_id and found.details.get("state") != "running"
        if found.state == "running" and own:  # it has ended; a child that it left behind, say a loader's, has the lock
            found = of_last_try(found.details)
        if found.state == "running":  # another sweep was faster, or the child has outlived its parent
            self._waiting.append(attempt.cell)
            return 0
        if found.state != "done":
            if found.state == "waiting":
                found = Status("failed", "its process ended before the cell started")
            self.failed.append((attempt.cell, found))
        elif found.details.get("attempt_id") == attempt.attempt_id:
            self.own[attempt.cell.line] = float(found.details.get("seconds", 0.0))
        return 1


def read_records(places: list[str] | str) -> dict[Canonical, tuple[str, float | None]]:
    """Command → (where its record stands, its seconds), for all records of `places`.

    Raises:
        UserError: a place without records, or a damaged one.
    """
    if not places:
        return {}
    from repro.report.records import iterate_records  # pandas is needed for this alone

    known: dict[Canonical, tuple[str, float | None]] = {}
    for where, record in iterate_records(places, as_written=True):
        # A record of a command for several seeds stands for its own.
        command = re.sub(r"--seeds[ =]\S+", f"--seed {record.get('seed')}", str(record.get("command", "")))
        with contextlib.suppress(ValueError):
            known[canonical(command)] = where, record.get("seconds")
    return known


def recorded(cells: list[Cell], places: list[str] | str) -> dict[str, Status]:
    """Line → status "done", for the cells whose command stands in a record of `places`."""
    known = read_records(places)
    found = {cell.line: known.get(canonical(cell.line)) for cell in cells}
    return {line: Status("done", f"recorded in {record[0]}") for line, record in found.items() if record}


def estimate(cells: list[Cell], todo: list[Cell], config: Config) -> str:
    """The hours of a plan: each cell's are the median of the recorded ones with its settings, whatever their seed.

    Of cells that no record tells about, it says what the datasheet of their --config does.
    """

    def settings(command: Canonical) -> Canonical:
        return command[0], frozenset(flag for flag in command[1] if flag[0] != "seed")

    taken: dict[Canonical, list[float]] = collections.defaultdict(list)
    for command, (_, seconds) in read_records(config.records).items():
        taken[settings(command)] += [seconds] if seconds else []
    for cell in cells:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            seconds = json.loads((cell.folder / "record.json").read_text(encoding="utf-8"))["seconds"]
            taken[settings(canonical(cell.line))].append(float(seconds))
    of_cell = {cell.line: taken[settings(canonical(cell.line))] for cell in todo}
    measured = [seconds for seconds in of_cell.values() if seconds]
    hours = sum(statistics.median(seconds) for seconds in measured) / 3600
    rest = len(todo) - len(measured)
    sheets = collections.Counter(datasheet(line) for line, seconds in of_cell.items() if not seconds)
    parts = [f"{hours:.2g} h for {len(measured)} cells, by the records of their settings"] if measured else []
    if rest and config.hours_per_cell:
        hours += rest * config.hours_per_cell
        parts.append(f"{rest * config.hours_per_cell:.2g} h for {rest} cells, by --hours_per_cell")
    else:
        neither = "no record has their settings, no datasheet a time, and --hours_per_cell is not given"
        for sheet, count in sheets.items():
            known = sheet and f"{count} cells, by the datasheet {sheet[0]}: {sheet[1]}"
            parts.append(known or f"unknown for {count} cells: {neither}")
    if hours:
        parts.append(f"{hours / config.jobs:.2g} h with {config.jobs} side by side")
    return "time: " + "; ".join(parts)


def datasheet(line: str) -> tuple[str, str] | None:
    """The file that --config names in a line, and what its comment `# Time: ...` says; None where there is none."""
    named = re.search(r"--config[ =](\S+)", line)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = Path(named[1]).read_text(encoding="utf-8") if named else ""
        if found := re.search(r"^# Time: *(.+(\n#  +.+)*)", text, re.MULTILINE):
            return str(named and named[1]), " ".join(found[1].replace("\n#", " ").split()).rstrip(".")
    return None


def show(cells: list[Cell], results: Path, known: dict[str, Status]) -> None:
    """Print every cell's state, the states of the queue included, and the failed cells' last lines of output."""
    states = [(cell, known.get(cell.line, found)) for cell, found in look(cells, results)]
    for cell, found in states:
        print(f"{found.state:<11} {cell.line}" + (f"  {found.message}" if found.message else ""))
        if found.state in LOST and (words := last_line(cell.folder / "log.txt")):
            print(f"{'':<11} last line of {cell.folder / 'log.txt'}: {words}")
    counts = collections.Counter(found.state for _, found in states)
    print(", ".join(f"{counts[state]} {state}" for state in get_args(State)))


def _remember(folder: Path, cells: list[Cell]) -> None:
    """Keep the lines in DIR/sweep.txt, for `--status` and repro.sweep.watch; another sweep may add its own."""
    path = folder / PLAN
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    known = set(text.splitlines())
    if new := [cell.line for cell in cells if cell.line not in known]:
        torn = text and not text.endswith("\n")  # a sweep was killed as it wrote its last line
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n" * bool(torn) + "".join(f"{line}\n" for line in new))


def known_cells(folder: Path) -> list[Cell]:
    """The cells of all sweeps over a results folder so far: of several lines for one folder, the last.

    Raises:
        UserError: no sweep was started over it.
    """
    path = folder / PLAN
    cells: dict[str, Cell] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(UserError):  # a torn line
            if cell := make_cell(line, folder, runs_here=False):
                cells[os.path.abspath(cell.folder)] = cell
    if not cells:
        raise UserError(f"{folder} holds no {PLAN} with cells: no sweep was started over it")
    return [*cells.values()]


def _to_plan(cell: Cell) -> Status:
    """`status`; but a folder that the line names may hold another command's run: the run itself compares settings."""
    found = status(cell)
    if found.state == "done" and cell.named:
        with contextlib.suppress(OSError, ValueError, KeyError):
            command = json.loads((cell.folder / "record.json").read_text(encoding="utf-8"))["command"]
            if canonical(command)[0] == canonical(cell.line)[0] and canonical(command) != canonical(cell.line):
                return Status("waiting", "its record is of another command", found.details)
    return found


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 1 when a cell failed."""
    config = parse_config(Config, argv, prog="python -m repro.sweep", description=__doc__ or "")
    results = Path(config.results)
    try:
        lines = [] if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().splitlines()
        "".join(lines).encode()  # bytes that are no text come as lone surrogates
    except UnicodeError as error:
        raise UserError(f"the lines on standard input are no UTF-8: {error}") from error
    cells, repeated = read_cells(lines, results)
    if config.status:
        cells = cells or known_cells(results)
        show(cells, results, recorded(cells, config.records))
        return 0
    if not cells:
        raise UserError("no cells: pipe one command a line into this program (see gnn/run_different_baselines.sh)")
    if repeated:
        print(f"note: {repeated} repeated lines left out", file=sys.stderr)
    known = recorded(cells, config.records)
    states = {cell.line: _to_plan(cell) for cell in cells} | known
    todo = [cell for cell in cells if states[cell.line].state != "done"]
    print(f"{len(cells)} cells, {len(cells) - len(todo)} done, {len(todo)} to run", file=sys.stderr)
    if config.dry_run:
        for cell in cells:
            where = known[cell.line].message if cell.line in known else cell.folder
            print(f"{states[cell.line].state:<11} {where}  {cell.line}")
        if todo:
            print(estimate(cells, todo, config), file=sys.stderr)
        return 0
    launcher = make_launcher(config, todo) if todo else None
    try:
        results.mkdir(parents=True, exist_ok=True)
        _remember(results, [cell for cell in cells if cell.line not in known])
        for cell in cells:
            remove_leftovers(cell.folder)
    except OSError as error:
        raise UserError(f"--results {results}: cannot be written ({error.strerror})") from error
    if launcher is None:
        return 0
    began = time.monotonic()
    sweep = Sweep(todo, launcher)
    sweep.run(len(cells), len(cells) - len(todo))
    return _report(sweep, time.monotonic() - began, config.jobs)


def _report(sweep: Sweep, seconds: float, jobs: int) -> int:
    if sweep.own:
        work = sum(sweep.own.values())
        text = f"{len(sweep.own)} cells, {jobs} side by side, took {seconds:.1f} s; their times add up to {work:.1f} s"
        print(f"{text} (speed-up {work / seconds:.2f})", file=sys.stderr)
    for cell, found in sweep.failed:
        print(f"{found.state}: {cell.line}\n  {found.message}; {cell.folder / 'log.txt'}", file=sys.stderr)
        if words := last_line(cell.folder / "log.txt"):
            print(f"  last line: {words}", file=sys.stderr)
    return 1 if sweep.failed else 0


if __name__ == "__main__":
    run_main(main)
