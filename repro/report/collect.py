"""Gather a sweep's records in one file: `python -m repro.report.collect --records RUNS --output FILE.jsonl`.

A run's metrics.jsonl is packed into its line as `curve`, thinned to 40 epochs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repro.config import parse_config
from repro.errors import run_main
from repro.files import write_atomic
from repro.report.records import curve_of, iterate_records


@dataclass
class Config:
    """What to gather, and where to."""

    records: str
    """folder of runs, record file or glob pattern"""
    output: str
    """file with one record a line, in the order of the commands, read as a folder is"""


def thin(curve: dict[str, list[Any]], points: int = 40) -> dict[str, list[Any]]:
    """At most so many epochs of a curve, evenly chosen with the last among them, to four digits; numbers only."""
    epochs = len(curve["epoch"])
    kept = sorted({round(i * (epochs - 1) / (points - 1)) for i in range(points)}) if epochs > points else range(epochs)
    numbers = {
        name: values for name, values in curve.items() if all(v is None or isinstance(v, (int, float)) for v in values)
    }
    return {
        name: [None if (v := values[i]) is None or v != v else float(f"{v:.4g}") for i in kept]
        for name, values in numbers.items()
    }


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(Config, argv, prog="python -m repro.report.collect", description=__doc__ or "")
    records = []
    for where, record in iterate_records(config.records, as_written=True):
        curve = curve_of(where, record.get("curve"))
        records.append(record | ({"curve": thin(curve)} if curve else {}))
    records.sort(key=lambda record: str(record.get("command", "")))
    lines = [json.dumps(record) for record in records]
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, "".join(line + "\n" for line in lines).encode())
    print(f"{len(lines)} records: {output}")


if __name__ == "__main__":
    run_main(main)
