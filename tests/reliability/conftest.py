"""Ways to run a tiny experiment in processes that need not load torch.

What is under test stays as it is: the sweep, its locks, the servers that fork its cells, the run folder, the
checkpoints. Only a sweep and its server are forks of this process in place of new interpreters.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from repro.config import parse_config
from repro.errors import run_main
from repro.sweep import preload, sweep

# The cells find their module here, in a fork as in a fresh interpreter.
HERE = str(Path(__file__).parent)
sys.path.append(HERE)
os.environ["PYTHONPATH"] = os.pathsep.join([*os.environ.get("PYTHONPATH", "").split(os.pathsep), HERE])

from tiny_experiment import Config, experiment  # noqa: E402

VOLATILE = ("seconds", "peak_rss_mb", "finished", "command", "environment")


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


def wait(pid: int, seconds: float = 300) -> int:
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


def launch_forked(flags: list[str], modules: tuple[str, ...], environment: dict[str, str], channel: Any) -> Any:
    """Stands in for `preload.launch`: the server is a fork of this process, which has its modules imported."""

    def body() -> None:
        os.environ.clear()
        os.environ.update(environment)
        atexit._clear()
        torch.cuda._is_in_bad_fork = bool  # this process has looked for a GPU, which a server never does
        if (name := preload.serve(channel, modules)) is not None:
            preload.run_to_exit(name)

    return preload.ForkedProcess(forked(body, Path(os.devnull), keep=(channel.fileno(),)))


def start_sweep(
    results: Path, lines: list[str], *, jobs: int = 2, pause: float = 0.0, leash: Path | None = None
) -> int:
    """Start `repro.sweep` over `lines` in a child; its process number."""

    def body() -> int:
        os.environ |= {"TINY_PAUSE": str(pause), "TINY_LEASH": str(leash or "")}
        preload.launch = launch_forked
        reading, writing = os.pipe()
        os.write(writing, "".join(f"{line}\n" for line in lines).encode())
        os.close(writing)
        sys.stdin = open(reading)
        return sweep.main(["--results", str(results), "--cluster", "local", "--jobs", str(jobs)])

    results.mkdir(parents=True, exist_ok=True)
    return forked(body, results / "sweep.log")


def sweep_lines(cells: int, steps: int) -> list[str]:
    return [f"python -m tiny_experiment --seed {seed} --steps {steps}" for seed in range(cells)]


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
def tiny(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> SimpleNamespace:
    """The tools of this file, for the tests."""
    # What is loaded here need not be loaded in each child.
    parse_config(sweep.Config, ["--results", "x"], prog="warm up")
    experiment(Config(output_dir=str(tmp_path_factory.mktemp("warm")), steps=1))
    gc.collect()
    gc.freeze()  # children, servers among them, would copy all of this process's memory to search it for garbage
    request.addfinalizer(gc.unfreeze)
    return SimpleNamespace(
        Config=lambda folder, **settings: Config(output_dir=folder, **settings),
        experiment=experiment, forked=forked, wait=wait, start_sweep=start_sweep, lines=sweep_lines,
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
