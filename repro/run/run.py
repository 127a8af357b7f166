"""One run is one folder: args.yaml, env.json, metrics.jsonl, checkpoints, and record.json, written last.

record.json's presence means *done*. The same command again resumes from the last checkpoint, or says that it is done.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import json
import math
import os
import platform
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import IO, Any, TypeVar

import numpy as np
import torch
import yaml

from repro.checkpoint import load_checkpoint, save_checkpoint
from repro.config import LOCATION_FIELDS, RunConfig, load_yaml, to_yaml
from repro.errors import Interrupted, UserError
from repro.files import write_atomic
from repro.run.track import NONE, Trackers, any_process, is_done

SCHEMA = 2
_PACKAGES = (
    "torch", "numpy", "torch_geometric", "transformers", "datasets", "timm", "accelerate", "torchvision", "lightly",
    "scikit-learn",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """What a number depends on besides its config: commit, versions, device, threads."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": _versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)),
        "platform": platform.platform(),
    }


@functools.cache
def _versions() -> dict[str, str]:
    installed = {name: list(metadata.distributions(name=name)) for name in _PACKAGES}
    return {name: found[0].version for name, found in installed.items() if found}


@functools.cache
def _commit() -> str | None:
    """Commit of the code that runs, with `-dirty` when tracked files differ; None outside a checkout."""
    here = Path(__file__).parent
    try:
        line = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return line.stdout.strip()


_commit()  # asked now, when the code is imported: what is committed during a run, or before a fork, is not what runs


def peak_rss_mb() -> float:
    """Largest resident size of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


Setup = TypeVar("Setup")


def train_cell(
    experiment: str, config: RunConfig, prepare: Callable[[Any], Setup], train: Callable[[Setup, Run], None]
) -> None:
    """Train in one process what `prepare` makes of the settings; the folder ends with a record.json.

    Bad input is refused by `prepare`, before the folder is made. A finished run needs none.
    """
    finished = is_done(Path(config.output_dir))
    setup = None if finished else prepare(config)
    with Run(config.output_dir, experiment, config, report_to=config.report_to) as run:
        if setup is not None and not run.done:
            train(setup, run)


class Run:
    """The folder of one run, held by a lock while the `with` block lasts.

    Example:
        ```
        with Run(config.output_dir, "gnn", config) as run:
            if run.done:
                return
            start, state = run.restore() or (0, None)
            for epoch in range(start, config.epochs):
                ...
                run.log({"epoch": epoch, "loss": loss})
                run.checkpoint(epoch + 1, {"model": model.state_dict(), ...})   # also leaves here on SIGTERM
            run.finish({"test_accuracy": accuracy}, protocol="standard", selection="best validation epoch")
        ```

    Args:
        output_dir: the folder; made if missing.
        experiment: name of the sub-project, for the record.
        config: all settings.
        main: False in processes of rank > 0, which read and write nothing.
        report_to: trackers that get every line of metrics too ("tensorboard", "wandb,mlflow", ...).

    Raises:
        UserError: another process holds the folder, it belongs to a run with other settings, or it cannot be written.
    """

    def __init__(
        self, output_dir: str | Path, experiment: str, config: RunConfig, *, main: bool = True, report_to: str = NONE
    ) -> None:
        self.folder = Path(output_dir)
        self._checkpoints = self.folder / "checkpoints"
        self.experiment = experiment
        self.config = config
        self.main = main
        self.started = time.monotonic()
        self.previous_seconds = 0.0
        self._trackers = Trackers(report_to if main else NONE)
        self._lines = 0
        self._stop_signal: int | None = None
        self._agreed: bool | None = None
        self._lock: IO[str] | None = None
        self._handlers: dict[int, Any] = {}

    # -- entering and leaving ------------------------------------------------------------------------------------

    def __enter__(self) -> Run:
        if self.main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = open(self.folder / "lock", "w")
            except OSError as error:
                raise UserError(f"--output_dir {self.folder}: cannot be written ({error.strerror})") from error
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._check_same_config()
                self._remove_leftovers()
            except BaseException as error:
                self._lock.close()  # __exit__ is not called for a block that was never entered
                if isinstance(error, BlockingIOError):
                    raise UserError(f"--output_dir {self.folder}: another process is writing this run") from error
                raise
        for signum in (signal.SIGTERM, signal.SIGUSR2):
            self._handlers[signum] = signal.signal(signum, self._on_signal)
        if self.done and self.main:
            print(f"done already: {self.folder / 'record.json'} (delete the folder to run again)")
        elif self.main:
            self._write_json("env.json", environment())
            self._trackers.start(self.experiment, self.folder, self.config)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._trackers.finish()
        if self._lock is not None:
            self._lock.close()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._stop_signal = signum

    def _check_same_config(self) -> None:
        """A folder belongs to one config: a second one must not continue or overwrite it."""
        path = self.folder / "args.yaml"
        mine = yaml.safe_load(to_yaml(self.config))
        if not path.exists():
            write_atomic(path, to_yaml(self.config).encode())
            return
        theirs = load_yaml(path)
        if not isinstance(theirs, dict):
            raise UserError(f"{path}: not the settings of a run: delete the folder to run again")
        names = [k for k in {**theirs, **mine} if k not in LOCATION_FIELDS and theirs.get(k) != mine.get(k)]
        if names:
            differences = ", ".join(f"{k}={theirs.get(k)!r} there, {mine.get(k)!r} here" for k in names[:3])
            raise UserError(
                f"--output_dir {self.folder} holds a run with other settings ({differences}): choose another"
            )

    def _remove_leftovers(self) -> None:
        """Remove what a process that was killed while it wrote has left; nobody else writes here (the lock)."""
        for name in ("args.yaml", "env.json", "metrics.jsonl", "record.json"):
            for path in self.folder.glob(f".{name}.*.tmp"):
                path.unlink(missing_ok=True)
        for path in [self._checkpoints] if self.done else self._checkpoints.glob(".tmp-*"):
            shutil.rmtree(path, ignore_errors=True)

    # -- during the run ------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """True when record.json is there."""
        return is_done(self.folder)

    @property
    def seconds(self) -> float:
        """Working time so far, over all the processes that shared in this run."""
        return self.previous_seconds + time.monotonic() - self.started

    @property
    def stop_requested(self) -> bool:
        """True after SIGTERM or SIGUSR2; `checkpoint` then saves and leaves. Several processes: `agree_to_stop`."""
        return self._stop_signal is not None

    def agree_to_stop(self) -> bool:
        """True on every process when any of them was asked to stop; collective: call it at the same step everywhere.

        From then on `checkpoint` leaves when the last answer was True, not when this process alone got a signal.
        """
        self._agreed = any_process(self.stop_requested)
        return self._agreed

    def log(self, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if not self.main:
            return
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(plain(values)) + "\n")
        self._lines += 1
        self._trackers.log(plain(values))

    def restore(self) -> tuple[int, Any] | None:
        """(step, state) of the last whole checkpoint, or None; metrics.jsonl is cut back to that step."""
        found = load_checkpoint(self._checkpoints)
        self._lines = found[1]["lines"] if found else 0
        if self.main:
            path = self.folder / "metrics.jsonl"
            if path.exists():
                kept = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[: self._lines]
                write_atomic(path, "".join(kept).encode())
            if found:
                print(f"resuming from step {found[0]} of {self.folder}")
        if found is None:
            return None
        self.previous_seconds = found[1]["seconds"]
        self.started = time.monotonic()
        return found[0], found[1]["state"]

    def checkpoint(self, step: int, state: Any) -> None:
        """Save the state at the end of `step`; leaves with `Interrupted` when a stop was asked for."""
        if self.main:
            tree = {"lines": self._lines, "seconds": self.seconds, "state": state}
            save_checkpoint(self._checkpoints, step, tree)
        if self.stop_requested if self._agreed is None else self._agreed:
            if self.main:
                print(f"stopped at step {step}; re-running the command resumes", file=sys.stderr)
            raise Interrupted(self._stop_signal or signal.SIGTERM)

    # -- the end -------------------------------------------------------------------------------------------------

    def finish(self, metrics: dict[str, Any], *, protocol: str, selection: str, **extra: Any) -> dict[str, Any]:
        """Write record.json, then drop the checkpoints.

        Args:
            metrics: the final numbers, fractions rather than percent.
            protocol: how they were measured; a table never mixes two.
            selection: the rule that chose what is reported ("last epoch", "best validation accuracy", ...).
            **extra: anything else worth keeping (parameters, best epoch, ...).
        """
        record = {
            "schema": SCHEMA,
            "experiment": self.experiment,
            "cell": plain(self.config.label()),
            "execution_fields": list(self.config.EXECUTION_FIELDS),
            "protocol": protocol,
            "selection": selection,
            "metrics": plain(metrics),
            "seed": self.config.seed,
            "config": plain(yaml.safe_load(to_yaml(self.config))),
            **plain(extra),
            "seconds": round(self.seconds, 3),
            "peak_rss_mb": round(peak_rss_mb(), 1),
            "command": shlex.join(["python", *readable(sys.orig_argv[1:])]),
            "environment": environment(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if torch.cuda.is_available():
            record["peak_cuda_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
        if self.main:
            self._write_json("record.json", record)
            shutil.rmtree(self._checkpoints, ignore_errors=True)
        return record

    def _write_json(self, name: str, value: Any) -> None:
        write_atomic(self.folder / name, (json.dumps(value, indent=1) + "\n").encode())


def readable(argv: list[str]) -> list[str]:
    """The command line without the machine's own paths: a script's path becomes relative to the repository."""
    root = str(Path(__file__).resolve().parents[2]) + os.sep
    return [a.replace(root, "") for a in argv]


def plain(value: Any) -> Any:
    """Tensors and NumPy values become numbers; NaN and infinities, which JSON lacks, become strings."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
