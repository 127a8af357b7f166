"""Gather a sweep's records in one file: `python -m repro.report.collect --records RUNS --output FILE.jsonl`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from repro.config import parse_config
from repro.errors import run_main
from repro.files import write_atomic
from repro.report.records import iterate_records


@dataclass
class Config:
    """What to gather, and where to."""

    records: str
    """folder of runs, record file or glob pattern"""
    output: str
    """file with one record a line, in the order of the commands, read as a folder is"""


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(Config, argv, prog="python -m repro.report.collect", description=__doc__ or "")
    records = [record for _, record in iterate_records(config.records, as_written=True)]
    records.sort(key=lambda record: str(record.get("command", "")))
    lines = [json.dumps(record) for record in records]
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, "".join(line + "\n" for line in lines).encode())
    print(f"{len(lines)} records: {output}")


if __name__ == "__main__":
    run_main(main)
