"""How long runs took, and in how much memory, as a sentence: it stands in a README beside the command of such a run.

Example: python -m repro.report.times results/quickstart/records.jsonl
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from repro.config import parse_config
from repro.errors import UserError, run_main
from repro.report.cells import select_runs
from repro.report.records import RecordsConfig, load_records, records_flag


@dataclass
class Config(RecordsConfig):
    """Which runs."""

    where: dict[str, Any] = field(default_factory=dict)
    """Keep only runs whose fields have these values: `--where '{data: cora}'`."""


def sentence(frame: pd.DataFrame) -> str:
    """Number of runs, seconds of each and together, memory, machine and commit."""
    for name in ("seconds", "peak_rss_mb", "environment"):
        if (missing := frame[name].isna() if name in frame else frame["path"].notna()).any():
            raise UserError(f"{frame['path'][missing].iloc[0]}: the record has no {name}")
    seconds = pd.to_numeric(frame["seconds"])
    low, high = duration(seconds.min()), duration(seconds.max())
    each = low if low == high else f"{low} to {high} each"
    together = f", {duration(seconds.sum())} together" if len(frame) > 1 else ""
    machines = dict.fromkeys(machine(environment) for environment in frame["environment"])
    commits = dict.fromkeys(str(environment.get("commit"))[:12] for environment in frame["environment"])
    return (
        f"{len(frame)} run{'s' * (len(frame) > 1)}: {each}{together}, {pd.to_numeric(frame['peak_rss_mb']).max():,.0f} "
        f"MB of memory at most; {' and '.join(machines)}; as recorded at {', '.join(commits)}."
    )


def machine(environment: dict[str, object]) -> str:
    """`cpu, 1 thread`, or the GPU's name."""
    device, threads = str(environment.get("device")), environment.get("threads")
    return f"{device}, {threads} thread{'s' * (threads != 1)}" if device == "cpu" else device


def duration(seconds: float) -> str:
    """In seconds, minutes or hours, to two or three digits."""
    length, unit = next(((n, unit) for n, unit in ((3600, "h"), (60, "min")) if seconds >= 1.5 * n), (1, "s"))
    value = seconds / length
    return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    words = records_flag(argv)
    config = parse_config(Config, words, prog="python -m repro.report.times", description=__doc__ or "")
    print(sentence(select_runs(load_records(config.records), config.where)))


if __name__ == "__main__":
    run_main(main)
