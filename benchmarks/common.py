"""What the benchmark programs share: timing, peak memory, goals, and the JSON of a run."""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import resource
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from torch.utils.benchmark import timer

from repro.errors import UserError
from repro.files import write_atomic
from repro.run.run import environment

Rows = list[dict[str, Any]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def names_in(only: str, known: Iterable[str]) -> list[str]:
    """The names of a comma-separated `--only`; a UserError where one is not known."""
    names = only.split(",")
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--only: unknown name {unknown[0]!r}; there are {', '.join(known)}")
    return names


def alternate_ms(
    functions: Mapping[str, Callable[[], object]], *, rounds: int = 5, clock: Callable[[], float] = timer
) -> dict[str, float]:
    """Median time in ms of each function, taken in turns so that a slow minute of the machine hits all of them."""
    for function in functions.values():  # to warm up
        function()
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = clock()
            function()
            taken[name].append((clock() - start) * 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def has_bfloat16() -> bool:
    """Whether products in bfloat16 are done in hardware here, not emulated."""
    return torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()


def product_gflops(n: int = 2048) -> float:
    """This machine's rate of large float32 products, in 10^9 operations a second."""
    a = torch.randn(n, n, device=DEVICE)
    return 2 * n**3 / alternate_ms({"product": lambda: a @ a})["product"] / 1e6


def peak_extra_mb(function: Callable[[], object]) -> float:
    """Largest memory that `function` takes beyond what was there before, in MiB.

    On a GPU: the allocator's peak. On a CPU: the kernel's own peak of the resident size, of a second call in a process
    of its own (the first one loads code and starts what lasts), with all free memory given back in between.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        torch.set_num_threads(1)  # a forked process must not use the parent's thread pool
        function()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the present size
        before = psutil.Process().memory_info().rss
        function()
        sender.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before / 2**20)

    process = context.Process(target=child)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the measured process ended with exit code {process.exitcode}")
    return float(receiver.recv())


def goal(name: str, value: float, target: float, *, at_least: bool) -> dict[str, Any]:
    """One line of the table of goals."""
    met, sign = (value >= target, "≥") if at_least else (value <= target, "≤")
    return {"goal": name, "target": f"{sign} {target:g}", "reached": float(f"{value:.4g}"), "met": met}


def report(name: str, rows: Rows, goals: Rows, path: str | None) -> None:
    """Print measurements and goals; write them with the environment to the JSON file `path`, if it is given."""
    print(pd.DataFrame(rows).to_string(index=False, na_rep="", float_format=lambda v: f"{v:.4g}"))
    if goals:
        print("\n" + pd.DataFrame(goals).to_string(index=False))
        print(f"\n{sum(g['met'] for g in goals)} of {len(goals)} goals met")
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        content = {
            "benchmark": name,
            "command": shlex.join(["python", *sys.orig_argv[1:]]),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(),
            "load_average": psutil.getloadavg()[0],
            "rows": rows,
            "goals": goals,
        }
        write_atomic(Path(path), (json.dumps(content, indent=1) + "\n").encode())
        print(f"written: {path}")
