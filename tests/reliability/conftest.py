"""A tiny resumable experiment, and ways to run it in forked processes: torch is loaded once, a process costs a blink.

What is under test stays as it is: the sweep, its locks, the run folder, the checkpoints. Only the start of a Python
interpreter is replaced by a fork of one that has loaded torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import repro.sweep.cell
from repro.config import parse_config
from repro.errors import run_main
from repro.run.run import Run
from repro.seeding import rng_state, seed_everything, set_rng_state
from repro.sweep import sweep

VOLATILE = ("seconds", "peak_rss_mb", "finished", "command", "environment")


@dataclass
class Config:
    """Settings of the tiny experiment."""

    output_dir: str
    """The run folder."""
    seed: int = 0
    """Seed of data and weights."""
    steps: int = 5
    """Steps, with a checkpoint after each."""


def experiment(config: Config, pause: float = 0.0) -> None:
    """Least squares by SGD with momentum on random batches: every step depends on all the state before it."""
    with Run(config.output_dir, "tiny", config) as run:
        if run.done:
            return
        seed_everything(config.seed)
        weight = torch.randn(8, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        start, last = 0, float("nan")
        if (found := run.restore()) is not None:
            start, state = found
            with torch.no_grad():
                weight.copy_(state["weight"])
            optimizer.load_state_dict(state["optimizer"])
            set_rng_state(state["rng"])
            last = state["last"]
        for step in range(start + 1, config.steps + 1):
            batch = torch.randn(16, 8)
            loss = (batch @ weight - batch.sum(dim=1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            last = loss.item()
            run.log({"epoch": step, "loss": last})
            time.sleep(pause)
            state = {"weight": weight.detach(), "optimizer": optimizer.state_dict(), "rng": rng_state(), "last": last}
            run.checkpoint(step, state)
        run.finish({"loss": last, "weight": weight.tolist()}, protocol="tiny", selection="last step")


def forked(body: Callable[[], object], out: Path | int, keep: tuple[int, ...] = ()) -> int:
    """Start `body` in a child process in a session of its own, stdout and stderr to `out`; its process number."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.setsid()
        target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if isinstance(out, Path) else out
        for stream in (1, 2):
            os.dup2(target, stream)
        for name in os.listdir("/proc/self/fd"):  # as exec would: a lock that is not handed on is not inherited
            if int(name) > 2 and int(name) not in keep:
                with contextlib.suppress(OSError):
                    os.close(int(name))
        # New objects: another thread may have held the locks of the old ones when this process was made.
        sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(signum, signal.SIG_DFL if signum != signal.SIGINT else signal.default_int_handler)
        run_main(body)
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(pid: int, seconds: float = 60) -> int:
    """Exit code of a child, as subprocess tells it (negative: a signal)."""
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"still running after {seconds} s")
        time.sleep(0.002)


def run_cell(words: list[str]) -> None:
    """What `python tiny ...` of a sweep's line does; notes each start, and whether there was a record by then."""
    given = dict(zip(words[::2], words[1::2], strict=True))
    config = Config(given["--output_dir"], int(given["--seed"]), int(given["--steps"]))
    folder = Path(config.output_dir)
    with open(folder / "starts.txt", "a") as file:
        file.write("again\n" if (folder / "record.json").exists() else "start\n")
    experiment(config, float(os.environ.get("TINY_PAUSE", "0")))


class ForkedCell:
    """Stands in for subprocess.Popen inside a sweep: a fork instead of a new interpreter."""

    def __init__(self, argv: tuple[str, ...], *, stdout: Any, pass_fds: list[int], **others: Any) -> None:
        self.pid = forked(lambda: run_cell(list(argv[2:])), stdout.fileno(), keep=tuple(pass_fds))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.005)
        return code

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)


def start_sweep(results: Path, lines: list[str], *, jobs: int = 2, pause: float = 0.0) -> int:
    """Start `repro.sweep` over `lines` in a child; its process number."""

    def body() -> int:
        os.environ["TINY_PAUSE"] = str(pause)
        repro.sweep.cell.subprocess = SimpleNamespace(Popen=ForkedCell, DEVNULL=-3, STDOUT=-2)  # type: ignore[assignment]
        reading, writing = os.pipe()
        os.write(writing, "".join(f"{line}\n" for line in lines).encode())
        os.close(writing)
        sys.stdin = open(reading)
        return sweep.main(["--results", str(results), "--cluster", "none", "--jobs", str(jobs)])

    results.mkdir(parents=True, exist_ok=True)
    return forked(body, results / "sweep.log")


def sweep_lines(cells: int, steps: int) -> list[str]:
    return [shlex.join(["python", "tiny", "--seed", str(seed), "--steps", str(steps)]) for seed in range(cells)]


def comparable(folder: Path) -> tuple[dict[str, Any], str]:
    """The record without what may differ between two runs of one thing, and the whole learning curve."""
    record = json.loads((folder / "record.json").read_text())
    for name in VOLATILE:
        del record[name]
    del record["config"]["output_dir"]
    return record, (folder / "metrics.jsonl").read_text()


# -- figures ---------------------------------------------------------------------------------------------------------

_FIGURES: dict[str, Any] = {}


@pytest.fixture(scope="session")
def figures() -> dict[str, Any]:
    """Numbers that the tests measure; $RELIABILITY_FIGURES names the JSON file that collects them."""
    return _FIGURES


def pytest_sessionfinish(session: pytest.Session) -> None:
    target = os.environ.get("RELIABILITY_FIGURES")
    if target and _FIGURES:
        path = Path(target)
        known = json.loads(path.read_text()) if path.exists() else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known | _FIGURES, indent=1, sort_keys=True) + "\n")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The tools of this file, for the tests."""
    # What is loaded here need not be loaded in each child.
    parse_config(sweep.Config, ["--results", "x"], prog="warm up")
    experiment(Config(str(tmp_path_factory.mktemp("warm")), steps=1))
    return SimpleNamespace(
        Config=Config, experiment=experiment, forked=forked, wait=wait, start_sweep=start_sweep, lines=sweep_lines,
        comparable=comparable,
    )  # fmt: skip


@pytest.fixture
def alarm() -> Iterator[Callable[[int], None]]:
    """`alarm(seconds)`: from now on anything that takes longer fails as a hang; called again, it starts anew."""

    def ring(signum: int, frame: object) -> None:
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, ring)
    yield signal.alarm  # type: ignore[misc]
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
