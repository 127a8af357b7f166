"""A Markdown table of a benchmark's JSON file: `python -m benchmarks.table --file results/benchmarks/layer.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from repro.config import parse_config
from repro.errors import UserError, run_main
from repro.report.tables import markdown_table


@dataclass
class Config:
    """What to print."""

    file: str
    """JSON file written by a benchmark"""
    goals: bool = False
    """the goals instead of the measurements"""


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table, numbers with three significant digits."""

    def cell(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
        return str(value)

    columns = list(dict.fromkeys(key for row in rows for key in row))
    texts = [[cell(row.get(column)) for column in columns] for row in rows]
    return markdown_table(pd.DataFrame(texts, columns=columns)).rstrip()


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(Config, argv, prog="benchmarks.table", description=__doc__ or "")
    path = Path(config.file)
    if not path.is_file():
        raise UserError(f"--file {path}: no such file")
    content = json.loads(path.read_text(encoding="utf-8"))
    print(markdown(content["goals"] if config.goals else content["rows"]))
    env = content["environment"]
    print(f"\n{env['device']}, {env['threads']} threads, torch {env['versions']['torch']}; `{content['command']}`")


if __name__ == "__main__":
    run_main(main)
