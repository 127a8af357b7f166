"""Records of finished runs, read back: one JSON file or line each, one row of a DataFrame each."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from repro.config import LOCATION_FIELDS
from repro.errors import UserError

REQUIRED = ("experiment", "protocol", "selection", "metrics", "config")
# What differs between two runs of the same cell that computed the same numbers.
_CIRCUMSTANCES = ("seconds", "peak_rss_mb", "peak_cuda_mb", "command", "environment", "finished")


def check_record(record: Any, where: str) -> dict[str, Any]:
    """The record, if it is one.

    Raises:
        UserError: a required part is missing or of the wrong type.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a run's record (a {type(record).__name__}, not a mapping)")
    missing = [name for name in REQUIRED if name not in record]
    if missing:
        raise UserError(f"{where}: not a run's record: {', '.join(missing)} missing")
    for name in ("metrics", "config"):
        if not isinstance(record[name], dict):
            raise UserError(f"{where}: damaged record: {name} is no mapping")
    return record


def find_records(places: Iterable[str | Path]) -> list[Path]:
    """Record files in folders (searched to any depth), named files, and glob patterns.

    Raises:
        UserError: a place holds none.
    """
    found: dict[Path, None] = {}
    for place in places:
        here = [Path(p) for p in sorted(glob.glob(str(place), recursive=True))]
        files: list[Path] = []
        for path in here:
            if path.is_dir():
                files += sorted([*path.rglob("record.json"), *path.rglob("records.jsonl")])
            else:
                files.append(path)
        if not files:
            raise UserError(f"{place}: no record.json or records.jsonl there")
        found.update(dict.fromkeys(files))
    return list(found)


def iterate_records(places: Iterable[str | Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) for each run's record; a `.jsonl` file holds one a line.

    Raises:
        UserError: a file cannot be read, or is not a record.
    """
    for path in find_records(places):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        lines = path.suffix == ".jsonl"
        parts = [(f"{path}:{n}", part) for n, part in enumerate(text.splitlines(), 1)] if lines else [(str(path), text)]
        for where, part in parts:
            if lines and not part.strip():
                continue
            try:
                record = json.loads(part)
            except ValueError as error:
                raise UserError(f"{where}: damaged record: {error}") from error
            yield where, check_record(record, where)


def load_records(places: str | Path | Sequence[str | Path]) -> pd.DataFrame:
    """One row per record.

    Args:
        places: folders, files or glob patterns.

    Returns:
        Columns `config.<field>`, `metrics.<name>` (fractions) and the record's other plain values by their own name;
        `path` tells where each was read.

    Raises:
        UserError: nothing there, or a damaged record.
    """
    rows = []
    for where, record in iterate_records([places] if isinstance(places, (str, Path)) else places):
        row: dict[str, Any] = {"path": where}
        for name, value in record.items():
            if name in ("config", "metrics"):
                row |= {f"{name}.{key}": _number(inner) for key, inner in value.items()}
            elif name not in ("environment",):
                row[name] = value
        rows.append(row)
    if not rows:
        raise UserError(
            f"{places}: only summaries of several seeds are there, none of their runs: name the folder above"
        )
    return pd.DataFrame(rows)


def comparable(record: dict[str, Any]) -> dict[str, Any]:
    """What two runs of the same cell must agree in: the record without times, machine and folders."""
    kept = {name: value for name, value in record.items() if name not in _CIRCUMSTANCES}
    kept["config"] = {name: value for name, value in record["config"].items() if name not in LOCATION_FIELDS}
    return kept


def _number(value: Any) -> Any:
    """NaN and infinities, which a record holds as strings, as numbers again."""
    return float(value) if value in ("nan", "inf", "-inf") else value
