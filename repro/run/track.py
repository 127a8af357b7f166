"""Whether a run is done, the stop that its processes agree on, and `--report_to tensorboard|wandb|trackio|mlflow`.

Trackers get what metrics.jsonl gets, through accelerate's classes; none is a dependency, and none is imported unless it
is asked for. Nor is torch, so that a sweep can ask whether a run is done in no time.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from repro.errors import UserError

NONE = "none"
STEP_NAMES = ("step", "epoch")  # the first of these in a line of metrics is its place on the tracker's axis


def is_done(folder: Path) -> bool:
    """True when the run's record.json is there.

    Raises:
        UserError: record.json is damaged.
    """
    path = folder / "record.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged record ({error}): delete it to run the cell again") from error
    if not isinstance(record, dict) or "metrics" not in record:
        raise UserError(f"{path}: not a run's record: delete it to run the cell again")
    return True


def any_process(flag: bool) -> bool:
    """True on every process of a distributed run when `flag` is True on one of them; collective, on gloo or nccl."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not (distributed.is_available() and distributed.is_initialized()):
        return flag
    import torch

    # Other back ends ("cpu:gloo,cuda:nccl" among them) take tensors of the CPU.
    found = torch.tensor(int(flag), device="cuda" if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
    return bool(found.item())


class Trackers:
    """The trackers of one run; those of `--report_to none` do nothing.

    Args:
        names: comma-separated, or "none".

    Raises:
        UserError: accelerate or a tracker's package is not installed, or accelerate does not know the name.
    """

    def __init__(self, names: str) -> None:
        self._names = [] if names == NONE else [name.strip() for name in names.split(",")]
        self._open: list[Any] = []
        if not self._names:
            return
        try:
            from accelerate import tracking
        except ImportError as error:
            raise UserError(f"--report_to {names} needs accelerate: pip install accelerate") from error
        installed = sorted(str(kind) for kind in tracking.get_available_trackers())
        if missing := [name for name in self._names if name not in installed]:
            found = ", ".join(installed) or "none"
            raise UserError(f"--report_to {', '.join(missing)}: not installed (found: {found}); pip install it")
        self._classes = [tracking.LOGGER_TYPE_TO_CLASS[name] for name in self._names]

    def start(self, project: str, folder: Path, config: Any) -> None:
        """Open the trackers, in the run's folder where they write files, and pass them the settings."""
        if not self._names:
            return
        from accelerate import PartialState

        PartialState()  # accelerate's trackers ask it which process is the main one
        plain = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in dataclasses.asdict(config).items()
        }
        for kind in self._classes:
            tracker = kind(project, str(folder)) if kind.requires_logging_directory else kind(project)
            tracker.start()
            tracker.store_init_configuration(plain)
            self._open.append(tracker)

    def log(self, values: dict[str, Any]) -> None:
        """Pass on one line of metrics.jsonl."""
        step = next((int(values[name]) for name in STEP_NAMES if name in values), None)
        for tracker in self._open:
            tracker.log({k: v for k, v in values.items() if isinstance(v, (int, float, str))}, step=step)

    def finish(self) -> None:
        """Close them."""
        for tracker in self._open:
            tracker.finish()
        self._open = []
