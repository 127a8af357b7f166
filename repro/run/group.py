"""Runs of one cell that differ in their seed, in one folder: X/seed0, X/seed1, ..., summed up in X/record.json.

Each seed's folder is an ordinary run. The summary tells a sweep that the cell is done; it is no run of its own, and
tables and figures read the runs themselves.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from repro.errors import Interrupted, UserError
from repro.run.run import SCHEMA, Run, environment, plain, readable

SHARED = ("experiment", "protocol", "selection", "parameters")  # the same in every run of a cell


class SeedGroup(Run):
    """The folder of several seeds' runs, held by a lock; its `config` has a field `seeds`.

    Example:
        ```
        with SeedGroup(config.output_dir, "gnn", config) as group:
            for folder, single in zip(group.folders, singles):
                with Run(folder, "gnn", single) as run:
                    ...
                group.leave_if_asked(run)
            group.summarize()
        ```
    """

    @property
    def folders(self) -> list[Path]:
        """One per seed, in the order of the seeds."""
        return [self.folder / f"seed{seed}" for seed in self.config.seeds]

    @property
    def trained(self) -> bool:
        """True when every run's record is there."""
        return all((folder / "record.json").exists() for folder in self.folders)

    @property
    def done(self) -> bool:
        """True when the summary and every run's record are there."""
        return super().done and self.trained

    def leave_if_asked(self, run: Run | None = None) -> None:
        """Leave when a stop was asked for between two runs, or in `run` after its last checkpoint.

        Raises:
            Interrupted: it was.
        """
        signum = self.stop_signal if run is None or run.stop_signal is None else run.stop_signal
        if signum is not None:
            print(f"stopped between two seeds of {self.folder}; the same command goes on", file=sys.stderr)
            raise Interrupted(signum)

    def summarize(self) -> dict[str, Any]:
        """Write the summary: every metric's values by seed, their mean and sample standard deviation (None for one).

        Raises:
            UserError: a record is damaged.
        """
        records = [read_record(folder) for folder in self.folders]
        values = {name: [float(record["metrics"][name]) for record in records] for name in records[0]["metrics"]}
        summary = {
            "schema": SCHEMA,
            **{name: records[0][name] for name in SHARED if name in records[0]},
            "metrics": {name: statistics.fmean(v) for name, v in values.items()},
            "std": {name: statistics.stdev(v) if len(v) > 1 else None for name, v in values.items()},
            "values": values,
            "seeds": list(self.config.seeds),
            "runs": [folder.name for folder in self.folders],
            "seconds": round(sum(record["seconds"] for record in records), 3),
            "peak_rss_mb": max(record["peak_rss_mb"] for record in records),
            "command": shlex.join(["python", *readable(sys.orig_argv[1:])]),
            "environment": environment(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._write_json("record.json", plain(summary))
        return summary


def told(summary: dict[str, Any], metric: str) -> str:
    """The summary in one line: the metric of each seed, their mean and spread."""
    each = [f"seed {seed} {value:.4f}" for seed, value in zip(summary["seeds"], summary["values"][metric], strict=True)]
    std = summary["std"][metric]
    spread = "" if std is None else f" ± {std:.4f}"
    return f"{metric.replace('_', ' ')}: {', '.join(each)}; mean {summary['metrics'][metric]:.4f}{spread}"


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a finished run.

    Raises:
        UserError: it is damaged.
    """
    path = folder / "record.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {**record, "metrics": dict(record["metrics"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged record ({error}): delete it to run that seed again") from error
